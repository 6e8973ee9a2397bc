"""How far an adapter's weights can be from those that it stores, and models with weights drawn from that distribution."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cora_cli import rundir
from cora_cli.adapters.facts import read_facts
from cora_cli.errors import CoraError, reason
from cora_cli.methods.parts.layers import ADAPTER
from cora_cli.methods.parts.starts import seeded
from cora_cli.models.references import ModelPath
from cora_cli.progress import say

_ROWS = "deviation"


def has_posterior(adapter: ModelPath | None) -> bool:
    """Whether the adapter stores a distribution; its own weights are the mean."""
    return adapter is not None and (adapter.path / rundir.POSTERIOR).is_file()


def say_mean(adapter: ModelPath) -> None:
    """Say that the result has no distribution, where the adapter has one."""
    if has_posterior(adapter):
        say(f"{adapter.reference} has a distribution of weights; what is written here is its mean")


def write_row_noise(directory: Path, deviations: Mapping[str, torch.Tensor]) -> None:
    """Store the relative standard deviation (r,) of the rows of each layer's A."""
    state = {f"{name}.{_ROWS}": value.detach().to("cpu", copy=True).contiguous() for name, value in deviations.items()}
    save_file(state, directory / rundir.POSTERIOR, metadata={"format": "pt"})


def drawn_models(model: Any, adapter: ModelPath, count: int) -> list[Any]:
    """`count` copies of a model of transformers with the LoRA layers of `adapter`. They share all weights but the drawn A.

    The draws are those of the seed with which the adapter was trained.

    Raises `CoraError` where the distribution does not fit the adapter.
    """
    path = adapter.path / rundir.POSTERIOR
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CoraError(f"{path} cannot be read: {reason(error)}") from error
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if {key.rpartition(".")[0] for key in state} != names:
        raise CoraError(f"{path} does not belong to this adapter: its layers are not those of the adapter")
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
            a = layer.lora_A[ADAPTER]
            deviation = state[f"{name}.{_ROWS}"]
            if deviation.shape != a.weight.shape[:1]:
                raise CoraError(
                    f"{path} does not belong to this adapter: {name} has {len(a.weight)} rows, not {len(deviation)}"
                )
            noise = deviation * torch.randn(len(deviation), generator=generator)
            a.weight = torch.nn.Parameter(a.weight * (1 + noise.to(a.weight))[:, None], requires_grad=False)
        drawn.append(one)
    return drawn
