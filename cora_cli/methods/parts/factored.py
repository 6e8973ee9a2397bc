"""A LoRA factor that is the product of a trained and a frozen matrix."""

import torch
from torch.nn import functional

from cora_cli.methods.parts.computed import Computed


class Factored(Computed):
    """The product of a trained `inner` and a frozen `outer` matrix.

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

    def matrix(self) -> torch.Tensor:
        """The product."""
        first, second = self._in_turn()
        return second @ first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in of the product) -> (..., out of the product), as two thin products."""
        first, second = self._in_turn()
        return functional.linear(functional.linear(x, first), second)
