"""Models whose linear layers are held quantised: by bitsandbytes as they are loaded, or as their files hold them.

`loading` loads them; here is what has to be set and checked after that, and what such a model cannot be used for.
"""

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from cora_cli.device import DTYPES
from cora_cli.errors import CoraError, reason
from cora_cli.models.checkpoint import PLAIN_TYPES, Checkpoint
from cora_cli.models.model_path import ModelPath
from cora_cli.models.precision import UNSUPPORTED, stays_in_float32
from cora_cli.models.skeleton import ONE_EXPERT
from cora_cli.progress import note

PLAIN_COPY = "a copy of the model with weights in bf16, fp16 or fp32"
_SCALES = {"Linear4bit": "quant_state", "Linear8bitLt": "SCB"}
"""The attribute of a weight in which bitsandbytes keeps its scales, by the class of the layer."""


_SCALE = re.compile(r"(_scale|_scale_inv|\.scale|\.qscale_\w+)$")
"""The names of scales, which may be float8 themselves."""


def require_four_bit() -> None:
    """Raise `CoraError` unless bitsandbytes, which holds weights in 4 bits on CUDA GPUs and processors, is installed."""
    if find_spec("bitsandbytes") is None:
        raise CoraError(
            "--load-in-4bit needs the package bitsandbytes: pip install 'cora-cli[four-bit]'; omit the flag to train on the stored weights"
        )


def is_dequantized(model: ModelPath) -> bool:
    """Whether transformers applies the scales of quantized weights; it loads those of a method that it does not know as they are."""
    stated = model.quantization()
    try:
        return stated is not None and AutoHfQuantizer.supports_quant_method(stated)
    except (ValueError, TypeError, AttributeError) as error:
        raise CoraError(
            f"config.json of {model.reference} has a quantization_config that cannot be read: {reason(error)}"
        ) from error


def check_float8(model: ModelPath, checkpoint: Checkpoint) -> None:
    """Raise `CoraError` for a float8 weight of the method fp8 without a scale that transformers reads; it would be taken as it is."""
    if (model.quantization() or {}).get("quant_method") != "fp8":
        return
    for name in _float8_weights(checkpoint):
        if _scale_of(name, checkpoint) is None:
            raise CoraError(
                f"{model.reference}: its files hold {name} in float8 without {name}_scale_inv, or another scale that transformers reads for fp8, so the "
                f"weight would be another; use {PLAIN_COPY}"
            )


_OF_A_WEIGHT = re.compile(r"(?P<weight>.+?)(_packed)?_(scale_inv|scale|scale_2|global_scale|zero_point)$")


def check_scales_applied(model: ModelPath, checkpoint: Checkpoint, unused: Collection[str]) -> None:
    """Raise `CoraError` for a weight of which transformers made plain numbers without one of its scales, which is among the `unused` tensors."""
    for scale in sorted(unused):
        found = _OF_A_WEIGHT.match(scale)
        held = [name for name in (found["weight"], f"{found['weight']}_packed") if name in checkpoint.types] if found else []
        if held and held[0] not in unused and checkpoint.types[held[0]] not in PLAIN_TYPES:
            raise CoraError(
                f"{model.reference}: its files hold {held[0]} as {checkpoint.types[held[0]]} with {scale}, which transformers did not apply as it made plain "
                f"numbers of the weight; use {PLAIN_COPY}"
            )


def check_blocks(model: ModelPath, checkpoint: Checkpoint) -> None:
    """Raise `CoraError` for a float8 weight whose last block of rows or columns is not complete.

    Where transformers makes plain numbers of it, it divides the weight into equal blocks, and so applies the scales to others.
    """
    stated = model.quantization() or {}
    blocks = stated.get("weight_block_size") if stated.get("quant_method") == "fp8" else None
    for name in _float8_weights(checkpoint) if blocks else ():
        scale = _scale_of(name, checkpoint)
        grid = checkpoint.shapes[scale][-2:] if scale is not None else ()
        for size, count, block in zip(checkpoint.shapes[name][-2:], grid, blocks or (), strict=False):
            if count > 1 and size % block and count == -(-size // block):
                raise CoraError(
                    f"{model.reference}: {name} has {size:,} rows or columns in {count} blocks of {block}, the last of them not complete, which transformers "
                    f"would take for equal ones; use {PLAIN_COPY}"
                )


def cannot_be_converted(error: Exception) -> str | None:
    """That transformers failed to make plain numbers of quantised weights, in words, since its own ones are of a report that it logs; None otherwise."""
    if not (isinstance(error, RuntimeError) and "`CONVERSION`" in str(error)):
        return None
    return f"transformers cannot make the weights of its layers from those that its files hold; if they are quantised, use {PLAIN_COPY}"


def check_compressed(model: ModelPath, checkpoint: Checkpoint) -> None:
    """Raise `CoraError` for weights of compressed-tensors of which transformers would make others as plain numbers.

    It takes one scheme for all layers, and one for all experts, and of the experts' scales only `weight_scale`. A weight without that is taken as it is.
    """
    stated = model.quantization() or {}
    if stated.get("quant_method") != "compressed-tensors":
        return
    for name, kind in checkpoint.types.items():
        scale = f"{name.removesuffix('_packed')}_scale"
        scaled = name.endswith("weight_packed") or (name.endswith("weight") and kind.startswith(("float8", "int8", "I8")))
        if scaled and scale not in checkpoint.shapes:
            raise CoraError(
                f"{model.reference}: its files hold {name} as {kind} without {scale}, so the weight would be another; use {PLAIN_COPY}"
            )
    schemes: dict[bool, dict[str, str]] = {False: {}, True: {}}
    groups = stated.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            continue  # which the library refuses
        targets = group.get("targets") or ()
        of_experts = any(str(target).startswith("re:") and "experts" in str(target) for target in targets)
        weights = group.get("weights")
        read = [
            isinstance(weights, dict) and weights.get(key)
            for key in ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
        ]
        schemes[of_experts].setdefault(repr([group.get("format") or stated.get("format"), *read]), name)
    for ways in schemes.values():
        if len(ways) > 1:
            raise CoraError(
                f"{model.reference}: config.json quantises its layers in several ways ({', '.join(ways.values())}), of which transformers takes one "
                f"for all as it makes plain numbers of them; use {PLAIN_COPY}"
            )
    ignored = ("weight_global_scale", "weight_zero_point")
    lost = next((name for name in sorted(checkpoint.shapes) if ".experts." in name and name.endswith(ignored)), None)
    if lost is not None:
        raise CoraError(
            f"{model.reference}: its files hold {lost}, which transformers does not apply to experts as it makes plain numbers of them; use {PLAIN_COPY}"
        )


def _float8_weights(checkpoint: Checkpoint) -> list[str]:
    kinds = checkpoint.types
    return [name for name in checkpoint.shapes if kinds[name].startswith("float8") and not _SCALE.search(name)]


def _scale_of(name: str, checkpoint: Checkpoint) -> str | None:
    """The scale of a float8 weight under one of the names that transformers reads for fp8."""
    stem = name.removesuffix("weight")
    names = (f"{name}_scale_inv", *((f"{stem}scale", f"{stem}qscale_weight") if stem != name else ()))
    return next((one for one in names if one in checkpoint.shapes), None)


def kind_stated(model: ModelPath) -> str | None:
    """How the files of a model hold its weights quantised, in words, by its configuration; None where they do not."""
    stated = model.quantization()
    if not stated:
        return None
    bits = next((n for n in (4, 8) if stated.get(f"load_in_{n}bit") or stated.get("bits") == n), None)
    return f"{stated.get('quant_method', 'quantised')}{f', {bits} bits' if bits else ''}"


def ask_for_plain(config: Any) -> None:
    """Have transformers load weights of compressed-tensors as plain numbers, which its default would leave compressed until the first pass.

    Until then such layers have no weight to adapt, or pass on no gradient. An empty entry says nothing, and is removed; transformers refuses it.
    """
    for one in (config, getattr(config, "text_config", None)):
        stated = getattr(one, "quantization_config", None)
        if one is not None and stated == {}:
            del one.quantization_config
        elif isinstance(stated, dict) and stated.get("quant_method") == "compressed-tensors":
            stated["dequantize"] = True


def is_held_quantized(model: Any) -> bool:
    """Whether layers of a loaded model hold their weights quantised."""
    return bool(getattr(model, "is_quantized", False))


def settle_quantized(model: Any, reference: str, dtype: torch.dtype | str, checkpoint: Checkpoint) -> None:
    """Let a model that was loaded quantised compute in `dtype`, and have a backward pass; or save plain weights where transformers made them so of
    those in `checkpoint`.

    Raises `CoraError` where bitsandbytes found no scales, so that its layers would multiply by numbers that are none, and where the weights multiply
    in another precision only.
    """
    if not is_held_quantized(model):
        # Otherwise the numbers would be quantised again as they are saved, but not the configuration.
        model._weight_conversions = None
        # Transformers leaves the others, such as the embedding, in the type of the files, which no layer could multiply by.
        for name, parameter in model.named_parameters():
            if isinstance(dtype, torch.dtype) and not stays_in_float32(model, name):
                parameter.data = parameter.data.to(dtype)
        if set(checkpoint.types.values()) <= PLAIN_TYPES:
            note(
                f"config.json of {reference} has a quantization_config, but its files hold plain weights, which are used as they are"
            )
        else:
            note(f"{reference} is stored quantised; its weights are used, and written, as plain numbers")
        return
    if isinstance(dtype, torch.dtype):
        _check_precision(model, reference, dtype)
    for name, module in model.named_modules():
        scales = _SCALES.get(type(module).__name__)
        if scales is None:
            continue
        if getattr(module.weight, scales, None) is None:
            others = any(getattr(one.weight, scales, None) is not None for one in model.modules() if type(one) is type(module))
            remedy = (
                f"list {name} in llm_int8_skip_modules there"
                if others
                else "remove quantization_config from it, and use --load-in-4bit to train in 4 bits"
            )
            raise CoraError(
                f"config.json of {reference} says that bitsandbytes holds its weights quantised, but its files hold {name}.weight without scales; "
                f"{remedy}"
            )
        if scales == "quant_state" and isinstance(dtype, torch.dtype):
            module.compute_dtype = dtype
        # On processors with bfloat16 instructions, the first pass without gradients would repack the weights in place, with rounded
        # scales, for a kernel that has no backward pass: what is trained afterwards would have no gradient.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def check_left_out(loaded: Any, model: ModelPath, types: Mapping[str, str]) -> None:
    """Raise `CoraError` for a layer that bitsandbytes is to leave as it is, but that the files hold quantised, and for single experts that it holds so,
    which the loaded model joins. `types` are those in the files.
    """
    if (model.quantization() or {}).get("quant_method") == "bitsandbytes":
        known = {name for name, _ in loaded.named_modules()}
        single = [name for name in sorted(types) if ONE_EXPERT.search(name) and types[name] in ("int8", "uint8", "I8", "U8")]
        apart = [name for name in single if name.endswith(".weight") and name.removesuffix(".weight") not in known]
        if apart:
            raise CoraError(
                f"{model.reference}: its files hold {apart[0]} quantised by bitsandbytes, of a single expert, which transformers joins with the others by now, "
                f"and so does not read; use {PLAIN_COPY}"
            )
    if not (skipped := (model.quantization() or {}).get("llm_int8_skip_modules")):
        return
    for name, module in loaded.named_modules():
        if type(module) is torch.nn.Linear and types.get(f"{name}.weight") in ("int8", "uint8", "I8", "U8"):
            raise CoraError(
                f"llm_int8_skip_modules in config.json of {model.reference} ({', '.join(map(str, skipped))}) leaves {name} out, but its files hold "
                f"{name}.weight quantised; correct that list"
            )


def _check_precision(model: Any, reference: str, dtype: torch.dtype) -> None:
    """Raise `CoraError` for weights of torchao that do not multiply inputs in `dtype`: some do so only in the type that they were quantised from."""
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or type(module.weight.data) is torch.Tensor or module.weight.dtype == dtype:
            continue
        try:
            torch.nn.functional.linear(
                torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device), module.weight
            )
        except UNSUPPORTED as error:
            named = next((f"--dtype {name}" for name, kind in DTYPES.items() if kind == module.weight.dtype), PLAIN_COPY)
            raise CoraError(
                f"{reference} is held quantised with weights that multiply in {str(module.weight.dtype).removeprefix('torch.')} only, not in "
                f"{str(dtype).removeprefix('torch.')}; use {named}"
            ) from error
        return


def check_four_bit(model: Any, reference: str, remedy: str) -> None:
    """Raise `CoraError` for a linear layer whose width bitsandbytes' code for processors gets wrong. The model needs no weights.

    Version 0.50.2 takes the scale of another block where the inputs are no multiple of the 64 numbers of a block: the weights come
    back with an error of 24 % instead of NF4's 9 %.
    """
    head = model.get_output_embeddings()
    kind = "Linear4bit" if is_held_quantized(model) else "Linear"
    for name, module in model.named_modules():
        if type(module).__name__ != kind or module is head or module.in_features % 64 == 0:
            continue
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0))
        back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", blocksize=64))
        if (back - weight).norm() > 0.15 * weight.norm():
            raise CoraError(
                f"{reference}: bitsandbytes cannot hold {name} in 4 bits on a processor: its {module.in_features} inputs are no multiple of 64, "
                f"and the weights would come back with other scales; {remedy}"
            )
