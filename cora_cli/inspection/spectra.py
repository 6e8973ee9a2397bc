"""Explained variance of one matrix by SVD and by PCA, and how far the two can differ.

PCA is the SVD of the matrix after its mean column is subtracted. Let M be (rows, columns), G = M Mᵀ, μ the mean of its columns, and
M_c = M − μ1ᵀ = M(I − 11ᵀ/columns), so that M_c M_cᵀ = G − columns·μμᵀ: a rank-one change. By Weyl's inequalities (Cauchy's interlacing;
Horn and Johnson, Matrix Analysis, corollary 4.3.9) λ_{k+1}(G) ≤ λ_k(M_c M_cᵀ) ≤ λ_k(G): centring removes at most one direction per
matrix and adds none. The energy outside the first k directions, T(k) = Σ_{i>k} λ_i, obeys T(k + 1) ≤ T_c(k) ≤ T(k). Let m be the share
of the energy in the mean column, E_c = (1 − m)·E. Then the shares s(k) of SVD and p(k) of PCA obey

    1 − (1 − s(k)) / (1 − m)  ≤  p(k)  ≤  1 − (1 − s(k + 1)) / (1 − m).
"""

import dataclasses

import numpy as np
import torch

from cora_cli.inspection.subspaces import energy, gram

LEVELS = (0.9, 0.95, 0.99)
"""Shares of the variance (0-1) for which the table counts directions."""
PAPER_SVD, PAPER_PCA, PAPER_DIRECTIONS = 130, 3000, 5120
"""The numbers of directions for "100%" in the paper (text of Figure 4), and the largest number in a matrix of Llama-2-13B."""


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Cumulative shares (0-1) in 1, 2, … directions: `svd` of ‖M‖_F², `pca` of ‖M_c‖_F². `mean_share` is m above."""

    svd: tuple[float, ...]
    pca: tuple[float, ...]
    mean_share: float


def spectra(matrix: torch.Tensor) -> Spectra:
    """Both spectra of `matrix`, (rows, columns) float64, which must not be zero."""
    centred = matrix - matrix.mean(dim=1, keepdim=True)
    directions = min(matrix.shape)
    svd, pca = (cumulative(torch.linalg.eigvalsh(gram(one), UPLO="L"), directions) for one in (matrix, centred))
    return Spectra(svd, pca, max(0.0, 1.0 - energy(centred) / energy(matrix)))


def cumulative(values: torch.Tensor, directions: int) -> tuple[float, ...]:
    """The shares (0-1) of the sum of all that the 1, 2, … largest of the eigenvalues `values`, ascending, of a Gram matrix have.

    The matrix has no more than `directions` non-zero ones.
    """
    values = values.flip(0)[:directions].clamp(min=0.0)
    total = values.sum()
    return tuple((values.cumsum(0) / total if total > 0 else torch.ones_like(values)).tolist())


def needed(shares: tuple[float, ...], level: float) -> int:
    """The smallest number of directions that hold the share `level` (0-1) of the variance."""
    return min(int(np.searchsorted(shares, level)) + 1, len(shares))


def bounds(found: Spectra) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper bound of p(k) from the inequality above, each (directions,)."""
    left, rest = 1.0 - np.asarray(found.svd), max(1.0 - found.mean_share, np.finfo(float).tiny)
    return 1.0 - left / rest, 1.0 - np.append(left[1:], 0.0) / rest


def least_mean_share(svd: int, pca: int, directions: int) -> float:
    """The m that a matrix must exceed if SVD reaches a share t < 1 with `svd` directions, but PCA only with `pca` > `svd`.

    T(svd) ≤ (1 − t)·E, and T_c(pca − 1) > (1 − t)(1 − m)·E. The λ descend, so the mean of the last directions − pca + 1 of them is
    at most the mean of all after `svd`: T_c(pca − 1) ≤ T(pca − 1) ≤ T(svd)·(directions − pca + 1) / (directions − svd). Together
    1 − m < (directions − pca + 1) / (directions − svd).
    """
    return 1.0 - (directions - pca + 1) / (directions - svd)


def paper_note(largest_mean_share: float) -> str:
    """Why the two numbers of the paper cannot come from one matrix, with the measured share of the mean column."""
    bound = least_mean_share(PAPER_SVD, PAPER_PCA, PAPER_DIRECTIONS)
    return (
        f"The paper (text of Figure 4) reaches 100% of the variance with about {PAPER_SVD} singular values (SVD), but only with {PAPER_PCA} components (PCA). "
        "Both numbers cannot belong to one matrix: centring is a rank-one change, so the two spectra interlace (Weyl, Cauchy). If SVD needs "
        f"{PAPER_SVD} directions for all of the variance, PCA needs {PAPER_SVD} or {PAPER_SVD - 1}. If 100% is a rounded share, the mean column must "
        f"hold more than {bound:.0%} of the energy of a matrix with {PAPER_DIRECTIONS} directions; here it holds at most {largest_mean_share:.2%}."
    )
