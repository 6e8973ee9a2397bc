"""The verdict follows from the numbers by its printed rule."""

import pytest

from cora_cli.inspection.measure import BASE, CEILING, CHANCE, OWN, PAPER, POOLED, START, WEIGHTS, Capture, Findings, Overlap
from cora_cli.inspection.sharing_verdict import RULE, judge


def findings(
    recovered: dict[str, float],
    own: float = 0.1,
    of_base: float = 0.99,
    start: dict[str, float] | None = None,
    ceiling: float = 0.8,
) -> list[Findings]:
    """One matrix with the recovered shares `recovered`; `start` gives the common-start capture of the models that have one."""
    control = max(own, 0.05)
    captures = tuple(
        Capture(
            name,
            {POOLED: control + share * (ceiling - control), OWN: own, CHANCE: 0.05, CEILING: ceiling, PAPER: own}
            | ({START: start[name]} if start and name in start else {}),
        )
        for name, share in recovered.items()
    )
    overlaps = tuple(Overlap(WEIGHTS, name, BASE, of_base, 0.05, (0.0, 1.0, 2.0)) for name in recovered)
    return [Findings("layers.0.q_proj", "q_proj", 0, (20, 20), 1, dict.fromkeys(recovered, 0.1), overlaps, captures, None)]


@pytest.mark.parametrize(
    ("least", "headline"),
    [
        (0.51, "Shared:"),
        (0.49, "Partly shared:"),
        (0.11, "Partly shared:"),
        (0.09, "No shared subspace found:"),
        (-0.2, "No shared subspace found:"),
    ],
)
@pytest.mark.parametrize(("own", "start"), [(0.01, None), (0.3, None), (0.3, {"a": 0.1}), (0.3, {"a": 0.12, "c": 0.06})])
def test_the_lowest_recovered_share_decides(least, headline, own, start):
    found = judge(findings({"a": 0.9, "b": least, "c": 0.7}, own, start=start), ["a", "b", "c"], True, None)
    assert found.headline.startswith(headline)
    assert f"{least:.1%} (for b) to 90.0% of the gap between control and ceiling" in found.headline
    assert found.recovered == pytest.approx({"a": 0.9, "b": least, "c": 0.7})
    assert found.unjudged == {}
    for percent in ("50%", "10%", "90%", "5%"):
        assert percent in RULE


def test_what_rounds_to_nothing_has_no_sign():
    found = judge(findings({"a": -0.0004, "b": 0.0004, "c": 0.0001}), ["a", "b", "c"], True, None)
    assert "recover 0.0% (for a) to 0.0% of the gap" in found.headline


def test_models_that_began_alike_are_not_judged_and_the_others_are():
    alike = {"a": 0.14, "b": 0.8}
    recovered = {"a": 0.99, "b": 0.99, "c": 0.7, "d": 0.4, "e": 0.6}
    found = judge(findings(recovered, own=0.3, start=alike), list(recovered), True, None)
    assert found.headline.startswith("Partly shared:")
    assert "40.0% (for d) to 70.0%" in found.headline
    assert found.recovered.keys() == {"c", "d", "e"}
    for name, percent in (("a", "12.0%"), ("b", "100.0%")):
        assert (
            f"{name} (it started from the same directions as another model, and these alone recover {percent} of the gap between "
            "chance and ceiling)" in found.sentences[0]
        )
    few = judge(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.3, start=alike), ["a", "b", "c"], True, None)
    assert few.headline.startswith(
        "No conclusion about a shared subspace: 1 of the 3 given models can be judged, and the rule needs at least 3."
    )
    assert "these alone recover 12.0% of the gap between chance and ceiling" in few.headline
    assert not any("Not judged" in sentence for sentence in few.sentences), "it is said once"


def test_a_model_whose_control_nearly_reaches_the_ceiling_is_not_judged():
    """A quotient of two rounding errors would decide."""
    found = judge(findings({"a": -1e9, "b": 0.8, "c": 0.7}, own=0.8 - 1e-13), ["a", "b", "c"], True, None)
    assert "0 of the 3 given models can be judged" in found.headline
    assert "a, b, c (the gap is too small: the control captures 80.0% of the change, the ceiling 80.0%)" in found.headline
    barely = judge(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.75), ["a", "b", "c"], True, None)
    assert barely.headline.startswith("Shared:")


def test_a_model_that_began_with_a_lost_basis_is_not_judged():
    recovered = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    found = judge(findings(recovered), list(recovered), True, None, lost=["d"])
    assert found.unjudged == {"d": "it started from a basis file that is neither at its recorded path nor named here"}
    assert found.recovered.keys() == {"a", "b", "c"}


def test_two_models_no_base_or_no_models_say_nothing():
    two = judge(findings({"a": 0.9, "b": 0.9}), ["a", "b", "the base again"], True, None).headline
    assert "2 of the 3 given models can be judged" in two
    assert "Not judged: the base again (its weights here equal those of the base model)" in two
    assert "with --base" in judge([], ["a", "b"], False, None).headline
    assert "no models were given" in judge([], [], True, None).headline


def test_a_model_whose_changes_no_other_shares_a_weight_with_is_named():
    [one] = findings({"a": 0.9, "b": 0.8, "c": 0.7})
    alone = Findings(
        "layers.0.k_proj", "k_proj", 0, (20, 20), 1, {"d": 0.1}, (), (Capture("d", {CEILING: 1.0, CHANCE: 0.05}),), None
    )
    found = judge([one, alone], ["a", "b", "c", "d"], True, None)
    assert found.headline.startswith("Shared:")
    assert found.sentences[0] == "Not judged: d (it changed no weight matrix that another model changed)."


@pytest.mark.parametrize(
    ("overlap", "said"), [(0.95, "are the base model's own:"), (0.85, "differ from the base model's own:")]
)
def test_the_weights_subspaces_are_compared_with_the_bases(overlap, said):
    found = judge(findings({"a": 0.9, "b": 0.9, "c": 0.9}, of_base=overlap), ["a", "b", "c"], True, None)
    assert said in found.sentences[0]
    assert (
        "capture 10.0% of a left-out model's ΔW; the base model's directions capture 10.0%, random directions 5.0%"
        in found.sentences[0]
    )
