"""The Gram matrix M Mᵀ of a merged matrix M in float64: accumulating it, and computing its largest eigenpairs.

On a CPU, BLAS's symmetric routines compute and read only the lower triangle, which halves the work; a GPU uses torch's dense
routines. `decompose` decides whether a Gram matrix is accurate enough.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

EPS = torch.finfo(torch.float64).eps
# Eigensolvers are backward stable: their error is a small multiple of eps·‖G‖, below 1 for a thousand random spectra.
SAFETY = 4.0
# Lanczos is faster than a direct solver above this many rows, if only this share of the directions is wanted.
_LANCZOS_ROWS, _LANCZOS_SHARE = 1024, 0.1
# Up to this many rows torch's idle threads cost more time than they save; see `one_thread_pool`.
_POOL_ROWS = 2048


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether scipy can work on the memory of `tensor`."""
    return tensor.device.type == "cpu"


@contextlib.contextmanager
def one_thread_pool(device: torch.device, rows: int) -> Iterator[None]:
    """On a CPU, if matrices have few `rows`, run torch on one thread and leave the cores to scipy's BLAS.

    Both libraries have their own thread pool, and the threads of the idle one keep spinning for a while. When short products
    alternate between the two, two cores take twice as long as one.
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
    """Add W Wᵀ in place to the lower triangle of `gram` (rows, rows) and return it; entries above the diagonal are undefined.

    `weight` is W, (rows, columns) float64.
    """
    if not on_cpu(gram):
        return gram.addmm_(weight, weight.T)
    from scipy.linalg.blas import dsyrk

    # BLAS is column-major and sees both matrices transposed, so its upper triangle is the lower one here.
    dsyrk(1.0, weight.contiguous().numpy().T, beta=1.0, c=gram.numpy().T, trans=1, lower=0, overwrite_c=1)
    return gram


def all_eigenpairs(gram: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every eigenvalue (rows,), descending, and their vectors (rows, rows), from the lower triangle of `gram`, on its device."""
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    return values.flip(0).cpu().numpy(), vectors.flip(1).cpu().numpy()


def lanczos_is_faster(rows: int, wanted: int) -> bool:
    """Whether Lanczos finds the `wanted` largest eigenpairs of a (rows, rows) matrix faster than a direct solver."""
    return rows > _LANCZOS_ROWS and wanted <= _LANCZOS_SHARE * rows


def top_eigenpairs(gram: torch.Tensor, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """At least the `wanted` largest eigenvalues, descending, and their vectors, from the lower triangle of `gram` (rows, rows)."""
    if not on_cpu(gram):
        return all_eigenpairs(gram)
    from scipy.linalg import eigh
    from scipy.linalg.blas import dsymm, dsymv

    rows, matrix = len(gram), gram.numpy()

    def product(vectors: np.ndarray) -> np.ndarray:
        return (dsymv if vectors.ndim == 1 else dsymm)(1.0, matrix.T, vectors, lower=0)

    found = lanczos(rows, product, wanted) if lanczos_is_faster(rows, wanted) else None
    if found is None:
        values, vectors = eigh(matrix, subset_by_index=[rows - wanted, rows - 1], lower=True)
        found = values[::-1], vectors[:, ::-1]
    return found


def lanczos(rows: int, product: Callable[[np.ndarray], np.ndarray], wanted: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The `wanted` largest eigenpairs, descending, from a fixed start; None if not all have converged to full precision.

    `product` multiplies the symmetric (rows, rows) matrix, which has no negative eigenvalues, by a vector or by several columns.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    starts = np.random.default_rng(0).standard_normal((2, rows))

    def of_one(vector: np.ndarray) -> np.ndarray:
        return product(vector.ravel())

    try:
        values, vectors = eigsh(LinearOperator((rows, rows), of_one, dtype=float), k=wanted, v0=starts[0])
        residual = np.linalg.norm(product(vectors) - vectors * values, axis=0).max()
        if residual > SAFETY * EPS * rows**0.5 * values[-1]:
            return None

        def rest(vector: np.ndarray) -> np.ndarray:
            return of_one(vector) - vectors @ (values * (vectors.T @ vector.ravel()))

        # A Krylov space can miss one copy of a repeated eigenvalue, so check that no larger eigenvalue remains.
        left = eigsh(LinearOperator((rows, rows), rest, dtype=float), k=1, v0=starts[1], tol=1e-3, return_eigenvectors=False)
    except ArpackNoConvergence:
        return None
    return None if left[0] > values[0] * (1 + 1e-9) else (values[::-1], vectors[:, ::-1])
