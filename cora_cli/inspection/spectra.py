"""Explained variance of one matrix by SVD and by PCA, and how far the two can be apart.

PCA is the SVD of the matrix whose columns were centred. Let M be (rows, columns), G = M Mᵀ, μ the mean of its columns, and
M_c = M − μ1ᵀ = M(I − 11ᵀ/columns), so that M_c M_cᵀ = G − columns·μμᵀ: a rank-one change. By Weyl's inequalities (Cauchy's interlacing;
Horn and Johnson, Matrix Analysis, corollary 4.3.9) λ_{k+1}(G) ≤ λ_k(M_c M_cᵀ) ≤ λ_k(G): centring removes at most one direction per
matrix and adds none. What is left after k directions, T(k) = Σ_{i>k} λ_i, obeys T(k + 1) ≤ T_c(k) ≤ T(k), and with m the share of the
energy in the mean column, E_c = (1 − m)·E, the shares s(k) of SVD and p(k) of PCA obey

    1 − (1 − s(k)) / (1 − m)  ≤  p(k)  ≤  1 − (1 − s(k + 1)) / (1 − m).
"""

import dataclasses

import numpy as np
import torch

from cora_cli.inspection.subspaces import energy, gram

LEVELS = (0.9, 0.95, 0.99)
"""Shares of the variance for which directions are counted."""
PAPER_SVD, PAPER_PCA, PAPER_DIRECTIONS = 130, 3000, 5120
"""Directions for "100 %" that the paper prints (section on figure 4), and the most that a matrix of Llama-2-13B has."""


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Cumulative shares (0-1) of 1, 2, … directions, by `svd` of ‖M‖_F² and by `pca` of ‖M_c‖_F²; `mean_share` is m above."""

    svd: tuple[float, ...]
    pca: tuple[float, ...]
    mean_share: float


def spectra(matrix: torch.Tensor) -> Spectra:
    """Both spectra of `matrix`, (rows, columns) float64, not zero."""
    centred = matrix - matrix.mean(dim=1, keepdim=True)
    directions = min(matrix.shape)
    return Spectra(_shares(matrix, directions), _shares(centred, directions), max(0.0, 1.0 - energy(centred) / energy(matrix)))


def needed(shares: tuple[float, ...], level: float) -> int:
    """The fewest directions that hold `level` of the variance."""
    return min(int(np.searchsorted(shares, level)) + 1, len(shares))


def bounds(found: Spectra) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest p(k) that the SVD's shares and the mean's allow (see above), each (directions,)."""
    left, rest = 1.0 - np.asarray(found.svd), max(1.0 - found.mean_share, np.finfo(float).tiny)
    return 1.0 - left / rest, 1.0 - np.append(left[1:], 0.0) / rest


def least_mean_share(svd: int, pca: int, directions: int) -> float:
    """The m that a matrix must exceed for SVD to reach some share t < 1 with `svd` directions and PCA not before `pca` > `svd`.

    T(svd) ≤ (1 − t)·E, and T_c(pca − 1) > (1 − t)(1 − m)·E. The λ descend, so the mean of the last directions − pca + 1 of them is
    no more than that of all after `svd`: T_c(pca − 1) ≤ T(pca − 1) ≤ T(svd)·(directions − pca + 1) / (directions − svd). Together
    1 − m < (directions − pca + 1) / (directions − svd).
    """
    return 1.0 - (directions - pca + 1) / (directions - svd)


def paper_note(largest_mean_share: float) -> str:
    """Why the paper's two counts cannot come from one matrix, beside the mean's share that was measured here."""
    bound = least_mean_share(PAPER_SVD, PAPER_PCA, PAPER_DIRECTIONS)
    return (
        f"The paper (text of its figure 4) reads 100 % from about {PAPER_SVD} singular values by SVD and {PAPER_PCA} components by PCA. That "
        "cannot be one matrix: centring is a rank-one change, so the two spectra interlace (Weyl, Cauchy), and all of the variance needs "
        f"{PAPER_SVD} or {PAPER_SVD - 1} components by PCA where it needs {PAPER_SVD} by SVD. If 100 % is a rounded share, the mean column would have "
        f"to hold more than {bound:.0%} of the energy of a matrix with {PAPER_DIRECTIONS} directions; here it holds at most {largest_mean_share:.2%}."
    )


def _shares(matrix: torch.Tensor, directions: int) -> tuple[float, ...]:
    values = torch.linalg.eigvalsh(gram(matrix), UPLO="L").flip(0)[:directions].clamp(min=0.0)
    total = values.sum()
    return tuple((values.cumsum(0) / total if total > 0 else torch.ones_like(values)).tolist())
