"""Measures the verdict of `cora report`: size, power and coverage over seeds, seed deviations and records.

    python benchmarks/verdict.py --families 2000      # the table of docs/verdict.md: 25 minutes on a busy core
    python benchmarks/verdict.py --looks --seeds 5    # a grid with `confirm` that looks after 3, 4 and 5 seeds

Each simulated family has 14 independent tests of a held-out loss. A record's tokens and nats are drawn, then read by the functions that the
report calls: `pseudo_values`, `crossed`, `p_value`, `interval` (`covered`), `holm` and MIN_SEEDS.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cora_cli.crossed import Floats, crossed, pseudo_values
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.render.markdown_table import markdown_table
from cora_cli.reporting.measures import LOSS, value_function
from cora_cli.reporting.outcomes import level_at
from cora_cli.reporting.statistics import LEVEL, holm

SEEDS, DEVIATIONS, RECORDS = (1, 2, 3, 5, 10), (0.0, 0.004, 0.008, 0.016), (40, 200, 1000)
TESTS = 14
EFFECT = 0.02
"""The true difference for the power, in nats per token: about a twentieth of what training gains in the demo."""
MARGIN = 0.038
"""The margin of equivalence: a tenth of what training gains in the demo."""
Bools = NDArray[np.bool_]
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


def draw(generator: np.random.Generator, tests: int, seeds: int, deviation: float, records: int, shape: float) -> Floats:
    """Contributions (tests, seeds, records) of independent comparisons of two methods without a true difference, paired over seeds."""
    tokens = np.round(generator.gamma(TOKEN_SHAPE, TOKENS / TOKEN_SHAPE, (tests, 1, records))) + 1
    record = (generator.gamma(shape, 1, (tests, 1, records)) - shape) / np.sqrt(shape)
    difference = RECORD_DEVIATION * record * generator.choice([-1.0, 1.0], (tests, 1, 1))
    difference = difference + deviation * generator.standard_normal((tests, seeds, 1))
    difference = difference + INTERACTION_DEVIATION * generator.standard_normal((tests, seeds, records))
    statistics = np.stack([tokens * difference, np.broadcast_to(tokens, difference.shape)], axis=-1)
    return pseudo_values(statistics, value_function(LOSS))


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
        found = crossed([draw(generator, count * TESTS, seeds, deviation, records, shape)])
        null, effect = (found.p_value(at).reshape(count, TESTS) for at in (0.0, -EFFECT))
        wrong = sum(min(holm(list(family))) < LEVEL for family in null)
        decides = seeds >= MIN_SEEDS
        cell.families += count
        cell.unguarded += wrong
        cell.wrong += decides * wrong
        cell.found += decides * sum(p < LEVEL for family in effect for p in holm(list(family)))
        cell.covered += int(found.covered(0.0, 0.95).sum())
    return cell


@dataclasses.dataclass
class Stopped:
    """What was counted for grids that stop where nothing is undecided."""

    families: int = 0
    wrong: int = 0
    ever: int = 0
    covered: int = 0
    found: int = 0
    decided: int = 0
    seeds: int = 0

    def row(self) -> list[str]:
        """Error at the end, error at any look, coverage, power, tests decided without a difference (%), and their mean seeds."""
        tests = self.families * TESTS
        shares = (self.wrong / self.families, self.ever / self.families, self.covered / tests)
        return [
            *(f"{100 * share:.1f}" for share in shares),
            *(f"{100 * count / tests:.0f}" for count in (self.found, self.decided)),
            f"{self.seeds / tests:.2f}",
        ]


def stop_early(most: int, deviation: float, records: int, families: int, shape: float, stream: int) -> Stopped:
    """One cell of the table of looks: tests that are decided keep the data of that look, the others get one more seed."""
    generator = np.random.default_rng([most, round(1000 * deviation), records, stream, 1])
    cell = Stopped()
    for count in blocks(families, most, records):
        contributions = draw(generator, count * TESTS, most, deviation, records, shape)
        cell.families += count
        for effect in (0.0, EFFECT):
            looked = look(contributions + effect, most, effect)
            shown = looked.shown.reshape(count, TESTS)
            if effect:
                cell.found += int(shown.sum())
                continue
            cell.wrong += int(shown.any(axis=1).sum())
            cell.ever += int(looked.ever.reshape(count, TESTS).any(axis=1).sum())
            cell.covered += int(looked.covered.sum())
            cell.decided += int((looked.shown | looked.alike).sum())
            cell.seeds += int(looked.seeds.sum())
    return cell


@dataclasses.dataclass
class Looked:
    """The tests (tests,) after all looks: shown to differ at the end or at any look, equivalent, true value covered, seeds used."""

    shown: Bools
    ever: Bools
    alike: Bools
    covered: Bools
    seeds: Floats


def look(contributions: Floats, most: int, truth: float) -> Looked:
    """Look after MIN_SEEDS seeds and after each further one up to `most`, as the report of a growing grid does."""
    tests, looks = len(contributions), most - MIN_SEEDS + 1
    scaled, value = np.ones(tests), np.zeros(tests)
    state = Looked(
        np.zeros(tests, bool), np.zeros(tests, bool), np.zeros(tests, bool), np.zeros(tests, bool), np.full(tests, float(most))
    )
    running = np.ones(tests, bool)
    for seeds in range(MIN_SEEDS, most + 1):
        found, level = crossed([contributions[running, :seeds]]), level_at(seeds, looks)
        value[running] = contributions[running, :seeds].mean(axis=(1, 2))
        scaled[running] = np.minimum(1.0, found.p_value() * LEVEL / level)
        state.covered[running] = found.covered(truth, 0.95)
        outside = [~found.covered(end, 1 - 2 * level) for end in (-MARGIN, MARGIN)]
        state.alike[running] = outside[0] & outside[1] & (abs(value[running]) < MARGIN)
        corrected = np.concatenate([holm(list(family)) for family in scaled.reshape(-1, TESTS)])
        state.shown = corrected < LEVEL
        state.ever |= state.shown
        ends = running & (state.shown | state.alike)
        state.seeds[ends] = seeds
        running &= ~ends
        if not running.any():
            break
    state.alike &= ~state.shown
    return state


def print_looks(options: argparse.Namespace) -> None:
    """Print the table of grids that stop early."""
    rows = []
    for most in options.seeds:
        for deviation in DEVIATIONS:
            for records in options.records:
                cell = stop_early(most, deviation, records, options.families, options.shape, options.stream)
                rows.append([str(most), f"{deviation:g}", str(records), *cell.row()])
    names = ("error", "error at any look", "coverage", "power", "decided", "mean seeds")
    print(markdown_table(["most seeds", "seed deviation", "records", *names], rows))
    print(f"\n{options.families} families of {TESTS} tests per cell, in per cent; margin {MARGIN:g} nats.")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000, help="simulated families per cell")
    parser.add_argument("--shape", type=float, default=SHAPE, help="gamma shape of the records; their skewness is 2/√shape")
    parser.add_argument("--stream", type=int, default=0, help="seed of the simulation; another one gives independent draws")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="numbers of training seeds")
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS, help="numbers of records")
    parser.add_argument(
        "--looks", action="store_true", help="simulate grids that look after 3 seeds and after each further one"
    )
    options = parser.parse_args()
    if options.looks:
        print_looks(options)
        return
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
