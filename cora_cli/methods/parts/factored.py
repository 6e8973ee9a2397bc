"""Factors of LoRA computed from W's singular directions, and a factor that is a product with a frozen part."""

import torch
from torch.nn import functional


class Factored(torch.nn.Module):
    """Stands where PEFT has the linear map of A or B, with a weight that is a trained `inner` times a frozen `outer` matrix.

    A = inner·outer, (r, k)·(k, in), or B = outer·inner, (out, k)·(k, r). The outer one is a buffer: it is stored in checkpoints, and
    nothing in PEFT can make it trainable.
    """

    outer: torch.Tensor

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor, outer_first: bool) -> None:
        super().__init__()
        self.inner = torch.nn.Parameter(inner)
        self.register_buffer("outer", outer)
        self._outer_first = outer_first

    def _in_turn(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.outer, self.inner) if self._outer_first else (self.inner, self.outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in of the product) -> (..., out of the product), as two thin products."""
        first, second = self._in_turn()
        return functional.linear(functional.linear(x, first), second)

    @property
    def weight(self) -> torch.Tensor:
        """The product, without a gradient: PEFT asks for it to merge, and for its type."""
        first, second = self._in_turn()
        return second.detach() @ first.detach()


def minor_factors(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with s·B·A = U_r Σ_r V_rᵀ, the part of the r smallest singular values of `weight` (out, in).

    It is divided between them as PiSSA does with the largest: A = √(Σ_r / s) V_rᵀ, B = U_r √(Σ_r / s) (MiLoRA, arXiv 2406.09044,
    section 3).
    """
    u, values, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (values[-rank:] / scaling).sqrt()
    return root[:, None] * v[-rank:], u[:, -rank:] * root


def principal_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V_rᵀ (r, in) and U_r Σ_r (out, r) of the r largest singular values of `weight` (out, in) (LoRA-XS, arXiv 2405.17604)."""
    u, values, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return v[:rank].contiguous(), u[:, :rank] * values[:rank]
