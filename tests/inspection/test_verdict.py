"""The verdict follows from the numbers by its printed rule."""

import pytest

from cora_cli.inspection.measure import BASE, CEILING, CHANCE, OWN, PAPER, POOLED, START, WEIGHTS, Capture, Findings, Overlap
from cora_cli.inspection.verdict import RULE, judge


def findings(ways: dict[str, float], own: float = 0.1, of_base: float = 0.99, start: float | None = None) -> list[Findings]:
    """One matrix whose captures lie so far on the way from the better control to the ceiling of 0.8."""
    control = max(own, 0.05)
    known = {} if start is None else {START: start}
    captures = tuple(
        Capture(name, {POOLED: control + way * (0.8 - control), OWN: own, CHANCE: 0.05, CEILING: 0.8, PAPER: own, **known})
        for name, way in ways.items()
    )
    overlaps = tuple(Overlap(WEIGHTS, name, BASE, of_base, 0.05, (0.0, 1.0, 2.0)) for name in ways)
    return [Findings("layers.0.q_proj", "q_proj", 0, (20, 20), 1, dict.fromkeys(ways, 0.1), overlaps, captures, None)]


@pytest.mark.parametrize(
    ("least", "headline"),
    [
        (0.51, "There is a common subspace:"),
        (0.49, "There is a common subspace in part:"),
        (0.11, "There is a common subspace in part:"),
        (0.09, "No common subspace is shown:"),
        (-0.2, "No common subspace is shown:"),
    ],
)
@pytest.mark.parametrize(("own", "start"), [(0.01, None), (0.3, None), (0.3, 0.2), (0.3, 0.34)])
def test_the_least_share_of_the_way_over_the_models_decides(least, headline, own, start):
    found = judge(findings({"a": 0.9, "b": least, "c": 0.7}, own, start=start), ["a", "b", "c"], True, None)
    assert found.headline.startswith(headline)
    assert f"{least:.0%} (b) to 90%" in found.headline
    assert found.ways == pytest.approx({"a": 0.9, "b": least, "c": 0.7})
    for percent in ("50%", "10%", "90%"):
        assert percent in RULE


def test_what_rounds_to_nothing_has_no_sign():
    found = judge(findings({"a": -0.004, "b": 0.004, "c": 0.001}), ["a", "b", "c"], True, None)
    assert "change 0% (a) to 0% of the way" in found.headline


def test_a_start_in_common_leaves_nothing_to_be_said():
    found = judge(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.3, start=0.36), ["a", "b", "c"], True, None)
    assert found.headline.startswith("Nothing can be said on a common subspace: the models are adapters that began")
    assert "up to 12% of the way" in found.headline


def test_two_models_no_base_or_no_models_say_nothing():
    two = judge(findings({"a": 0.9, "b": 0.9}), ["a", "b", "the base again"], True, None).headline
    assert "at least 3 models that differ from the base; of the 3 given here 2 do" in two
    assert "needs --base" in judge([], ["a", "b"], False, None).headline
    assert "no models were given" in judge([], [], True, None).headline


@pytest.mark.parametrize(("overlap", "said"), [(0.95, "are the base model's own:"), (0.85, "are not simply the base")])
def test_the_weights_subspaces_are_compared_with_the_bases(overlap, said):
    found = judge(findings({"a": 0.9, "b": 0.9, "c": 0.9}, of_base=overlap), ["a", "b", "c"], True, None)
    assert said in found.sentences[0]
    assert "capture 10.0% of a left-out change, the base model's own 10.0%, chance 5.0%" in found.sentences[0]
