"""A frozen change of W that stands next to an adapter: the mean of the changes that earlier models made (`--start mean-delta`)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from cora_cli.methods.parts.layers import ADAPTER, Observed, linear_weight

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

    def matrix(self) -> torch.Tensor:
        """The mean itself, (out, in)."""
        return self.up @ self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        return functional.linear(functional.linear(x.to(self.down.dtype), self.down), self.up)


def add_mean_change(layer: LoraLayer, sources: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let the layer's base layer compute (W + mean of B_k·A_k)·x."""
    base: Any = layer.get_base_layer()
    mean = MeanChange(sources).to(base.weight.device)
    setattr(layer, _NAME, mean)
    _add_to_outputs(base, mean)


def _add_to_outputs(linear: torch.nn.Module, mean: MeanChange) -> Any:
    """The handle of the hook that does so."""
    return linear.register_forward_hook(lambda _, inputs, output: output + mean(inputs[0]).to(output.dtype))


@contextlib.contextmanager
def mean_changes_added(model: torch.nn.Module, observed: Mapping[str, Observed]) -> Iterator[None]:
    """Let the layers of a model without an adapter compute (W + mean of B_k·A_k)·x in the block."""
    with contextlib.ExitStack() as stack:
        for name, one in observed.items():
            linear: Any = model.get_submodule(name)
            stack.callback(_add_to_outputs(linear, MeanChange(one.sources).to(linear.weight.device)).remove)
        yield


def put_means(model: torch.nn.Module, observed: Mapping[str, Observed]) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Put W + mean in float32 in the place of W, for starts that are computed from it; `take_means` takes what this returns."""
    places = []
    for name, one in observed.items():
        module: Any = model.get_submodule(name)
        linear = linear_weight(module)
        assert linear is not None
        mean = MeanChange(one.sources).to(module.weight.device).matrix()
        mean = mean.T if linear.transposed else mean
        places.append((module.weight, module.weight.data, mean))
        module.weight.data = module.weight.data.float() + mean
    return places


def take_means(places: Sequence[tuple[Any, torch.Tensor, torch.Tensor]], subtracted: bool) -> None:
    """Put W back, or W minus what has been `subtracted` from it and the mean since."""
    for weight, before, mean in places:
        weight.data = (weight.data - mean).to(before.dtype) if subtracted else before


def mean_matrix(layer: LoraLayer) -> torch.Tensor | None:
    """The mean (out, in) that stands next to W; None where none does."""
    mean: Any = getattr(layer, _NAME, None)
    return None if mean is None else mean.matrix()


def with_mean_change(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r + Σk, in) and B (out, r + Σk) whose s·B·A is that of `a` and `b` plus the mean; `a` and `b` where the layer has none."""
    mean: Any = getattr(layer, _NAME, None)
    if mean is None:
        return a, b
    return torch.cat([a, mean.down]), torch.cat([b, mean.up / layer.scaling[ADAPTER]], dim=1)
