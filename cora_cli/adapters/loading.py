"""Loads adapters: standard PEFT directories, the compact form, and what only cora loads.

After every load it verifies that all keys arrived and that a trained adapter changes the model.
"""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cora_cli import writing
from cora_cli.adapters.elsewhere import start_that_changes_base
from cora_cli.adapters.experts import joined, of_all_experts, of_one_scale, unchanged_experts
from cora_cli.adapters.facts import COMPACT_FILE, AdapterFacts, read_facts, starting_b
from cora_cli.adapters.install import apply_trained_set, install_adapter
from cora_cli.adapters.names import (
    config_by_names,
    feedforward_by_names,
    module_of,
    names_kept,
    names_of,
    of_left_out_parts,
    renamed,
)
from cora_cli.adapters.peft_settings import check_patterns, misfit, say_other_weight_files, say_unknown_settings
from cora_cli.adapters.rows import resize_embeddings
from cora_cli.adapters.storage import PREFIX, WEIGHTS_FILE, check_is_complete, stores_trained
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import ADAPTER, factors_of, linear_weight, lora_layers
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import METHODS, method_of
from cora_cli.models.checkpoint import Checkpoint, finite
from cora_cli.models.fused import fused_views, split_projections
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import ONE_EXPERT, of_text, without_numbers
from cora_cli.progress import note
from cora_cli.scratch import temporary_directory

_NEEDS_MORE = {"XLORA": "other adapters, which it mixes anew for each token", "POLY": "a task number with each prompt"}
_MAGNITUDES = ".lora_magnitude_vector.weight"
_MERGE_FIRST = "merge it with the transformers 4 that trained it"


def load_adapter(
    model: PreTrainedModel,
    adapter: ModelPath,
    basis_path: Path | None = None,
    trainable: bool = False,
    rank: int | None = None,
    base: ModelPath | None = None,
) -> PeftModel:
    """Wrap `model` with the adapter at `adapter`, standard or compact; B is frozen again where its method freezes it. Where the adapter
    was trained on views of a fused projection, that is split in `model`.

    `rank` cuts it to its first pairs; see `check_rank`. `base` is where `model` comes from: what the adapter changes of parts of it that `model`
    lacks, such as the one that reads images, is left out, and a line says so.

    Raises `CoraError` where keys are missing or unknown, where a needed basis differs from the recorded one, where a trained adapter
    changes nothing, and, if `trainable`, where the stored tensors are not the trained ones.
    """
    check_is_complete(adapter)
    facts = read_facts(adapter.path)
    if rank is not None:
        check_rank(adapter, rank)
    if trainable and facts is not None and not stores_trained(facts.plan):
        raise CoraError(
            f"adapter {adapter.path} of mode {facts.plan.mode} is stored as an equivalent plain LoRA; to continue training, resume from the run's "
            "checkpoints"
        )
    say_unknown_settings(adapter)
    say_other_weight_files(adapter)
    split_as_trained(model, adapter, facts)
    check_patterns(model, adapter)
    try:
        with warnings.catch_warnings(), names_kept():
            # PEFT only warns of missing keys; `_check_arrived` turns that into an error.
            warnings.simplefilter("ignore")
            if facts is not None and facts.compact:
                wrapped = _load_compact(model, adapter, facts, basis_path, trainable)
            elif facts is not None and not method_of(facts.plan.mode).plain_peft_loads:
                wrapped = _load_own(model, adapter, facts, trainable)
            else:
                stored = _stored_tensors(adapter)
                if facts is None:
                    _check_gathered(adapter, stored)
                config, stored = of_all_experts(model, *of_one_scale(adapter.adapter_config(), stored), adapter)
                names = names_of(model, stored)
                if apart := of_left_out_parts(model, stored, names, base) if base is not None else set():
                    stored, config = _without(apart, stored, config, model, adapter)
                state = renamed(stored, names)
                check_start(adapter)
                resize_embeddings(model, state, adapter)
                config = config_by_names(feedforward_by_names(config, stored), stored, names)
                with _for_peft(adapter, state, config) as path:
                    wrapped = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
                _check_arrived(wrapped, state, adapter)
    except CoraError:
        raise
    except (
        SafetensorError,
        UnpicklingError,
        OSError,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if is_out_of_memory(error):
            raise
        adapter.require_unchanged()
        foreign = misfit(adapter) or _not_joined(model, adapter) if facts is None else None
        raise CoraError(
            f"adapter {adapter.path} cannot be loaded: {foreign or _missing(error) or _other_shape(error) or reason(error)}"
        ) from error
    adapter.require_unchanged()
    if facts is not None and trainable:
        method_of(facts.plan.mode).after_install(wrapped, facts.plan)
        apply_trained_set(wrapped, facts.plan)
    _check_effect(wrapped, facts, adapter)
    if rank is not None:
        assert facts is not None
        _cut(wrapped, rank, facts.plan)
    return wrapped.eval()


def check_start(adapter: ModelPath) -> None:
    """Raise `CoraError` for an adapter that needs more than its files and W: other inputs, or a changed W that PEFT cannot compute again, in whose
    place it would take one drawn at random, or W itself."""
    if (need := _NEEDS_MORE.get(str(kind := adapter.adapter_config().get("peft_type")))) is not None:
        raise CoraError(f"adapter {adapter.path} is of {kind}, which needs {need}; cora does not load such adapters")
    start = start_that_changes_base(adapter.adapter_config())
    if start == "loftq" and not torch.cuda.is_available():
        raise CoraError(
            f"adapter {adapter.path} has init_lora_weights 'loftq': it applies to weights that PEFT quantises again as it loads it, on CUDA GPUs only"
        )
    if start is not None and (start.startswith("pissa_niter_") or start in ("lora_ga", "corda")):
        raise CoraError(
            f"adapter {adapter.path} has init_lora_weights {start!r}: it applies to weights that its training had changed, which cannot be computed "
            "again; save it as a plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=…) of PEFT"
        )


def split_as_trained(model: PreTrainedModel, adapter: ModelPath, facts: AdapterFacts | None) -> None:
    """Split the fused projections of `model` whose views the adapter changes.

    Without `facts`, as in a checkpoint of a run, its tensors say which: a list of target modules may be one for many families, in which those
    that a model lacks have no effect.
    """
    if facts is not None:
        split_projections(model, facts.plan.target_modules)
    elif views := fused_views(model):
        keys = Checkpoint(adapter).shapes
        split_projections(model, [name for name in views if any(key.startswith(f"{PREFIX}{name}.") for key in keys)])


def _check_effect(wrapped: PeftModel, facts: AdapterFacts | None, adapter: ModelPath) -> None:
    """Raise `CoraError` where an adapter that `cora` trained changes nothing; say so of another program's, which may be untrained."""
    if changes_model(wrapped):
        return
    if facts is None:
        note(f"adapter {adapter.path} changes no weight of its layers: s·B·A is zero in all of them, as before any training")
    elif method_of(facts.plan.mode).can_train(facts.plan):
        raise CoraError(f"adapter {adapter.path} was trained, but changes no weight: B·A is zero in every layer")


def check_rank(adapter: ModelPath, rank: int) -> None:
    """Raise `CoraError` unless the adapter was trained by a method that works at lower ranks too, and `rank` is one of its ranks."""
    facts = read_facts(adapter.path)
    if facts is None or not method_of(facts.plan.mode).nested_ranks:
        nested = ", ".join(method.name for method in METHODS.values() if method.nested_ranks)
        kind = f"mode {facts.plan.mode}" if facts is not None else "another program"
        raise CoraError(
            f"{adapter.reference} cannot be cut to rank {rank}: only mode {nested} trains for lower ranks, not {kind}"
        )
    if not 1 <= rank <= facts.plan.rank:
        raise CoraError(f"{adapter.reference} has the ranks 1 to {facts.plan.rank}, not {rank}")


def _cut(wrapped: PeftModel, rank: int, plan: AdapterPlan) -> None:
    """Keep the first `rank` pairs of every layer, scaled by alpha / rank, and those of a mean of earlier changes as they are."""
    config: Any = wrapped.peft_config[ADAPTER]
    scaling = plan.alpha / rank
    for _, layer in lora_layers(wrapped):
        a, b = factors_of(layer)
        mean = b[:, plan.rank :] * (layer.scaling[ADAPTER] / scaling)
        a, b = torch.cat([a[:rank], a[plan.rank :]]), torch.cat([b[:, :rank], mean], dim=1)
        for factor, kept in ((layer.lora_A[ADAPTER], a), (layer.lora_B[ADAPTER], b)):
            factor.weight = torch.nn.Parameter(kept.detach().contiguous(), requires_grad=False)
        layer.r[ADAPTER], layer.scaling[ADAPTER] = len(a), scaling
        config.r = len(a)
        if len(a) > rank:
            config.lora_alpha = len(a) * scaling


def _stored_tensors(adapter: ModelPath) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's files. Raises `CoraError` as `Checkpoint` does, and if it has none; PEFT would look for them on the hub."""
    tensors = Checkpoint(adapter).read_all()
    # PEFT takes DoRA's magnitudes under both names, and gives them the short one.
    return {key.removesuffix(".weight") if key.endswith(_MAGNITUDES) else key: tensor for key, tensor in tensors.items()}


def _check_gathered(adapter: ModelPath, state: Mapping[str, torch.Tensor]) -> None:
    """Raise `CoraError` for a tensor of no numbers, as DeepSpeed's ZeRO-3 leaves in an adapter whose parts were not gathered.

    AdaLoRA may prune a layer to nothing, and says so.
    """
    kept = adapter.adapter_config().get("rank_pattern") or {}
    pruned = {
        name.rpartition(".lora_E")[0] for name, triplets in kept.items() if isinstance(triplets, list) and not any(triplets)
    }
    places = [f"{PREFIX}{name}.lora_" for name in pruned]
    empty = next((key for key, tensor in sorted(state.items()) if not (tensor.numel() or key.startswith(tuple(places)))), None)
    if empty is not None:
        raise CoraError(f"adapter {adapter.path}: {without_numbers(empty, tuple(state[empty].shape))}")


def _missing(error: Exception) -> str | None:
    """The key that PEFT missed in the files of an adapter, in words."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(key, str) or not key.startswith(PREFIX):
        return None
    return f"its files hold no {key}, which its adapter_config.json names (modules_to_save, trainable_token_indices): the adapter is incomplete"


def _other_shape(error: Exception) -> str | None:
    """The first tensor that torch found of another shape, in words."""
    found = re.search(r"size mismatch for (\S+): .*?Size\(\[([\d, ]*)\]\).*?Size\(\[([\d, ]*)\]\)", str(error), re.DOTALL)
    return found and (
        f"{found[1]} has the shape ({found[2]}) in its file, but ({found[3]}) by its configuration and the base model: they do not belong together"
    )


def _without(
    apart: set[str], stored: dict[str, torch.Tensor], config: dict[str, Any], model: PreTrainedModel, adapter: ModelPath
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What an adapter stores but for the keys `apart`, and its configuration without the saved modules that are none of `model`; says so."""
    if len(apart) == len(stored):
        raise CoraError(
            f"adapter {adapter.path} changes none of the layers of {type(model).__name__}, only others, such as {min(apart)}"
        )
    note(
        f"adapter {adapter.path}: {len(apart)} of its {len(stored)} tensors are of parts that {type(model).__name__} lacks, such as {min(apart)}; they are "
        "left out"
    )
    saved = [
        name
        for name in config.get("modules_to_save") or ()
        if any(module.endswith(of_text(name)) for module, _ in model.named_modules())
    ]
    return {key: stored[key] for key in stored if key not in apart}, {**config, "modules_to_save": saved or None}


@contextlib.contextmanager
def _for_peft(adapter: ModelPath, state: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Path]:
    """The directory of an adapter, or one for the time being with its configuration and its tensors `state` where PEFT finds them: in one file of the
    usual name.
    """
    files = adapter.weight_files()
    as_stored = (
        not adapter.hides_from_peft and config == adapter.adapter_config() and state.keys() == Checkpoint(adapter).shapes.keys()
    )
    if as_stored and [file.name for file in files] == [WEIGHTS_FILE]:
        yield adapter.path
        return
    with temporary_directory("adapter") as directory:
        writing.write_json(directory / "adapter_config.json", config)
        # Copies, since safetensors refuses tensors that share memory.
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, directory / WEIGHTS_FILE)
        yield directory


def check_basis(adapters: Iterable[ModelPath | None], basis_path: Path | None) -> None:
    """Raise `CoraError` for a basis that the user names although no adapter's B comes from one."""
    known = [adapter for adapter in adapters if adapter is not None]
    facts = [read_facts(adapter.path) for adapter in known]
    if basis_path is not None and not any(one is not None and one.compact and one.plan.needs_basis for one in facts):
        what = f"{known[0].reference} stores its own B" if known else "there is no adapter"
        raise CoraError(f"--basis {basis_path} has no effect, since {what}; leave it out")


def changes_model(model: PeftModel) -> bool:
    """Whether any layer's ΔW = s·B·A is non-zero; a layer without such matrices, as of an embedding, counts as a change."""
    layers = [layer for _, layer in lora_layers(model)]
    scaled = [layer for layer in layers if layer.scaling[ADAPTER]]
    pairs = [factors_of(layer) for layer in scaled if ADAPTER in layer.lora_A]
    matrices = [(a, b) for a, b in pairs if a.ndim == 2 and b.shape[1] == len(a)]  # BD-LoRA's blocks have other shapes
    changed = not layers or len(matrices) < len(scaled)
    return changed or any(bool((b.detach().float() @ a.detach().float()).any()) for a, b in matrices)


def _check_arrived(wrapped: PeftModel, state: dict[str, torch.Tensor], adapter: ModelPath) -> None:
    """Raise `CoraError` for a tensor that the model lacks or does not take, or takes otherwise than it is stored, or that is not finite.

    PEFT may or may not store the embeddings next to the adapter of an embedding.
    """
    single, state = state, joined(wrapped, state)
    factors = get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)
    expected = set(factors) - (unchanged_experts(factors, state) if state is not single else set())
    allowed = expected | set(get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=True))
    for key in sorted(allowed & set(state)):
        if state[key].is_floating_point() or ".lora_" in key or key.endswith("weight"):
            finite(state[key], adapter.reference, key)
    if lost := sorted((expected - set(state)) | (set(state) - allowed - _repeated(state))):
        taken = type(wrapped.get_base_model()).__name__  # which may be the part for text of a class for images and text
        kind = "is missing" if lost[0] in expected else f"belongs to no layer of {taken}"
        known = {name for name, _ in wrapped.get_base_model().named_modules()}
        own = {name for name, _ in wrapped.get_base_model().named_parameters() if f".{ADAPTER}." not in name}
        if lost[0].removeprefix(PREFIX) in own:
            kind = "is a weight that nothing in its adapter_config.json trains; if it was trained, name its layer there in modules_to_save"
        elif lost[0] not in expected and any(name.endswith(f".{module_of(lost[0])}") for name in known):
            kind += (
                "; it is of the model without its head, as embedding models are, which PEFT does not load on one with a head"
            )
        if state is not single:
            if dense := [key for key in lost if key in single and module_of(key) in known]:
                lost = [dense[0], *lost[1:]]
                kind = f"is of a layer that is called as experts are, which PEFT leaves out next to those; {_MERGE_FIRST}"
            elif lost[0] not in expected and lost[0] not in single:
                lost = [min(single.keys() - state.keys()), *lost[1:]]
                kind = _of_one_expert(taken)
        raise CoraError(f"adapter {adapter.path}: {len(lost)} keys do not fit the model, the first, {lost[0]}, {kind}")
    for key in sorted(expected) if isinstance(wrapped.active_peft_config, LoraConfig) else ():
        if not torch.equal(factors[key], state[key].to(factors[key])):
            raise CoraError(f"adapter {adapter.path}: PEFT does not load {key} as it is stored")


def _of_one_expert(taken: str) -> str:
    return f"is of a single expert, which PEFT does not join with the others for {taken}; {_MERGE_FIRST}"


def _not_joined(model: PreTrainedModel, adapter: ModelPath) -> str | None:
    """Says that a tensor is of a single expert, which the model has no layer for; None where there is no such."""
    known = {name for name, _ in model.named_modules()}
    single = sorted(key for key in Checkpoint(adapter).shapes if ONE_EXPERT.search(key) and module_of(key) not in known)
    return f"{single[0]} {_of_one_expert(type(model).__name__)}" if single else None


def _repeated(state: Mapping[str, torch.Tensor]) -> set[str]:
    """The keys under which PEFT stores a saved module a second time, and what it replaces, where its embedding has more rows than before."""
    found = set()
    for key in state:
        module, _, weight = key.partition(".modules_to_save.")
        kept = state.get(f"{module}.{weight}")
        if weight and kept is not None and torch.equal(kept, state[key]):
            found |= {key, f"{module}.original_module.{weight}"}
    return found


def _load_own(model: PreTrainedModel, adapter: ModelPath, facts: AdapterFacts, trainable: bool) -> PeftModel:
    state = _stored_tensors(adapter)
    wrapped = install_adapter(model, facts.plan, None)
    set_peft_model_state_dict(wrapped, state)
    _check_arrived(wrapped, state, adapter)
    return wrapped if trainable else wrapped.requires_grad_(False)


def _load_compact(
    model: PreTrainedModel, adapter: ModelPath, facts: AdapterFacts, basis_path: Path | None, trainable: bool
) -> PeftModel:
    b_of = starting_b(adapter, facts, basis_path)
    factors = load_file(adapter.path / COMPACT_FILE)
    full = dict(factors)
    weights = {name: linear_weight(module) for name, module in model.named_modules()}
    outputs = {name: weight.out_features for name, weight in weights.items() if weight is not None}
    for key in factors:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if name not in outputs:
            raise CoraError(f"adapter {adapter.path}: the key {key} belongs to no linear layer of this model")
        full[key.replace(".lora_A.", ".lora_B.")] = b_of(name, outputs[name])
    config = LoraConfig.from_peft_type(**LoraConfig.check_kwargs(**adapter.adapter_config()))
    config.inference_mode = not trainable
    wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, full)
    _check_arrived(wrapped, full, adapter)
    return wrapped
