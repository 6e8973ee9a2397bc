"""Measures every weight matrix: sizes of the changes, overlaps, leave-one-out captures and spectra. One matrix is in memory at a time.

`sharing` draws the verdict from these numbers, and `inspection_document` formats them.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping

import torch

from cora_cli.basis.choices import BasisChoices, Side
from cora_cli.extraction.gram import one_thread_pool
from cora_cli.extraction.merge import plan
from cora_cli.inspection.around_mean import AroundMean, around_mean
from cora_cli.inspection.changes import Change, change_of, leave_one_out, not_zero, read_matrix
from cora_cli.inspection.spectra import Spectra, spectra
from cora_cli.inspection.subspaces import chance, chance_deviation, energy, gram, in_common, leading, overlap, principal_angles
from cora_cli.progress import progress
from cora_cli.weights.sources import WeightSource

BASE = "base model"
WEIGHTS, DELTA, FILE = "W", "ΔW", "basis"
"""The kinds of subspaces that are compared: of the weights, of their changes from the base model, and of basis files."""
POOLED, MEAN, PAPER, ALONG = "pooled ΔW", "mean ΔW", "mean W", "along mean"
UNSCALED_POOLED, UNSCALED_MEAN = "pooled ΔW, not normalized", "mean ΔW, not normalized"
OWN, START, CHANCE, CEILING = "base W", "common start", "chance", "ceiling"
"""The bases whose captures are measured, as they are named in tables and in JSON; see `Capture`."""


def chance_of(basis: str) -> str:
    """The name of the capture by random directions, as many as the basis file `basis` has."""
    return f"{CHANCE}, {basis}"


Directions = Callable[[str, int], torch.Tensor | None]
"""Maps a module's name and its dimension on the inspected side to orthonormal directions (dimension, k) float64, or None if it has none."""
Kept = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
"""By left-out model and module: the directions (rows, k) of POOLED and of OWN in `Capture`, float64 on the CPU."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Overlap (0-1) of two subspaces of the kind WEIGHTS, DELTA or FILE, its mean by chance (0-1), and the smallest, median and largest
    principal angle in degrees. If `other` is BASE, the second subspace is that of the base model's weights.
    """

    kind: str
    one: str
    other: str
    value: float
    chance: float
    angles: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Held:
    """How much of the ΔW of `model` a basis from other models holds in one weight matrix.

    `by` names the source of the basis: a model (its leading directions of ΔW) or a group of models. All numbers are shares (0-1) of
    ‖ΔW‖_F²: `value` in the basis, `own` in as many leading directions of the base model's W, `chance` and `deviation` the mean and the
    standard deviation for as many random directions, `ceiling` in the leading directions of ΔW itself.
    """

    model: str
    by: str
    value: float
    own: float
    chance: float
    deviation: float
    ceiling: float


@dataclasses.dataclass(frozen=True)
class Capture:
    """Captures: shares (0-1) of the energy ‖ΔW‖_F² of the model `left_out` inside several bases, by the name of the basis.

    - POOLED: leading directions of Σ ΔWⱼΔWⱼᵀ / ‖ΔWⱼ‖_F² over the other models.
    - MEAN: leading directions of the mean of ΔWⱼ / ‖ΔWⱼ‖_F over the other models.
    - UNSCALED_POOLED, UNSCALED_MEAN: the same without dividing by ‖ΔWⱼ‖_F, as `cora extract-basis --source delta` computes them; only
      where runs used such a basis.
    - PAPER: leading directions of the mean W of the other models (equation 2 of arXiv 2409.02119).
    - OWN: leading directions of the base model's W.
    - START: the best directions among those from which both this adapter and another one are known to have started. If there are
      fewer than k, random directions fill up the rest.
    - CHANCE: k / d, the mean for a random basis of k directions in d dimensions.
    - CEILING: leading directions of the model's own ΔW; no basis of this rank captures more.
    - ALONG: the share along the mean of MEAN, taken as one direction in the space of matrices.
    - `chance_of(name)`: random directions, as many as the basis file `name` has.

    PAPER, OWN, START and CHANCE use k directions, as many as POOLED has; k is below the rank if the changes have a lower rank. Every
    other name is a basis that the caller gave. `deviation` is the standard deviation (0-1) whose mean is CHANCE.
    """

    left_out: str
    shares: dict[str, float]
    deviation: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """All measurements of the weight matrix `module`, stored as (out, in) = `shape`; `rank` is the largest number of directions used.

    `kind` is the last part of the module's name, `layer` the first number in it. `sizes` is ‖W − W_base‖_F / ‖W_base‖_F by model,
    empty without a base model. `pairs` holds what each model's directions hold of each other one, in both directions.
    `spectra` belongs to the mean of the models' W and is None without models.
    """

    module: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    sizes: dict[str, float]
    overlaps: tuple[Overlap, ...]
    captures: tuple[Capture, ...]
    pairs: tuple[Held, ...]
    spectra: Spectra | None


def measure(
    models: Mapping[str, WeightSource],
    base: WeightSource | None,
    bases: Mapping[str, Directions],
    rank: int,
    target_modules: tuple[str, ...],
    device: torch.device,
    hidden: Mapping[str, Directions],
    side: Side = "output",
    starts: Mapping[str, Directions] | None = None,
    unscaled: bool = False,
    kept: Kept | None = None,
) -> list[Findings]:
    """Measure every target matrix; for the input side, its transpose.

    Each ΔW is divided by its Frobenius norm, matrix by matrix, before models are pooled: otherwise one model with a large change would
    be most of every pool. Only PAPER is computed from the weights as they are, and with `unscaled` also UNSCALED_POOLED and UNSCALED_MEAN.

    `bases` are given bases, for which overlaps and captures are reported. Of the bases in `hidden` only the captures are measured.
    `starts` are the known starting directions of models. The directions behind two of the captures are added to `kept`. Raises `CoraError` if the models differ in shape, if `rank` is more than a
    matrix has, or if a matrix is zero.
    """
    sources = list(models.values()) or ([base] if base else [])
    if not sources:
        return []
    groups = plan(sources, base, BasisChoices(merge="gram", rank=rank, side=side, target_modules=target_modules))
    found = []
    most_rows = max(group.rows for group in groups)
    with one_thread_pool(device, most_rows), progress("inspecting", len(groups), "matrices") as shown:
        for group in groups:
            [shape] = group.modules.values()
            given, only, started = (_frames(some, group.name, group.rows, device) for some in (bases, hidden, starts or {}))
            found.append(_measure(group.name, shape, models, base, given, only, started, rank, device, side, unscaled, kept))
            shown.advance(note=group.name)
    return found


def held_by(model: str, by: str, change: Change, basis: torch.Tensor, of_base: torch.Tensor, ceiling: float) -> Held:
    """What `basis` (rows, k), computed from `by`, holds of the `change` of `model`; `of_base` are the base model's directions."""
    rows, size = basis.shape
    return Held(
        model,
        by,
        change.captured_by(basis),
        change.captured_by(of_base[:, :size]),
        chance(1, size, rows),
        chance_deviation(size, rows, change.concentration),
        ceiling,
    )


def _frames(bases: Mapping[str, Directions], module: str, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    frames = {name: directions(module, rows) for name, directions in bases.items()}
    return {name: frame.to(device) for name, frame in frames.items() if frame is not None}


def _measure(
    module: str,
    shape: tuple[int, int],
    models: Mapping[str, WeightSource],
    base: WeightSource | None,
    bases: Mapping[str, torch.Tensor],
    hidden: Mapping[str, torch.Tensor],
    starts: Mapping[str, torch.Tensor],
    rank: int,
    device: torch.device,
    side: Side,
    unscaled: bool,
    kept: Kept | None,
) -> Findings:
    base_weight = not_zero(read_matrix(base, module, device, side), module, BASE) if base else None
    read: dict[str, Change] = {}
    changes: dict[str, Change] = {}
    sizes: dict[str, float] = {}
    around: AroundMean | None = None
    if base is not None and base_weight is not None:
        read = {name: change_of(source, module, base, base_weight, side) for name, source in models.items()}
        sizes = {name: math.sqrt(change.energy / energy(base_weight)) for name, change in read.items()}
        changes = {name: change for name, change in read.items() if sizes[name] > 0}  # a zero change has no directions
        around = around_mean(base_weight, changes, len(models), rank)
    of_base = None
    if around is not None:
        of_base = around.leading({}, rank)
        of_weights = {name: around.leading({name: 1.0}, rank) if name in changes else of_base for name in models}
        of_mean: Spectra | None = around.spectra()
    else:
        of_weights, of_mean = {}, None
        mean: torch.Tensor | None = None
        for name, source in models.items():  # of the weights only their mean is kept
            if base_weight is None:
                weight = read_matrix(source, module, device, side)
            else:
                weight = read[name].add_to(base_weight.clone())
            of_weights[name] = leading(gram(not_zero(weight, module, name)), rank)
            mean = weight / len(models) if mean is None else mean.add_(weight, alpha=1 / len(models))
        if base_weight is not None:
            of_base = leading(gram(base_weight), rank)
        if mean is not None and energy(mean) > 0:
            of_mean = spectra(mean)
    of_changes = {name: change.leading(rank) for name, change in changes.items()}
    overlaps = [
        _overlap(kind, one, frames[one], other, frames[other])
        for kind, frames in ((WEIGHTS, of_weights), (DELTA, of_changes), (FILE, bases))
        for one, other in itertools.combinations(frames, 2)
    ]
    captures, pairs = [], []
    if base_weight is not None and of_base is not None:
        overlaps += [
            _overlap(kind, name, frame, BASE, of_base)
            for kind, frames in ((WEIGHTS, of_weights), (DELTA, of_changes), (FILE, bases))
            for name, frame in frames.items()
        ]
        of_others = _by_other_models(changes, base_weight, around, rank, unscaled, len(models))
        for name, change in changes.items():
            ceiling = change.captured_by(of_changes[name])
            shares, pooled = {CEILING: ceiling, **of_others[name][0]}, of_others[name][1]
            size = rank if pooled is None else pooled.shape[1]
            if kept is not None and pooled is not None:
                kept[name, module] = pooled.cpu(), of_base[:, :size].cpu()
            if POOLED in shares and (start := in_common(name, starts)) is not None:
                shares[START] = _within(start, change, size)
            shares |= {CHANCE: chance(1, size, len(base_weight)), OWN: change.captured_by(of_base[:, :size])}
            shares |= {given: change.captured_by(frame) for given, frame in {**hidden, **bases}.items()}
            shares |= {chance_of(given): chance(1, frame.shape[1], len(frame)) for given, frame in bases.items()}
            captures.append(Capture(name, shares, chance_deviation(size, len(base_weight), change.concentration)))
            pairs += [
                held_by(name, other, change, frame, of_base, ceiling) for other, frame in of_changes.items() if other != name
            ]
    return Findings(
        module=module,
        kind=module.rpartition(".")[2],
        layer=layer_of(module),
        shape=shape,
        rank=rank,
        sizes=sizes,
        overlaps=tuple(overlaps),
        captures=tuple(captures),
        pairs=tuple(pairs),
        spectra=of_mean,
    )


def layer_of(module: str) -> int | None:
    """The first number in a module's name, or None."""
    number = re.search(r"\d+", module)
    return int(number[0]) if number else None


def _by_other_models(
    changes: Mapping[str, Change],
    base_weight: torch.Tensor,
    around: AroundMean | None,
    rank: int,
    unscaled: bool,
    models: int,
) -> dict[str, tuple[dict[str, float], torch.Tensor | None]]:
    """Per model, its captures by bases from the other models (none if there is no other), and the directions of POOLED.

    PAPER uses as many directions. It alone needs the mean of the changes as they are, and is of all `models`, as in `extract-basis`: those without a
    change have the base's weight.
    """
    found: dict[str, tuple[dict[str, float], torch.Tensor | None]] = {}
    for name, others in leave_one_out(changes, base_weight.shape):
        if others is None:
            found[name] = {}, None
            continue
        change, pooled = changes[name], others.leading(rank)
        found[name] = {POOLED: change.captured_by(pooled)}, pooled
        if others.mean.energy > 0:
            found[name][0].update(
                {MEAN: change.captured_by(others.mean.leading(rank)), ALONG: change.aligned_with(others.mean)}
            )
    for name, others in leave_one_out(changes, base_weight.shape, normalize=False):
        shares, directions = found[name]
        if others is not None and directions is not None:
            size, change = directions.shape[1], changes[name]
            if around is None:
                paper = leading(gram(others.mean.add_to(base_weight.clone(), (len(changes) - 1) / (models - 1))), size)
            else:
                paper = around.leading({other: 1 / (models - 1) for other in changes if other != name}, size)
            shares[PAPER] = change.captured_by(paper)
            if unscaled:
                shares[UNSCALED_POOLED] = change.captured_by(others.leading(rank))
                if others.mean.energy > 0:
                    shares[UNSCALED_MEAN] = change.captured_by(others.mean.leading(rank))
    return found


def _within(start: torch.Tensor, change: Change, size: int) -> float:
    """The largest capture (0-1) of `change` by `size` directions in the span of `start`, (rows, k). If `start` has fewer directions,
    the mean capture of random ones from the rest of the space is added."""
    rows, known = start.shape
    values = torch.linalg.svdvals(start.T @ change.factor)[:size]
    held = energy(values) / change.energy
    return held + (1 - held) * (chance(1, size - known, rows - known) if size > known else 0.0)


def _overlap(kind: str, one: str, frame: torch.Tensor, other: str, against: torch.Tensor) -> Overlap:
    angles = principal_angles(frame, against).rad2deg()
    least, median, largest = angles.min().item(), angles.quantile(0.5).item(), angles.max().item()
    by_chance = chance(frame.shape[1], against.shape[1], len(frame))
    return Overlap(kind, one, other, overlap(frame, against), by_chance, (least, median, largest))
