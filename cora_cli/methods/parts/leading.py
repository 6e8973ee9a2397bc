"""A LoRA factor of which a step uses the first pairs only."""

import torch
from torch.nn import functional


class Leading(torch.nn.Module):
    """Takes the place of PEFT's linear layer for A (r, in) or B (out, r), with the same weight.

    `first` is the number of rows of A or columns of B in use, None for all; with `last_alone`, only the last of them gets a gradient.
    """

    def __init__(self, weight: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self._dim = dim
        self.first: int | None = None
        self.last_alone = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., columns in use) -> (..., rows in use)."""
        if self.first is None:
            return functional.linear(x, self.weight)
        if not self.last_alone:
            return functional.linear(x, self.weight.narrow(self._dim, 0, self.first))
        fixed = self.weight.detach().narrow(self._dim, 0, self.first - 1)
        return functional.linear(x, torch.cat([fixed, self.weight.narrow(self._dim, self.first - 1, 1)], self._dim))
