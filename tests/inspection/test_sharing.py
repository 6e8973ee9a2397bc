"""The verdict follows from the numbers by its printed rule."""

import pytest

from cora_cli.inspection.measure import BASE, CEILING, CHANCE, OWN, PAPER, POOLED, START, WEIGHTS, Capture, Findings, Overlap
from cora_cli.inspection.sharing import RULE, judge


def findings(
    ways: dict[str, float], own: float = 0.1, of_base: float = 0.99, start: dict[str, float] | None = None, ceiling: float = 0.8
) -> list[Findings]:
    """One matrix whose captures lie so far on the way from the better control to the ceiling; `start` is of those models that have one."""
    control = max(own, 0.05)
    captures = tuple(
        Capture(
            name,
            {POOLED: control + way * (ceiling - control), OWN: own, CHANCE: 0.05, CEILING: ceiling, PAPER: own}
            | ({START: start[name]} if start and name in start else {}),
        )
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
@pytest.mark.parametrize(("own", "start"), [(0.01, None), (0.3, None), (0.3, {"a": 0.1}), (0.3, {"a": 0.12, "c": 0.06})])
def test_the_least_share_of_the_way_over_the_models_decides(least, headline, own, start):
    found = judge(findings({"a": 0.9, "b": least, "c": 0.7}, own, start=start), ["a", "b", "c"], True, None)
    assert found.headline.startswith(headline)
    assert f"{least:.1%} (b) to 90.0%" in found.headline
    assert found.ways == pytest.approx({"a": 0.9, "b": least, "c": 0.7})
    assert found.unjudged == {}
    for percent in ("50%", "10%", "90%", "5%"):
        assert percent in RULE


def test_what_rounds_to_nothing_has_no_sign():
    found = judge(findings({"a": -0.0004, "b": 0.0004, "c": 0.0001}), ["a", "b", "c"], True, None)
    assert "change 0.0% (a) to 0.0% of the way" in found.headline


def test_models_that_began_alike_are_not_judged_and_the_others_are():
    alike = {"a": 0.14, "b": 0.8}
    ways = {"a": 0.99, "b": 0.99, "c": 0.7, "d": 0.4, "e": 0.6}
    found = judge(findings(ways, own=0.3, start=alike), list(ways), True, None)
    assert found.headline.startswith("There is a common subspace in part:")
    assert "40.0% (d) to 70.0%" in found.headline
    assert found.ways.keys() == {"c", "d", "e"}
    assert (
        "a (began with directions that another one began with, and these alone come 12.0% of the way from chance)"
        in found.sentences[0]
    )
    assert (
        "b (began with directions that another one began with, and these alone come 100.0% of the way from chance)"
        in found.sentences[0]
    )
    few = judge(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.3, start=alike), ["a", "b", "c"], True, None)
    assert few.headline.startswith(
        "Nothing can be said on a common subspace: that needs at least 3 models to judge; of the 3 given here 1 can"
    )
    assert "these alone come 12.0% of the way from chance" in few.headline
    assert not any("Not judged" in sentence for sentence in few.sentences), "it is said once"


def test_a_model_whose_control_nearly_reaches_the_ceiling_is_not_judged():
    """A quotient of two rounding errors would decide."""
    found = judge(findings({"a": -1e9, "b": 0.8, "c": 0.7}, own=0.8 - 1e-13), ["a", "b", "c"], True, None)
    assert "of the 3 given here 0 can be judged" in found.headline
    assert "a, b, c (no way to go: the control holds 80.0% of the change, the ceiling 80.0%)" in found.headline
    barely = judge(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.75), ["a", "b", "c"], True, None)
    assert barely.headline.startswith("There is a common subspace:")


def test_a_model_that_began_with_a_lost_basis_is_not_judged():
    ways = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    found = judge(findings(ways), list(ways), True, None, lost=["d"])
    assert found.unjudged == {"d": "began with a basis that is not where it was nor given here"}
    assert found.ways.keys() == {"a", "b", "c"}


def test_two_models_no_base_or_no_models_say_nothing():
    two = judge(findings({"a": 0.9, "b": 0.9}), ["a", "b", "the base again"], True, None).headline
    assert "at least 3 models to judge; of the 3 given here 2 can be judged. Not judged: the base again (equals the base" in two
    assert "needs --base" in judge([], ["a", "b"], False, None).headline
    assert "no models were given" in judge([], [], True, None).headline


def test_a_model_whose_changes_no_other_shares_a_weight_with_is_named():
    [one] = findings({"a": 0.9, "b": 0.8, "c": 0.7})
    alone = Findings(
        "layers.0.k_proj", "k_proj", 0, (20, 20), 1, {"d": 0.1}, (), (Capture("d", {CEILING: 1.0, CHANCE: 0.05}),), None
    )
    found = judge([one, alone], ["a", "b", "c", "d"], True, None)
    assert found.headline.startswith("There is a common subspace:")
    assert found.sentences[0] == "Not judged: d (changed no weight that another one changed)."


@pytest.mark.parametrize(("overlap", "said"), [(0.95, "are the base model's own:"), (0.85, "are not simply the base")])
def test_the_weights_subspaces_are_compared_with_the_bases(overlap, said):
    found = judge(findings({"a": 0.9, "b": 0.9, "c": 0.9}, of_base=overlap), ["a", "b", "c"], True, None)
    assert said in found.sentences[0]
    assert "capture 10.0% of a left-out change, the base model's own 10.0%, chance 5.0%" in found.sentences[0]
