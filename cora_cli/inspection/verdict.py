"""What the numbers say, in words, by one stated rule; no judgement is added to it."""

import dataclasses
from collections.abc import Sequence
from statistics import fmean

from cora_cli.inspection.foresight import Foresight
from cora_cli.inspection.measure import BASE, CEILING, CHANCE, FILE, OWN, PAPER, POOLED, START, WEIGHTS, Findings

MOSTLY, PARTLY, SAME = 0.5, 0.1, 0.9
"""The rule's thresholds: of the way from control to ceiling, and of the overlap from which two subspaces count as one."""
FEWEST_MODELS = 3

RULE = (
    "Rule: each model in turn is left out, and its capture by the others' pooled ΔW is averaged over all weight matrices. How far that "
    "lies on the way from the better of two controls (chance, the base model's own directions) to the ceiling (the model's own "
    f"directions) is its share of the way. The least share over the models decides: from {MOSTLY:.0%} the subspace is common, from "
    f"{PARTLY:.0%} in part, below that none is shown. Where what the others' adapters began with alone comes {PARTLY:.0%} of that way, nothing is "
    f"said. The weights' subspaces are the base model's where their mean overlap with its own is at least {SAME:.0%}. Leave-one-out needs "
    f"{FEWEST_MODELS} models and a base. Models are few and share each other's bases, so no p-value is given. What is shared may come from the tasks, "
    "but as well from the base, from the recipe or from a common start that is not known here: no number tells which."
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`headline` answers whether there is a common subspace; `sentences` say the rest; `ways` is each model's share of the way."""

    headline: str
    sentences: tuple[str, ...]
    ways: dict[str, float]


def judge(
    findings: Sequence[Findings], models: Sequence[str], has_base: bool, foresight: Sequence[Foresight] | None
) -> Verdict:
    """The verdict on what was measured of `models`; `foresight` is None where no runs were given."""
    ways = {name: way for name in models if (way := _way(findings, name)) is not None}
    sentences = [sentence for sentence in (_weights(findings), *_files(findings)) if sentence]
    if foresight is None:
        sentences.append(
            "Foresight: no finished runs were given (--runs), so nothing is said on whether these numbers foretell a loss."
        )
    else:
        sentences += [f"Foresight, {found.sentence()}" for found in foresight]
    return Verdict(_headline(findings, models, has_base, ways), tuple(sentences), ways)


def shares_of(findings: Sequence[Findings], name: str, share: str) -> list[float]:
    """One share of the ΔW of the model `name` in every weight matrix that has it."""
    return [c.shares[share] for one in findings for c in one.captures if c.left_out == name and share in c.shares]


def _way(findings: Sequence[Findings], name: str, share: str = POOLED) -> float | None:
    """How far `share` comes from the better control to the ceiling; None where the model `name` has no such share."""
    shares = [c.shares for one in findings for c in one.captures if c.left_out == name and share in c.shares]
    if not shares:
        return None
    reached, by_chance, own, ceiling = (fmean(one[key] for one in shares) for key in (share, CHANCE, OWN, CEILING))
    control = max(by_chance, own)
    return (reached - control) / (ceiling - control) if ceiling > control else 0.0


def _headline(findings: Sequence[Findings], models: Sequence[str], has_base: bool, ways: dict[str, float]) -> str:
    if not models:
        return "Nothing can be said on a common subspace: no models were given, so only the bases themselves are described."
    if not has_base:
        return "Nothing can be said on a common subspace of the changes: that needs --base, the model that the others were fine-tuned from."
    if len(ways) < FEWEST_MODELS:
        changed = {capture.left_out for one in findings for capture in one.captures}
        return (
            f"Nothing can be said on a common subspace: leave-one-out needs at least {FEWEST_MODELS} models that differ from the base; of the "
            f"{len(models)} given here {len(changed)} {'does' if len(changed) == 1 else 'do'}."
        )
    begun = [way for name in ways if (way := _way(findings, name, START)) is not None]
    if max(begun, default=0.0) >= PARTLY:
        return (
            "Nothing can be said on a common subspace: the models are adapters that began with common directions, and these alone come up to "
            f"{max(begun):.0%} of the way from control to ceiling; compare models whose starts differ, such as those of different seeds."
        )
    least = min(ways, key=lambda name: ways[name])
    found = (
        "There is a common subspace"
        if ways[least] >= MOSTLY
        else "There is a common subspace in part"
        if ways[least] >= PARTLY
        else "No common subspace is shown"
    )
    return (
        f"{found}: the others' directions hold a left-out model's change {_percent(ways[least])} ({least}) to {_percent(max(ways.values()))} of the way "
        "from control to ceiling."
    )


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"  # without the sign of a zero


def _weights(findings: Sequence[Findings]) -> str | None:
    found = [o.value for one in findings for o in one.overlaps if o.kind == WEIGHTS and o.other == BASE]
    if not found:
        return None
    paper = [(c.shares[PAPER], c.shares[OWN], c.shares[CHANCE]) for f in findings for c in f.captures if PAPER in c.shares]
    said = "are the base model's own" if fmean(found) >= SAME else "are not simply the base model's own"
    sentence = f"The leading directions of the weights (the paper's way) {said}: mean overlap {fmean(found):.1%}."
    if paper:
        shares = [fmean(column) for column in zip(*paper, strict=True)]
        sentence += (
            f" They capture {shares[0]:.1%} of a left-out change, the base model's own {shares[1]:.1%}, chance {shares[2]:.1%}."
        )
    return sentence


def _files(findings: Sequence[Findings]) -> list[str]:
    names = dict.fromkeys(o.one for one in findings for o in one.overlaps if o.kind == FILE and o.other == BASE)
    sentences = []
    for name in names:
        values = [o.value for f in findings for o in f.overlaps if (o.kind, o.one, o.other) == (FILE, name, BASE)]
        said = "is the base model's own subspace" if fmean(values) >= SAME else "is not simply the base model's own subspace"
        sentences.append(f"{name} {said}: mean overlap {fmean(values):.1%}.")
    return sentences
