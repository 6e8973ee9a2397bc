"""Merges an adapter into its base and writes the result as a plain model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel

from cora_cli import writing
from cora_cli.adapters.base import base_of, check_base, say_other_base
from cora_cli.adapters.card import carry_card
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.names import names_of, renamed
from cora_cli.adapters.posterior import say_mean
from cora_cli.adapters.rows import embedding_rows, say_tokens_without_rows
from cora_cli.adapters.storage import PREFIX
from cora_cli.data.templates import Template
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import ADAPTER, adapted_layers, linear_weight, lora_layers
from cora_cli.models.checkpoint import Checkpoint, is_finite
from cora_cli.models.configuration import load_configuration
from cora_cli.models.fused import join_projections
from cora_cli.models.loading import check_names, has_own_head, load_model, save_model, separate_head, stored_types
from cora_cli.models.model_path import ModelPath
from cora_cli.models.precision import stays_in_float32
from cora_cli.models.quantized import PLAIN_COPY, is_held_quantized
from cora_cli.models.skeleton import build_skeleton
from cora_cli.models.tokenizer import load_tokenizer, save_tokenizer
from cora_cli.models.trained_on import carry_record, check_code, say_other_tokenizer, say_other_weights, trained_on
from cora_cli.progress import note, say
from cora_cli.settings import TemplateName


class CannotMerge(CoraError):
    """An adapter that PEFT cannot merge, with the `reason`."""

    def __init__(self, adapter: ModelPath, reason: str) -> None:
        self.reason = reason.rstrip(".")
        super().__init__(
            f"adapter {adapter.reference} cannot be merged: {self.reason}; `cora evaluate`, on transformers, evaluates it as it is"
        )


_MUCH = 0.5
"""The share of a change whose loss is worth a word. Rounding that loses less is small against the change in the few directions that it has."""
_SUMS_IN_FLOAT32 = (
    *(
        "LORA",
        "ADALORA",
        "LOHA",
        "LOKR",
        "OFT",
        "HRA",
        "IA3",
        "VERA",
        "PVERA",
        "FOURIERFT",
        "GRALORA",
        "MISS",
        "SHIRA",
        "TINYLORA",
    ),
    *("LN_TUNING", "TRAINABLE_TOKENS"),
)
"""PEFT's methods whose change of a linear layer in bfloat16 is computed in float32, and rounded with the sum alone."""
_DTYPES: dict[str, torch.dtype | None] = {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def merge_adapter(
    adapter: ModelPath,
    output: Path,
    *,
    base: ModelPath | None = None,
    basis_path: Path | None = None,
    dtype: str = "stored",
    trust_remote_code: bool = False,
) -> int:
    """Write W + s·B·A in place of W for every adapted layer, with the tokenizer; returns the number of those layers.

    A given `base` is used as it is; it may be the same model in another precision. `dtype` is `stored` (that of each weight in the base's files), `bf16` or `fp32`. Raises `CoraError` where `output` exists or the adapter does not fit.
    """
    if output.exists():
        raise CoraError(f"{output} exists already; choose a new directory")
    if not adapter.is_adapter:
        raise CoraError(f"{adapter.reference} is a complete model: there is nothing to merge")
    if base is None:
        base = base_of(adapter)
        check_base(adapter, base)
    else:
        say_other_base(adapter, base)
    check_code(adapter, base, trust_remote_code)
    say_mean(adapter)
    say_other_weights(adapter)
    say_other_tokenizer(adapter, base)
    tokenizer = None
    if adapter.has_tokenizer or base.vocabulary_files():
        tokenizer = load_tokenizer(base, trust_remote_code, adapter)
    else:
        say(f"neither {adapter.reference} nor {base.reference} holds a tokenizer, and so none is written")
    model, kinds, others = _load_base(base, dtype, trust_remote_code)
    tied, rows = not has_own_head(model), embedding_rows(model)
    if model.dtype != torch.float32:
        _widen(model, adapter)
    wrapped = load_adapter(model, adapter, basis_path, base=base)
    layers = len(list(adapted_layers(wrapped)))
    lost = say_rounded_away(wrapped, adapter, kinds)
    merged = merged_into_base(wrapped, adapter)
    left = embedding_rows(merged)
    if tokenizer is not None:
        if rows != left < len(tokenizer):
            raise CoraError(
                f"{adapter.reference} stores {left:,} embedding rows, fewer than the {len(tokenizer):,} tokens of its tokenizer, so that text could have "
                "tokens without a row; it belongs to another tokenizer, or its embedding was cut too short"
            )
        say_tokens_without_rows(len(tokenizer), left, adapter)
    join_projections(merged)
    if tied and has_own_head(merged):
        note(f"{adapter.reference} changes the embedding or the head, which were one weight: merged, each has its own")
    _round(merged, kinds, adapter, others)
    with writing.atomic_path(output, replace=False) as temporary:
        save_model(merged, base, temporary, trust_remote_code, ends=_ends(adapter, tokenizer))
        _check_written(temporary, adapter, trust_remote_code)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary, output)
        carry_record(temporary, adapter, base)
        carry_card(temporary, adapter, base, lost=lost)
    return layers


def _load_base(
    base: ModelPath, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, torch.dtype], torch.dtype]:
    """The model with at least the digits of its files and of what is written, so that the sum alone is rounded; the type in which each of its weights
    is written, by name; and that of a new one. `dtype` is that of `merge_adapter`."""
    stored, target = stored_types(base, trust_remote_code), _DTYPES[dtype]
    widths = [*stored.values(), *([target] if target else [])]
    widest = functools.reduce(torch.promote_types, widths) if widths else "auto"  # float32 for bf16 next to fp16
    model = load_model(base, widest, torch.device("cpu"), None, trust_remote_code)
    if target is None and stored:
        return model, stored, model.dtype
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, kind in kinds.items():
        if target is not None and kind.is_floating_point and not stays_in_float32(model, name):
            kinds[name] = target
    return model, kinds, target or model.dtype


def _widen(model: PreTrainedModel, adapter: ModelPath) -> None:
    """Hold in float32 what PEFT would change by numbers in the type of the weight, such as an embedding, so that the sum alone is rounded.

    What the methods of `_SUMS_IN_FLOAT32` change stays as it is, since float32 takes twice the memory.
    """
    known = dict(model.named_modules())
    config = adapter.adapter_config()
    # VeRA's projections, where its files lack them, are drawn in the type of the weight.
    exact = config.get("peft_type") in _SUMS_IN_FLOAT32 and config.get("save_projection", True)
    stored = Checkpoint(adapter).shapes
    for key in renamed(stored, names_of(model, stored)):
        if exact and ".lora_embedding_" not in key:
            continue
        parts = key.removeprefix(PREFIX).split(".")
        owners = (known.get(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1))
        owner = next((owner for owner in owners if owner is not None), None)
        # A bias too, which RoAd turns; every weight, where what is stored belongs to no layer, as with Uni-LoRA.
        for parameter in owner._parameters.values() if owner is not None else model.parameters():
            if parameter is not None:
                parameter.data = parameter.data.float()


def _check_written(directory: Path, adapter: ModelPath, trust_remote_code: bool) -> None:
    """Raise `CoraError` where the files written lack weights that a model of their configuration needs, which it would draw at random."""
    written = ModelPath(str(directory), directory, None)
    try:
        check_names(written, build_skeleton(load_configuration(written, trust_remote_code), trust_remote_code))
    except CoraError as error:
        raise CoraError(f"adapter {adapter.path} cannot be merged: what transformers writes of the merged {error}") from error


def _ends(adapter: ModelPath, tokenizer: Any) -> set[int]:
    """The tokens by which the adapter's training ended answers, as far as that is known; of another program's, those of its chat template, if any."""
    if tokenizer is None:
        return set()
    known = trained_on(adapter)
    name = known.template if known else "chat" if tokenizer.chat_template else "plain"
    if name is None or (name == "chat" and not tokenizer.chat_template):
        return set()
    return Template(cast("TemplateName", name), "prompt", tokenizer, known.date if known else None).ends


def _round(merged: Any, kinds: Mapping[str, torch.dtype], adapter: ModelPath, others: torch.dtype) -> None:
    """Give the weights of `merged` the types `kinds`, by name, and `others` to one that is new. Raises `CoraError` where one exceeds its type's numbers."""
    for name, parameter in merged.named_parameters():
        kind = kinds.get(name, others)
        parameter.data = parameter.data.to(kind)
        if not is_finite(parameter.data):
            raise CoraError(
                f"{adapter.reference}: {name} is stored as {str(kind).removeprefix('torch.')}, which the merged weight exceeds; use --dtype fp32"
            )


def no_change_of_weights(wrapped: PeftModel) -> str | None:
    """Why an adapter is no change of the weights, such as a prompt; None if it is one."""
    method = wrapped.active_peft_config.peft_type.value
    if wrapped.active_peft_config.is_prompt_learning:
        return f"{method} changes the input, not the weights"
    return None if isinstance(wrapped.base_model, BaseTuner) else f"{method} adds to what layers give, not to their weights"


def merged_into_base(wrapped: PeftModel, adapter: ModelPath) -> Any:
    """The base model of `wrapped` with the adapter in its weights.

    Raises `CannotMerge` for an adapter that is no change of the weights, or whose merged weights would not be finite; some layers of `wrapped` may then be
    merged.
    """
    if why := no_change_of_weights(wrapped):
        raise CannotMerge(adapter, why)
    if is_held_quantized(wrapped.get_base_model()):
        raise CannotMerge(
            adapter,
            f"the weights of its base are quantised, and merged ones would be rounded again; merge into {PLAIN_COPY} with --base",
        )
    looked_up = _LookedUp(wrapped)
    _separate_shared_weights(wrapped)
    _settle_heads(wrapped)
    try:
        _merge_parameters(wrapped)
        # PEFT's safe merge would round the change to the type of the weights before the sum is.
        merged: Any = wrapped.merge_and_unload(safe_merge=False)
    except (ValueError, RuntimeError) as error:  # RuntimeError: such as a bias for a layer that has none
        if is_out_of_memory(error):
            raise
        raise CannotMerge(adapter, reason(error)) from error
    if infinite := next((name for name, weight in merged.named_parameters() if not is_finite(weight.data)), None):
        raise CannotMerge(adapter, f"{infinite} would hold values that are not finite")
    if not looked_up.is_merged(merged.get_input_embeddings()):
        raise CannotMerge(
            adapter,
            f"{type(merged).__name__} changes what it looks up in its embedding, such as by a norm, and PEFT adds the adapter behind that",
        )
    if has_own_head(merged):
        separate_head(merged)
    return merged


class _LookedUp:
    """What the embedding of `wrapped` gives for a few tokens, among them those for which the adapter has rows."""

    @torch.no_grad()
    def __init__(self, wrapped: PeftModel) -> None:
        config, base = wrapped.active_peft_config, cast("Any", wrapped.get_base_model())
        embedding = base.get_input_embeddings()
        stated = getattr(config, "token_indices", None) or getattr(config, "trainable_token_indices", None) or []
        rows = stated if isinstance(stated, list) else [row for some in stated.values() for row in some]
        self._ids = torch.tensor([0, 1, *rows[:8]], device=wrapped.device)
        self._found = embedding(self._ids).float()
        plain: Any = embedding
        while isinstance(plain, BaseTunerLayer | AuxiliaryTrainingWrapper):
            plain = plain.get_base_layer() if isinstance(plain, BaseTunerLayer) else plain.original_module
        self._change = (self._found - plain(self._ids).float()).abs().max().item()

    @torch.no_grad()
    def is_merged(self, embedding: Any) -> bool:
        """Whether the merged `embedding` gives the same, but for the rounding of its weights."""
        found = embedding(self._ids)
        rounding = torch.finfo(found.dtype).eps * self._found.abs().max().item()
        return torch.allclose(found.float(), self._found, rtol=0, atol=0.01 * self._change + 2 * rounding)


NO_TYPES: Mapping[str, torch.dtype] = MappingProxyType({})


def say_rounded_away(wrapped: PeftModel, adapter: ModelPath, stored: Mapping[str, torch.dtype] = NO_TYPES) -> float | None:
    """Say so and return the share where much of the change is lost by merging it in the type of the weights; None where little is.

    `stored` has the types in which weights are written, if others than they are loaded in.
    Into weights that are held quantised, nothing is merged.
    """
    if is_held_quantized(wrapped.get_base_model()) or (lost := rounded_away(wrapped, stored)) <= _MUCH:
        return None
    note(
        f"{adapter.reference}: its change is so small that {lost:.0%} of it is lost where the merged weights are rounded to their type; "
        "--dtype fp32 keeps it"
    )
    return lost


@torch.no_grad()
def rounded_away(wrapped: PeftModel, stored: Mapping[str, torch.dtype] = NO_TYPES) -> float:
    """‖round(W + ΔW) − (W + ΔW)‖_F / ‖ΔW‖_F over the plain LoRA layers, at most 1: the share of the change that merging in W's type loses."""
    errors = changes = 0.0
    for name, layer in lora_layers(wrapped):
        base = layer.get_base_layer()
        if linear_weight(base) is None or ADAPTER in layer.lora_variant:
            continue
        weight = base.weight
        kind = stored.get(f"{name}.weight", weight.dtype)
        if kind not in (torch.bfloat16, torch.float16):
            continue
        change = layer.get_delta_weight(ADAPTER).float()
        exact = weight.float() + change
        errors += (exact.to(kind).float() - exact).square().sum().item()
        changes += change.square().sum().item()
    return min(1.0, (errors / changes) ** 0.5) if changes else 0.0


@torch.no_grad()
def _merge_parameters(wrapped: PeftModel) -> None:
    """Merge the LoRAs of parameters, such as fused experts, whose change PEFT would round to the type of the weight before the sum is."""
    for _, layer in adapted_layers(wrapped):
        if isinstance(layer, ParamWrapper):
            weight = layer.get_param()
            kind = weight.dtype
            weight.data = weight.data.float()
            layer.merge()
            weight.data = weight.data.to(kind)


@torch.no_grad()
def _settle_heads(wrapped: PeftModel) -> None:
    """Prepare tied heads that get trained rows of tokens with the embedding for merging, so that they give what they give unmerged.

    PEFT computes such a head without its bias. If a LoRA adapts it, too, PEFT would leave both unmerged.
    """
    layers: list[Any] = [layer for _, layer in adapted_layers(wrapped)]
    for layer in layers:
        head: Any = layer.get_base_layer()
        if isinstance(layer, TrainableTokensLayer) and getattr(head, "bias", None) is not None:
            head.bias = torch.nn.Parameter(torch.zeros_like(head.bias), requires_grad=False)
    for layer in layers:
        if isinstance(inner := getattr(layer, "base_layer", None), TrainableTokensWrapper):
            inner.token_adapter.merge()
            layer.base_layer = inner.token_adapter.base_layer


def _separate_shared_weights(wrapped: PeftModel) -> None:
    """Give each adapted layer parameters of its own where it shares them, as embedding and head do, and layers that PEFT has replicated.

    PEFT adds each update to its own layer; merged into a shared weight, it would reach the others too. Replicated layers get all parameters for
    themselves, since they are different layers from now on.
    """
    base: Any = wrapped.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    everywhere = bool(getattr(wrapped.active_peft_config, "layer_replication", None))
    adapted = {id(layer.get_base_layer()) for _, layer in adapted_layers(wrapped)}
    taken: set[int] = set()
    # The layers that are not adapted come first, and keep the shared ones.
    for module in sorted(base.modules(), key=lambda module: id(module) in adapted):
        for name, parameter in [*module._parameters.items()]:
            if parameter is None:
                continue
            if id(parameter) not in taken:
                taken.add(id(parameter))
            elif id(module) in adapted or (everywhere and not any(module is end for end in ends)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
