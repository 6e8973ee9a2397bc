"""What the numbers say, in words, by one stated rule; no judgement is added to it."""

import dataclasses
from collections.abc import Sequence
from statistics import fmean

from cora_cli.inspection.measure import BASE, CEILING, CHANCE, FILE, OWN, PAPER, POOLED, START, WEIGHTS, Findings
from cora_cli.inspection.prediction import Foresight

MOSTLY, PARTLY, SAME, ROOM = 0.5, 0.1, 0.9, 0.05
"""The rule's thresholds: of the way from control to ceiling, of the overlap from which two subspaces count as one, and of the ceiling
that must lie above the control, so that there is a way at all."""
FEWEST_MODELS = 3

RULE = (
    "Rule: each model in turn is left out, and its capture by the others' pooled ΔW is averaged over all weight matrices that it and another model "
    "changed. How far that lies on the way from the better of two controls (chance, the base model's own directions) to the ceiling (the "
    "model's own directions) is its share of the way. The least share over the models decides: from "
    f"{MOSTLY:.0%} the subspace is common, from {PARTLY:.0%} in part, below that none is shown. A model is not judged where the control comes "
    f"within {ROOM:.0%} of the ceiling; where as many directions, of those that both its adapter and another one's began with, come {PARTLY:.0%} of the "
    "way from chance to the ceiling, or may have, as its basis is not at hand; or where it changed no weight that another one changed. The "
    f"weights' subspaces are the base model's where their mean overlap with its own is at least {SAME:.0%}. Leave-one-out needs {FEWEST_MODELS} "
    "models to judge and a base. Models are few and share each other's bases, so no p-value is given. What is shared may come from the "
    "tasks, but as well from the base, from the recipe or from a common start that is not known here: no number tells which."
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`headline` answers whether there is a common subspace; `sentences` say the rest; `ways` is each judged model's share of the way, and
    `unjudged` says why the others have none.
    """

    headline: str
    sentences: tuple[str, ...]
    ways: dict[str, float]
    unjudged: dict[str, str]


def judge(
    findings: Sequence[Findings],
    models: Sequence[str],
    has_base: bool,
    foresight: Sequence[Foresight] | None,
    lost: Sequence[str] = (),
) -> Verdict:
    """The verdict on what was measured of `models`; `foresight` is None where no runs were given, and `lost` are adapters that began with a
    basis which is not where it was.
    """
    unjudged = {name: why for name in models if (why := _objection(findings, name, lost))} if has_base else {}
    ways = {name: _way(findings, name) for name in models if has_base and name not in unjudged}
    sentences = [_not_judged(unjudged)] if len(ways) >= FEWEST_MODELS and unjudged else []
    sentences += [sentence for sentence in (_weights(findings), *_files(findings)) if sentence]
    if foresight is None:
        sentences.append(
            "Foresight: no finished runs were given (--runs), so nothing is said on whether these numbers foretell a loss."
        )
    else:
        sentences += [f"Foresight, {found.sentence()}" for found in foresight]
    return Verdict(_headline(models, has_base, ways, unjudged), tuple(sentences), ways, unjudged)


def shares_of(findings: Sequence[Findings], name: str, share: str) -> list[float]:
    """One share of the ΔW of the model `name` in every weight matrix that has it."""
    return [c.shares[share] for one in findings for c in one.captures if c.left_out == name and share in c.shares]


def _objection(findings: Sequence[Findings], name: str, lost: Sequence[str]) -> str | None:
    """Why the model `name` is not judged; None where it is."""
    if not any(one.sizes.get(name) for one in findings):
        return "equals the base in these weights"
    shares = _shared(findings, name)
    if not shares:
        return "changed no weight that another one changed"
    if name in lost:
        return "began with a basis that is not where it was nor given here"
    control, ceiling = _ends(shares)
    if ceiling - control < ROOM * ceiling:
        return f"no way to go: the control holds {control:.1%} of the change, the ceiling {ceiling:.1%}"
    by_chance, start = (fmean(one.get(key, one[CHANCE]) for one in shares) for key in (CHANCE, START))
    if (way := (start - by_chance) / (ceiling - by_chance)) >= PARTLY:
        return f"began with directions that another one began with, and these alone come {way:.1%} of the way from chance"
    return None


def _shared(findings: Sequence[Findings], name: str) -> list[dict[str, float]]:
    return [c.shares for one in findings for c in one.captures if c.left_out == name and POOLED in c.shares]


def _ends(shares: Sequence[dict[str, float]]) -> tuple[float, float]:
    """The better control and the ceiling."""
    by_chance, own, ceiling = (fmean(one[key] for one in shares) for key in (CHANCE, OWN, CEILING))
    return max(by_chance, own), ceiling


def _way(findings: Sequence[Findings], name: str) -> float:
    shares = _shared(findings, name)
    control, ceiling = _ends(shares)
    return (fmean(one[POOLED] for one in shares) - control) / (ceiling - control)


def _not_judged(unjudged: dict[str, str]) -> str:
    whys: dict[str, list[str]] = {}
    for name, why in unjudged.items():
        whys.setdefault(why, []).append(name)
    return "Not judged: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in whys.items()) + "."


def _headline(models: Sequence[str], has_base: bool, ways: dict[str, float], unjudged: dict[str, str]) -> str:
    nothing = "Nothing can be said on a common subspace"
    if not models:
        return f"{nothing}: no models were given, so only the bases themselves are described."
    if not has_base:
        return f"{nothing} of the changes: that needs --base, the model that the others were fine-tuned from."
    if len(ways) < FEWEST_MODELS:
        needed = (
            f"that needs at least {FEWEST_MODELS} models to judge; of the {len(models)} given here {len(ways)} can be judged"
        )
        return f"{nothing}: {needed}." + (f" {_not_judged(unjudged)}" if unjudged else "")
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
    return f"{round(share, 3) + 0.0:.1%}"  # without the sign of a zero


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
