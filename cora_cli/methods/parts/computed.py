"""A LoRA factor that is computed from trained tensors of other shapes."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional


class Computed(torch.nn.Module):
    """Replaces PEFT's linear layer for A (r, in) or B (out, r); a subclass holds the trained tensors and computes the matrix.

    PEFT's forward pass, merging and precision rules apply unchanged, and what is stored is an ordinary LoRA.
    """

    def matrix(self) -> torch.Tensor:
        """A or B, with gradients to the trained tensors."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., columns of the matrix) -> (..., rows of the matrix)."""
        return functional.linear(x, self.matrix())

    @property
    def weight(self) -> torch.Tensor:
        """The matrix without a gradient; PEFT reads it when merging, and for its dtype."""
        with torch.no_grad():
            return self.matrix()

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for a checkpoint in which its tensors have these names and shapes, where their number or shape changes in training."""
