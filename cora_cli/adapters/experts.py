"""Adapters of single experts, as every earlier transformers had them; PEFT joins those of all experts, since these are one parameter by now."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cora_cli.adapters.peft_settings import DEFAULT_ALPHA, pattern_value
from cora_cli.adapters.storage import PREFIX
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import ADAPTER
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import ONE_EXPERT

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)\.lora_(?:embedding_)?(?P<factor>[AB])(?P<bias>\.bias)?")
_PLACE = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>[^.]+)\.(?P<factor>lora_[AB])\.weight")
_HALVES = {"w1": ("w1", "w3"), "w3": ("w1", "w3"), "gate_proj": ("gate_proj", "up_proj"), "up_proj": ("gate_proj", "up_proj")}
"""Gate and up, which transformers joins to one weight, under both names that they have in files."""
_DOWN = {"w1": "w2", "w3": "w2", "gate_proj": "down_proj", "up_proj": "down_proj"}
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


def of_all_experts(
    model: PreTrainedModel, config: dict[str, Any], stored: dict[str, torch.Tensor], adapter: ModelPath
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of single experts with zeros for what it leaves as it is of a layer's experts; any other as it is.

    PEFT joins all experts of a layer or none, gate with up, and names the result as if down were adapted too. Patterns of target modules are
    replaced by names, since PEFT compares them with experts that have no numbers. Raises `CoraError` for A without B, or B without A.
    """
    known = {f"{PREFIX}{name}" for name, _ in model.named_modules()}
    # A model's own code may keep its experts apart.
    places = {key: place for key in stored if (place := _PLACE.fullmatch(key)) and key.rpartition(".lora_")[0] not in known}
    if not places:
        return config, stored
    count = max(
        (len(weight) for name, weight in model.named_parameters() if ".experts." in name and weight.ndim == 3), default=0
    )
    like: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for place in places.values():
        pair = [f"{place['experts']}.{place['number']}.{place['name']}.lora_{factor}.weight" for factor in "AB"]
        if lost := [key for key in pair if key not in stored]:
            raise CoraError(
                f"adapter {adapter.path}: {lost[0]} is missing, the other factor of that expert is there: the adapter is incomplete"
            )
        a, b = (stored[key] for key in pair)
        for name in _HALVES.get(place["name"], (place["name"],)):
            like.setdefault((place["experts"], name), (a, b))
        if place["name"] in _DOWN:
            like.setdefault((place["experts"], _DOWN[place["name"]]), (b.T, a.T))
    plain = dict(stored)
    for (experts, name), (a, b) in like.items():
        for number in range(count):
            if f"{experts}.{number}.{name}.lora_A.weight" not in stored:
                plain[f"{experts}.{number}.{name}.lora_A.weight"] = torch.zeros_like(a)
                plain[f"{experts}.{number}.{name}.lora_B.weight"] = torch.zeros_like(b)
    added = {place["name"] for key in plain.keys() - stored.keys() if (place := _PLACE.fullmatch(key))}
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        others = {found["module"] for key in stored.keys() - places.keys() if (found := _FACTOR.match(key))}
        targets = sorted(others | {place["name"] for place in places.values()})
    if isinstance(targets, list):
        targets = [*targets, *sorted(added - {target.rpartition(".")[2] for target in targets})]
    # PEFT refuses dropout for experts that are one parameter; it is for training alone.
    return {**config, "target_modules": targets, "lora_dropout": 0.0}, plain


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
