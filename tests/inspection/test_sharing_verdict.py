"""The verdict follows from the numbers by its printed rule."""

from collections.abc import Sequence

import pytest

from cora_cli.inspection.group_measure import GroupFindings
from cora_cli.inspection.groups import find_groups, of_all
from cora_cli.inspection.measure import (
    BASE,
    CEILING,
    CHANCE,
    OWN,
    PAPER,
    POOLED,
    START,
    WEIGHTS,
    Capture,
    Findings,
    Held,
    Overlap,
)
from cora_cli.inspection.sharing_verdict import RULE, Verdict, group_names, judge, pooled_already, unjudged_models


def findings(
    recovered: dict[str, float],
    own: float = 0.1,
    of_base: float = 0.99,
    start: dict[str, float] | None = None,
    ceiling: float = 0.8,
    pairs: float = 0.5,
    layer: int = 0,
) -> list[Findings]:
    """One matrix with the recovered shares `recovered`, and `pairs` for every pair; `start` gives the common-start capture of the models
    that have one.
    """
    control = max(own, 0.05)

    def capture(share: float) -> float:
        return control + share * (ceiling - control)

    captures = tuple(
        Capture(
            name,
            {POOLED: capture(share), OWN: own, CHANCE: 0.05, CEILING: ceiling, PAPER: own}
            | ({START: start[name]} if start and name in start else {}),
            0.01,
        )
        for name, share in recovered.items()
    )
    held = tuple(
        Held(one, other, capture(pairs), own, 0.05, 0.01, ceiling) for one in recovered for other in recovered if one != other
    )
    overlaps = tuple(Overlap(WEIGHTS, name, BASE, of_base, 0.05, (0.0, 1.0, 2.0)) for name in recovered)
    sizes = dict.fromkeys(recovered, 0.1)
    return [Findings(f"layers.{layer}.q_proj", "q_proj", layer, (20, 20), 1, sizes, overlaps, captures, held, None)]


def verdict(found: Sequence[Findings], models: Sequence[str], has_base: bool = True, lost: Sequence[str] = ()) -> Verdict:
    """The verdict, where the pool of a group holds as much of its models as that of all other models does."""
    unjudged = unjudged_models(found, models, lost) if has_base else {}
    judged = [name for name in models if has_base and name not in unjudged]
    grouping = find_groups(found, judged)
    measured = None
    if len(judged) > 1 and not pooled_already(found, grouping):
        measured = _measured(found, group_names(grouping))
    return judge(found, models, has_base, None, unjudged, grouping, measured)


def _measured(found: Sequence[Findings], groups: dict[str, tuple[str, ...]]) -> list[GroupFindings]:
    return [
        GroupFindings(
            one.module,
            one.layer,
            tuple(
                Held(**{**held.__dict__, "by": group})
                for group, members in groups.items()
                for [(_, held)] in of_all([one], members).values()
            ),
        )
        for one in found
    ]


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
    found = verdict(findings({"a": 0.9, "b": least, "c": 0.7}, own, start=start), ["a", "b", "c"])
    assert found.headline.startswith(headline)
    assert f"{least:.1%} [–] (for b) to 90.0% [–] of the gap between control and ceiling" in found.headline
    assert {name: one.share for name, one in found.recovered.items()} == pytest.approx({"a": 0.9, "b": least, "c": 0.7})
    assert found.unjudged == {}
    for percent in ("50%", "10%", "90%", "5%"):
        assert percent in RULE


def test_what_rounds_to_nothing_has_no_sign():
    found = verdict(findings({"a": -0.0004, "b": 0.0004, "c": 0.0001}), ["a", "b", "c"])
    assert "recover 0.0% [–] (for a) to 0.0% [–] of the gap" in found.headline


def test_models_that_began_alike_are_not_judged_and_the_others_are():
    alike = {"a": 0.14, "b": 0.8}
    recovered = {"a": 0.99, "b": 0.99, "c": 0.7, "d": 0.4, "e": 0.6}
    found = verdict(findings(recovered, own=0.3, start=alike), list(recovered))
    assert found.headline.startswith("Partly shared:")
    assert "40.0% [–] (for d) to 70.0% [–]" in found.headline
    assert found.recovered.keys() == {"c", "d", "e"}
    for name, percent in (("a", "12.0%"), ("b", "100.0%")):
        assert (
            f"{name} (it started from the same directions as another model, and these alone recover {percent} of the gap between "
            "chance and ceiling)" in found.sentences[0]
        )
    few = verdict(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.3, start=alike), ["a", "b", "c"])
    assert few.headline.startswith(
        "No conclusion about a shared subspace: 1 of the 3 given models can be judged, and the rule needs at least 2."
    )
    assert "these alone recover 12.0% of the gap between chance and ceiling" in few.headline
    assert not any("Not judged" in sentence for sentence in few.sentences), "it is said once"


def test_a_model_whose_control_nearly_reaches_the_ceiling_is_not_judged():
    """A quotient of two rounding errors would decide."""
    found = verdict(findings({"a": -1e9, "b": 0.8, "c": 0.7}, own=0.8 - 1e-13), ["a", "b", "c"])
    assert "0 of the 3 given models can be judged" in found.headline
    assert "a, b, c (the gap is too small: the control captures 80.0% of the change, the ceiling 80.0%)" in found.headline
    barely = verdict(findings({"a": 0.9, "b": 0.8, "c": 0.7}, own=0.75), ["a", "b", "c"])
    assert barely.headline.startswith("Shared:")


def test_a_model_that_began_with_a_lost_basis_is_not_judged():
    recovered = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    found = verdict(findings(recovered), list(recovered), lost=["d"])
    assert found.unjudged == {"d": "it started from a basis file that is neither at its recorded path nor named here"}
    assert found.recovered.keys() == {"a", "b", "c"}


def test_two_models_are_judged_with_a_caution_and_one_is_not():
    two = verdict(findings({"a": 0.9, "b": 0.9}), ["a", "b", "the base again"])
    assert two.headline.startswith("Shared: the other model recovers 90.0% [–] (for a) to 90.0% [–] of the gap")
    assert two.sentences[0] == "Not judged: the base again (its weights here equal those of the base model)."
    assert two.sentences[1] == "Only two models could be judged: what two models share need not be common to a third."
    one = verdict(findings({"a": 0.9}), ["a", "the base again"]).headline
    assert "1 of the 2 given models can be judged, and the rule needs at least 2. Not judged: the base again" in one


def test_no_base_or_no_models_say_nothing():
    assert "with --base" in verdict([], ["a", "b"], has_base=False).headline
    assert "no models were given" in verdict([], []).headline


def test_a_model_whose_changes_no_other_shares_a_weight_with_is_named():
    [one] = findings({"a": 0.9, "b": 0.8, "c": 0.7})
    alone = Findings(
        "layers.0.k_proj",
        "k_proj",
        0,
        (20, 20),
        1,
        {"d": 0.1},
        (),
        (Capture("d", {CEILING: 1.0, CHANCE: 0.05}, 0.01),),
        (),
        None,
    )
    found = verdict([one, alone], ["a", "b", "c", "d"])
    assert found.headline.startswith("Shared:")
    assert found.sentences[0] == "Not judged: d (it changed no weight matrix that another model changed)."


@pytest.mark.parametrize(
    ("overlap", "said"), [(0.95, "are the base model's own:"), (0.85, "differ from the base model's own:")]
)
def test_the_weights_subspaces_are_compared_with_the_bases(overlap, said):
    found = verdict(findings({"a": 0.9, "b": 0.9, "c": 0.9}, of_base=overlap), ["a", "b", "c"])
    assert said in found.sentences[0]
    assert (
        "capture 10.0% of a left-out model's ΔW; the base model's directions capture 10.0%, random directions 5.0%"
        in found.sentences[0]
    )
