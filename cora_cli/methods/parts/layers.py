"""The layers of a PEFT model that an adapter changes, and their factors A and B."""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"


@dataclasses.dataclass(frozen=True)
class Observed:
    """What the start of a layer is computed from apart from W, as far as the method asks for it (`Method.start_from`).

    `sources`: B (out, k) and A (k, in) with B·A = ΔW, of each model of --start-models. `gradient` (out, in): ∂L/∂W of the mean loss of the
    start's examples. `inputs` (in, in): the mean of x·xᵀ over their tokens. `start`: A and B in place of those computed from the
    others, as a resumed run subtracted them from W. All float32 on the CPU.
    """

    sources: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    gradient: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    start: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """The weight W (out, in) of a linear layer, whichever way round the layer stores it, and what was observed for its start.

    `rank` is the layer's own rank, where its method shares them out.
    """

    weight: torch.Tensor
    in_features: int
    out_features: int
    transposed: bool = False
    observed: Observed = Observed()
    rank: int | None = None


def linear_weight(module: torch.nn.Module) -> LinearWeight | None:
    """The weight of an `nn.Linear` or of GPT-2's Conv1D, which stores (in, out); None for other modules."""
    if isinstance(module, torch.nn.Linear):
        return LinearWeight(module.weight, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        inside, outside = module.weight.shape
        return LinearWeight(module.weight.T, inside, outside, transposed=True)
    return None


def stores_transposed(layer: BaseTunerLayer) -> bool:
    """Whether the layer that an adapter changes stores its weight as (in, out)."""
    return isinstance(layer.get_base_layer(), Conv1D)


def transformers_model(model: Any) -> Any:
    """The model of transformers, without the adapter that it may have."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_invocation(model: Any) -> bool:
    """Whether the model has an activated LoRA (aLoRA), which changes the tokens from its invocation on; only PEFT's own passes know where that is."""
    return bool(isinstance(model, PeftModel) and getattr(model.active_peft_config, "alora_invocation_tokens", None))


def without_cache(model: Any) -> dict[str, bool]:
    """The argument by which the model's forward pass keeps no keys and values; none where it takes no such argument, as with a model's own code."""
    taken = inspect.signature(transformers_model(model).forward).parameters
    named = "use_cache" in taken or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    return {"use_cache": False} if named else {}


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer that any of PEFT's methods adapts, with its name in the base model."""
    base: torch.nn.Module = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer (PEFT's `LoraLayer`) with the name that its linear layer has in the base model.

    PEFT derives the layers of AdaLoRA from it, which have other factors and are none.
    """
    for name, module in adapted_layers(model):
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer):
            yield name, module


def factors_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a LoRA layer: the parameters themselves, or what a factor is computed as."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight, b.weight
