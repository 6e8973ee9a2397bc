"""A LoRA factor with trained blocks on its diagonal and zeros elsewhere."""

import torch

from cora_cli.methods.parts.computed import Computed


class BlockDiagonal(Computed):
    """The block-diagonal matrix of n trained `blocks` (n, rows / n, columns / n)."""

    def __init__(self, blocks: torch.Tensor) -> None:
        super().__init__()
        self.blocks = torch.nn.Parameter(blocks)

    def matrix(self) -> torch.Tensor:
        """(rows, columns)."""
        return torch.block_diag(*self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., columns) -> (..., rows), each block on its slice of x."""
        count, _, columns = self.blocks.shape
        slices = x.reshape(-1, count, columns).transpose(0, 1)
        # Not einsum: where a plan has fake tensors, autocast would leave its operands in two types.
        return torch.bmm(slices, self.blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], -1)
