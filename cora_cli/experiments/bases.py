"""Check before a grid runs that its bases can be extracted from its models."""

import contextlib

from cora_cli.adapters.base import base_of
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs
from cora_cli.extraction.extract import open_sources
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.progress import quiet
from cora_cli.weights.planned import open_planned


def check_bases(grid: Grid, inputs: Inputs, planned: bool = False) -> None:
    """Say what `cora extract-basis` says of the models behind the grid's bases before it reads a tensor.

    Raises `CoraError` that lists what it would refuse, each with a row that needs it. Models that are missing, or that the grid fine-tunes itself, are
    left out; if this is `planned` without a hub, so are adapters whose own base is not here.
    """
    if grid.model not in inputs.models:
        return
    base = resolve_model(grid.model, weights=False)
    if not base.has_weights and base.has_own_code:
        return  # its layers are known by its own code alone
    alike: dict[BasisChoices, tuple[str, dict[str, None]]] = {}
    for row in grid.rows:
        if row.basis is None:
            continue
        named = [grid.models[name] for name in row.sources] or [grid.model]
        here = [reference for reference in named if isinstance(reference, str) and reference in inputs.models]
        choices = BasisChoices(**{**row.basis, "rank": 1})  # ranks are for `check_shapes`
        alike.setdefault(choices, (row.name, {}))[1].update(dict.fromkeys(here))
    problems: list[str] = []
    said: set[tuple[str, str]] = set()
    for choices, (name, references) in alike.items():
        subtracted = base if choices.source == "delta" else None
        try:
            models = [resolve_model(reference, weights=False) for reference in references]
            if planned and subtracted is None:
                models = [model for model in models if not model.is_adapter or _has_base(model)]
            told = {(choices.source, reference) for reference in references}
            with quiet() if told <= said else contextlib.nullcontext():
                if models:
                    open_sources(models, choices, subtracted, open_planned(subtracted) if subtracted else None, open_planned)
            said |= told
        except CoraError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CoraError("; ".join(problems))


def _has_base(adapter: ModelPath) -> bool:
    try:
        return bool(base_of(adapter, weights=False))
    except CoraError:
        return False
