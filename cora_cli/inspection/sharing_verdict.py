"""The verdict of `cora inspect`: whether the models share a subspace, by the rule in RULE.

Every sentence follows from the measured numbers and the thresholds below; nothing else enters the verdict.
"""

import dataclasses
from collections.abc import Sequence
from statistics import fmean

from cora_cli.inspection.measure import BASE, CEILING, CHANCE, FILE, OWN, PAPER, POOLED, START, WEIGHTS, Findings
from cora_cli.inspection.prediction import Prediction

MOSTLY, PARTLY, SAME, ROOM = 0.5, 0.1, 0.9, 0.05
"""Thresholds of the rule (0-1): the recovered share for a common subspace and for a partly shared one, the overlap from which two
subspaces count as the same, and the smallest gap between control and ceiling, as a share of the ceiling."""
FEWEST_MODELS = 3

RULE = (
    "Rule: each model in turn is left out, and a basis is computed from the pooled ΔW of the other models. The capture of a basis is the share of "
    "the left-out model's ‖ΔW‖_F² inside it, averaged over the weight matrices that this model and at least one other model changed. The control "
    "is the better of two bases of the same size that do not use the fine-tuned models: random directions (chance) and the base model's leading "
    "directions. The ceiling is the capture of the model's own leading directions; no basis of this rank captures more. The recovered share is "
    "(capture of the others' basis − control) / (ceiling − control): 0% means no better than the control, 100% as good as the model's own directions. "
    f"The lowest recovered share of all judged models decides. From {MOSTLY:.0%} the subspace is shared, from {PARTLY:.0%} it is partly shared, "
    f"and below {PARTLY:.0%} no shared subspace is found. At least {FEWEST_MODELS} models must be judged, and the base model must be known. "
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
    """`headline` says whether there is a common subspace, and `sentences` hold the other findings. `recovered` maps each judged model to
    its recovered share (at most 1, negative below the control), `unjudged` each other model to the reason.
    """

    headline: str
    sentences: tuple[str, ...]
    recovered: dict[str, float]
    unjudged: dict[str, str]


def judge(
    findings: Sequence[Findings],
    models: Sequence[str],
    has_base: bool,
    predictions: Sequence[Prediction] | None,
    lost: Sequence[str] = (),
) -> Verdict:
    """The verdict on `models` from their `findings`, by RULE. `predictions` is None if no runs were given; `lost` names the adapters
    whose starting basis is not available.
    """
    unjudged = {name: why for name in models if (why := _objection(findings, name, lost))} if has_base else {}
    recovered = {name: _recovered_share(findings, name) for name in models if has_base and name not in unjudged}
    sentences = [_not_judged(unjudged)] if len(recovered) >= FEWEST_MODELS and unjudged else []
    sentences += [sentence for sentence in (_weights(findings), *_files(findings)) if sentence]
    if predictions is None:
        sentences.append("No conclusion about predicting the held-out loss: no finished runs were given. Add them with --runs.")
    else:
        sentences += [found.sentence() for found in predictions]
    return Verdict(_headline(models, has_base, recovered, unjudged), tuple(sentences), recovered, unjudged)


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


def _recovered_share(findings: Sequence[Findings], name: str) -> float:
    shares = _shared(findings, name)
    control, ceiling = _ends(shares)
    return (fmean(one[POOLED] for one in shares) - control) / (ceiling - control)


def _not_judged(unjudged: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in unjudged.items():
        by_reason.setdefault(reason, []).append(name)
    return "Not judged: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()) + "."


def _headline(models: Sequence[str], has_base: bool, recovered: dict[str, float], unjudged: dict[str, str]) -> str:
    nothing = "No conclusion about a shared subspace"
    if not models:
        return f"{nothing}: no models were given, so only the basis files are described."
    if not has_base:
        return f"{nothing}: the changes ΔW are unknown. Name the model that these were fine-tuned from with --base."
    if len(recovered) < FEWEST_MODELS:
        needed = (
            f"{len(recovered)} of the {len(models)} given models can be judged, and the rule needs at least {FEWEST_MODELS}"
        )
        return f"{nothing}: {needed}." + (f" {_not_judged(unjudged)}" if unjudged else "")
    lowest = min(recovered, key=lambda name: recovered[name])
    found = (
        "Shared"
        if recovered[lowest] >= MOSTLY
        else "Partly shared"
        if recovered[lowest] >= PARTLY
        else "No shared subspace found"
    )
    return (
        f"{found}: the other models recover {_percent(recovered[lowest])} (for {lowest}) to "
        f"{_percent(max(recovered.values()))} of the gap between control and ceiling."
    )


def _percent(share: float) -> str:
    return f"{round(share, 3) + 0.0:.1%}"  # adding 0.0 turns -0.0 into 0.0


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
