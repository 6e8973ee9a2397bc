"""Weight sources -> numbers per weight matrix, with the same matrix of all models in memory and nothing else.

What the numbers amount to is `verdict`'s business, how they look `document`'s.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping

import torch

from cora_cli.basis.choices import BasisChoices, Side
from cora_cli.errors import CoraError
from cora_cli.extraction.gram import one_thread_pool
from cora_cli.extraction.merge import plan
from cora_cli.inspection.changes import Change, leave_one_out
from cora_cli.inspection.spectra import Spectra, spectra
from cora_cli.inspection.subspaces import chance, energy, gram, in_common, leading, overlap, principal_angles
from cora_cli.progress import progress
from cora_cli.weights.sources import WeightSource

BASE = "base model"
WEIGHTS, DELTA, FILE = "W", "ΔW", "basis"
"""Of what two subspaces are: of the weights, of their change from the base, or of basis files."""
POOLED, MEAN, PAPER, ALONG = "pooled ΔW", "mean ΔW", "mean W", "along mean"
OWN, START, CHANCE, CEILING = "base W", "common start", "chance", "ceiling"
"""What the energy of a left-out ΔW is measured in; see `Capture`."""


def chance_of(basis: str) -> str:
    """The share that stands for as many random directions as the basis file of that name has."""
    return f"{CHANCE}, {basis}"


Directions = Callable[[str, int], torch.Tensor | None]
"""A module's name and dimension on the inspected side -> orthonormal (dimension, k) float64, or None where there is nothing for that module."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Overlap (0-1) of two subspaces of the kind WEIGHTS, DELTA or FILE, what chance gives, and the least, median and largest
    principal angle in degrees. `other` may be BASE, whose subspace is that of its weights.
    """

    kind: str
    one: str
    other: str
    value: float
    chance: float
    angles: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Capture:
    """Shares (0-1) of the energy ‖ΔW‖_F² of the model `left_out` inside bases that were made without it.

    POOLED: leading directions of Σ ΔWⱼΔWⱼᵀ over the other models; MEAN: of the mean of their ΔW; PAPER: of the mean of their W
    (equation 2 of arXiv 2409.02119); OWN: of the base model's W; START: the most that as many directions hold of those that both its
    adapter and another model's are known to have begun with, filled up with random ones; CHANCE: k / d for a random basis. PAPER, OWN,
    START and CHANCE have the k directions of POOLED, which are fewer than the rank where the changes have fewer. CEILING: of the model's
    own ΔW, which no basis of that rank exceeds; `chance_of` a basis: of as many random directions as that has; ALONG: the share along the
    others' mean ΔW as one direction of the space of matrices. Other names are bases that were given.
    """

    left_out: str
    shares: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that was measured of one weight matrix `module`, stored as (out, in) = `shape`; `rank` is the most directions that were taken.

    `kind` is the name's last part, `layer` its first number. `sizes`: ‖W − W_base‖_F / ‖W_base‖_F by model, empty without a base.
    `spectra` are those of the mean of the models' W, None without models.
    """

    module: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    sizes: dict[str, float]
    overlaps: tuple[Overlap, ...]
    captures: tuple[Capture, ...]
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
) -> list[Findings]:
    """Measure every target matrix, or for the side of its inputs its transpose. `bases` are compared with everything, `hidden` only
    capture; `starts` are what models are known to have begun with.

    Raises `CoraError` where models differ in shape or `rank` is more than a matrix has.
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
            given, only, begun = (_frames(some, group.name, group.rows, device) for some in (bases, hidden, starts or {}))
            found.append(_measure(group.name, shape, models, base, given, only, begun, rank, device, side))
            shown.advance(note=group.name)
    return found


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
) -> Findings:
    base_weight = _not_zero(_read(base, module, device, side), module, BASE) if base else None
    changes: dict[str, Change] = {}
    sizes: dict[str, float] = {}
    of_weights: dict[str, torch.Tensor] = {}
    mean: torch.Tensor | None = None
    for name, source in models.items():  # of their weights only the sum stays, of their changes each
        if base is None or base_weight is None:
            weight = _read(source, module, device, side)
        else:
            change = _change(source, module, base, base_weight, side)
            weight = change.add_to(base_weight.clone())
            sizes[name] = math.sqrt(change.energy / energy(base_weight))
            if sizes[name] > 0:  # a model that equals the base there has no directions of change
                changes[name] = change
        of_weights[name] = leading(gram(_not_zero(weight, module, name)), rank)
        mean = weight / len(models) if mean is None else mean.add_(weight, alpha=1 / len(models))
    of_changes = {name: change.leading(rank) for name, change in changes.items()}
    of_base = leading(gram(base_weight), rank) if base_weight is not None else None
    overlaps = [
        _overlap(kind, one, frames[one], other, frames[other])
        for kind, frames in ((WEIGHTS, of_weights), (DELTA, of_changes), (FILE, bases))
        for one, other in itertools.combinations(frames, 2)
    ]
    captures = []
    if base_weight is not None and of_base is not None:
        overlaps += [
            _overlap(kind, name, frame, BASE, of_base)
            for kind, frames in ((WEIGHTS, of_weights), (DELTA, of_changes), (FILE, bases))
            for name, frame in frames.items()
        ]
        for name, others in leave_one_out(changes, base_weight.shape):
            change, size = changes[name], rank
            shares = {CEILING: change.captured_by(of_changes[name])}
            if others is not None:
                pooled = others.leading(rank)
                size = pooled.shape[1]
                shares[POOLED] = change.captured_by(pooled)
                shares |= _in_mean(change, others.mean, base_weight, rank, size)
                if (start := in_common(name, starts)) is not None:
                    shares[START] = _within(start, change, size)
            shares |= {CHANCE: chance(1, size, len(base_weight)), OWN: change.captured_by(of_base[:, :size])}
            shares |= {given: change.captured_by(frame) for given, frame in {**hidden, **bases}.items()}
            shares |= {chance_of(given): chance(1, frame.shape[1], len(frame)) for given, frame in bases.items()}
            captures.append(Capture(name, shares))
    layer = re.search(r"\d+", module)
    return Findings(
        module=module,
        kind=module.rpartition(".")[2],
        layer=int(layer[0]) if layer else None,
        shape=shape,
        rank=rank,
        sizes=sizes,
        overlaps=tuple(overlaps),
        captures=tuple(captures),
        spectra=spectra(mean) if mean is not None and energy(mean) > 0 else None,
    )


def _not_zero(weight: torch.Tensor, module: str, name: str) -> torch.Tensor:
    if not energy(weight) > 0:
        raise CoraError(f"{module} of {name} is zero and has no directions; leave it out with --target-modules")
    return weight


def _read(source: WeightSource, module: str, device: torch.device, side: Side) -> torch.Tensor:
    return _oriented(source.read(module).to(device).double(), side)


def _oriented(matrix: torch.Tensor, side: Side) -> torch.Tensor:
    return matrix.T if side == "input" else matrix


def _change(source: WeightSource, module: str, base: WeightSource, base_weight: torch.Tensor, side: Side) -> Change:
    """W − W_base of one model, in factors where it is known so and these are smaller."""
    device, known = base_weight.device, source.own_rank(module, base)
    if known is not None and known < min(base_weight.shape):
        left, right = (factor.to(device) for factor in source.own_factors(module, base))
        return Change(right.T, left.T) if side == "input" else Change(left, right)
    delta = source.own_delta(module, base)
    return Change(_read(source, module, device, side) - base_weight if delta is None else _oriented(delta.to(device), side))


def _in_mean(change: Change, mean: Change, base_weight: torch.Tensor, rank: int, size: int) -> dict[str, float]:
    """The shares of `change` in the `mean` ΔW of the other models, and in `size` directions of their mean W."""
    found = {PAPER: change.captured_by(leading(gram(mean.add_to(base_weight.clone())), size))}
    if mean.energy > 0:
        found |= {MEAN: change.captured_by(mean.leading(rank)), ALONG: change.aligned_with(mean)}
    return found


def _within(start: torch.Tensor, change: Change, size: int) -> float:
    """The most of `change` that `size` directions in the span of `start`, (rows, k), hold; where that has fewer, they are made up by
    random ones of the rest of the space."""
    rows, known = start.shape
    values = torch.linalg.svdvals(start.T @ change.factor)[:size]
    held = energy(values) / change.energy
    return held + (1 - held) * (chance(1, size - known, rows - known) if size > known else 0.0)


def _overlap(kind: str, one: str, frame: torch.Tensor, other: str, against: torch.Tensor) -> Overlap:
    angles = principal_angles(frame, against).rad2deg()
    least, median, largest = angles.min().item(), angles.quantile(0.5).item(), angles.max().item()
    by_chance = chance(frame.shape[1], against.shape[1], len(frame))
    return Overlap(kind, one, other, overlap(frame, against), by_chance, (least, median, largest))
