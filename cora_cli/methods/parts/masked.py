"""A LoRA factor of which only chosen entries are trained."""

import torch
from torch.nn import functional


class Masked(torch.nn.Module):
    """Takes the place of PEFT's linear layer; entries of `weight` where `mask` is false count as zero and get no gradient (LoRI)."""

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., columns) -> (..., rows)."""
        return functional.linear(x, self.weight * self.mask)
