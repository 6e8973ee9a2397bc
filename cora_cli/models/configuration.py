"""Read a model's configuration, and what it says about dropout and sequence lengths under all the names that families use."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cora_cli.errors import CoraError, reason
from cora_cli.models.checkpoint import PLAIN_TYPES
from cora_cli.models.model_path import ModelPath

NOISE = ("drop", "jitter")
"""Parts of the names of settings that make a model in training random."""
_ROUTING = ("phimoe", "router_jitter_noise")
"""A family and its setting that is named like noise and decides, in evaluation too, which experts share a token; see `route_as_evaluated`."""
RESCALED = "rescale_prenorm_residual"
"""Mamba's setting by which its first weights are drawn."""
WINDOWS = (
    *("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "local_attention"),
    *("attention_window", "attention_window_size", "index_topk"),
)
"""Names of settings beyond whose value, in tokens, a token no longer attends to the first one, or not to all."""


def load_configuration(model: ModelPath, trust_remote_code: bool = False) -> Any:
    """The configuration of a causal language model.

    Raises `CoraError` where it cannot be read or contradicts itself, and for a type that transformers does not load as a causal language model.
    """
    if unknown := _unknown_type(model.config()):
        raise CoraError(
            f'config.json of {model.reference} has {unknown}, which is no type of torch; write one such as "float16"'
        )
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises unrelated types for damaged files
        raise CoraError(f"config.json of {model.reference} cannot be read: {reason(error)}") from error
    if contradiction := _contradiction(model.config(), config):
        raise CoraError(f"config.json of {model.reference} contradicts itself: {contradiction}; remove the wrong one")
    model.require_unchanged()
    _forget_uses(config)
    by_remote_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not by_remote_code:
        raise CoraError(
            f"{model.reference} is a {config.model_type} model, which transformers does not load as a causal language model; use a model "
            "that predicts the next token of a text"
        )
    return config


def _unknown_type(stated: Mapping[str, Any]) -> str | None:
    """The entry of `config.json` that states a type of numbers that torch does not have, as JSON; None without one."""
    for name in ("dtype", "torch_dtype"):
        if isinstance(value := stated.get(name), str) and not isinstance(getattr(torch, value, None), torch.dtype):
            return f"{name} {json.dumps(value)}"
    text = stated.get("text_config")
    return _unknown_type(text) if isinstance(text, dict) else None


def _forget_uses(config: Any) -> None:
    """Leave out of a configuration what it states about the use of the model it was saved from, rather than about the model.

    Such as outputs as tuples, gradient checkpointing, an attention kernel that may not be installed here, or a type of numbers in which no model can
    be created, such as float8: what the weights are stored as, their files say. And how first weights are drawn, by which transformers divides stored
    ones of Mamba's kin as it loads them.
    """
    for part in parts_of(config):
        # transformers turns checkpointing on, and removes the entry, which code of a model may read when it is created again.
        for name in (RESCALED, "gradient_checkpointing"):
            if hasattr(part, name):
                setattr(part, name, False)
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
        if getattr(part, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            part._attn_implementation = None
        if (
            isinstance(kind := getattr(part, "dtype", None), torch.dtype)
            and str(kind).removeprefix("torch.") not in PLAIN_TYPES
        ):
            part.dtype = None


def _contradiction(stated: Mapping[str, Any], config: Any) -> str | None:
    """One setting that `config.json` states twice with different values, of which transformers would silently take one; None if none is.

    Settings have several names: those of a family, and those of different versions for the rotary embedding.
    """
    rope, scaling = stated.get("rope_parameters"), stated.get("rope_scaling")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        stated_apart = {name: stated[name] for name in ("rope_theta", "partial_rotary_factor") if stated.get(name) is not None}
        if isinstance(scaling, dict) and scaling:  # transformers takes it in place of all of `rope_parameters`
            stated_apart = {
                **dict.fromkeys(rope),
                **stated_apart,
                **scaling,
                "rope_type": scaling.get("rope_type", scaling.get("type")),
            }
        for name, value in rope.items():
            if name in stated_apart and stated_apart[name] != value:
                place, other = "rope_scaling" if scaling else "next to it", stated_apart[name]
                return f"rope_parameters has {name} {value!r}, but {place} {'has none' if other is None else repr(other)}"
    if stated.get("is_encoder_decoder") and not getattr(type(config), "is_encoder_decoder", False):
        return f"is_encoder_decoder is true, but a {config.model_type} model has no encoder"
    for alias, name in config.attribute_map.items():
        if alias in stated and name in stated and stated[alias] != stated[name]:
            return f"{alias} is {stated[alias]!r}, but {name}, another name for it, is {stated[name]!r}"
    text = stated.get("text_config")
    return _contradiction(text, config.get_text_config(decoder=True)) if isinstance(text, dict) else None


def parts_of(config: Any) -> Iterator[Any]:
    """A configuration and all configurations in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts_of(value)


def has_own_class(config: Any) -> bool:
    """Whether the class of a configuration is none of transformers'."""
    return not type(config).__module__.startswith("transformers.")


def decoder_of(config: Any) -> Any:
    """The configuration of the model that reads and writes the text: transformers', or that in an entry of its own name that code of a model's own
    keeps it in, such as `llm_config`: the only one with a vocabulary."""
    text = config.get_text_config(decoder=True)
    if text is config and has_own_class(config):
        within = [part for part in parts_of(config) if part is not config and getattr(part, "vocab_size", None) is not None]
        return within[0] if len(within) == 1 else text
    return text


def remove_dropout(config: Any) -> dict[str, float]:
    """Set every dropout of a configuration, and every noise on the routing of experts, to 0. Returns what was above it, by name."""
    found: dict[str, float] = {}
    for part in parts_of(config):
        for name, value in vars(part).items():
            is_noise = any(noise in name for noise in NOISE) and (part.model_type, name) != _ROUTING
            if is_noise and type(value) in (int, float) and value > 0:
                found[name] = float(value)
                setattr(part, name, type(value)())  # some configurations insist on the type
    return found


def route_as_evaluated(model: torch.nn.Module) -> None:
    """Let the routers that would draw a token's experts at random in training compute as in evaluation, whatever mode the model is put in."""
    for module in model.modules():
        if hasattr(module, _ROUTING[1]):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: torch.nn.Module, _: object) -> None:
    module.eval()


def keep_scales(model: torch.nn.Module) -> None:
    """Let RWKV's layers keep their weights, which it would divide by powers of two in evaluation.

    What an adapter adds to a layer would not be divided, so that an adapted model would be another one than in training or merged.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = _keep


def _keep() -> None:
    """Divide nothing."""


def balances_experts(stated: Mapping[str, Any]) -> bool:
    """Whether a `config.json` asks for a loss on the routing of experts, which transformers adds to that of the tokens."""
    return any(bool(part.get("output_router_logits")) for part in (stated, stated.get("text_config")) if isinstance(part, dict))


def length_limits(config: Any) -> set[int]:
    """The lengths in tokens at which a model's attention or positions change."""
    decoder = decoder_of(config)
    limits = {value for part in parts_of(decoder) for name in WINDOWS if type(value := getattr(part, name, None)) is int}
    limits |= set((getattr(decoder, "compress_rates", None) or {}).values())  # tokens to a key that stands for all of them
    switch = rope_switch(config)
    return {limit for limit in limits if limit > 0} | ({switch} if switch is not None else set())


def rope_switch(config: Any) -> int | None:
    """The length above which the rotary embedding of *all* tokens of a forward pass changes; None where none does.

    Such a model (LongRoPE, arXiv 2402.13753, or dynamic NTK) takes the length from the largest position of the pass, so examples on
    both sides of it do not go together.
    """
    decoder = decoder_of(config)
    rope = getattr(decoder, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "longrope":
            return int(parameters["original_max_position_embeddings"])
        if kind == "dynamic":
            return int(decoder.max_position_embeddings)
    return None


def depends_on_batch(config: Any) -> bool:
    """Whether attention depends on the length of the batch, padding included: where it is sparse in blocks, or chooses keys by content."""
    decoder = decoder_of(config)
    return (
        getattr(decoder, "attention_type", None) == "block_sparse"
        or hasattr(decoder, "lsh_attn_chunk_length")
        or hasattr(decoder, "keep_window_size")
        or any(getattr(decoder, name, None) for name in ("index_topk", "indexer_budget"))
    )
