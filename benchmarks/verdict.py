"""Measures the verdict of `cora report`: size, power and coverage over seeds, seed deviations and records.

    python benchmarks/verdict.py --families 2000      # the table of docs/verdict.md: 25 minutes on a busy core

Each simulated family has 14 independent tests of a held-out loss. A record's tokens and nats are drawn, then read by the functions that the
report calls: `pseudo_values`, `crossed`, `p_value`, `interval` (`covered`), `holm` and MIN_SEEDS.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from cora_cli.crossed import Crossed, crossed, pseudo_values
from cora_cli.render.markdown_table import markdown_table
from cora_cli.reporting.measures import LOSS, value_function
from cora_cli.reporting.statistics import LEVEL, MIN_SEEDS, holm

SEEDS, DEVIATIONS, RECORDS = (1, 2, 3, 5, 10), (0.0, 0.004, 0.008, 0.016), (40, 200, 1000)
TESTS = 14
EFFECT = 0.02
"""The true difference for the power, in nats per token: about a twentieth of what training gains in the demo."""
# The differences between the demo's adapters on its 48 records: 0.04 nats per token; contributions with a skewness of up to 1.2 and an
# excess kurtosis of up to 2.5; 44 ± 16 tokens. Records of gamma shape 6 and these token counts give contributions of 1.0 and about 2.7.
RECORD_DEVIATION, INTERACTION_DEVIATION, SHAPE = 0.04, 0.02, 6.0
TOKENS, TOKEN_SHAPE = 44.0, 7.5
_BLOCK = 1_500_000


@dataclasses.dataclass
class Cell:
    """What was counted in one cell of the table."""

    families: int = 0
    wrong: int = 0
    unguarded: int = 0
    covered: int = 0
    found: int = 0

    def row(self) -> list[str]:
        """Family-wise error, the same without the minimum of seeds, coverage, and power, in per cent."""
        tests = self.families * TESTS
        return [
            f"{100 * self.wrong / self.families:.1f}",
            f"{100 * self.unguarded / self.families:.1f}",
            f"{100 * self.covered / tests:.1f}",
            f"{100 * self.found / tests:.0f}",
        ]


def draw(generator: np.random.Generator, tests: int, seeds: int, deviation: float, records: int, shape: float) -> Crossed:
    """Independent comparisons (tests,) of two methods without a true difference, paired over seeds."""
    tokens = np.round(generator.gamma(TOKEN_SHAPE, TOKENS / TOKEN_SHAPE, (tests, 1, records))) + 1
    record = (generator.gamma(shape, 1, (tests, 1, records)) - shape) / np.sqrt(shape)
    difference = RECORD_DEVIATION * record * generator.choice([-1.0, 1.0], (tests, 1, 1))
    difference = difference + deviation * generator.standard_normal((tests, seeds, 1))
    difference = difference + INTERACTION_DEVIATION * generator.standard_normal((tests, seeds, records))
    statistics = np.stack([tokens * difference, np.broadcast_to(tokens, difference.shape)], axis=-1)
    return crossed([pseudo_values(statistics, value_function(LOSS))])


def blocks(families: int, seeds: int, records: int) -> Iterator[int]:
    """Numbers of families that are simulated at once."""
    most = max(1, _BLOCK // (TESTS * seeds * records))
    while families > 0:
        yield min(most, families)
        families -= most


def simulate(seeds: int, deviation: float, records: int, families: int, shape: float, stream: int) -> Cell:
    """One cell of the table."""
    generator = np.random.default_rng([seeds, round(1000 * deviation), records, stream])
    cell = Cell()
    for count in blocks(families, seeds, records):
        found = draw(generator, count * TESTS, seeds, deviation, records, shape)
        null, effect = (found.p_value(at).reshape(count, TESTS) for at in (0.0, -EFFECT))
        wrong = sum(min(holm(list(family))) < LEVEL for family in null)
        decides = seeds >= MIN_SEEDS
        cell.families += count
        cell.unguarded += wrong
        cell.wrong += decides * wrong
        cell.found += decides * sum(p < LEVEL for family in effect for p in holm(list(family)))
        cell.covered += int(found.covered(0.0, 0.95).sum())
    return cell


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000, help="simulated families per cell")
    parser.add_argument("--shape", type=float, default=SHAPE, help="gamma shape of the records; their skewness is 2/√shape")
    parser.add_argument("--stream", type=int, default=0, help="seed of the simulation; another one gives independent draws")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="numbers of training seeds")
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS, help="numbers of records")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    for seeds in options.seeds:
        for deviation in DEVIATIONS:
            cells = [
                simulate(seeds, deviation, records, options.families, options.shape, options.stream)
                for records in options.records
            ]
            rows.append(
                [
                    str(seeds),
                    f"{deviation:g}",
                    *(text for column in zip(*(c.row() for c in cells), strict=True) for text in column),
                ]
            )
    names = ("error", "error without minimum", "coverage", "power")
    print(markdown_table(["seeds", "seed deviation", *(f"{name}, {n}" for name in names for n in options.records)], rows))
    print(
        f"\n{options.families} families of {TESTS} tests per cell, in per cent; records of skewness {2 / options.shape**0.5:.2f}; power at a "
        f"difference of {EFFECT:g} nats. Standard error: {100 * (0.05 * 0.95 / options.families) ** 0.5:.1f} for an error of 5, "
        f"{100 * (0.05 * 0.95 / options.families / TESTS) ** 0.5:.2f} for a coverage of 95. {time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    main()
