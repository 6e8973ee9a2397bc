"""Load transformers models and tokenizers from a directory, on the chosen device and in the chosen precision.

Only this module calls `from_pretrained` of a base model. `references` finds the directory, and `adapters` adds adapters to the
loaded model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from cora_cli.errors import CoraError, reason
from cora_cli.models.references import ModelPath


def require_four_bit(device: torch.device) -> None:
    """Raise `CoraError` unless this machine can hold weights in 4 bits, which takes a CUDA GPU and bitsandbytes."""
    missing = [
        what
        for what, there in (("a CUDA GPU", device.type == "cuda"), ("bitsandbytes", find_spec("bitsandbytes")))
        if not there
    ]
    if missing:
        raise CoraError(
            f"--load-in-4bit needs {' and '.join(missing)}, not found on this machine; omit it to train on the stored weights"
        )


@contextmanager
def loading(model: ModelPath) -> Iterator[None]:
    """Turn every exception of the block into a `CoraError` that names the model: libraries raise unrelated types for damaged files."""
    try:
        yield
    except CoraError:
        raise
    except Exception as error:
        raise CoraError(f"model {model.reference} cannot be loaded: {reason(error)}") from error


def load_model(
    model: ModelPath,
    dtype: torch.dtype | str,
    device: torch.device,
    attention: str | None,
    trust_remote_code: bool = False,
    four_bit: bool = False,
) -> PreTrainedModel:
    """Load a complete causal language model in evaluation mode.

    `dtype` is a torch dtype, or "auto" for the stored one. `attention` names transformers' attention implementation; None is
    transformers' default, which is SDPA for models that support it (models with soft-capped logits do not). `four_bit` holds
    the linear layers in NF4 with double quantization and multiplies in `dtype` (QLoRA, arXiv 2305.14314); see
    `require_four_bit`. Raises `CoraError` for an adapter directory and for damaged or missing weights.
    """
    if model.is_adapter:
        raise CoraError(
            f"{model.reference} is an adapter, not a complete model; merge it first with `cora merge {model.reference}`"
        )
    options: dict[str, Any] = {}
    if four_bit:
        kind: dict[str, Any] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **kind), "device_map": {"": device}}
    loaded: Any
    report: Any
    with loading(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # output_loading_info returns a pair
            model.path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CoraError(
            f"model {model.reference} is incomplete: {len(missing)} weights that its config.json requires are missing, such as "
            f"{missing[0]}"
        )
    return (loaded if four_bit else loaded.to(device)).eval()


def load_tokenizer(model: ModelPath, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer.

    Without a padding token it pads with the end token, which is safe because no loss mask depends on token ids. Raises
    `CoraError` if the tokenizer cannot be loaded or has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some of its settings are read only now
    except Exception as error:  # unrelated types, as in `loading`
        raise CoraError(f"tokenizer of {model.reference} cannot be loaded: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CoraError(f"tokenizer of {model.reference} has no end-of-sequence token, so generation would never stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(config: Any) -> int:
    """The longest sequence that the model supports, in tokens, according to its configuration."""
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)
