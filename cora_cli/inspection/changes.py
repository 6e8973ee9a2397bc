"""The changes ΔW that models made to one weight matrix: as they are or as low-rank factors, and what all models but one have together.

What that is compared with is `measure`'s business.
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
    """ΔW (rows, columns) float64: `left` itself, or with `right` the product L R, which is then never kept whole.

    `factor` is F with F Fᵀ = ΔW ΔWᵀ, so that its energy, directions and what a basis captures of it are those of ΔW.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        self.left, self.right = left, right
        self.factor = left if right is None else gram_factor([(left, right)], centred=False)[0]

    @cached_property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return energy(self.factor)

    def leading(self, rank: int) -> torch.Tensor:
        """At most `rank` left singular vectors, (rows, k); see `subspaces.leading`."""
        rows, columns = self.factor.shape
        return leading_of_tall(self.factor, rank) if 2 * columns <= rows else leading(self._gram, rank)

    def captured_by(self, basis: torch.Tensor) -> float:
        """The share (0-1) of its energy inside the span of `basis`, (rows, k)."""
        return captured(basis, self.factor)

    def aligned_with(self, other: Change) -> float:
        """⟨M, N⟩² / (‖M‖_F²·‖N‖_F²), 0-1: the share of its energy along the other as one direction of the space of matrices."""
        one, two = (self, other) if self.right is not None else (other, self)
        if one.right is None:
            product = (one.left * two.left).sum()
        elif two.right is None:  # ⟨L R, M⟩ = ⟨L, M Rᵀ⟩
            product = (one.left * (two.left @ one.right.T)).sum()
        else:
            product = ((one.left.T @ two.left) * (one.right @ two.right.T)).sum()
        return float(product.item() ** 2 / (self.energy * other.energy))

    def add_to(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` (rows, columns), after ΔW was added to it in place."""
        return matrix.add_(self.left) if self.right is None else matrix.addmm_(self.left, self.right)

    def add_gram_to(self, total: torch.Tensor) -> torch.Tensor:
        """`total` (rows, rows), after ΔW ΔWᵀ was added to its lower triangle in place."""
        return total.add_(self._gram) if self.right is None else add_gram(total, self.factor)

    @cached_property
    def _gram(self) -> torch.Tensor:
        return gram(self.factor)


@dataclasses.dataclass(frozen=True)
class Others:
    """What all models but one have together: `leading(rank)` of Σ ΔWⱼΔWⱼᵀ, (rows, k), and the `mean` of their ΔWⱼ."""

    leading: Callable[[int], torch.Tensor]
    mean: Change


def leave_one_out(changes: Mapping[str, Change], shape: torch.Size) -> Iterator[tuple[str, Others | None]]:
    """For each model what the other models have, None where there is no other; `shape` is that of ΔW.

    They are summed over the others alone: a difference from sums over all models would lose digits. Changes in few factors are put side
    by side. Of others the models are halved again and again, each half starting from the sums over what is outside of it, which takes
    n·log n additions and holds log n pairs of sums.
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
