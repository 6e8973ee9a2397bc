"""Extract a basis file from models: plan the groups, merge and decompose each one, write the file and summarise it.

This is the entry point of `cora extract-basis`; the mathematics is in `merge` and `decompose`.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from cora_cli.adapters.base import say_different_bases, say_other_base
from cora_cli.basis.artifact import Basis, LayerEnergy, SourceRecord, holds_other_tensors, write_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError, UsageError
from cora_cli.extraction.decompose import decompose
from cora_cli.extraction.gram import one_thread_pool
from cora_cli.extraction.merge import Group, merge_group, plan
from cora_cli.extraction.pooled import layer_energies
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import note, progress
from cora_cli.weights.sources import WeightSource, open_source


@dataclasses.dataclass(frozen=True)
class KindSummary:
    """Share of ‖M‖_F² (0-1) in the kept directions over the `groups` groups of one kind (`q_proj`, `layer`, `global`)."""

    kind: str
    groups: int
    mean: float
    minimum: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class PooledSummary:
    """How much of their own energy the `weights` of one kind keep in the pooled directions (shares, 0-1; see `LayerEnergy`)."""

    kind: str
    weights: int
    kept: float
    minimum: float
    maximum: float
    chance: float
    own: float


@dataclasses.dataclass(frozen=True)
class ExtractionSummary:
    """The result of `extract_basis`; `without_gap` lists the groups whose subspace is not unique.

    `seconds` is the total time, of which `seconds_reading` went to reading files and `seconds_decomposing` to decompositions;
    the rest is checking, hashing and merging.
    """

    path: Path
    sha256: str
    models: int
    choices: BasisChoices
    kinds: tuple[KindSummary, ...]
    pooled: tuple[PooledSummary, ...]
    without_gap: tuple[str, ...]
    bytes_read: int
    seconds: float
    seconds_reading: float
    seconds_decomposing: float

    def render(self) -> str:
        """The summary as the plain text that the command prints."""
        choices = self.choices
        groups = sum(kind.groups for kind in self.kinds)
        width = max(len("group"), *(len(kind.kind) for kind in self.kinds))
        lines = [
            f"{self.path}: {groups} groups of rank {choices.rank} from {self.models} model{'s' if self.models > 1 else ''} "
            f"(share {choices.share}, merge {choices.merge}, source {choices.source}{', normalized' if choices.normalize else ''}, side {choices.side}, "
            f"method {choices.method}, component {choices.component})",
            "",
            "explained variance of the kept directions",
            f"{'group':<{width}}  {'count':>5}  {'mean':>7}  {'min':>7}  {'max':>7}",
        ]
        for kind in self.kinds:
            values = "  ".join(f"{value:7.2%}" for value in (kind.mean, kind.minimum, kind.maximum))
            lines.append(f"{kind.kind:<{width}}  {kind.groups:>5}  {values}")
        if self.pooled:
            lines += [
                "",
                "each weight's own energy: what the pooled directions keep of it, what random ones would, and a basis of that weight alone",
                f"{'group':<{width}}  {'count':>5}  {'kept':>7}  {'min':>7}  {'max':>7}  {'chance':>7}  {'own':>7}",
            ]
        for pool in self.pooled:
            values = "  ".join(f"{share:7.2%}" for share in (pool.kept, pool.minimum, pool.maximum, pool.chance, pool.own))
            lines.append(f"{pool.kind:<{width}}  {pool.weights:>5}  {values}")
        lines.append("")
        for name in self.without_gap:
            lines.append(f"{name}: no spectral gap at rank {choices.rank}, so this subspace is not unique in float64")
        lines.append(
            f"read {self.bytes_read / 1e9:.2f} GB in {self.seconds_reading:.1f} s ({self.seconds_reading / self.seconds:.0%} of the time), "
            f"decomposed in {self.seconds_decomposing:.1f} s; {self.seconds:.1f} s in total"
        )
        lines.append(f"sha256 {self.sha256}")
        return "\n".join(lines)


def extract_basis(
    models: Sequence[ModelPath],
    output: Path,
    choices: BasisChoices,
    base: ModelPath | None,
    device: torch.device,
    overwrite: bool = False,
) -> ExtractionSummary:
    """Extract the common subspace of `models` (at least one) and write it to `output`.

    `base` is the model that `--source delta` subtracts, and the base of every adapter in `models`; without it, each adapter
    uses the base that its configuration names. Raises `CoraError`, before any tensor is read, if files, shapes or choices do
    not fit, or if `output` exists and `overwrite` is not set.
    """
    began = time.perf_counter()
    check_place(models, output, choices, base, overwrite)
    base_source = open_source(base) if base else None
    sources, subtracted, groups = open_sources(models, choices, base, base_source, open_source)
    basis, seconds_decomposing = _extract(groups, sources, subtracted, choices, output, device)
    for one, other in itertools.combinations(basis.sources, 2):
        if one.hash == other.hash:
            note(f"{one.reference} and {other.reference} hold the same weights there, which count twice")
    if subtracted is not None:
        _say_unchanged(sources, subtracted, list(basis.modules))
    write_basis(output, basis)
    read = [*sources, *([base_source] if base_source else [])]
    return ExtractionSummary(
        path=output,
        sha256=basis.sha256,
        models=len(models),
        choices=choices,
        kinds=_summarise(basis),
        pooled=_summarise_pooled(basis),
        without_gap=tuple(name for name, gap in basis.gaps.items() if not gap),
        bytes_read=sum(source.bytes_read for source in read),
        seconds=time.perf_counter() - began,
        seconds_reading=sum(source.seconds_reading for source in read),
        seconds_decomposing=seconds_decomposing,
    )


def open_sources(
    models: Sequence[ModelPath],
    choices: BasisChoices,
    base: ModelPath | None,
    base_source: WeightSource | None,
    opening: Callable[[ModelPath, WeightSource | None], WeightSource],
) -> tuple[list[WeightSource], WeightSource | None, list[Group]]:
    """The models' weights, those that are subtracted, and the groups to decompose; reads no tensor.

    `base_source` has the weights of `base`, `opening` is `open_source` or `open_planned`. Says what of the models is not read, and which were trained
    on another base. Raises `CoraError` where files, shapes or choices do not fit, or a model would count twice.
    """
    _refuse_repeated(models)
    for model in models:
        if base is not None and model.is_adapter:
            say_other_base(model, base)
    if base is None:
        say_different_bases(models)
    sources = [opening(model, base_source) for model in models]
    subtracted = base_source if choices.source == "delta" else None
    groups = plan(sources, subtracted, choices)
    for source in sources:
        source.say_left_out(choices.target_modules)
    return sources, subtracted, groups


def check_place(
    models: Sequence[ModelPath], output: Path, choices: BasisChoices, base: ModelPath | None, overwrite: bool
) -> None:
    """Raise `CoraError` for models, a base or an output that cannot be those of an extraction."""
    if not models:
        raise UsageError("no model was given; name at least one to extract a basis from")
    choices.require_base(base is not None)
    if output.is_dir() or (output.exists() and not overwrite):
        remedy = "name a file instead" if output.is_dir() else "use --overwrite to replace it"
        raise CoraError(f"{output} {'is a directory' if output.is_dir() else 'exists already'}; {remedy}")
    for model in (*models, *([base] if base else [])):
        if output.resolve() in {
            file.resolve() for file in [*(model.weight_files() if model.has_weights else ()), *model.path.glob("*.json")]
        }:
            raise CoraError(f"{output} is a file of {model.reference}, which is read; write the basis to another file")
    if output.exists() and holds_other_tensors(output):
        raise CoraError(
            f"{output} holds tensors and is no basis, so --overwrite does not replace it; choose another name, or remove it"
        )
    if base is not None and choices.source == "weights" and not any(model.is_adapter for model in models):
        raise UsageError("--base has no effect on complete models with --source weights; leave it out, or use --source delta")


def _refuse_repeated(models: Sequence[ModelPath]) -> None:
    """Raise `UsageError` for a model that would count twice."""
    places: set[Path] = set()
    for model in models:
        if (place := model.path.resolve()) in places:
            raise UsageError(f"{model.reference} is named twice; name it once")
        places.add(place)


def _extract(
    groups: Sequence[Group],
    sources: Sequence[WeightSource],
    base: WeightSource | None,
    choices: BasisChoices,
    output: Path,
    device: torch.device,
) -> tuple[Basis, float]:
    """The basis, and how many seconds its decompositions took."""
    directions, values, energies, gaps = {}, {}, {}, {}
    layers: dict[str, LayerEnergy] = {}
    seconds = 0.0
    modules = {module: shape for group in groups for module, shape in group.modules.items()}
    # Progress counts matrices rather than groups, because `--share global` has a single group.
    most_rows = max(group.rows for group in groups)
    pooled = sum(len(group.modules) for group in groups if len(group.modules) > 1)
    matrices = (len(modules) + pooled) * len(sources)
    with one_thread_pool(device, most_rows), progress("extracting", matrices, "matrices") as shown:
        for group in groups:
            merged = merge_group(group, sources, base, choices, device, partial(shown.advance, note=group.name))
            began = time.perf_counter()
            found = decompose(merged, choices.rank, choices.component)
            seconds += time.perf_counter() - began
            del merged  # otherwise it would stay in memory while the next one is summed
            directions[group.name] = found.basis.float()
            values[group.name] = found.singular_values
            energies[group.name] = torch.tensor(found.total_energy, dtype=torch.float64)
            gaps[group.name] = found.gap
            if len(group.modules) > 1:
                advance = partial(shown.advance, note=f"{group.name}: energy kept")
                layers |= layer_energies(group, directions[group.name], sources, base, choices, device, advance)
    basis = Basis(
        path=output,
        choices=choices,
        mapping=choices.mapping,
        directions=directions,
        singular_values=values,
        total_energy=energies,
        gaps=gaps,
        modules=modules,
        sources=tuple(_record(source, modules) for source in sources),
        base=_record(base, modules) if base else None,
        architecture=sources[0].architecture,
        layers=layers,
    )
    return basis, seconds


def _say_unchanged(sources: Sequence[WeightSource], base: WeightSource, modules: Sequence[str]) -> None:
    """Say which models left weights of `modules` as the base has them, as an adapter does that was trained on fewer layers."""
    for source in sources:
        same = [module for module in modules if _is_unchanged(source, base, module)]
        there = (
            "there"
            if len(same) == len(modules)
            else f"in {len(same)} of the {len(modules)} matrices, such as {same[0]}"
            if same
            else ""
        )
        if there:
            note(
                f"{source.reference} holds the weights of the base {there}, so its change is zero, and it counts as a model all the same"
            )


def _is_unchanged(source: WeightSource, base: WeightSource, module: str) -> bool:
    """Whether a weight that was read is that of the base."""
    rank = source.own_rank(module, base)
    return rank == 0 if rank is not None else source.content_hash([module]) == base.content_hash([module])


def _record(source: WeightSource, modules: dict[str, tuple[int, int]]) -> SourceRecord:
    return SourceRecord(source.reference, source.revision, source.content_hash(modules))


def _kind(basis: Basis, group: str) -> str:
    return "layer" if basis.choices.share == "layer" else group.rpartition(".")[2]


def _summarise_pooled(basis: Basis) -> tuple[PooledSummary, ...]:
    kinds: dict[str, list[LayerEnergy]] = {}
    for module, energy in basis.layers.items():
        kinds.setdefault(_kind(basis, basis.mapping.group_of(module) or module), []).append(energy)
    found = []
    for kind, energies in kinds.items():
        kept, chance, own = zip(*(dataclasses.astuple(energy) for energy in energies), strict=True)
        n = len(energies)
        found.append(PooledSummary(kind, n, sum(kept) / n, min(kept), max(kept), sum(chance) / n, sum(own) / n))
    return tuple(found)


def _summarise(basis: Basis) -> tuple[KindSummary, ...]:
    kinds: dict[str, list[float]] = {}
    for group, share in basis.explained_variance.items():
        kinds.setdefault(_kind(basis, group), []).append(share)
    return tuple(
        KindSummary(kind, len(shares), sum(shares) / len(shares), min(shares), max(shares)) for kind, shares in kinds.items()
    )
