"""Linear algebra of subspaces: the leading subspace of a matrix, the overlap of two subspaces, and the energy that one captures.

All tensors are float64 and all bases have orthonormal columns; no result depends on the choice of basis within a subspace.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from cora_cli.extraction.gram import EPS, add_gram, empty_gram, top_eigenpairs

_SAME = 1 - 1e-8
"""The squared cosine from which a direction counts as lying in a subspace; chance does not reach it."""


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """Lower triangle of M Mᵀ, (rows, rows); `matrix` is M, (rows, columns) float64."""
    return add_gram(empty_gram(matrix), matrix.contiguous())


def leading(of_gram: torch.Tensor, rank: int) -> torch.Tensor:
    """U (rows, k): the left singular vectors of M with the `rank` largest values, from the lower triangle of M Mᵀ.

    k is `rank`, or the numerical rank of M if that is lower: singular vectors beyond it are arbitrary.
    """
    values, vectors = top_eigenpairs(of_gram, rank)
    kept = numerical_rank(values[:rank], len(of_gram))
    return torch.from_numpy(vectors[:, :kept].copy()).to(of_gram.device)


def numerical_rank(values: np.ndarray, rows: int) -> int:
    """How many of the largest eigenvalues `values`, descending, of a Gram matrix of that many `rows` are more than rounding errors."""
    return int((values > EPS * rows * max(values[0], 0.0)).sum())


def leading_of_tall(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Like `leading`, from M (rows, columns) itself: faster than using M Mᵀ if M has few columns."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values[:rank].square() > EPS * len(matrix) * values[0].square()).sum())
    return vectors[:, :kept].contiguous()


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖UᵀV‖_F² / min(k, l), 0-1, of U (rows, k) and V (rows, l): the mean squared cosine of the principal angles.

    It is 1 if the smaller subspace lies in the larger one. For two subspaces of dimension r it is ‖U₁ᵀU₂‖_F² / r.
    """
    return energy(one.T @ other) / min(one.shape[1], other.shape[1])


def chance(one: int, other: int, rows: int) -> float:
    """The mean overlap of a k-dimensional and a uniformly random l-dimensional subspace of ℝ^rows: max(k, l) / rows.

    The projector VVᵀ of a uniformly random subspace is distributed as QVVᵀQᵀ for every rotation Q, so its mean commutes with all of
    them and is c·I; the trace gives c = l / rows. Hence E‖UᵀV‖_F² = tr(UUᵀ·E VVᵀ) = k·l / rows, and dividing by min(k, l) gives
    the result. In the same way, a random subspace of dimension l captures l / rows of the energy of any matrix:
    E‖VᵀX‖_F² = tr(XXᵀ·E VVᵀ) = (l / rows)·‖X‖_F². For rank r in d dimensions, both are r / d.
    """
    return max(one, other) / rows


def chance_deviation(directions: int, rows: int, concentration: float) -> float:
    """The standard deviation of the share (0-1) of ‖X‖_F² that a uniformly random subspace captures, of which `chance` is the mean.

    With P the projector on `directions` = k of `rows` = d dimensions and A = XXᵀ / ‖X‖_F², the share is tr(PA). P − (k/d)·I is a
    rotationally distributed traceless symmetric matrix of squared norm k(d − k) / d, in a space of dimension (d − 1)(d + 2) / 2 on which
    the rotations act irreducibly, so by Schur's lemma Var tr(PA) = 2k(d − k) / (d(d − 1)(d + 2)) · (tr A² − 1/d). `concentration` is
    tr A² (`Change.concentration`).
    """
    if directions >= rows:
        return 0.0
    spread = 2.0 * directions * (rows - directions) / (rows * (rows - 1) * (rows + 2))
    return math.sqrt(spread * max(0.0, concentration - 1.0 / rows))


def in_common(name: str, frames: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The directions (rows, k) of the basis `name` that also lie in another basis of `frames`, or None if there are none.

    Any two subspaces of dimensions k and l share at least k + l − rows directions. A pair counts only if it shares more than that.
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

    The cosines are the singular values of UᵀV, the sines those of (I − UUᵀ)V (Björck and Golub 1973). Small angles are taken from
    the sine and large ones from the cosine, where each is accurate.
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
    """‖BᵀM‖_F² / ‖M‖_F², 0-1: the share of the energy of M (rows, columns) inside the span of B (rows, k). M must not be zero."""
    return energy(basis.T @ matrix) / energy(matrix)
