"""Subspaces of the output space: the leading one of a matrix, how much two overlap, and how much energy one captures.

All is float64; bases have orthonormal columns, and nothing depends on their signs or rotation. No model is known here.
"""

import math
from collections.abc import Mapping

import torch

from cora_cli.extraction.gram import EPS, add_gram, empty_gram, top_eigenpairs

_SAME = 1 - 1e-8
"""The squared cosine from which a direction counts as lying in a subspace, which it does not by accident."""


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """Lower triangle of M Mᵀ, (rows, rows); `matrix` is M, (rows, columns) float64."""
    return add_gram(empty_gram(matrix), matrix.contiguous())


def leading(of_gram: torch.Tensor, rank: int) -> torch.Tensor:
    """U (rows, k): the left singular vectors of M with the `rank` largest values, from the lower triangle of M Mᵀ.

    k is `rank`, or the numerical rank of M where that is less: beyond it directions mean nothing.
    """
    values, vectors = top_eigenpairs(of_gram, rank)
    kept = int((values[:rank] > EPS * len(of_gram) * max(values[0], 0.0)).sum())
    return torch.from_numpy(vectors[:, :kept].copy()).to(of_gram.device)


def leading_of_tall(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """As `leading`, of M (rows, columns) with few columns, whose own decomposition is quicker than that of M Mᵀ."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values[:rank].square() > EPS * len(matrix) * values[0].square()).sum())
    return vectors[:, :kept].contiguous()


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖UᵀV‖_F² / min(k, l), 0-1, of U (rows, k) and V (rows, l): the mean squared cosine of the principal angles.

    It is 1 where the smaller subspace lies in the larger one, and ‖U₁ᵀU₂‖_F² / r for two of rank r.
    """
    return energy(one.T @ other) / min(one.shape[1], other.shape[1])


def chance(one: int, other: int, rows: int) -> float:
    """The overlap that a k- and a uniformly random l-dimensional subspace of ℝ^rows have on average: max(k, l) / rows.

    The projector VVᵀ of a uniformly random subspace is distributed as QVVᵀQᵀ for every rotation Q, so its mean commutes with all of
    them and is c·I; the trace gives c = l / rows. Hence E‖UᵀV‖_F² = tr(UUᵀ·E VVᵀ) = k·l / rows, over min(k, l). In the same way a
    random subspace of dimension l captures l / rows of the energy of any matrix: E‖VᵀX‖_F² = tr(XXᵀ·E VVᵀ) = (l / rows)·‖X‖_F².
    For two of rank r, and for the capture, this is r / d.
    """
    return max(one, other) / rows


def in_common(name: str, frames: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The directions (rows, k) of the frame of that name that lie in another one of `frames` too; None where there are none.

    Two subspaces of k and l dimensions share k + l − rows whatever they are; only where they share more do they count.
    """
    if name not in frames:
        return None
    own, shared = frames[name], []
    for other, frame in frames.items():
        if other != name:
            vectors, cosines, _ = torch.linalg.svd(own.T @ frame, full_matrices=False)
            same = cosines.square() > _SAME
            if int(same.sum()) > max(0, own.shape[1] + frame.shape[1] - len(own)):
                shared.append(own @ vectors[:, same])
    return leading_of_tall(torch.cat(shared, dim=1), own.shape[1]) if shared else None


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The min(k, l) principal angles in radians, ascending, of U (rows, k) and V (rows, l).

    Cosines are the singular values of UᵀV, sines those of (I − UUᵀ)V (Björck and Golub 1973): each angle is taken from the one of
    the two that determines it well.
    """
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1.0)
    sines = torch.linalg.svdvals(other - one @ (one.T @ other)).flip(0).clamp(max=1.0)
    return torch.where(cosines > math.sqrt(0.5), sines.arcsin(), cosines.arccos())


def energy(matrix: torch.Tensor) -> float:
    """‖M‖_F²."""
    return torch.linalg.vector_norm(matrix).item() ** 2


def captured(basis: torch.Tensor, matrix: torch.Tensor) -> float:
    """‖BᵀM‖_F² / ‖M‖_F², 0-1: the share of the energy of M (rows, columns), not zero, inside the span of B (rows, k)."""
    return energy(basis.T @ matrix) / energy(matrix)
