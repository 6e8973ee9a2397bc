"""The largest eigenvalue of the Hessian of a loss in the trained parameters, from products of the Hessian with vectors.

A product is a central difference of two gradients, (g(θ + εv) − g(θ − εv)) / 2ε: the attention of packed rows and the loss of this program
have no second derivative, and neither have FlexAttention's kernels.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

Vector = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Eigenvalue:
    """`value` is at most λmax, an eigenvalue lies within `error` of it, and it took `products` products."""

    value: float
    error: float
    products: int


class Hessian:
    """Products of the Hessian of a loss with vectors, at the present values of the parameters, which are back in place after each.

    `gradient` computes the gradient (parameters,) of the loss at the parameters' current values; `at_start` is the one at the present ones.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], gradient: Callable[[], Vector]) -> None:
        self._parameters, self._gradient = parameters, gradient
        self._largest = 0.0
        self.at_start = gradient()

    def product(self, vector: Vector) -> Vector:
        """H·v for a v of length 1.

        The step ε along v changes the loss by at most about the cube root of the precision, by its slope and by the curvature seen so far;
        one that turns out to be too long for the curvature is taken again.
        """
        change = torch.finfo(vector.dtype).eps ** (1 / 3)
        step = change / float(self.at_start.norm())
        while True:
            if self._largest:
                step = min(step, math.sqrt(change / self._largest))
            with self._moved(step * vector):
                ahead = self._gradient()
            with self._moved(-step * vector):
                behind = self._gradient()
            found = (ahead - behind) / (2 * step)
            self._largest = max(self._largest, float(found.norm()))
            if step**2 * self._largest <= 4 * change:
                return found

    @contextlib.contextmanager
    def _moved(self, by: Vector) -> Iterator[None]:
        """The parameters moved by a vector."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        parts = by.split([parameter.numel() for parameter in self._parameters])
        with torch.no_grad():
            for parameter, part in zip(self._parameters, parts, strict=True):
                parameter.add_(part.view_as(parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)


def largest_eigenvalue(product: Callable[[Vector], Vector], start: Vector, most: int, tolerance: float) -> Eigenvalue:
    """λmax of a symmetric matrix by Lanczos: power iteration that uses all of its vectors, though it keeps only two.

    It ends where the error is below `tolerance`·|λ|, or after `most` products. That the vectors lose orthogonality repeats eigenvalues and
    changes none. Unlike plain power iteration it finds the largest eigenvalue, not the one of largest magnitude.
    """
    before, coupling = torch.zeros_like(start), 0.0
    vector = start / start.norm()
    table = torch.zeros(most, most, dtype=torch.float64)
    value = error = 0.0
    for step in range(most):
        image = product(vector) - coupling * before
        table[step, step] = along = float(image @ vector)
        image -= along * vector
        coupling = float(image.norm())
        values, vectors = torch.linalg.eigh(table[: step + 1, : step + 1])
        value, error = float(values[-1]), coupling * abs(float(vectors[-1, -1]))
        if error <= tolerance * abs(value) or step + 1 == most:
            return Eigenvalue(value, error, step + 1)
        table[step, step + 1] = table[step + 1, step] = coupling
        before, vector = vector, image / coupling
    raise AssertionError("a matrix has at least one product")
