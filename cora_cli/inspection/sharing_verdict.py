"""The verdict of `cora inspect`: which models share a subspace, by the rule in RULE.

Every sentence follows from the measured numbers and the thresholds below; nothing else enters the verdict. `groups` holds the statistics.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from cora_cli.inspection.group_measure import GroupFindings
from cora_cli.inspection.groups import ERROR, LEVEL, LINK, Group, Grouping, Recovered, of_all, of_groups, recovered
from cora_cli.inspection.headline import headline_of, loose_pairs
from cora_cli.inspection.measure import BASE, CEILING, CHANCE, FILE, OWN, PAPER, POOLED, START, WEIGHTS, Findings
from cora_cli.inspection.prediction import Prediction

MOSTLY, PARTLY, SAME, ROOM = 0.5, 0.1, 0.9, 0.05
"""Thresholds of the rule (0-1): the recovered share for a common subspace and for a partly shared one, the overlap from which two
subspaces count as the same, and the smallest gap between control and ceiling, as a share of the ceiling."""
FEWEST_MODELS = 2

RULE = (
    "Rule: every ΔW is first divided by its Frobenius norm, matrix by matrix, so that no model counts more because it was trained further. The "
    "capture of a basis is the share of a model's ‖ΔW‖_F² inside it, averaged over the weight matrices that this model and a model behind the basis "
    "changed. The control is the better of two bases of the same size that do not use the fine-tuned models: random directions (chance) and the base "
    "model's leading directions. The ceiling is the capture of the model's own leading directions; no basis of this rank captures more. The recovered "
    "share is (capture − control) / (ceiling − control): 0% means no better than the control, 100% as good as the model's own directions. Its interval "
    f"({LEVEL:.0%}) takes the layers as a sample of layers (ratio of sums over layers, Student's t); “–” means that there is only one layer. "
    "Groups: the similarity of two models is the smaller of the shares that the leading directions of each recover of the other, or 0 if a capture "
    f"lies inside the chance band, which random directions leave with a probability of at most {ERROR:.0%} over all pairs. Groups are those of average "
    f"linkage with a mean similarity of at least {LINK:.0%}; if there are none, all judged models are treated as one. Then each model of a group in "
    "turn is left out, "
    "and a basis is computed from the pooled ΔW of the group's other models. The lowest recovered share decides for the group. From "
    f"{MOSTLY:.0%} the subspace is shared, from {PARTLY:.0%} it is partly shared, and below {PARTLY:.0%}, or inside the chance band, no shared subspace "
    "is found. Models outside a group are compared with the basis of all its models. At "
    f"least {FEWEST_MODELS} models must be judged, and the base model must be known. "
    "A model is not judged if (1) it changed no weight matrix that another model changed; "
    f"(2) the gap between control and ceiling is less than {ROOM:.0%} of the ceiling; (3) its adapter and another one started from common directions, "
    f"and these alone recover at least {PARTLY:.0%} of the gap between chance and ceiling; or (4) its adapter started from a basis file that is not "
    "available, so that (3) cannot be checked. For (3), the best of the common starting directions are used, as many as the others' basis has; "
    "random directions fill up a shortage. The leading directions of the weights, or of a basis file, count as the base model's own if their mean "
    f"overlap with those is at least {SAME:.0%}. There is no p-value, because the models are few and each one is part of the others' bases. Models may "
    "share directions because of their tasks, but also because of the base model, the training recipe or a common start that is not recorded. "
    "These numbers cannot tell which."
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`headline` says which models share a subspace, and `sentences` hold the other findings.

    `groups` are the groups that share one, `outside` the judged models in none. `recovered` maps each judged model to what the others of
    its group recover; for a model outside, it is the largest share that a group's basis recovers, or, without groups, what the other judged
    models recover. `between` is the largest share that one group recovers of a model of another one, None with fewer than two groups.
    `unjudged` maps each other model to the reason.
    """

    headline: str
    sentences: tuple[str, ...]
    recovered: dict[str, Recovered]
    unjudged: dict[str, str]
    groups: tuple[Group, ...]
    outside: tuple[str, ...]
    between: float | None


def unjudged_models(findings: Sequence[Findings], models: Sequence[str], lost: Sequence[str] = ()) -> dict[str, str]:
    """The models that RULE does not judge, with the reason; `lost` names the adapters whose starting basis is not available."""
    return {name: why for name in models if (why := _objection(findings, name, lost))}


def group_names(grouping: Grouping) -> dict[str, tuple[str, ...]]:
    """The names under which `group_measure` measures the groups."""
    return {f"group {place}": models for place, models in enumerate(grouping.groups, 1)}


def pooled_already(findings: Sequence[Findings], grouping: Grouping) -> bool:
    """Whether the only group has all models that changed a weight, so that `measure` has its leave-one-out captures."""
    changed = {name for one in findings for name, size in one.sizes.items() if size > 0}
    return len(grouping.groups) == 1 and set(grouping.groups[0]) == changed


def judge(
    findings: Sequence[Findings],
    models: Sequence[str],
    has_base: bool,
    predictions: Sequence[Prediction] | None,
    unjudged: Mapping[str, str],
    grouping: Grouping,
    measured: Sequence[GroupFindings] | None,
) -> Verdict:
    """The verdict on `models` from their `findings`, by RULE.

    `unjudged` is that of `unjudged_models`, `grouping` that of the other models (`find_groups`), and `measured` what `measure_groups` found
    of its groups, or None if `pooled_already`. `predictions` is None if no runs were given.
    """
    unjudged = dict(unjudged)
    shares, groups, outside, between = _judge_groups(findings, grouping, measured, unjudged)
    sentences = [_not_judged(unjudged)] if len(shares) >= FEWEST_MODELS and unjudged else []
    if len(shares) == FEWEST_MODELS:
        sentences.append("Only two models could be judged: what two models share need not be common to a third.")
    if grouping.linked:
        sentences += [said for group in groups if (said := loose_pairs(grouping, group.models))]
    sentences += [sentence for sentence in (_weights(findings), *_files(findings)) if sentence]
    if predictions is None:
        sentences.append("No conclusion about predicting the held-out loss: no finished runs were given. Add them with --runs.")
    else:
        sentences += [found.sentence() for found in predictions]
    headline = _no_conclusion(models, has_base, len(shares), unjudged) or headline_of(
        shares, groups, outside, between, bool(unjudged)
    )
    return Verdict(headline, tuple(sentences), shares, unjudged, groups, outside, between)


def _judge_groups(
    findings: Sequence[Findings],
    grouping: Grouping,
    measured: Sequence[GroupFindings] | None,
    unjudged: dict[str, str],
) -> tuple[dict[str, Recovered], tuple[Group, ...], tuple[str, ...], float | None]:
    """The recovered shares, the groups that share a subspace, the models outside them, and `Verdict.between`.

    Models that have no weight matrix in common with others of their group are added to `unjudged`.
    """
    names = group_names(grouping)
    if measured is None:
        [(name, members)] = names.items() or [("", ())]
        held = {(model, name): found for model, found in of_all(findings, members).items()}
    else:
        held = dict(of_groups(measured))
    count = len(grouping.order)
    shares = {pair: recovered(found, count) for pair, found in held.items()}
    for name, members in names.items():
        for model in members:
            if (model, name) not in shares:
                unjudged[model] = "it changed no weight matrix that another judged model changed"
    judged = [model for model in grouping.order if model not in unjudged]
    groups, kept = [], {}
    for name, members in names.items():
        own = {model: shares[model, name] for model in members if model in judged}
        if len(own) > 1 and all(one.share >= PARTLY and one.above_chance for one in own.values()):
            groups.append(Group(tuple(own), min(one.share for one in own.values()) < MOSTLY, own))
            kept[name] = own
    found: dict[str, Recovered] = {model: one for own in kept.values() for model, one in own.items()}
    outside = tuple(model for model in judged if model not in found)
    for model in outside:
        by = [shares[model, name] for name in kept or names if (model, name) in shares]
        if by:
            found[model] = max(by, key=lambda one: one.share)
        else:
            unjudged[model] = "it changed no weight matrix that a group of the other models changed"
    across = [
        shares[m, name].share
        for name in kept
        for own in kept.values()
        for m in own
        if m not in kept[name] and (m, name) in shares
    ]
    ordered = {model: found[model] for model in judged if model in found}
    return ordered, tuple(groups), tuple(model for model in outside if model in found), max(across, default=None)


def shares_of(findings: Sequence[Findings], name: str, share: str) -> list[float]:
    """The captures (0-1) of the model `name` by the basis `share`, one per weight matrix where it was measured."""
    return [c.shares[share] for one in findings for c in one.captures if c.left_out == name and share in c.shares]


def _objection(findings: Sequence[Findings], name: str, lost: Sequence[str]) -> str | None:
    """The reason why the model `name` is not judged, or None if it is judged."""
    if not any(one.sizes.get(name) for one in findings):
        return "its weights here equal those of the base model"
    shares = _shared(findings, name)
    if not shares:
        return "it changed no weight matrix that another model changed"
    if name in lost:
        return "it started from a basis file that is neither at its recorded path nor named here"
    control, ceiling = _ends(shares)
    if ceiling - control < ROOM * ceiling:
        return f"the gap is too small: the control captures {control:.1%} of the change, the ceiling {ceiling:.1%}"
    by_chance, start = (fmean(one.get(key, one[CHANCE]) for one in shares) for key in (CHANCE, START))
    if (recovered := (start - by_chance) / (ceiling - by_chance)) >= PARTLY:
        return (
            "it started from the same directions as another model, and these alone recover "
            f"{recovered:.1%} of the gap between chance and ceiling"
        )
    return None


def _shared(findings: Sequence[Findings], name: str) -> list[dict[str, float]]:
    return [c.shares for one in findings for c in one.captures if c.left_out == name and POOLED in c.shares]


def _ends(shares: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Control and ceiling of RULE: captures (0-1), averaged over the weight matrices."""
    by_chance, own, ceiling = (fmean(one[key] for one in shares) for key in (CHANCE, OWN, CEILING))
    return max(by_chance, own), ceiling


def _not_judged(unjudged: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in unjudged.items():
        by_reason.setdefault(reason, []).append(name)
    return "Not judged: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()) + "."


def _no_conclusion(models: Sequence[str], has_base: bool, judged: int, unjudged: Mapping[str, str]) -> str | None:
    nothing = "No conclusion about a shared subspace"
    if not models:
        return f"{nothing}: no models were given, so only the basis files are described."
    if not has_base:
        return f"{nothing}: the changes ΔW are unknown. Name the model that these were fine-tuned from with --base."
    if judged < FEWEST_MODELS:
        needed = f"{judged} of the {len(models)} given models can be judged, and the rule needs at least {FEWEST_MODELS}"
        return f"{nothing}: {needed}." + (f" {_not_judged(unjudged)}" if unjudged else "")
    return None


def _weights(findings: Sequence[Findings]) -> str | None:
    found = [o.value for one in findings for o in one.overlaps if o.kind == WEIGHTS and o.other == BASE]
    if not found:
        return None
    paper = [(c.shares[PAPER], c.shares[OWN], c.shares[CHANCE]) for f in findings for c in f.captures if PAPER in c.shares]
    said = "are the base model's own" if fmean(found) >= SAME else "differ from the base model's own"
    sentence = f"The leading directions of the weights W (the paper's basis) {said}: their mean overlap is {fmean(found):.1%}."
    if paper:
        shares = [fmean(column) for column in zip(*paper, strict=True)]
        sentence += (
            f" They capture {shares[0]:.1%} of a left-out model's ΔW; the base model's directions capture {shares[1]:.1%}, "
            f"random directions {shares[2]:.1%}."
        )
    return sentence


def _files(findings: Sequence[Findings]) -> list[str]:
    names = dict.fromkeys(o.one for one in findings for o in one.overlaps if o.kind == FILE and o.other == BASE)
    sentences = []
    for name in names:
        values = [o.value for f in findings for o in f.overlaps if (o.kind, o.one, o.other) == (FILE, name, BASE)]
        said = "spans the base model's own subspace" if fmean(values) >= SAME else "differs from the base model's own subspace"
        sentences.append(f"{name} {said} (mean overlap {fmean(values):.1%}).")
    return sentences
