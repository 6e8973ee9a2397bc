"""A frozen change of W that stands next to an adapter: the mean of the changes that earlier models made (`--start mean-delta`)."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from cora_cli.methods.parts.layers import ADAPTER

_NAME = "mean_change"


class MeanChange(torch.nn.Module):
    """(1/n)·Σ B_k·A_k of n source models as one product: `up` (out, Σk) times `down` (Σk, in).

    It is added to the output of the base layer and not to W, where the precision of W would round it away. It is no part of the adapter's
    checkpoints: a resumed run computes it again from models with the same hashes.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, sources: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.register_buffer("down", torch.cat([a for _, a in sources]))
        self.register_buffer("up", torch.cat([b for b, _ in sources], dim=1) / len(sources))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        return functional.linear(functional.linear(x.to(self.down.dtype), self.down), self.up)


def add_mean_change(layer: LoraLayer, sources: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let the layer's base layer compute (W + mean of B_k·A_k)·x."""
    base: Any = layer.get_base_layer()
    mean = MeanChange(sources).to(base.weight.device)
    setattr(layer, _NAME, mean)
    base.register_forward_hook(lambda _, inputs, output: output + mean(inputs[0]).to(output.dtype))


def with_mean_change(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r + Σk, in) and B (out, r + Σk) whose s·B·A is that of `a` and `b` plus the mean; `a` and `b` where the layer has none."""
    mean: Any = getattr(layer, _NAME, None)
    if mean is None:
        return a, b
    return torch.cat([a, mean.down]), torch.cat([b, mean.up / layer.scaling[ADAPTER]], dim=1)
