"""The change ΔW of each model in one weight matrix, dense or as low-rank factors, and the leave-one-out sums over all other models.

`measure` compares these changes with each other and with bases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch

from cora_cli.extraction.gram import add_gram, empty_gram
from cora_cli.extraction.lowrank import gram_factor
from cora_cli.inspection.subspaces import captured, energy, gram, leading, leading_of_tall


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

    def add_to(self, matrix: torch.Tensor) -> torch.Tensor:
        """Add ΔW to `matrix` (rows, columns) in place and return it."""
        return matrix.add_(self.left) if self.right is None else matrix.addmm_(self.left, self.right)

    def add_gram_to(self, total: torch.Tensor) -> torch.Tensor:
        """Add ΔW ΔWᵀ to the lower triangle of `total` (rows, rows) in place and return it."""
        return total.add_(self._gram) if self.right is None else add_gram(total, self.factor)

    @cached_property
    def _gram(self) -> torch.Tensor:
        return gram(self.factor)


@dataclasses.dataclass(frozen=True)
class Others:
    """All models but one: `leading(rank)` gives the leading directions (rows, k) of Σ ΔWⱼΔWⱼᵀ, `mean` is the mean of ΔWⱼ."""

    leading: Callable[[int], torch.Tensor]
    mean: Change


def leave_one_out(changes: Mapping[str, Change], shape: torch.Size) -> Iterator[tuple[str, Others | None]]:
    """For each model, the sums over the other models, or None if there is no other model; `shape` is that of ΔW.

    Each sum runs over the other models alone, because subtracting one model from a total would lose digits. Low-rank factors are
    concatenated if they are narrow together. Otherwise the list of models is halved recursively, and each half starts from the sums over
    the models outside it: this takes n·log n additions and keeps log n pairs of sums in memory.
    """
    names = list(changes)
    in_factors = all(change.right is not None for change in changes.values())
    if len(names) < 2:
        yield from ((name, None) for name in names)
    elif in_factors and 2 * sum(change.factor.shape[1] for change in changes.values()) <= shape[0]:
        for name in names:
            yield name, _side_by_side([change for other, change in changes.items() if other != name])
    else:
        one = changes[names[0]].factor
        start = empty_gram(one), torch.zeros(shape, dtype=one.dtype, device=one.device)
        for name, pooled, total in _halve(names, *start, changes):
            yield name, Others(partial(leading, pooled), Change(total / (len(names) - 1)))


def _side_by_side(changes: Sequence[Change]) -> Others:
    pooled = Change(torch.cat([change.factor for change in changes], dim=1))
    lefts = torch.cat([change.left for change in changes], dim=1)
    rights = torch.cat([change.right for change in changes if change.right is not None])
    return Others(pooled.leading, Change(lefts / len(changes), rights))


def _halve(
    names: list[str], pooled: torch.Tensor, total: torch.Tensor, changes: Mapping[str, Change]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    if len(names) == 1:
        yield names[0], pooled, total
        return
    middle = len(names) // 2
    for inside, outside in ((names[:middle], names[middle:]), (names[middle:], names[:middle])):
        own_pooled, own_total = pooled.clone(), total.clone()
        for name in outside:
            changes[name].add_gram_to(own_pooled)
            changes[name].add_to(own_total)
        yield from _halve(inside, own_pooled, own_total, changes)
