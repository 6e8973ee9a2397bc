"""A grid that looks at its results more than once keeps the chance of an error."""

import pytest

from cora_cli.reporting.outcomes import BETTER, UNDECIDED, decide, level_at
from cora_cli.reporting.statistics import LEVEL, SEEDS, Difference


def found(seeds: int, p_value: float) -> Difference:
    return Difference(0.1, p_value, SEEDS, 40, (seeds, seeds), True, 0.0, 0.0, 0.0, (seeds, seeds))


@pytest.mark.parametrize("looks", [1, 2, 3, 8])
def test_the_levels_of_all_looks_add_up(looks: int) -> None:
    assert sum(level_at(3 + look, looks) for look in range(looks)) == pytest.approx(LEVEL)


def test_an_early_look_needs_a_smaller_p_value() -> None:
    def outcome(seeds: int, p_value: float, looks: int | None) -> str:
        return decide([("rouge1", found(seeds, p_value), None, "")], looks)[0].outcome

    assert outcome(3, 0.02, None) == BETTER
    assert outcome(3, 0.02, 3) == UNDECIDED
    assert outcome(3, 0.009, 3) == BETTER
    assert outcome(5, 0.02, 3) == BETTER
    assert outcome(5, 0.04, 3) == UNDECIDED
