"""Leading directions of many matrices W_base + Σ cⱼ·ΔWⱼ with low-rank ΔWⱼ, and both spectra of the models' mean W, from one reduction.

A large Gram matrix takes seconds to build and to decompose. Here only that of the mean is built, and brought to tridiagonal form. All others
differ from it by products of thin factors.
"""

from collections.abc import Mapping

import numpy as np
import torch

from cora_cli.extraction.gram import lanczos, lanczos_is_faster, on_cpu
from cora_cli.inspection.changes import Change
from cora_cli.inspection.spectra import Spectra, cumulative
from cora_cli.inspection.subspaces import energy, gram, leading, numerical_rank

# The changes may together have this share of a matrix's rows as columns: every product below works on twice as many.
_MOST_COLUMNS = 0.125
# Every ‖ΔW‖_F / ‖W_base‖_F is below this. So no W is zero, and the differences of Gram matrices keep their digits.
_SMALL_CHANGE = 1.0
# The largest share of the energy in the mean column, which is subtracted from a Gram matrix.
_LARGEST_MEAN_SHARE = 0.5
_BLOCK = 64


class AroundMean:
    """The matrices W_base + Σ cⱼ·ΔWⱼ (rows, columns) of `models` models, seen from their mean W̄, which has cⱼ = 1 / `models`.

    Let L = [L₁ L₂ …] and R = [R₁; R₂; …] be the factors of all `changes`, D = diag(cⱼ − 1 / models), F = [W̄Rᵀ L] and
    S = [[0, D], [D, D R Rᵀ D]]. Then the Gram matrix is W̄W̄ᵀ + F S Fᵀ. With the reflection H that takes the mean column μ of W̄ to e₁,
    Householder's reduction gives W̄W̄ᵀ = H Q T (H Q)ᵀ with a tridiagonal T. Q leaves e₁ as it is, so the Gram matrix of the centred W̄,
    W̄W̄ᵀ − columns·μμᵀ, has the same T but for its first entry. F is kept as (H Q)ᵀF, so a product with a Gram matrix takes a few thin ones.
    """

    def __init__(self, base: torch.Tensor, changes: Mapping[str, Change], models: int) -> None:
        rows, columns = base.shape
        self._base, self._changes, self._models = base, changes, models
        mean = base.clone()
        for change in changes.values():
            change.add_to(mean, 1 / models)
        left = torch.cat([base.new_zeros(rows, 0), *(change.left for change in changes.values())], dim=1)
        rights = [change.right for change in changes.values() if change.right is not None]
        right = torch.cat([base.new_zeros(0, columns), *rights])
        self._widths = np.array([len(one) for one in rights], dtype=int)
        self._inner = (right @ right.T).numpy()
        factor = torch.cat([mean @ right.T, left], dim=1).numpy()
        mean_column = mean.mean(dim=1).numpy()
        in_mean = columns * float(mean_column @ mean_column)
        self.mean_share = in_mean / energy(mean)
        of_mean = gram(mean)
        del mean
        self._reduce(of_mean.add_(of_mean.tril(-1).T).numpy(), mean_column)
        self._factor = self._into(factor)
        centred = self._diagonal.copy()
        centred[0] -= in_mean
        self._diagonals, self._directions = (self._diagonal, centred), min(rows, columns)

    def spectra(self) -> Spectra:
        """Those of W̄; see `spectra.spectra`."""
        from scipy.linalg import eigvalsh_tridiagonal

        svd, pca = (
            cumulative(torch.from_numpy(eigvalsh_tridiagonal(diagonal, self._beside, lapack_driver="sterf")), self._directions)
            for diagonal in self._diagonals
        )
        return Spectra(svd, pca, self.mean_share)

    def leading(self, coefficients: Mapping[str, float], rank: int) -> torch.Tensor:
        """The leading left singular vectors (rows, k), k ≤ `rank`, of W_base + Σ cⱼ·ΔWⱼ, with cⱼ = 0 for models that are not named.

        See `subspaces.leading`, which takes over where Lanczos does not converge to full precision.
        """
        away = np.repeat([coefficients.get(name, 0.0) - 1 / self._models for name in self._changes], self._widths)

        def product(vectors: np.ndarray) -> np.ndarray:
            columns = vectors.reshape(len(vectors), -1)
            on_mean, on_left = np.split(self._factor.T @ columns, 2)
            of_mean = away[:, None] * on_left
            of_left = away[:, None] * (on_mean + self._inner @ of_mean)
            result = self._diagonal[:, None] * columns + self._factor @ np.concatenate([of_mean, of_left])
            result[:-1] += self._beside[:, None] * columns[1:]
            result[1:] += self._beside[:, None] * columns[:-1]
            return result.reshape(vectors.shape)

        found = lanczos(len(self._diagonal), product, rank)
        if found is None:
            matrix = self._base.clone()
            for name, scale in coefficients.items():
                self._changes[name].add_to(matrix, scale)
            return leading(gram(matrix), rank)
        values, vectors = found
        return torch.from_numpy(self._out_of(vectors[:, : numerical_rank(values, len(vectors))]))

    def _reduce(self, of_mean: np.ndarray, mean_column: np.ndarray) -> None:
        """Set H, Q and T from W̄W̄ᵀ (rows, rows), which is overwritten, and μ (rows,)."""
        from scipy.linalg.lapack import dsytrd

        length = float(np.linalg.norm(mean_column))
        self._mirror = mean_column.copy()  # H = I − 2·w wᵀ with the normal w of the mirror between μ and ±e₁
        self._mirror[0] += np.copysign(length, mean_column[0])
        self._mirror /= np.linalg.norm(self._mirror) or 1.0
        turned = of_mean @ self._mirror
        turned = 2 * (turned - (self._mirror @ turned) * self._mirror)
        of_mean -= np.outer(self._mirror, turned)
        of_mean -= np.outer(turned, self._mirror)
        reduced, self._diagonal, self._beside, self._scales, _ = dsytrd(
            of_mean.T, lower=1, lwork=_BLOCK * len(of_mean), overwrite_a=1
        )
        self._vectors = np.asfortranarray(reduced[1:, :-1])  # those of the reflections whose product is Q

    def _into(self, columns: np.ndarray) -> np.ndarray:
        """(H Q)ᵀ times `columns` (rows, k)."""
        turned = np.asfortranarray(columns - np.outer(2 * self._mirror, self._mirror @ columns))
        turned[1:] = self._rotate("T", turned[1:])
        return turned

    def _out_of(self, columns: np.ndarray) -> np.ndarray:
        """H Q times `columns` (rows, k)."""
        turned = np.array(columns, order="F")
        turned[1:] = self._rotate("N", turned[1:])
        turned -= np.outer(2 * self._mirror, self._mirror @ turned)
        return np.ascontiguousarray(turned)

    def _rotate(self, transpose: str, columns: np.ndarray) -> np.ndarray:
        from scipy.linalg.lapack import dormqr

        if not columns.size:
            return columns
        work = _BLOCK * (columns.shape[1] + _BLOCK)
        return dormqr("L", transpose, self._vectors, self._scales, np.asfortranarray(columns), work, overwrite_c=1)[0]


def around_mean(base: torch.Tensor, changes: Mapping[str, Change], models: int, rank: int) -> AroundMean | None:
    """`AroundMean` of `models` models, those not among `changes` being equal to `base`; None where it would be slower or less exact."""
    rows = len(base)
    limit = _SMALL_CHANGE * energy(base) ** 0.5
    if models == 0 or not on_cpu(base) or not lanczos_is_faster(rows, rank):
        return None
    if any(change.right is None or change.energy**0.5 >= limit for change in changes.values()):
        return None
    if sum(change.left.shape[1] for change in changes.values()) > _MOST_COLUMNS * rows:
        return None
    found = AroundMean(base, changes, models)
    return found if found.mean_share <= _LARGEST_MEAN_SHARE else None
