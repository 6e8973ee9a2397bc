"""Adapters of single experts, as every earlier transformers had them; PEFT joins those of all experts, since these are one parameter by now."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch.nn.functional import pad

from cora_cli.adapters.peft_settings import DEFAULT_ALPHA, pattern_value
from cora_cli.adapters.storage import PREFIX
from cora_cli.methods.parts.layers import ADAPTER
from cora_cli.models.skeleton import ONE_EXPERT

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)\.lora_(?:embedding_)?(?P<factor>[AB])(?P<bias>\.bias)?")
_JOINED = re.compile(r"\.experts\.(?:base_layer\.)*lora_[AB]\.")


def of_one_scale(config: dict[str, Any], stored: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of single experts with one rank and the scale 1, which are within its factors; any other as it is.

    PEFT multiplies rank and alpha for the joined ones, from the general values: the scale of rsLoRA is then another one, and patterns are passed over.
    """
    varied = config.get("use_rslora") or config.get("alpha_pattern") or config.get("rank_pattern")
    if not varied or config.get("use_dora") or not any(ONE_EXPERT.search(key) for key in stored):
        return config, dict(stored)
    found = {key: place for key in stored if (place := _FACTOR.match(key))}
    ranks = {place["module"]: len(stored[key]) for key, place in found.items() if place["factor"] == "A"}
    most = max(ranks.values(), default=0)
    plain = dict(stored)
    for key, place in found.items():
        rank = ranks.get(place["module"])
        if rank is None:
            continue  # `_check_arrived` names what is missing
        alpha = pattern_value(config.get("alpha_pattern"), place["module"], config.get("lora_alpha", DEFAULT_ALPHA))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if place["factor"] == "A":
            plain[key] = pad(stored[key], (0, 0, 0, most - rank))
        else:
            scaled = scale * stored[key].float()
            plain[key] = scaled if place["bias"] else pad(scaled, (0, most - rank))
    changed = {"r": most, "lora_alpha": most, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**config, **changed}, plain


def joined(wrapped: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with the adapters of single experts as PEFT joins them where the model has joined the experts."""
    single = {key: tensor for key, tensor in state.items() if ONE_EXPERT.search(key)}
    if not single:
        return state
    rest = {key: tensor for key, tensor in state.items() if key not in single}
    return rest | convert_peft_adapter_state_dict_for_transformers(wrapped, wrapped.peft_config[ADAPTER], single, ADAPTER)


@torch.no_grad()
def unchanged_experts(factors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> set[str]:
    """Which of PEFT's `factors` are of layers whose experts an adapter leaves as they are: `state` lacks A and B. Their B becomes zero."""
    found = {key for key in factors.keys() - state.keys() if _JOINED.search(key)}
    found = {key for key in found if {key.replace(".lora_A.", ".lora_B."), key.replace(".lora_B.", ".lora_A.")} <= found}
    for key in found:
        if ".lora_B." in key:
            factors[key].zero_()
    return found
