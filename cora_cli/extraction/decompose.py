"""The singular vectors of one merged matrix, exact to float64 (equations 3-5; centred, equations 7-9, in arXiv 2409.02119).

The fast eigendecomposition of the Gram matrix is used if its error is provably small, else the SVD of M. Approximations
(randomised or few-step methods) are never returned. `merge` builds M.
"""

import dataclasses

import numpy as np
import torch

from cora_cli.basis.choices import Component
from cora_cli.errors import CoraError
from cora_cli.extraction.gram import EPS, SAFETY, add_gram, all_eigenpairs, empty_gram, top_eigenpairs
from cora_cli.extraction.merge import Merged

# The subspace error ‖(I − UUᵀ)B‖₂ above which M itself is decomposed, and above which a subspace counts as not unique.
ACCURATE, DETERMINED = 1e-7, 1e-6
# Above this ratio of rows to columns (embeddings) the Gram matrix needs far more memory than M and more time than its thin SVD.
_TALL = 2


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """`basis` (out, R) float64, orthonormal columns whose largest entry is positive, with their `singular_values` (R,) float64.

    The principal directions come first, or the most minor ones under `bottom`, so the first r columns equal the result for
    rank r. `total_energy` = ‖M‖_F². `gap` says whether the subspace is unique in float64.
    """

    basis: torch.Tensor
    singular_values: torch.Tensor
    total_energy: float
    gap: bool


@dataclasses.dataclass(frozen=True)
class _Solution:
    """All computed `values`, descending: σ of M, or λ = σ² if `squared`; `vectors` is (rows, len(values))."""

    values: np.ndarray
    vectors: np.ndarray
    squared: bool


def decompose(merged: Merged, rank: int, component: Component) -> Decomposition:
    """The `top` or `bottom` `rank` left singular vectors of M.

    By the Davis-Kahan theorem the error of the computed subspace is about eps·‖G‖ / gap. If that is too large for the Gram
    matrix and M is available, M itself is decomposed. Raises `CoraError` if the numerical rank of M is below `rank`.
    """
    group = merged.group
    start = 0 if component == "top" else group.directions - rank
    stop = start + rank
    if merged.matrix is None:
        assert merged.gram is not None
        solution = _top_of_gram(merged.gram, rank) if component == "top" else _all_of_gram(merged.gram)
    elif not decomposes_gram(group.rows, merged.matrix.shape[1], component):
        solution = _direct(merged.matrix)
    else:
        solution = _top_of_gram(add_gram(empty_gram(merged.matrix), merged.matrix), rank)
        if _error(solution, merged, start, stop) > ACCURATE:
            solution = _direct(merged.matrix)
    numerical_rank = int((solution.values > _floor(solution, merged)).sum())
    if numerical_rank < rank:
        advice = f"use --rank {numerical_rank} or less" if numerical_rank else "its values are all zero"
        raise CoraError(
            f"the merged matrix of group {group.name} has a numerical rank of {numerical_rank}, less than --rank {rank}; {advice}"
        )
    full_space = rank == group.rows  # it is always unique: no other direction is left
    vectors, values = solution.vectors[:, start:stop], np.clip(solution.values[start:stop], 0.0, None)
    if component == "bottom":
        vectors, values = vectors[:, ::-1], values[::-1]
    return Decomposition(
        torch.from_numpy(_signed(vectors)),
        torch.from_numpy(np.sqrt(values) if solution.squared else values.copy()),
        merged.energy,
        full_space or bool(_error(solution, merged, start, stop) <= DETERMINED),
    )


def decomposes_gram(rows: int, columns: int, component: Component) -> bool:
    """Whether the Gram matrix of an M of this shape is decomposed first, not M itself."""
    return component == "top" and rows <= _TALL * columns


def _error(solution: _Solution, merged: Merged, start: int, stop: int) -> float:
    """An estimate of ‖(I − UUᵀ)B‖₂ for the directions `start` to `stop`: backward error divided by the spectral gap."""
    values, gap = solution.values, float("inf")
    if start:
        gap = values[start - 1] - values[start]
    # The full space has no gap to others, but its smallest value must still exceed the rounding errors.
    if stop < merged.group.rows or not start:
        gap = min(gap, values[stop - 1] - (values[stop] if stop < len(values) else 0.0))
    removed = merged.removed if solution.squared else merged.removed**0.5
    return EPS * (SAFETY * values[0] + removed) / gap if gap > 0 else float("inf")


def _floor(solution: _Solution, merged: Merged) -> float:
    """The largest value that counts as zero (the threshold of numpy's `matrix_rank`, plus the rounding error of centring)."""
    group = merged.group
    if solution.squared:
        return EPS * (group.rows * solution.values[0] + SAFETY * merged.removed)
    return EPS * (max(group.rows, group.columns) * solution.values[0] + SAFETY * merged.removed**0.5)


def _direct(matrix: torch.Tensor) -> _Solution:
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return _Solution(values.cpu().numpy(), vectors.cpu().numpy(), squared=False)


def _all_of_gram(gram: torch.Tensor) -> _Solution:
    return _Solution(*all_eigenpairs(gram), squared=True)


def _top_of_gram(gram: torch.Tensor, rank: int) -> _Solution:
    """The first `rank` eigenpairs, and the next one, if there is one, for the gap."""
    return _Solution(*top_eigenpairs(gram, min(rank + 1, len(gram))), squared=True)


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Each column with its largest-magnitude entry, as stored in float32, positive."""
    lead = np.abs(vectors.astype(np.float32)).argmax(axis=0)
    signs = np.where(vectors[lead, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return np.ascontiguousarray(vectors * signs)
