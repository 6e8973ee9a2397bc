"""The Gram matrix M Mᵀ of a merged matrix M, in float64: adding to it, and its largest eigenpairs.

On a CPU only its lower triangle is computed and read, which halves both, through BLAS's own symmetric routines; on a GPU torch's dense
ones serve. Whether a Gram matrix is accurate enough is `decompose`'s question.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

EPS = torch.finfo(torch.float64).eps
# Eigensolvers are backward stable: their error is a small multiple of eps·‖G‖, below 1 in a thousand random spectra.
SAFETY = 4.0
# Lanczos beats a direct solver beyond this many rows, if few directions are wanted.
_LANCZOS_ROWS, _LANCZOS_SHARE = 1024, 0.1
# Up to so many rows the idle threads of torch cost more than they give; see `one_thread_pool`.
_POOL_ROWS = 2048


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether scipy can work on the memory of `tensor`."""
    return tensor.device.type == "cpu"


@contextlib.contextmanager
def one_thread_pool(device: torch.device, rows: int) -> Iterator[None]:
    """Leave a CPU's cores to scipy's BLAS, with torch on one thread, while matrices of at most `rows` rows are worked on, if these are few.

    Both have threads of their own, and those of the one that just worked spin while the other works: with short products in turn, two
    cores take twice as long as one.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and rows <= _POOL_ROWS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def empty_gram(weight: torch.Tensor) -> torch.Tensor:
    """Zeros (rows, rows) float64 on the device of `weight`, (rows, columns), for `add_gram`."""
    return torch.zeros((weight.shape[0],) * 2, dtype=torch.float64, device=weight.device)


def add_gram(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gram` (rows, rows) after W Wᵀ was added in place to its lower triangle; above the diagonal it means nothing.

    `weight` is W, (rows, columns) float64.
    """
    if not on_cpu(gram):
        return gram.addmm_(weight, weight.T)
    from scipy.linalg.blas import dsyrk

    # BLAS counts by columns and so sees both matrices transposed: its upper triangle is the lower one here.
    dsyrk(1.0, weight.contiguous().numpy().T, beta=1.0, c=gram.numpy().T, trans=1, lower=0, overwrite_c=1)
    return gram


def all_eigenpairs(gram: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every eigenvalue (rows,), descending, and their vectors (rows, rows), from the lower triangle of `gram`, on its device."""
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    return values.flip(0).cpu().numpy(), vectors.flip(1).cpu().numpy()


def top_eigenpairs(gram: torch.Tensor, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """At least the `wanted` largest eigenvalues, descending, and their vectors, from the lower triangle of `gram` (rows, rows)."""
    if not on_cpu(gram):
        return all_eigenpairs(gram)
    from scipy.linalg import eigh

    rows, matrix = len(gram), gram.numpy()
    found = None
    if rows > _LANCZOS_ROWS and wanted <= _LANCZOS_SHARE * rows:
        found = _lanczos(matrix, wanted)
    values, vectors = found or eigh(matrix, subset_by_index=[rows - wanted, rows - 1], lower=True)
    return values[::-1], vectors[:, ::-1]


def _lanczos(gram: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The `wanted` largest eigenpairs, ascending, from a fixed start; None where they are not all there to full precision."""
    from scipy.linalg.blas import dsymm, dsymv
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    rows, upper = len(gram), gram.T
    starts = np.random.default_rng(0).standard_normal((2, rows))

    def product(vector: np.ndarray) -> np.ndarray:
        return dsymv(1.0, upper, vector.ravel(), lower=0)

    try:
        values, vectors = eigsh(LinearOperator((rows, rows), product, dtype=float), k=wanted, v0=starts[0])
        residual = np.linalg.norm(dsymm(1.0, upper, vectors, lower=0) - vectors * values, axis=0).max()
        if residual > SAFETY * EPS * rows**0.5 * values[-1]:
            return None

        def rest(vector: np.ndarray) -> np.ndarray:
            return product(vector) - vectors @ (values * (vectors.T @ vector.ravel()))

        # A Krylov space can miss one copy of a repeated eigenvalue: nothing larger may be left outside of what was found.
        left = eigsh(LinearOperator((rows, rows), rest, dtype=float), k=1, v0=starts[1], tol=1e-3, return_eigenvectors=False)
    except ArpackNoConvergence:
        return None
    return None if left[0] > values[0] * (1 + 1e-9) else (values, vectors)
