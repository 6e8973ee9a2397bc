"""LoRA factors put together from pieces that all layers share: mixed vectors of a bank (VB-LoRA), or single entries (Uni-LoRA)."""

import torch

from cora_cli.methods.parts.computed import Computed


class MixedVectors(Computed):
    """A (r, in) or B (out, r) cut into pieces of length b along its long side: each is Σ softmax(top k logits)·(their vectors of `bank`).

    `bank` (h, b) is shared; `logits` (pieces, h) are this factor's own, pieces in the order (r, in/b) for A and (out/b, r) for B.
    """

    def __init__(self, bank: torch.nn.Parameter, logits: torch.Tensor, rank: int, top: int, is_a: bool) -> None:
        super().__init__()
        self.bank, self.logits = bank, torch.nn.Parameter(logits)
        self._rank, self._top, self._is_a = rank, top, is_a

    def matrix(self) -> torch.Tensor:
        """The factor."""
        largest, places = self.logits.topk(self._top, dim=-1)
        pieces = (largest.softmax(-1)[..., None] * self.bank[places]).sum(-2)
        if self._is_a:
            return pieces.reshape(self._rank, -1)
        return pieces.unflatten(0, (-1, self._rank)).transpose(1, 2).reshape(-1, self._rank)


class SharedEntries(Computed):
    """A matrix whose entries are those of the shared `vector` (d, 1) at `places`, each divided by the root of how often it is used.

    `places` and `shares` come from the seed and are no part of a checkpoint.
    """

    places: torch.Tensor
    shares: torch.Tensor

    def __init__(self, vector: torch.nn.Parameter, places: torch.Tensor, shares: torch.Tensor) -> None:
        super().__init__()
        self.vector = vector
        self.register_buffer("places", places.int(), persistent=False)
        self.register_buffer("shares", shares, persistent=False)

    def matrix(self) -> torch.Tensor:
        """The factor."""
        return self.vector[self.places, 0] * self.shares
