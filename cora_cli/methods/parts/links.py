"""A LoRA factor that is a chain: a trained link, after earlier ones that are frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from cora_cli.methods.parts.computed import Computed
from cora_cli.methods.parts.layers import ADAPTER


class Links(Computed):
    """Takes the place of PEFT's linear layer for A (rows of links below each other) or B (columns next to each other).

    W + s·B₁·A₁ + s·B₂·A₂ + … is W + s·[B₁ B₂ …]·[A₁; A₂; …], so that a link is merged by keeping it: exactly, in any precision of W,
    and it is part of every checkpoint. A link that is being trained gets LoRA's dropout, those before it do not, as if they were in W.
    """

    earlier: torch.Tensor | None
    """None before the first knot: PEFT takes an empty tensor in a checkpoint for damage, as it does one that is not a matrix."""
    used: torch.Tensor
    """Whether the link is one: a layer can be left out of a link, which is zero then."""

    def __init__(self, link: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.link = torch.nn.Parameter(link)
        self.register_buffer("earlier", None)
        self.register_buffer("used", torch.ones(1, 1, dtype=torch.bool))
        self.dropout: torch.nn.Module = torch.nn.Identity()
        self._dim = dim

    def matrix(self) -> torch.Tensor:
        """All links, the trained one also where it is left out."""
        return self.link if self.earlier is None else torch.cat([self.earlier, self.link], self._dim)

    @property
    def weight(self) -> torch.Tensor:
        """All links without a gradient, the trained one only where it is one."""
        return self.matrix().detach() if self.earlier is None or self.used else self.earlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in or all ranks) -> (..., all ranks or out)."""
        if self._dim == 1:
            return super().forward(x)
        new = functional.linear(self.dropout(x), self.link)
        return new if self.earlier is None else torch.cat([functional.linear(x, self.earlier), new], -1)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for the links that were finished when a checkpoint was written."""
        self.earlier = self.link.new_zeros(shapes["earlier"]) if "earlier" in shapes else None


def take_dropout(layer: LoraLayer) -> None:
    """Give the layer's dropout to its A, which applies it to the trained link alone."""
    chain: Any = layer.lora_A[ADAPTER]
    chain.dropout, layer.lora_dropout[ADAPTER] = layer.lora_dropout[ADAPTER], torch.nn.Identity()


@torch.no_grad()
def extend(layer: LoraLayer, link_a: torch.Tensor | None) -> None:
    """Freeze the layer's link and start a new one with A = `link_a` and B = 0, in the same parameters; None leaves the layer out."""
    for factor, start in ((layer.lora_A[ADAPTER], link_a), (layer.lora_B[ADAPTER], None)):
        chain: Any = factor
        if chain.used:
            chain.earlier = chain.weight.clone()
        start_link(chain, start, link_a is not None)


def start_link(chain: Any, start: torch.Tensor | None, used: bool) -> None:
    """Set the trained link to `start`, or to zero."""
    chain.link.zero_() if start is None else chain.link.copy_(start)
    chain.used.fill_(used)
