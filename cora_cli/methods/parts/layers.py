"""The layers of a PEFT model that an adapter changes, and their factors A and B."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer that any of PEFT's methods adapts, with its name in the base model."""
    base: torch.nn.Module = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer with the name that its linear layer has in the base model."""
    for name, module in adapted_layers(model):
        if isinstance(module, LoraLayer):
            yield name, module


def factors_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a LoRA layer: the parameters themselves, or the product where a factor is one."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight, b.weight
