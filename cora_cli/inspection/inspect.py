"""The entry point of `cora inspect`: opens the models, adapters and basis files, measures them and draws the verdict.

`output` writes the resulting `Inspection` in every format.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cora_cli import writing
from cora_cli.adapters.base import base_of, check_base, say_different_bases, say_other_base
from cora_cli.basis.artifact import Basis, differing_key, read_basis
from cora_cli.basis.choices import DEFAULT_RANK, DEFAULT_TARGET_MODULES, Side
from cora_cli.device import Hardware
from cora_cli.errors import CoraError, UsageError
from cora_cli.inspection.functional import Function, check_hosts, measure_function
from cora_cli.inspection.group_measure import measure_groups
from cora_cli.inspection.groups import Grouping, find_groups
from cora_cli.inspection.measure import BASE, Directions, Findings, Kept, measure
from cora_cli.inspection.own_data import read_own_data
from cora_cli.inspection.prediction import Prediction, is_unscaled, predict, used_bases
from cora_cli.inspection.sharing_verdict import Verdict, group_names, judge, pooled_already, unjudged_models
from cora_cli.inspection.starts import known_starts, unrecorded_note
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import recorded_base, resolve_model
from cora_cli.progress import note
from cora_cli.weights.planned import open_planned
from cora_cli.weights.sources import WeightSource, open_source


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The inspected models and bases with all results; `grouping` is that of the judged models.

    `models` (short name -> reference) and `bases` are keyed by short names; `base` is the reference of the base model. `predictions` is
    None if no runs were given, and `function` if no data were.
    """

    models: dict[str, str]
    base: str | None
    bases: dict[str, Basis]
    rank: int
    side: Side
    findings: tuple[Findings, ...]
    predictions: tuple[Prediction, ...] | None
    function: tuple[Function, ...] | None
    grouping: Grouping
    verdict: Verdict
    bytes_read: int
    seconds: float

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of weight matrices (such as `q_proj`), in the order of the model."""
        return tuple(dict.fromkeys(found.kind for found in self.findings))


@dataclasses.dataclass(frozen=True)
class Opened:
    """The inputs of an inspection, whose weights are not read yet. All dictionaries but `bases` are keyed by the models' short names."""

    references: dict[str, str]
    paths: dict[str, ModelPath]
    models: dict[str, WeightSource]
    base: str | None
    base_source: WeightSource | None
    bases: dict[str, Basis]
    rank: int
    side: Side
    targets: tuple[str, ...]


def inspect(
    references: Sequence[str],
    base: str | None,
    rank: int | None,
    side: Side | None,
    target_modules: tuple[str, ...] | None,
    runs: Sequence[str],
    data: Sequence[str],
    limit: int | None,
    seed: int,
    hardware: Hardware,
) -> Inspection:
    """Inspect basis files and models. Without `base`, the base model is the one that all given adapters name, if they agree.

    `rank`, `side` and `target_modules` default to those of the basis files, or else to the defaults of `cora extract-basis`. `data` and
    `limit` are those of `read_own_data`; `seed` draws the random basis that the models with data are compared with. Raises
    `UsageError` if there is nothing to compare, and `CoraError` if something cannot be read or does not match.
    """
    began, device = time.perf_counter(), hardware.device
    asked = open_inputs(references, base, rank, side, target_modules, runs)
    of_models, models, base_source = asked.paths, asked.models, asked.base_source
    rank, compared, targets = asked.rank, asked.side, asked.targets
    if data and not (asked.base and len(models) > 1):
        raise UsageError(
            "--data needs at least two models and their --base, because it replaces the change of one by what the others have of it"
        )
    base_path = resolve_model(asked.base) if asked.base else None
    for source in models.values():
        source.say_left_out(targets)
    _refuse_copies(models, targets)
    own_data = read_own_data(data, of_models, models, base_path, targets, limit) if data and base_path else {}
    if base_source is not None:
        check_hosts(own_data, models, base_source, targets)
    used = used_bases(runs) if runs else []
    for trained, sha256 in dict.fromkeys(one.model for one in used):
        if base_path is not None and sha256 not in base_path.content_hashes():
            note(
                f"--runs: runs trained {trained}, which has other weights than {base_path.reference}, so the captures are of changes of another model "
                "than their losses"
            )
    starts, lost = known_starts(of_models, models, base_source, compared, asked.bases.values())
    kept: Kept | None = {} if own_data else None
    findings = measure(
        models,
        base_source,
        {name: _first_columns(one, rank, compared) for name, one in asked.bases.items()},
        rank,
        targets,
        device,
        {name: directions for one in used for name, directions in one.directions.items()},
        compared,
        starts,
        unscaled=any(is_unscaled(one.basis.choices) for one in used if one.basis),
        kept=kept,
    )
    predictions = tuple(predict(used, models, findings)) if runs else None
    grouping, verdict = group_and_judge(findings, models, base_source, predictions, lost, rank, targets, device, compared)
    if unrecorded := unrecorded_note(of_models, verdict.recovered, compared):
        verdict = dataclasses.replace(verdict, sentences=(unrecorded, *verdict.sentences))
    function = None
    if kept is not None and base_path is not None and base_source is not None:
        modules = [found.module for found in findings]
        sources = (of_models, models, base_path, base_source)
        function = measure_function(own_data, *sources, modules, targets, kept, rank, compared, seed, hardware)
    read = [*models.values(), *([base_source] if base_source else [])]
    return Inspection(
        models=asked.references,
        base=asked.base,
        bases=asked.bases,
        rank=rank,
        side=compared,
        findings=tuple(findings),
        predictions=predictions,
        function=None if function is None else tuple(function),
        grouping=grouping,
        verdict=verdict,
        bytes_read=sum(source.bytes_read for source in read),
        seconds=time.perf_counter() - began,
    )


def open_inputs(
    references: Sequence[str],
    base: str | None,
    rank: int | None,
    side: Side | None,
    target_modules: tuple[str, ...] | None,
    runs: Sequence[str],
    weights: bool = True,
) -> Opened:
    """Open what `inspect` is given; arguments and errors are its own. Without `weights`, models need none."""
    if repeated := sorted({reference for reference in references if references.count(reference) > 1}):
        raise UsageError(f"{repeated[0]} is named twice; name it once")
    files = [reference for reference in references if Path(reference).is_file()]
    bases = dict(zip(short_names(files), (read_basis(Path(file)) for file in files), strict=True))
    sides: list[Side] = [one.choices.side for one in bases.values()]
    compared = side or (sides[0] if sides else "output")
    for name, one in bases.items():
        if one.choices.side != compared:
            raise CoraError(
                f"{name} is a basis of the {one.choices.side} side, but this inspection compares the {compared} side; inspect it separately with --side {one.choices.side}"
            )
    named = [reference for reference in references if reference not in files]
    paths = [resolve_model(reference, weights) for reference in named]
    named_base, base = base, base or _common_base(paths)
    if runs and not (named and base):
        raise UsageError(
            "--runs needs models and their --base, because it compares losses with the capture of the models' changes"
        )
    if runs and compared == "input":
        raise UsageError("--runs cannot be used with --side input, because the start of B consists of output directions")
    if len(named) == 1 and not bases and base is None:
        raise UsageError("one model alone cannot be compared; name other models, a basis file, or its --base")
    opening = open_source if weights else open_planned
    base_path = resolve_model(named_base, weights) if named_base else base_of(paths[0], weights) if base else None
    for path in paths:
        if base_path is not None and path.is_adapter and weights:
            (say_other_base if named_base else check_base)(path, base_path)
    if base_path is None:
        say_different_bases(paths)
    base_source = opening(base_path) if base_path else None
    models = {name: opening(path, base_source) for name, path in zip(short_names(named), paths, strict=True)}
    read = {source.reference: source.architecture for source in ([base_source] if base_source else []) + list(models.values())}
    _check_architectures(read | {name: one.architecture for name, one in bases.items()})
    for one in bases.values():
        if base_source and weights and (other := one.other_base(base_source)):
            note(other)
    rank = rank or min((one.rank for one in bases.values()), default=DEFAULT_RANK)
    targets = target_modules or next((one.choices.target_modules for one in bases.values()), DEFAULT_TARGET_MODULES)
    return Opened(
        dict(zip(models, named, strict=True)),
        dict(zip(models, paths, strict=True)),
        models,
        base,
        base_source,
        bases,
        rank,
        compared,
        targets,
    )


def group_and_judge(
    findings: Sequence[Findings],
    models: Mapping[str, WeightSource],
    base: WeightSource | None,
    predictions: Sequence[Prediction] | None,
    lost: Sequence[str],
    rank: int,
    target_modules: tuple[str, ...],
    device: torch.device,
    side: Side,
) -> tuple[Grouping, Verdict]:
    """The groups among the `models` that can be judged, and the verdict; `findings` are those of `measure` with the same arguments.

    Groups other than all models are measured in a second pass over the weights. `lost` as in `unjudged_models`.
    """
    unjudged = unjudged_models(findings, list(models), lost) if base else {}
    judged = {name: model for name, model in models.items() if base and name not in unjudged}
    grouping = find_groups(findings, list(judged))
    measured = None
    if base and len(judged) > 1 and not pooled_already(findings, grouping):
        measured = measure_groups(judged, base, group_names(grouping), rank, target_modules, device, side)
    return grouping, judge(findings, list(models), base is not None, predictions, unjudged, grouping, measured)


def _check_architectures(architectures: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `CoraError` where two inputs are of different architectures: a comparison of their directions would mean nothing."""
    for (one, first), (other, second) in itertools.combinations(architectures.items(), 2):
        if key := differing_key(first, second):
            raise CoraError(
                f"{key} is {first[key]} in {one}, but {second[key]} in {other}; only models of one architecture can be compared"
            )


def _refuse_copies(models: dict[str, WeightSource], targets: tuple[str, ...]) -> None:
    """Raise `CoraError` if two models have the same target weights, since each would capture all of the other's change.

    The first target matrix is compared first, and the others are read only if it is equal. `measure` checks the shapes.
    """
    alike: dict[str, list[tuple[str, list[str]]]] = {}
    for name, source in models.items():
        modules = source.targets(targets)
        alike.setdefault(source.content_hash(modules[:1]), []).append((name, modules))
    for suspects in alike.values():
        known: dict[str, str] = {}
        for name, modules in suspects if len(suspects) > 1 else ():
            if (other := known.setdefault(models[name].content_hash(modules), name)) != name:
                raise CoraError(f"{other} and {name} hold the same weights; name only one of them")


def short_names(references: Sequence[str]) -> list[str]:
    """The shortest path suffix that identifies each reference, such as `json` for `demo/models/json`, as text that figures can show."""
    names: list[str] = []
    for reference in references:
        parts = Path(reference).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        alone = (end for end in ends if end != BASE and sum(_ends_with(other, end) for other in references) == 1)
        names.append(writing.utf8(next(alone, reference)))
    return names


def _ends_with(reference: str, end: str) -> bool:
    return f"/{'/'.join(Path(reference).parts)}".endswith(f"/{end}")


def _common_base(models: Sequence[ModelPath]) -> str | None:
    """The base model that all of `models` name, if they are all adapters of the same one."""
    if not models or not all(model.is_adapter for model in models):
        return None
    named = {recorded_base(model.adapter_config()) for model in models}
    return named.pop() if len(named) == 1 else None


def _first_columns(basis: Basis, rank: int, side: Side) -> Directions:
    def directions(module: str, features: int) -> torch.Tensor | None:
        if basis.mapping.group_of(module) not in basis.directions:
            return None
        return basis.for_module(module, rank, features, side).double()

    return directions
