"""Writes a trained adapter of any method as an equivalent plain PEFT LoRA, where one exists.

Unlike `merge` it writes no copy of the base model, and unlike the run's own adapter the result contains nothing specific to `cora`.
"""

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.miss import MissLinear
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from cora_cli import writing
from cora_cli.adapters.base import base_of, check_base
from cora_cli.adapters.card import carry_card
from cora_cli.adapters.elsewhere import start_that_changes_base
from cora_cli.adapters.facts import read_facts
from cora_cli.adapters.loading import check_basis, check_rank, load_adapter, split_as_trained
from cora_cli.adapters.merge import CannotMerge, merged_into_base, no_change_of_weights
from cora_cli.adapters.names import names_of, renamed
from cora_cli.adapters.peft_settings import OF_TRAINING
from cora_cli.adapters.posterior import say_mean
from cora_cli.adapters.rows import embedding_rows, say_tokens_without_rows
from cora_cli.adapters.storage import PREFIX, WEIGHTS_FILE, order_names, plain_factors
from cora_cli.errors import CoraError, reason
from cora_cli.methods.method import AS_THE_FILE_SAYS
from cora_cli.methods.parts.layers import ADAPTER, adapted_layers, factors_of, linear_weight, lora_layers, stores_transposed
from cora_cli.methods.registry import method_of
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.fused import SplitProjection, split_parts
from cora_cli.models.loading import load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import location
from cora_cli.models.tokenizer import load_tokenizer, save_tokenizer
from cora_cli.models.trained_on import carry_record, check_code

_NO_LORAS = {"use_dora": "DoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA"}
"""Settings of PEFT's LoRA with which W changes by more, or by other factors, than s·B·A, and the methods that they choose."""
_NEGLIGIBLE = 1e-6
"""Singular values of ΔW below this fraction of the largest are rounding errors of its float32 factors."""


def export_adapter(
    adapter: ModelPath,
    output: Path,
    *,
    base: ModelPath | None = None,
    basis_path: Path | None = None,
    rank: int | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Write the LoRA to `output` and return its rank; `rank` cuts it to its first pairs where it was trained for that.

    A LoRA keeps its A and B (a compact one gets its B back). For any other method the ΔW of each layer is decomposed, and all layers
    get the largest rank. Views of fused projections become one LoRA on each of these, whose rank is the sum of theirs. Raises `CoraError` where `output` exists, where the adapter does not fit, and where no LoRA is equivalent.
    """
    if output.exists():
        raise CoraError(f"{output} exists already; choose a new directory")
    if not adapter.is_adapter:
        raise CoraError(f"{adapter.reference} is a complete model: there is no adapter to export")
    check_basis([adapter], basis_path)
    if rank is not None:
        check_rank(adapter, rank)
    say_mean(adapter)
    if base is None:
        base = base_of(adapter)
    check_base(adapter, base)
    check_code(adapter, base, trust_remote_code)
    model = load_model(base, torch.float32, torch.device("cpu"), None, trust_remote_code)
    split_as_trained(model, adapter, read_facts(adapter.path))
    before: dict[str, torch.Tensor] = {}
    if start_that_changes_base(adapter.adapter_config()) is not None:
        linears = {name: module for name, module in model.named_modules() if linear_weight(module) is not None}
        before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    names = names_of(model, Checkpoint(adapter).shapes)
    stored = renamed(Checkpoint(adapter).shapes, names)
    wrapped = load_adapter(model, adapter, basis_path, rank=rank, base=base)
    config, state, scaling = _as_lora(wrapped, adapter, before, stored)
    if split := split_parts(model):
        config, state = _on_fused(state, scaling, wrapped, split, adapter)
    if names and (base.config().get("architectures") or [type(model).__name__])[0] != type(model).__name__:
        config, state = _by_stored_names(config, state, names, adapter, wrapped)
    config.base_model_name_or_path = base.reference.partition("@")[0] if base.revision else location(base.reference)
    config.revision = base.revision
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    order_names(config)
    try:
        with writing.atomic_path(output, replace=False) as temporary:
            config.save_pretrained(str(temporary))
            # Copies, since safetensors refuses one tensor under two names, and embedding and head may share theirs.
            copies = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
            save_file(copies, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            if adapter.has_tokenizer or adapter.chat_template.is_file():
                own = load_tokenizer(base, trust_remote_code, adapter)
                say_tokens_without_rows(len(own), embedding_rows(model), adapter)
                save_tokenizer(own, temporary, output)
            carry_record(temporary, adapter)
            carry_card(temporary, adapter, rank=rank)
    except SafetensorError as error:
        raise CoraError(f"{output} cannot be written: {error}") from error
    return int(config.r)


def _as_lora(
    wrapped: PeftModel, adapter: ModelPath, before: Mapping[str, torch.Tensor], stored: Collection[str]
) -> tuple[Any, dict[str, torch.Tensor], dict[str, float]]:
    """The configuration and the tensors of the LoRA, and the scale of each layer that is not within its tensors.

    `before` has the weights that PEFT has changed to load the adapter, `stored` the keys of its files.
    """
    config: Any = wrapped.peft_config[ADAPTER]
    facts = read_facts(adapter.path)
    ours = method_of(facts.plan.mode).lora_rank if facts is not None else AS_THE_FILE_SAYS
    is_lora = isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig)  # which PEFT derives from it
    if before and (shared := _sharing(wrapped)):
        raise CoraError(
            f"{adapter.reference} subtracts its start ({config.init_lora_weights}) from the weight of {shared}, which other layers share, so no LoRA on "
            "the base is equivalent; `cora merge` writes it as a plain model"
        )
    other = next((name for name in _NO_LORAS if is_lora and getattr(config, name)), None)
    if ours is not None and is_lora and other is None:
        state = get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)
        state |= _complete(wrapped, stored)
        state = {key: tensor for key, tensor in state.items() if not OF_TRAINING.search(key)}
        config = copy.copy(config)
        config.monteclora_config = config.velora_config = None
        # The factors of a parameter, such as fused experts, are those of all its matrices, and no LoRA of a layer.
        if not config.target_parameters and (before or config.rank_pattern or config.alpha_pattern):
            return config, _with_one_scale(wrapped, config, state, before), {}
        return config, state, {name: layer.scaling[ADAPTER] for name, layer in lora_layers(wrapped)}
    if why := no_change_of_weights(wrapped):
        raise CoraError(
            f"adapter {adapter.reference} cannot be exported: {why}; `cora evaluate`, on transformers, evaluates it as it is"
        )
    method = config.peft_type.value
    if other is not None:
        method = _NO_LORAS[other]
    elif is_lora and facts is not None:
        method = f"mode {facts.plan.mode}"
    none = f"{adapter.reference} uses {method}, which has no equivalent LoRA"
    if ours is None or is_lora:
        raise CoraError(f"{none}; {_instead(wrapped, adapter)}")
    # PEFT does not convert AdaLoRA, although its B·diag(E)·A is a LoRA, pruned or not.
    if not wrapped.supports_lora_conversion() and not isinstance(config, AdaLoraConfig):
        raise CoraError(f"{adapter.reference} uses {method}, which PEFT does not convert to LoRA; {_instead(wrapped, adapter)}")
    also = [*(config.modules_to_save or ()), *(["biases"] if getattr(config, "bias", "none") != "none" else [])]
    if also:
        raise CoraError(
            f"{adapter.reference} uses {method} and also trained {', '.join(also)}, which would be lost in a LoRA; `cora merge` writes it as a "
            "plain model"
        )
    layers: list[tuple[str, Any]] = list(adapted_layers(wrapped))
    try:
        with torch.no_grad():
            factors = {name: _factors(_delta(layer)) for name, layer in layers}
    except (TypeError, NotImplementedError) as error:  # PEFT cannot compute this layer's ΔW, or needs an input for it
        raise CoraError(f"{none}; {_instead(wrapped, adapter)}") from error
    # PEFT's own conversion wants one rank that no layer's dimensions are below.
    state, rank = plain_factors(factors)
    transposed = any(stores_transposed(layer) for _, layer in layers)
    targets = copy.copy(config.target_modules)
    state |= _complete(wrapped, stored)
    chosen: dict[str, Any] = {
        name: copy.copy(getattr(config, name, None)) for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
    }
    made = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=transposed, **chosen)
    try:
        for name, _ in layers:
            _check_lora_target_modules_mamba(made, wrapped.get_base_model(), name.rpartition(".")[2])
    except ValueError as error:
        raise CoraError(f"{none} that PEFT takes: {reason(error)}; {_instead(wrapped, adapter)}") from error
    return made, state, {}


def _sharing(wrapped: PeftModel) -> str | None:
    """The first layer with a LoRA whose weight is that of another layer, too, as a tied head's and those of replicated layers; None without one."""
    weights = [weight for module in wrapped.modules() if (weight := module._parameters.get("weight")) is not None]
    owners = Counter(map(id, weights))
    linears = [(name, layer.get_base_layer()) for name, layer in lora_layers(wrapped) if ADAPTER in layer.lora_A]
    # A wrapped one is a tied head that gets rows of tokens with the embedding.
    shared = (name for name, linear in linears if isinstance(linear, AuxiliaryTrainingWrapper) or owners[id(linear.weight)] > 1)
    return next(shared, None)


def _by_stored_names(
    config: Any, state: dict[str, torch.Tensor], names: Mapping[str, str], adapter: ModelPath, wrapped: PeftModel
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The LoRA by the names of the adapter's files, which are those of the base's own class: PEFT finds no other ones there, and says nothing."""
    stored_as, stated = {name: stored for stored, name in names.items()}, adapter.adapter_config().get("target_modules")
    config = copy.copy(config)
    if isinstance(stated, str):
        config.target_modules = stated
    elif config.target_modules:
        config.target_modules = {stored_as.get(name, name) for name in config.target_modules}
    if config.modules_to_save:
        # By their complete names, since a part of the class that this model lacks may have others with such an ending.
        inner = wrapped.get_base_model()
        saved = [name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)]
        config.modules_to_save = [stored_as.get(name, name) for name in saved]
    return config, renamed(state, stored_as)


def _complete(wrapped: PeftModel, stored: Collection[str]) -> dict[str, torch.Tensor]:
    """The complete embeddings that an adapter's files hold among the keys `stored`, as where it was trained with added tokens."""
    with_them, without = (
        get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=also) for also in (True, False)
    )
    return {key: tensor for key, tensor in with_them.items() if key in stored and key not in without}


def _instead(wrapped: PeftModel, adapter: ModelPath) -> str:
    """What serves an adapter that is no LoRA, by whether it can be merged; `wrapped` is of no more use."""
    try:
        merged_into_base(wrapped, adapter)
    except CannotMerge:
        return "`cora evaluate`, on transformers, evaluates it as it is"
    return "`cora merge` writes it as a plain model"


@torch.no_grad()
def _with_one_scale(
    wrapped: PeftModel, config: Any, state: dict[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors `state` with factors of one rank and scale, relative to the weights `before`; `config` gets that rank and scale.

    vLLM and others know neither ranks and scales that vary over the layers nor the starts that PEFT subtracts from the weights.
    """
    factors, biases, embeddings = {}, {}, []
    for name, layer in lora_layers(wrapped):
        if ADAPTER in layer.lora_embedding_A:  # (r, rows) and (width, r)
            factors[name] = layer.lora_embedding_A[ADAPTER], layer.scaling[ADAPTER] * layer.lora_embedding_B[ADAPTER]
            embeddings.append(f"{PREFIX}{name}.")
            continue
        if (key := f"{PREFIX}{name}.lora_B.bias") in state:
            biases[key] = layer.scaling[ADAPTER] * state[key]
        a, b = factors_of(layer)
        factors[name] = a, layer.scaling[ADAPTER] * b
        if name in before:
            if layer.get_base_layer().weight.shape != before[name].shape:
                raise CoraError(
                    f"the adapter subtracts its start ({config.init_lora_weights}) from {name}, and gives it other rows than the base has, so no LoRA on the "
                    "base is equivalent; `cora merge` writes it as a plain model"
                )
            delta = _delta(layer) + _oriented(layer, layer.get_base_layer().weight - before[name])
            factors[name] = _factors(delta)
    made, rank = plain_factors(factors)
    of_embeddings = {
        key: key.replace(".lora_", ".lora_embedding_").removesuffix(".weight")
        for key in made
        if key.startswith(tuple(embeddings))
    }
    config.r = config.lora_alpha = rank
    config.use_rslora, config.init_lora_weights = False, True
    config.rank_pattern, config.alpha_pattern = {}, {}
    # PEFT stores the weight of an adapted head, or embedding, too: without the start that it subtracted from it, to which these factors do not apply.
    subtracted = {f"{PREFIX}{name}.base_layer.weight" for name in before}
    rest = {
        key: tensor
        for key, tensor in state.items()
        if key not in subtracted and not re.search(r"\.lora_(embedding_)?[AB]\b", key)
    }
    return rest | {of_embeddings.get(key, key): tensor for key, tensor in made.items()} | biases


def _oriented(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if stores_transposed(layer) else weight


def _delta(layer: Any) -> torch.Tensor:
    """ΔW (out, in) of a layer; PEFT gives it as the layer stores its weight, and MiSS's as a change of a given weight."""
    if isinstance(layer, MissLinear):
        weight = layer.get_base_weight().float()
        if layer.miss_fn == "bat":
            return layer.get_delta_weight(ADAPTER, weight)
        return layer.get_delta_weight_miss(ADAPTER, torch.zeros_like(weight))
    return _oriented(layer, layer.get_delta_weight(ADAPTER))


def _factors(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (k, in) and B (out, k) with B·A = ΔW (out, in), k its rank but at least 1."""
    u, values, v = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = max(1, int((values > _NEGLIGIBLE * values[0]).sum()))
    return v[:kept].float(), (u[:, :kept] * values[:kept]).float()


def _on_fused(
    state: dict[str, torch.Tensor],
    scaling: Mapping[str, float],
    wrapped: PeftModel,
    split: dict[str, SplitProjection],
    adapter: ModelPath,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same LoRA for a model whose fused projections are not split: B of each view in its rows, times its scale, the A of all views one below the
    other.

    Raises `CoraError` for an adapter that holds more than A and B.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    ends = ("base_model.model.", ".lora_A.weight", ".lora_B.weight")
    names = [key.removeprefix(ends[0]).removesuffix(ends[1]) for key in state if key.endswith(ends[1])]
    if other := state.keys() - {f"{ends[0]}{name}{end}" for name in names for end in ends[1:]}:
        raise CoraError(
            f"{adapter.reference} adapts rows of fused projections and also holds {min(other)}, which no LoRA on the complete projections has; "
            "`cora merge` writes it as a plain model"
        )
    views: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in names:
        a, b = (state[f"{ends[0]}{name}{end}"].detach() for end in ends[1:])
        pair = (scaling.get(name, 1.0) * b, a)
        place, _, part = name.rpartition(".")
        if place in split:
            views.setdefault(place, {})[part] = pair
        else:
            factors[name] = (a, pair[0])
    for name, parts in views.items():
        b, a = split[name].layout.place(parts)
        factors[name] = (a, b)
    joined, rank = plain_factors(factors)
    endings = {name.rpartition(".")[2] for name in factors}
    inner = wrapped.get_base_model()
    alike = {name for name, _ in inner.named_modules() if name.rpartition(".")[2] in endings}
    transposed = any(split[name].kind is Conv1D for name in views)
    targets = sorted(endings) if alike == factors.keys() else sorted(factors)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=transposed), joined
