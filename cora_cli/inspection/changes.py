"""The changes ΔW that models made to one weight matrix: as they are or as low-rank factors, and their sums over all models but one.

What the sums are compared with is `measure`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch

from cora_cli.basis.gram import add_gram, empty_gram
from cora_cli.basis.lowrank import gram_factor
from cora_cli.inspection.subspaces import captured, energy, gram, leading, leading_of_tall


class Change:
    """ΔW (rows, columns) float64: `left` itself, or with `right` the product L R, which is then never kept whole.

    `factor` is F with F Fᵀ = ΔW ΔWᵀ, so that its energy, directions and what a basis captures of it are those of ΔW.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        self._left, self._right = left, right
        self.factor = left if right is None else gram_factor([(left, right)], centred=False)[0]

    @property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return energy(self.factor)

    def leading(self, rank: int) -> torch.Tensor:
        """At most `rank` left singular vectors, (rows, k); see `subspaces.leading`."""
        return leading(self._gram, rank) if self._right is None else leading_of_tall(self.factor, rank)

    def captured_by(self, basis: torch.Tensor) -> float:
        """The share (0-1) of its energy inside the span of `basis`, (rows, k)."""
        return captured(basis, self.factor)

    def aligned_with(self, matrix: torch.Tensor) -> float:
        """⟨ΔW, M⟩² / (‖ΔW‖_F²·‖M‖_F²), 0-1: the share of its energy along M, (rows, columns), as one direction of the space of matrices."""
        other = matrix if self._right is None else matrix @ self._right.T  # ⟨L R, M⟩ = ⟨L, M Rᵀ⟩
        return float((self._left * other).sum().item() ** 2 / (self.energy * energy(matrix)))

    def add_to(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` (rows, columns), after ΔW was added to it in place."""
        return matrix.add_(self._left) if self._right is None else matrix.addmm_(self._left, self._right)

    def add_gram_to(self, total: torch.Tensor) -> torch.Tensor:
        """`total` (rows, rows), after ΔW ΔWᵀ was added to its lower triangle in place."""
        return total.add_(self._gram) if self._right is None else add_gram(total, self.factor)

    @cached_property
    def _gram(self) -> torch.Tensor:
        return gram(self._left)


def leave_one_out(
    changes: Mapping[str, Change], shape: torch.Size
) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """For each model the lower triangle of Σ ΔWⱼΔWⱼᵀ and the mean of ΔWⱼ over all other models j, None where there is no other.

    They are summed over the others alone: a difference from sums over all models would lose digits. The models are halved again and
    again, each half starting from the sums over what is outside of it, which takes n·log n additions and holds log n pairs of sums.
    """
    names = list(changes)
    if not names:
        return
    one = changes[names[0]].factor
    start = empty_gram(one), torch.zeros(shape, dtype=one.dtype, device=one.device)
    for name, pooled, total in _halve(names, *start, changes):
        yield (name, pooled, total / (len(names) - 1)) if len(names) > 1 else (name, None, None)


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
