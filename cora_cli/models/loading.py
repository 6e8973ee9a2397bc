"""Load transformers models from a directory, on the chosen device and in the chosen precision, and write them again.

Only this module calls `from_pretrained` of a base model. `references` finds the directory, and `adapters` adds adapters to the
loaded model.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cora_cli import writing
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.models.causality import require_causal
from cora_cli.models.checkpoint import PLAIN_TYPES, Checkpoint, check_type, finite, is_wrapped, load_pickle
from cora_cli.models.configuration import RESCALED, decoder_of, has_own_class, keep_scales, load_configuration
from cora_cli.models.model_path import ModelPath
from cora_cli.models.own_code.classes import complete_class, has_own_code
from cora_cli.models.own_code.ties import listed_ties
from cora_cli.models.own_code.unstored import kept_as_read, restore_buffers
from cora_cli.models.quantized import (
    PLAIN_COPY,
    ask_for_plain,
    cannot_be_converted,
    check_blocks,
    check_compressed,
    check_float8,
    check_four_bit,
    check_left_out,
    check_scales_applied,
    is_dequantized,
    is_held_quantized,
    settle_quantized,
)
from cora_cli.models.skeleton import Skeleton, build_skeleton, layer_of, shape_fault, skeleton_of, surplus_fault
from cora_cli.progress import note
from cora_cli.scratch import temporary_directory

UNSTATED = 2**31
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_CONTEXTS_OF_OWN_CODE = (
    "block_size",
    "n_ctx",
    "seq_length",
    "seq_len",
    "max_seq_length",
    "max_sequence_length",
    "model_max_length",
)
"""Names of the context length, such as nanoGPT's; in classes of transformers, some of them say what a model was trained on and not what it can read."""
_POSITIONS_BEHIND_PADDING = (
    "roberta",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "data2vec-text",
    "roberta-prelayernorm",
    "xmod",
)
_BUFFERS = ("bias", "mask", "ids")
"""Endings of the names of masks and positions that older checkpoints store."""


def load_model(
    model: ModelPath,
    dtype: torch.dtype | str,
    device: torch.device,
    attention: str | None,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    config: Any = None,
) -> PreTrainedModel:
    """Load a complete causal language model in evaluation mode.

    `dtype` is a torch dtype, or "auto" for the stored one. `attention` names transformers' attention implementation; None is
    transformers' default, which is SDPA for models that support it (models with soft-capped logits do not). `four_bit` holds
    the linear layers in NF4 with double quantization and multiplies in `dtype` (QLoRA, arXiv 2305.14314); see
    `quantized.require_four_bit`. `config` replaces the stored configuration. Raises `CoraError` for an adapter directory, for damaged or missing weights, and for
    weights that are not finite.
    """
    if model.is_adapter:
        raise CoraError(
            f"{model.reference} is an adapter, not a complete model; merge it first with `cora merge {model.reference}`"
        )
    model.require_unchanged()
    checkpoint = Checkpoint(model)
    _check_types(model, checkpoint)
    model.generation_config()
    quantized = four_bit or is_dequantized(model)
    if not trust_remote_code and "AutoModelForCausalLM" in (model.config().get("auto_map") or {}):
        note(
            f"{model.reference}: transformers' own class is used, not the code in the folder, which --trust-remote-code would run"
        )
    options: dict[str, Any] = {"config": config or load_configuration(model, trust_remote_code)}
    ask_for_plain(options["config"])
    if four_bit or device.type != "cpu":
        # Each tensor goes to the device as it is read, so that the host never holds the model.
        options["device_map"] = {"": device}
    if four_bit:
        kind: dict[str, Any] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    loaded: Any
    report: Any
    try:
        with _for_transformers(model, checkpoint) as path, listed_ties(), kept_as_read():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with both shapes
                **options,
            )
            loaded.config.name_or_path = str(model.path)
    except Exception as error:  # libraries raise many unrelated types for damaged files
        if is_out_of_memory(error):
            raise
        model.require_unchanged()
        raise CoraError(
            f"model {model.reference} cannot be loaded: {_unknown_value(model, error) or cannot_be_converted(error) or reason(error)}"
        ) from error
    model.require_unchanged()
    if quantized:
        check_left_out(loaded, model, checkpoint.types)
        settle_quantized(loaded, model.reference, dtype, checkpoint)
    if quantized and device.type == "cpu" and is_held_quantized(loaded):
        check_four_bit(
            loaded,
            model.reference,
            "omit --load-in-4bit, or use a CUDA GPU" if four_bit else f"use a CUDA GPU, or {PLAIN_COPY}",
        )
    require_causal(loaded, model.reference)
    unread: list[str] = []
    if has_own_code(loaded):
        stored = {name for name, _ in Skeleton(loaded).names(checkpoint.shapes).values()}
        unread = restore_buffers(loaded, options["config"], stored)
    complete_class(loaded, model.path)
    keep_scales(loaded)
    if model.config().get(RESCALED) and "mamba" in loaded.config.model_type:
        note(
            f"{model.reference}: its weights are used as they are stored; transformers by itself divides those of out_proj as it loads them, because "
            f"config.json sets {RESCALED}: set that to false for what else uses the model"
        )
    _check_complete(model, checkpoint, loaded, {**report, "missing_keys": {*report["missing_keys"], *unread}}, quantized)
    # Others have their scales apart; so have torchao's tensors, whatever type they show.
    plain = {
        name: weight.detach()
        for name, weight in loaded.named_parameters()
        if type(weight.data) is torch.Tensor and str(weight.dtype).removeprefix("torch.") in PLAIN_TYPES
    }
    for name, weight in plain.items():
        finite(weight, model.reference, name)
    _say_zeros({name: weight for name, weight in plain.items() if weight.dim() > 1}, model.reference)
    if has_own_head(loaded):
        separate_head(loaded)
    return loaded.eval()


def _say_zeros(matrices: Mapping[str, torch.Tensor], reference: str) -> None:
    """Say which matrices are zero throughout, as at the end of files for which a download had reserved all of the space before it stopped.

    Models may be written so: layers that are added to others often start with some.
    """
    # One column tells nearly always, without reading the others again.
    if zero := [name for name, weight in matrices.items() if weight.numel() and not weight[..., :1].any() and not weight.any()]:
        note(
            f"{reference}: {len(zero)} of its {len(matrices)} matrices are zero throughout, such as {zero[0]}; if it was not written so, its "
            "download was cut off: download it again"
        )


def has_own_head(model: Any) -> bool:
    """Whether the weight of the head is another than the embedding's. A configuration may say otherwise of files that hold two, which transformers
    keeps apart."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is not getattr(model.get_input_embeddings(), "weight", None)


def separate_head(model: Any) -> None:
    """Let a model with a head of its own be loaded so: its configuration ties none of its weights, such as the bias of BERT's head, so each is one."""
    untie(model.config)
    ends, taken = (model.get_input_embeddings(), model.get_output_embeddings()), set()
    for module in model.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is None or id(parameter) not in taken:
                taken.add(id(parameter))
            elif any(module is end for end in ends):
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def untie(config: Any) -> None:
    """Let a configuration say that embedding and head are two weights, so that what reads the model elsewhere does not make one of them."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def skeleton_as_stored(model: ModelPath, config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal model without weights, with a head of its own where the files hold one, whatever `config` says; it is corrected.

    Raises `CoraError` as `build_skeleton` does.
    """
    built = build_skeleton(config, trust_remote_code)
    head = next((name for name, module in built.named_modules() if module is built.get_output_embeddings()), None)
    if head is None or has_own_head(built) or not model.has_weights:
        return built
    skeleton, checkpoint = Skeleton(built), Checkpoint(model)
    keys = [key for key, name in skeleton.loaded_names(checkpoint.shapes).items() if name in skeleton.shared[f"{head}.weight"]]
    first = checkpoint.read(keys[0]) if len(keys) > 1 else None
    if first is None or all(torch.equal(first, checkpoint.read(key)) for key in keys[1:]):
        return built
    untie(config)
    return build_skeleton(config, trust_remote_code)


def _unknown_value(model: ModelPath, error: Exception) -> str | None:
    """The setting in a model's configuration that transformers has looked up in vain, in words; None if the error is another one."""
    if not (isinstance(error, KeyError) and error.args):
        return None
    named = next((name for name, value in model.language_config().items() if value == error.args[0]), None)
    return named and f"its config.json has {named} {error.args[0]!r}, which transformers does not know"


def _check_complete(model: ModelPath, checkpoint: Checkpoint, loaded: Any, report: Any, quantized: bool) -> None:
    """Raise `CoraError` where the loaded model is not the one that its files hold; say which of their tensors it does not use."""
    if quantized and not is_held_quantized(loaded):
        check_blocks(model, checkpoint)
    passed_over = [] if quantized else Skeleton(loaded).left_out(checkpoint.shapes)
    missing, unused = sorted(report["missing_keys"]), sorted({*report["unexpected_keys"], *passed_over})
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise CoraError(f"{model.reference}: {shape_fault(name, tuple(stored), tuple(expected))}")
    for name, same in Skeleton(loaded).stored_twice(checkpoint.shapes).items():
        raise CoraError(f"{model.reference}: {' and '.join(same)} are both {name} of the model; remove one of them")
    if surplus := Skeleton(loaded).surplus_layers(checkpoint.shapes):
        raise CoraError(f"{model.reference}: {surplus_fault(surplus)}")
    if missing:
        raise _incomplete(model, missing, unused)
    if quantized and not is_held_quantized(loaded):
        check_scales_applied(model, checkpoint, unused)
    beside = [] if quantized else [(name, layer) for name in unused if (layer := layer_of(loaded, name)) is not None]
    if beside:
        raise CoraError(
            f"{model.reference}: its files hold {beside[0][0]}, which {type(loaded).__name__} does not take, next to the weight of {beside[0][1]}: "
            "that layer would not compute what it was trained to; merge it into the weight, or correct config.json"
        )
    if unused:
        note(
            f"{model.reference}: {len(unused)} tensors of its files are not used by {type(loaded).__name__}, such as {unused[0]}"
        )


def check_names(model: ModelPath, skeleton: Any) -> None:
    """Raise `CoraError` where the files of a model lack weights of `skeleton`, as `load_model` does; reads their headers only.

    The names of quantised weights are not checked, since those of their parts are of another library.
    """
    if not model.has_weights:
        return
    if is_dequantized(model):
        _check_types(model, Checkpoint(model))
        return
    built, keys = Skeleton(skeleton), Checkpoint(model).shapes
    if missing := built.missing(keys):
        own = skeleton.state_dict()
        raise _incomplete(model, missing, sorted(key for key, (name, _) in built.names(keys).items() if name not in own))


def _incomplete(model: ModelPath, missing: list[str], unused: list[str]) -> CoraError:
    rest = f", while {len(unused)} tensors of its files fit no weight, such as {unused[0]}" if unused else ""
    named = next(iter(model.config().get("architectures") or ()), "")
    other = (
        isinstance(getattr(transformers, str(named), None), type) and named not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    meant = f"; by its config.json it is a {named}, and cora works with causal language models alone" if other else ""
    return CoraError(
        f"model {model.reference} is incomplete: {len(missing)} weights that its config.json requires are missing, such as {missing[0]}{rest}{meant}"
    )


def _check_types(model: ModelPath, checkpoint: Checkpoint) -> None:
    """Raise `CoraError` for weights that are stored with scales of which the configuration does not tell transformers, or that it does not read."""
    if is_dequantized(model):
        check_float8(model, checkpoint)
        check_compressed(model, checkpoint)
        return
    for name, shape in checkpoint.shapes.items():
        kind = checkpoint.types[name]
        # Buffers such as masks and positions hold integers; a matrix of 8-bit integers, such as fused experts, has scales elsewhere.
        packed = kind.startswith("float8") or (kind in ("int8", "uint8", "I8", "U8") and len(shape) >= 2)
        if name.endswith("weight") or (packed and not name.endswith(_BUFFERS)):
            check_type(kind, model.reference, name)


@contextlib.contextmanager
def _for_transformers(model: ModelPath, checkpoint: Checkpoint) -> Iterator[Path]:
    """The directory of a complete model; or links to its files, where transformers would follow the configuration of an adapter in it,
    not find the weights for lack of an index, or not find the tensors in a pickle's entry `state_dict`."""
    files = model.weight_files()
    wrapped = [file for file in files if file.suffix != ".safetensors" and is_wrapped(file)]
    if model.has_known_layout and not wrapped and not (model.path / "adapter_config.json").exists():
        yield model.path
        return
    with temporary_directory("model") as directory:
        known = model.has_known_layout
        for file in model.path.iterdir():
            if file in wrapped:
                torch.save(load_pickle(file), directory / file.name)
            elif file.name != "adapter_config.json" and (known or not file.name.endswith(".index.json")):
                (directory / file.name).symlink_to(file.resolve())
        if not known:
            index = "model.safetensors.index.json" if files[0].suffix == ".safetensors" else "pytorch_model.bin.index.json"
            places = {tensor: file.name for tensor, file in checkpoint.files.items()}
            writing.write_json(directory / index, {"metadata": {}, "weight_map": places})
        yield directory


def stored_types(model: ModelPath, trust_remote_code: bool = False) -> dict[str, torch.dtype]:
    """The type in the files of every weight of the loaded model, by its name there; the widest one of those that are joined, such as experts'."""
    types, skeleton = Checkpoint(model).types, skeleton_of(model, trust_remote_code)
    own, found = skeleton.model.state_dict().keys(), dict[str, torch.dtype]()
    for key, (name, _) in skeleton.names(types).items():
        if name in own and types[key] in PLAIN_TYPES:
            kind = getattr(torch, types[key])
            found[name] = torch.promote_types(found.get(name, kind), kind)
    parts = {name: types[key] for name, (key, _, _) in skeleton.parts(types).items()}
    return found | {name: getattr(torch, kind) for name, kind in parts.items() if kind in PLAIN_TYPES}


def completed_ends(model: Any, ends: Collection[int]) -> list[int] | None:
    """The end tokens of the model's generation configuration together with `ends`, by which answers end; None where it has these: `generate` stops at them."""
    if model.generation_config is None:  # a class of which transformers makes no generating model
        return None
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    further = sorted({*ends} - {*listed})
    return [*listed, *further] if further else None


_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def save_model(
    model: Any,
    source: ModelPath,
    directory: Path,
    trust_remote_code: bool = False,
    weights: dict[str, Any] | None = None,
    ends: Collection[int] = (),
) -> None:
    """Write a complete model that was loaded from `source` so that `load_model` reads it; `weights` replace its own.

    The tokens `ends`, by which it was trained to end answers, end those of `generate`, too. The text part of a model such as Mllama has a configuration of its own, of which transformers makes no model: it is written within that of `source`.
    """
    if complete := completed_ends(model, ends):
        model.generation_config.eos_token_id = complete
    if model.generation_config is not None:
        # transformers refuses settings without effect, such as a temperature without do_sample, except in a published file, which this is but for the ends.
        model.generation_config._original_object_hash = hash(model.generation_config)
    stated = load_configuration(source, trust_remote_code)
    for config in (model.config, stated):
        if not trust_remote_code and hasattr(config, "auto_map"):
            del config.auto_map  # which names code that is not written
    model.save_pretrained(directory, state_dict=weights)
    if type(stated) is type(model.config):  # how images become its input stays as it is
        for file in (source.path / name for name in _PROCESSORS):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
    if type(model.config) in AutoModelForCausalLM._model_mapping:
        return
    if type(stated) is not type(model.config):  # else it has code of its own
        stated.text_config, stated.dtype, stated.architectures = model.config, model.dtype, [type(model).__name__]
        stated.save_pretrained(directory)


def hides_context(config: Any) -> bool:
    """Whether the model may have a longest sequence of which its configuration does not tell, as one with code of its own."""
    return has_own_class(config) and context_length(config) == UNSTATED


def _scaled_context(text: Any) -> int:
    """The tokens to which scaled rotary embeddings stretch the context where the configuration says so apart from its usual entry; 0 elsewhere.

    As published, Qwen2.5's YaRN leaves `max_position_embeddings` at the original length, and Vicuna's linear scaling has `max_sequence_length`.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope.get("rope_type") == "yarn" and isinstance(original, int) and isinstance(factor, int | float):
        return int(original * factor)
    length = getattr(text, "max_sequence_length", None)
    return length if rope.get("rope_type") == "linear" and isinstance(length, int) else 0


def context_length(config: Any) -> int:
    """The longest sequence that the model supports, in tokens, according to its configuration; `UNSTATED` where that does not tell."""
    text = decoder_of(config)
    names = (*_CONTEXTS, *(_CONTEXTS_OF_OWN_CODE if has_own_class(config) else ()))
    stated = next((length for name in names if isinstance(length := getattr(text, name, None), int) and length > 0), UNSTATED)
    stated = max(stated, _scaled_context(text))
    # These number positions from behind the padding token's id.
    return stated - text.pad_token_id - 1 if text.model_type in _POSITIONS_BEHIND_PADDING else stated
