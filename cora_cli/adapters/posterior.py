"""How far an adapter's weights can be from those that it stores, and models with weights drawn from that distribution.

`posterior.safetensors` holds one of two kinds: a size of each row of A that was learned in training, or the curvature of a Laplace
approximation.
"""

import copy
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cora_cli import rundir
from cora_cli.adapters.facts import read_facts
from cora_cli.adapters.kronecker import Kronecker
from cora_cli.errors import CoraError, reason
from cora_cli.methods.parts.layers import ADAPTER
from cora_cli.methods.parts.starts import seeded
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import fused_experts
from cora_cli.progress import say

_ROWS = "deviation"
_PRECISION = "prior_precision"
_NO_DERIVATIVE = re.compile(r"forward(?:[- ]mode)? AD")
"""What PyTorch says of an operation, or of a function of a model's own, without a derivative of the kind that draws need."""
_PARTS = ("outputs", "output_values", "inputs", "input_values")


def has_posterior(adapter: ModelPath | None) -> bool:
    """Whether the adapter stores a distribution; its own weights are the mean."""
    return adapter is not None and (adapter.path / rundir.POSTERIOR).is_file()


def say_mean(adapter: ModelPath) -> None:
    """Say that the result has no distribution, where the adapter has one."""
    if has_posterior(adapter):
        say(f"{adapter.reference} has a distribution of weights; what is written here is its mean")


def write_row_noise(directory: Path, deviations: Mapping[str, torch.Tensor]) -> None:
    """Store the standard deviation (r,) of the rows of each layer's A, relative to the rows."""
    state = {f"{name}.{_ROWS}": value.detach().to("cpu", copy=True).contiguous() for name, value in deviations.items()}
    save_file(state, directory / rundir.POSTERIOR, metadata={"format": "pt"})


def write_kronecker(directory: Path, curvatures: Mapping[tuple[str, str], Kronecker], precision: float) -> None:
    """Store the curvature of the A and B of each layer, and the prior precision."""
    state = {
        f"{name}.{factor}.{part}": getattr(one, part).float().to("cpu", copy=True).contiguous()
        for (name, factor), one in curvatures.items()
        for part in _PARTS
    }
    # A tensor, since safetensors writes several entries of metadata in random order.
    state[_PRECISION] = torch.tensor(precision, dtype=torch.float64)
    save_file(state, directory / rundir.POSTERIOR, metadata={"format": "pt"})


def drawn_models(model: Any, adapter: ModelPath, count: int) -> list[Any]:
    """`count` models in place of the one of transformers with the LoRA layers of `adapter`. They share all weights but A and B.

    The size of A's rows is drawn as it is. A draw δ of a Laplace approximation is that of the linearised model, as the approximation
    assumes: its logits are f(θ) + J·δ, by forward-mode differentiation. The draws are those of the seed with which the adapter was
    trained. Raises `CoraError` where the distribution does not fit the adapter.
    """
    path = adapter.path / rundir.POSTERIOR
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CoraError(f"{path} cannot be read: {reason(error)}") from error
    precision = state.pop(_PRECISION, None)
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    parts = [_ROWS] if precision is None else [f"{factor}.{part}" for factor, part in itertools.product("AB", _PARTS)]
    if state.keys() != {f"{name}.{part}" for name in names for part in parts}:
        raise CoraError(f"{path} does not belong to this adapter: it has other layers")
    facts = read_facts(adapter.path)
    seed = facts.plan.seed if facts is not None else 0
    shared = [*model.parameters(), *model.buffers()]
    drawn = []
    for number in range(count):
        # What the memo holds is not copied.
        one = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        for name in names:
            layer = one.get_submodule(name)
            generator = seeded(seed, name, f"draw {number}")
            try:
                if precision is None:
                    _scale_rows(layer, state[f"{name}.{_ROWS}"], generator)
                else:
                    _set_tangents(layer, state, name, float(precision), generator)
            except (RuntimeError, ValueError) as error:
                raise CoraError(f"{path} does not belong to this adapter: {name}: {reason(error)}") from error
        if precision is not None:
            if fused_experts(one):  # the kernel for all experts at once has no such derivatives
                one.set_experts_implementation("eager")
            one.forward = _linearised(one.forward)
        drawn.append(one)
    return drawn


def _scale_rows(layer: Any, deviation: torch.Tensor, generator: torch.Generator) -> None:
    """Multiply the rows of A (r, in) by 1 + deviation ⊙ z."""
    a = layer.lora_A[ADAPTER]
    scale = (1 + deviation * torch.randn(len(a.weight), generator=generator)).to(a.weight)
    a.weight = torch.nn.Parameter(a.weight * scale[:, None], requires_grad=False)


class Dual(torch.nn.Module):
    """A linear map by a weight (rows, columns) whose tangent is a draw δ."""

    def __init__(self, weight: torch.nn.Parameter, tangent: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.tangent = tangent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., columns) -> (..., rows), in the precision that the weight has now."""
        return functional.linear(x, forward_ad.make_dual(self.weight.detach(), self.tangent.to(self.weight)))


def _set_tangents(
    layer: Any, state: Mapping[str, torch.Tensor], name: str, precision: float, generator: torch.Generator
) -> None:
    """Give A and B a draw δ as their tangents."""
    _enter_level()
    for factor in "AB":
        modules = getattr(layer, f"lora_{factor}")
        weight = modules[ADAPTER].weight
        curvature = Kronecker(*(state[f"{name}.{factor}.{part}"] for part in _PARTS))
        delta = curvature.draw(torch.randn(weight.shape, generator=generator), precision)
        modules[ADAPTER] = Dual(weight, delta.to(weight))


@functools.cache
def _enter_level() -> None:
    """Duals live as long as their level, of which PyTorch has one at a time; the states of generation hold duals from pass to pass."""
    forward_ad.enter_dual_level()


def _linearised(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a model with dual weights, with logits f(θ) + J·δ."""

    @functools.wraps(forward)
    def linear(*args: Any, **kwargs: Any) -> Any:
        # Inference mode has no derivatives, and the fused kernels of attention none of this kind.
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                output = forward(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:
                if not _NO_DERIVATIVE.search(str(error)):
                    raise
                raise CoraError(f"this model cannot be linearised ({reason(error)}); --draws 0 evaluates its mean") from error
            value, change = forward_ad.unpack_dual(output.logits)
            output.logits = value if change is None else value + change
        return output

    return linear
