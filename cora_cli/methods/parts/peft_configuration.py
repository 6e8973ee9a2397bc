"""A configuration file of PEFT -> PEFT's own configuration class, checked: which methods can be trained here, and with what values."""

import dataclasses
import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig

from cora_cli.errors import CoraError

_OWN_LOOP = {
    "ADALORA": "a call in each step",
    "XLORA": "adapters that are trained already",
    "POLY": "a task number with each example",
}
_NO_LINEAR_LAYER = frozenset({"ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS"})
"""Methods that target blocks or embeddings instead of linear layers."""
_NO_CHANGE_OF_W = {
    "BEFT": "adds to the bias and not to the weight, so that the adapter could not be merged",
    "LILY": "weights its factors by a mean over all tokens of a batch, so that no loss or answer would be that of its record alone",
}
_MORE_THAN_LAYERS = {
    "modules_to_save": "trains complete modules next to the adapter",
    "trainable_token_indices": "trains rows of the embedding next to the adapter",
    "layer_replication": "repeats layers of the base model",
    "kasa_config": "adds terms to the loss",
    "monteclora_config": "adds a term to the loss",
    "use_asa": "needs a call after each step",
    "arrow_config": "chooses among other adapters",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), "belongs to a start that needs data"),
}
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object", NoneType: "null"}
_STARTS = (True, False, "gaussian", "orthogonal")


def peft_configuration(values: dict[str, Any], rank: int) -> PeftConfig:
    """PEFT's configuration from `values`, the content of an `adapter_config.json`; `rank` is the default of a method that has one.

    Raises `CoraError` for a method that PEFT does not know, that does not adapt weights or needs a training loop of its own, and for
    a value of another type than PEFT declares.
    """
    kind = str(values["peft_type"]).upper()
    known = {str(member.value): member for member in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in known:
        raise CoraError(f"--peft-config: peft_type {values['peft_type']!r} is none of {', '.join(sorted(known))}")
    if kind in _OWN_LOOP:
        raise CoraError(f"--peft-config: {kind} needs {_OWN_LOOP[kind]}, which `cora train` does not provide")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]]
    if "target_modules" not in {field.name for field in dataclasses.fields(config_class)} or kind in _NO_LINEAR_LAYER:
        raise CoraError(f"--peft-config: {kind} does not adapt linear layers, the only ones that `cora train` adapts")
    if kind in _NO_CHANGE_OF_W:
        raise CoraError(f"--peft-config: {kind} {_NO_CHANGE_OF_W[kind]}")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise CoraError(
            f"--peft-config: task_type must be CAUSAL_LM, the only task that `cora train` trains, not {values['task_type']!r}"
        )
    for name, effect in _MORE_THAN_LAYERS.items():
        if (stated := values.get(name)) or (stated is not None and name.endswith("_config")):
            raise CoraError(f"--peft-config: {name} {effect}, which `cora train` does not do; leave it out")
    # OFT counts blocks unless it is given a rank.
    has_rank = any(field.name == "r" and field.default != 0 for field in dataclasses.fields(config_class))
    settings = ({"r": rank} if has_rank else {}) | {
        key: value for key, value in values.items() if key not in ("peft_type", "inference_mode")
    }
    types = get_type_hints(config_class)
    try:
        settings = {key: _typed(key, value, types.get(key, Any)) for key, value in settings.items()}
        config = config_class(**{**settings, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError, ImportError) as error:
        raise refused(kind, error) from error
    if isinstance(config, LoraConfig) and config.init_lora_weights not in _STARTS:
        raise CoraError(
            f"--peft-config: the start {config.init_lora_weights} needs data or changes the base; pissa, olora and mica are modes of "
            "their own"
        )
    if isinstance(config, LoraConfig) and config.target_parameters:
        raise CoraError(
            "--peft-config: target_parameters names parameters outside linear layers, which `cora train` does not adapt"
        )
    if isinstance(config, LoraConfig) and config.lora_bias:
        raise CoraError("--peft-config: lora_bias changes more than the weight, so that the adapter could not be merged")
    if isinstance(config, LoraConfig) and config.alora_invocation_tokens:
        raise CoraError(
            "--peft-config: alora_invocation_tokens applies to some tokens only, so that the adapter could not be merged"
        )
    return config


def _typed(name: str, value: Any, expected: Any) -> Any:
    """The value of the field `name`, an integer as a float where one is declared. Raises `TypeError` where it is something else."""
    if expected is int and name.endswith("alpha"):
        expected = float  # PEFT only divides it by the rank
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, get_args(expected))):
        return value  # of which PEFT makes a configuration of its own
    for candidate in (value, float(value)) if type(value) is int else (value,):
        try:
            type_validator(name, candidate, expected)
        except TypeError:
            continue
        return candidate
    raise TypeError(f"{name} must be {_in_words(expected)}, not {json.dumps(value)}")


def _in_words(expected: Any) -> str:
    """A type in the words of JSON."""
    origin, inner = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        # typing keeps one order of equal unions: whichever was written first anywhere.
        return " or ".join(sorted(map(_in_words, inner), key=lambda word: (word == "null", word)))
    if origin is Literal:
        return " or ".join(json.dumps(one) for one in inner)
    if origin is list:
        return f"a list of {word.removeprefix('a ').removeprefix('an ')}s" if (word := _WORDS.get(inner[0])) else "a list"
    return _WORDS.get(origin or expected, getattr(expected, "__name__", str(expected)))


def refused(kind: str, error: Exception) -> CoraError:
    """The error to raise when PEFT refuses a configuration, on reading it or on building the layers."""
    return CoraError(f"--peft-config: PEFT refuses the configuration of {kind}: {' '.join(str(error).split())}")
