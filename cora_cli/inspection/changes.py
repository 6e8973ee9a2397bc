"""The change ΔW of each model in one weight matrix, dense or as low-rank factors, and the leave-one-out sums over all other models.

`measure` compares these changes with each other and with bases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.extraction.gram import add_gram, empty_gram
from cora_cli.extraction.lowrank import gram_factor
from cora_cli.inspection.subspaces import captured, energy, gram, leading, leading_of_tall
from cora_cli.weights.sources import WeightSource


class Change:
    """ΔW (rows, columns) float64: `left` itself, or the product L R if `right` is given. The product is never stored.

    `factor` is F with F Fᵀ = ΔW ΔWᵀ, so F has the same energy, left singular vectors and captures as ΔW.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        self.left, self.right = left, right
        self.factor = left if right is None else gram_factor([(left, right)], centred=False)[0]

    @cached_property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return energy(self.factor)

    def leading(self, rank: int) -> torch.Tensor:
        """The leading left singular vectors (rows, k), k ≤ `rank`; see `subspaces.leading`."""
        rows, columns = self.factor.shape
        return leading_of_tall(self.factor, rank) if 2 * columns <= rows else leading(self._gram, rank)

    def captured_by(self, basis: torch.Tensor) -> float:
        """The share (0-1) of ‖ΔW‖_F² inside the span of `basis`, (rows, k)."""
        return captured(basis, self.factor)

    def aligned_with(self, other: Change) -> float:
        """⟨M, N⟩² / (‖M‖_F²·‖N‖_F²), 0-1: the share of ‖M‖_F² along N, taken as one direction in the space of matrices."""
        one, two = (self, other) if self.right is not None else (other, self)
        if one.right is None:
            product = (one.left * two.left).sum()
        elif two.right is None:  # ⟨L R, M⟩ = ⟨L, M Rᵀ⟩
            product = (one.left * (two.left @ one.right.T)).sum()
        else:
            product = ((one.left.T @ two.left) * (one.right @ two.right.T)).sum()
        return float(product.item() ** 2 / (self.energy * other.energy))

    @property
    def scale(self) -> float:
        """1 / ‖ΔW‖_F, the factor that normalises ΔW; ΔW must not be zero."""
        return 1.0 / math.sqrt(self.energy)

    @cached_property
    def concentration(self) -> float:
        """‖ΔW ΔWᵀ‖_F² / ‖ΔW‖_F⁴, between 1 / rows and 1: one over the number of equally strong directions with the same value."""
        rows, columns = self.factor.shape
        narrow = self.factor.T @ self.factor if 2 * columns <= rows else self._gram.tril()
        square = energy(narrow) if 2 * columns <= rows else 2 * energy(narrow) - energy(narrow.diagonal())
        return square / self.energy**2

    def add_to(self, matrix: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Add `scale`·ΔW to `matrix` (rows, columns) in place and return it."""
        if self.right is None:
            return matrix.add_(self.left, alpha=scale)
        return matrix.addmm_(self.left, self.right, alpha=scale)

    def add_gram_to(self, total: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Add `scale`²·ΔW ΔWᵀ to the lower triangle of `total` (rows, rows) in place and return it."""
        if self.right is None:
            return total.add_(self._gram, alpha=scale**2)
        return add_gram(total, self.factor if scale == 1.0 else scale * self.factor)

    @cached_property
    def _gram(self) -> torch.Tensor:
        return gram(self.factor)


def not_zero(weight: torch.Tensor, module: str, name: str) -> torch.Tensor:
    """`weight` itself. Raises `CoraError` naming `module` and the model if it is zero."""
    if not energy(weight) > 0:
        raise CoraError(f"{module} of {name} is zero and has no directions; exclude it with --target-modules")
    return weight


def read_matrix(source: WeightSource, module: str, device: torch.device, side: Side) -> torch.Tensor:
    """The weight of `module` in float64, transposed for the input side."""
    return _oriented(source.read(module).to(device).double(), side)


def _oriented(matrix: torch.Tensor, side: Side) -> torch.Tensor:
    return matrix.T if side == "input" else matrix


def change_of(source: WeightSource, module: str, base: WeightSource, base_weight: torch.Tensor, side: Side) -> Change:
    """W − W_base of one model, as low-rank factors if they are known and smaller than the matrix."""
    device, known = base_weight.device, source.own_rank(module, base)
    if known is not None and known < min(base_weight.shape):
        left, right = (factor.to(device) for factor in source.own_factors(module, base))
        return Change(right.T, left.T) if side == "input" else Change(left, right)
    delta = source.own_delta(module, base)
    return Change(
        read_matrix(source, module, device, side) - base_weight if delta is None else _oriented(delta.to(device), side)
    )


@dataclasses.dataclass(frozen=True)
class Others:
    """All models but one: `leading(rank)` gives the leading directions (rows, k) of Σ sⱼ²·ΔWⱼΔWⱼᵀ, `mean` is the mean of sⱼ·ΔWⱼ.

    sⱼ is 1 / ‖ΔWⱼ‖_F if the changes are normalised, else 1.
    """

    leading: Callable[[int], torch.Tensor]
    mean: Change


def pooled_directions(changes: Sequence[Change], rank: int) -> torch.Tensor:
    """The leading directions (rows, k), k ≤ `rank`, of the pool of all `changes`, each normalised to ‖ΔWⱼ‖_F = 1."""
    rows = changes[0].factor.shape[0]
    if _are_narrow(changes, rows):
        return Change(torch.cat([change.scale * change.factor for change in changes], dim=1)).leading(rank)
    total = empty_gram(changes[0].factor)
    for change in changes:
        change.add_gram_to(total, change.scale)
    return leading(total, rank)


def leave_one_out(
    changes: Mapping[str, Change], shape: torch.Size, normalize: bool = True
) -> Iterator[tuple[str, Others | None]]:
    """For each model, the sums over the other models, or None if there is no other model; `shape` is that of ΔW.

    With `normalize`, each ΔWⱼ is divided by its Frobenius norm, so that every model has the same energy and the directions do not depend
    on how far a model was trained; no change may be zero then.

    Each sum runs over the other models alone, because subtracting one model from a total would lose digits. Low-rank factors are
    concatenated if they are narrow together. Otherwise the list of models is halved recursively, and each half starts from the sums over
    the models outside it: this takes n·log n additions and keeps log n pairs of sums in memory.
    """
    names = list(changes)
    scales = {name: change.scale if normalize else 1.0 for name, change in changes.items()}
    if len(names) < 2:
        yield from ((name, None) for name in names)
    elif _are_narrow(list(changes.values()), shape[0]):
        for name in names:
            yield name, _side_by_side([(change, scales[other]) for other, change in changes.items() if other != name])
    else:
        one = changes[names[0]].factor
        start = empty_gram(one), torch.zeros(shape, dtype=one.dtype, device=one.device)
        for name, pooled, total in _halve(names, *start, changes, scales):
            yield name, Others(partial(leading, pooled), Change(total / (len(names) - 1)))


def _are_narrow(changes: Sequence[Change], rows: int) -> bool:
    """Whether all changes are low-rank factors that have few columns together."""
    in_factors = all(change.right is not None for change in changes)
    return in_factors and 2 * sum(change.factor.shape[1] for change in changes) <= rows


def _side_by_side(changes: Sequence[tuple[Change, float]]) -> Others:
    pooled = Change(torch.cat([scale * change.factor for change, scale in changes], dim=1))
    lefts = torch.cat([scale * change.left for change, scale in changes], dim=1)
    rights = torch.cat([change.right for change, _ in changes if change.right is not None])
    return Others(pooled.leading, Change(lefts / len(changes), rights))


def _halve(
    names: list[str], pooled: torch.Tensor, total: torch.Tensor, changes: Mapping[str, Change], scales: Mapping[str, float]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    if len(names) == 1:
        yield names[0], pooled, total
        return
    middle = len(names) // 2
    for inside, outside in ((names[:middle], names[middle:]), (names[middle:], names[:middle])):
        own_pooled, own_total = pooled.clone(), total.clone()
        for name in outside:
            changes[name].add_gram_to(own_pooled, scales[name])
            changes[name].add_to(own_total, scales[name])
        yield from _halve(inside, own_pooled, own_total, changes, scales)
