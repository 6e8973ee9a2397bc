"""Merges an adapter into its base and writes the result as a plain model."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from cora_cli import rundir
from cora_cli.adapters.storage import base_of, check_base, load_adapter
from cora_cli.errors import CoraError, reason
from cora_cli.methods.parts.layers import adapted_layers
from cora_cli.models.loading import load_model, load_tokenizer
from cora_cli.models.references import ModelPath

_DTYPES: dict[str, torch.dtype | str] = {"stored": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


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

    A given `base` is used as it is; it may be the same model in another precision. `dtype` is `stored` (the base's own), `bf16` or `fp32`. Raises `CoraError` where `output` exists or the adapter does not fit.
    """
    if output.exists():
        raise CoraError(f"{output} exists already; choose a new directory")
    if not adapter.is_adapter:
        raise CoraError(f"{adapter.reference} is a complete model: there is nothing to merge")
    if base is None:
        base = base_of(adapter)
        check_base(adapter, base)
    tokenizer = load_tokenizer(base, trust_remote_code)
    model = load_model(base, _DTYPES[dtype], torch.device("cpu"), None, trust_remote_code)
    wrapped = load_adapter(model, adapter, basis_path)
    layers = len(list(adapted_layers(wrapped)))
    merged = merged_into_base(wrapped, adapter, safe=True)
    try:
        with rundir.atomic_path(output, replace=False) as temporary:
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except Exception as error:
        if rundir.is_disk_full(error):
            raise rundir.disk_error(OSError(28, "No space left on device"), output) from error
        raise
    return layers


def merged_into_base(wrapped: PeftModel, adapter: ModelPath, safe: bool = False) -> Any:
    """The base model of `wrapped` with the adapter in its weights; `safe` also refuses weights that would not be finite.

    Raises `CoraError` for a method of PEFT that has no change of the weights to merge.
    """
    try:
        return wrapped.merge_and_unload(safe_merge=safe)
    except (ValueError, NotImplementedError) as error:
        raise CoraError(f"adapter {adapter.reference} cannot be merged: {reason(error)}") from error
