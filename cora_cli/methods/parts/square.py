"""The two halves of MoRA's change of a weight: fixed compression of the inputs, and a trained square matrix with fixed expansion."""

import math

import torch
from torch.nn import functional

from cora_cli.methods.parts.computed import Computed

_BASE = 10_000
"""RoPE's, as in the authors' code."""


class Compression(Computed):
    """Cuts the inputs into blocks of q, padded at the end with the first inputs, and sums or rotates them. Nothing in it is trained.

    The rotation turns the pair (k, k + q/2) of block j by the angle j·base^(−2k/q) (arXiv 2405.12130, type 6).
    """

    like: torch.Tensor

    def __init__(self, in_features: int, size: int, rotates: bool) -> None:
        super().__init__()
        self._inputs, self._size, self._rotates = in_features, size, rotates
        self._count = math.ceil(in_features / size)
        # Holds no number: its device and precision are those of the matrix.
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def blocks(self) -> int:
        """Blocks that come out: all of them where they are rotated, otherwise their sum."""
        return self._count if self._rotates else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., blocks·q)."""
        missing = self._count * self._size - self._inputs
        blocks = torch.cat([x, x[..., :missing]], dim=-1).unflatten(-1, (self._count, self._size))
        if not self._rotates:
            return blocks.sum(dim=-2)
        angles = self._angles(x.device)
        first, second = blocks.chunk(2, dim=-1)
        turned = blocks * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)
        return turned.flatten(-2)

    def matrix(self) -> torch.Tensor:
        """(blocks·q, in): a one for each input of a sum, or a cosine and a sine for each number of a rotated block."""
        places = torch.arange(self._count * self._size, device=self.like.device)
        found = self.like.new_zeros(self.blocks * self._size, self._inputs)
        if not self._rotates:
            return found.index_put_((places % self._size, places % self._inputs), found.new_ones(()), accumulate=True)
        angles, half = self._angles(places.device).flatten(), self._size // 2
        ahead = places % self._size < half
        partners = torch.where(ahead, places + half, places - half)
        found[places, places % self._inputs] = angles.cos().to(found.dtype)
        found[places, partners % self._inputs] = torch.where(ahead, -1, 1) * angles.sin().to(found.dtype)
        return found

    def _angles(self, device: torch.device) -> torch.Tensor:
        """(blocks, q): by how much each number of each block is turned."""
        speeds = _BASE ** (-torch.arange(0, self._size, 2, device=device, dtype=torch.float32) / self._size)
        return torch.outer(torch.arange(self._count, device=device), speeds).repeat(1, 2)


class Expansion(Computed):
    """Multiplies each block by the trained `square` (q, q), sets the results side by side, and repeats or cuts them to the outputs."""

    def __init__(self, square: torch.Tensor, blocks: int, out_features: int) -> None:
        super().__init__()
        self.square = torch.nn.Parameter(square)
        self._blocks, self._outputs = blocks, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., blocks·q) -> (..., out)."""
        out = functional.linear(x.unflatten(-1, (self._blocks, -1)), self.square).flatten(-2)
        return out.repeat(*[1] * (out.dim() - 1), math.ceil(self._outputs / out.shape[-1]))[..., : self._outputs]

    def matrix(self) -> torch.Tensor:
        """(out, blocks·q)."""
        whole = torch.block_diag(*[self.square] * self._blocks)
        return whole.repeat(math.ceil(self._outputs / len(whole)), 1)[: self._outputs]
