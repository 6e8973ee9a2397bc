"""A LoRA factor of which some ranks repeat a chunk, each copy rolled along the rank (PRoLoRA, arXiv 2402.16902)."""

import torch

from cora_cli.methods.parts.computed import Computed


class RotatedChunks(Computed):
    """A (r, in) with `rank_dim` 0, or B (out, r) with `rank_dim` 1: trained `own` ranks, then those of the trained `chunk`.

    Copy c of the chunk is rolled back by c·max(⌊ranks of the chunk / copies⌋, 1) ranks; the last copy is cut to the features.
    """

    def __init__(self, own: torch.Tensor, chunk: torch.Tensor, copies: int, rank_dim: int) -> None:
        super().__init__()
        self.own, self.chunk = torch.nn.Parameter(own), torch.nn.Parameter(chunk)
        self._copies, self._rank_dim = copies, rank_dim

    def matrix(self) -> torch.Tensor:
        """(r, in) or (out, r)."""
        feature_dim = 1 - self._rank_dim
        stride = max(self.chunk.shape[self._rank_dim] // self._copies, 1)
        copies = [self.chunk.roll(-copy * stride, self._rank_dim) for copy in range(self._copies)]
        shared = torch.cat(copies, dim=feature_dim).narrow(feature_dim, 0, self.own.shape[feature_dim])
        return torch.cat([self.own, shared], dim=self._rank_dim)
