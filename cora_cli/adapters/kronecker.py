"""The Gaussian of a Laplace approximation over one matrix, whose curvature is a Kronecker product (K-FAC, arXiv 1503.05671)."""

import dataclasses
from collections.abc import Sequence

import torch

_PRECISIONS = (1e-10, 1e14)
"""Where the best prior precision is searched."""


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A curvature F = (Q_o·diag(l_o)·Q_oᵀ) ⊗ (Q_i·diag(l_i)·Q_iᵀ) of a matrix (out, in), with Q_o (out, k) and Q_i (in, l) orthonormal.

    Directions that Q_o and Q_i leave out have no curvature, so that the prior alone decides about them.
    """

    outputs: torch.Tensor
    output_values: torch.Tensor
    inputs: torch.Tensor
    input_values: torch.Tensor

    @classmethod
    def of_sums(cls, gradients: torch.Tensor, activations: torch.Tensor, count: int, most: int) -> "Kronecker":
        """From Σ g·gᵀ (out, out) and Σ x·xᵀ (in, in) over `count` positions: F = (1/count)·(Σ g·gᵀ) ⊗ (Σ x·xᵀ), `most` directions each."""
        (outputs, output_values), (inputs, input_values) = (_leading(one, most) for one in (gradients / count, activations))
        return cls(outputs, output_values, inputs, input_values)

    @property
    def eigenvalues(self) -> torch.Tensor:
        """Those of F that are kept (k, l)."""
        return torch.outer(self.output_values, self.input_values)

    def draw(self, noise: torch.Tensor, precision: float) -> torch.Tensor:
        """(F + λ)^(−½)·noise for standard normal `noise` (out, in): a draw from N(0, (F + λ)⁻¹) with the prior precision λ."""
        inside = self.outputs.T @ noise @ self.inputs
        change = (self.eigenvalues + precision).rsqrt() - precision**-0.5
        return noise * precision**-0.5 + self.outputs @ (change * inside) @ self.inputs.T


def best_precision(curvatures: Sequence[Kronecker], norm_squared: float) -> float:
    """The λ that maximises the marginal likelihood of N(0, λ⁻¹) weights whose trained values have this squared norm.

    log p(D | λ) = const − ½λ‖θ‖² + ½P·log λ − ½Σ log(l + λ) over all P directions (arXiv 2106.10065), so that at the maximum λ‖θ‖² is the
    number Σ l / (l + λ) of directions that the data decide. Both sides are monotonic, which makes it unique.
    """
    values = torch.cat([one.eigenvalues.flatten() for one in curvatures]).double()
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in _PRECISIONS)
    for _ in range(200):
        middle = (low + high) / 2
        precision = middle.exp()
        above = (values / (values + precision)).sum() < precision * norm_squared
        low, high = (low, middle) if above else (middle, high)
    return float(((low + high) / 2).exp())


def _leading(matrix: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (n, k) and eigenvalues (k,) of a positive semidefinite matrix (n, n): the k ≤ `most` largest."""
    values, vectors = torch.linalg.eigh(matrix.double())
    kept = values.clamp(min=0)[-most:], vectors[:, -most:]
    return kept[1].contiguous(), kept[0].contiguous()
