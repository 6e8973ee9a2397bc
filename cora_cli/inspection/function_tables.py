"""The table and the sentences on the function of each model's change: how much of it lies in what the other models share."""

from collections.abc import Iterator, Mapping, Sequence

from cora_cli.inspection.functional import Function, Replaced
from cora_cli.inspection.headline import percent
from cora_cli.inspection.replacements import ITSELF, MEAN, MEAN_AND_REST, NOTHING, OWN, PROJECTION, RANDOM
from cora_cli.render.table import Cell, Table


def function_table(functions: Sequence[Function]) -> Table:
    """Each model with each replacement of its change: loss, gain, and the shares of function and norm."""
    rows = []
    for function in functions:
        for by, found in function.replaced.items():
            rows.append(
                (
                    Cell(function.model),
                    Cell(by),
                    Cell(f"{found.loss:.4f}"),
                    Cell() if by == NOTHING else Cell(f"{found.gain:+.4f}", _ends(found.gain_interval, "{:+.4f}")),
                    _share(found),
                    Cell() if found.energy is None else Cell(percent(found.energy)),
                )
            )
    return Table(
        "Function: the loss on a model's own data, with its ΔW replaced",
        ("model", "ΔW replaced by", "loss", "gain", "of the function", "of the norm"),
        tuple(rows),
        (_note(functions),) if functions else (),
    )


def _note(functions: Sequence[Function]) -> str:
    data = "; ".join(
        f"{one.model}: {one.records} records of {one.dataset}, {one.tokens:,} response tokens" for one in functions
    )
    return (
        f"loss: nats per response token. gain: by how much it lies below that with “{NOTHING}”, on the same records. of the function: gain / gain of "
        f"“{ITSELF}”; “–” where the model's own ΔW is not shown to gain anything. of the norm: 1 − ‖ΔW − X‖_F² / ‖ΔW‖_F² of the replacement X, mean over the "
        "matrices that the model changed; for a projection this is its capture. Intervals (95 %) are over records: Student's t with Hall's correction, and "
        "Fieller's theorem for shares. "
        f"{MEAN}: of the other models' ΔW as they are. {PROJECTION}: ΔW projected on the leading directions of their pool, each ΔW divided by its "
        f"norm. {MEAN_AND_REST}: the mean, and ΔW less the mean projected on these. {RANDOM} (one draw, by --seed) and {OWN}: ΔW projected on as many "
        f"directions. What a model changes outside of the inspected matrices stays in every row. Data: {data}; precision {functions[0].dtype}."
    )


def function_sentences(functions: Sequence[Function], unjudged: Mapping[str, str]) -> Iterator[str]:
    """What the table says, in words; `unjudged` is that of the verdict."""
    shown = [one for one in functions if one.replaced[ITSELF].share is not None]
    if shown:
        listed = "; ".join(f"{one.model} {_both(one.replaced[PROJECTION])}" for one in shown)
        yield (
            "Of the function (by how much a model's own ΔW lowers the loss on its own data) and of the norm of that ΔW, the others' basis holds: "
            f"{listed}."
        )
        controls = "; ".join(f"{by}, {_range(shown, by)}" for by in (MEAN, MEAN_AND_REST, RANDOM, OWN))
        yield f"The same shares of the function with other replacements, from the lowest model to the highest: {controls}."
    for one in functions:
        if one not in shown:
            found = one.replaced[ITSELF]
            yield (
                f"{one.model} has no share of the function: its own ΔW is not shown to lower the loss on its data (gain {found.gain:+.4f} "
                f"{_ends(found.gain_interval, '{:+.4f}')}, {one.records} record{'s' if one.records > 1 else ''})."
            )
    if common := [one.model for one in shown if one.model in unjudged]:
        yield (
            f"The shares of {', '.join(common)} say nothing about a common space that was learned, because the rule does not judge the geometry there."
        )


def _both(found: Replaced) -> str:
    assert found.share is not None
    norm = "–" if found.energy is None else percent(found.energy)
    return f"{percent(found.share)} {_ends(found.share_interval)} of the function, {norm} of the norm"


def _range(functions: Sequence[Function], by: str) -> str:
    shares = sorted(share for one in functions if (share := one.replaced[by].share) is not None)
    return percent(shares[0]) if shares[0] == shares[-1] else f"{percent(shares[0])} to {percent(shares[-1])}"


def _share(found: Replaced) -> Cell:
    return Cell() if found.share is None else Cell(percent(found.share), _ends(found.share_interval))


def _ends(interval: tuple[float, float] | None, form: str = "") -> str:
    return "–" if interval is None else f"[{', '.join(form.format(end) if form else percent(end) for end in interval)}]"
