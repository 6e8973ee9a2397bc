"""Check before a grid runs that its ranks and shared bases fit the weights of its model."""

from collections.abc import Iterator

from cora_cli.basis.choices import DEFAULT_TARGET_MODULES, BasisChoices
from cora_cli.errors import CoraError
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs, ModelFacts
from cora_cli.experiments.rows import Row
from cora_cli.methods.registry import method_of


def check_shapes(grid: Grid, inputs: Inputs) -> None:
    """Raise `CoraError` that lists every rank or `share` that does not fit the weights.

    Models that are missing are not checked.
    """
    model = inputs.models.get(grid.model)
    if model is None:
        return
    if not model.shapes:
        raise CoraError(
            f"{grid.model} is an adapter, but a grid needs a complete model as its base; create one with "
            f"`cora merge {grid.model} -o DIR`"
        )
    problems = [f"{row.name}: {problem}" for row in grid.rows for problem in _shape_problems(row, grid, model, inputs)]
    if problems:
        raise CoraError("; ".join(problems))


def _shape_problems(row: Row, grid: Grid, model: ModelFacts, inputs: Inputs) -> Iterator[str]:
    names = (row.train or row.basis or {}).get("target_modules") or DEFAULT_TARGET_MODULES
    targets = model.targets(names)
    adapter = row.training.adapter_plan() if row.train is not None else None
    if adapter is None and row.basis is None:
        return
    if lacking := [name for name in names if not model.targets((name,))]:
        yield f"{grid.model} has no weight for target module {lacking[0]}; change target_modules"
        return
    choices = BasisChoices(**(row.basis or {}))
    along, across = (1, 0) if choices.side == "input" else (0, 1)
    lengths: tuple[int, ...] = (along,)
    needed = row.basis_rank or 0
    if adapter is not None and (sides := method_of(row.mode).bounded_sides(adapter)):
        needed = max(needed, method_of(row.mode).b_width(adapter))
        lengths = tuple(sorted({*lengths, *sides}))
    most, narrowest, side = min((shape[side], module, side) for module, shape in targets.items() for side in lengths)
    if needed > most:
        what = ("rows", "columns")[side]
        yield f"rank {needed} exceeds the {most} {what} of {narrowest}; use rank {most} or less"
    for side in (along, across) if choices.merge == "mean" else (along,):
        sizes = sorted({shape[side] for shape in targets.values()})
        if choices.share in ("global", "layer") and len(sizes) > 1:
            yield (
                f"share {choices.share} needs weights with equal {('out', 'in')[side]}-dimensions, but those of {grid.model} are "
                f"{', '.join(map(str, sizes))}; use share projection or module"
            )
    narrow = next((module for module, (out, inside) in targets.items() if out != inside), None)
    if row.basis is not None and adapter is not None and choices.side == "input" and adapter.basis_side == "output" and narrow:
        yield f"side input needs square weights in this mode, but {narrow} has the shape {targets[narrow]}; use side output"
    for reference in (grid.models[source] for source in row.sources):
        facts = inputs.models.get(reference) if isinstance(reference, str) else None
        theirs = facts.targets(names) if facts else {}
        if theirs and theirs != targets:
            yield f"source model {reference} has other weight shapes than {grid.model}; use fine-tuned models of that base"
