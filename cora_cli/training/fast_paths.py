"""Options that make a model's layers faster and change nothing else: torch.compile, and the kernels of liger-kernel.

Both are checked, then trusted: a few probes from the data go through the model before and after, and a run whose losses differ by
more than rounding is refused. The attention of packed rows is chosen in `device` and checked in `batching`.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import transformers_model
from cora_cli.training.attention import allow_compilations, register_packed_attention
from cora_cli.training.batching import TOLERANCES
from cora_cli.training.heldout import held_out_loss

BACKEND = "inductor"
"""torch.compile's backend."""
_OTHER_KERNELS = ("rope", "cross_entropy", "fused_linear_cross_entropy")
"""Kernels of liger-kernel that stay off: the first would be replaced for all models of the process, and losses are computed by `losses`."""


def use_liger(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware) -> None:
    """Replace norms and feed-forward layers of a loaded model by the kernels of liger-kernel.

    Raises `CoraError` without a CUDA GPU or the package, for a model that it does not know, and where the losses differ.
    """
    if hardware.device.type != "cuda":
        raise CoraError("--liger needs a CUDA GPU, because its kernels are written in Triton; leave it out on a processor")
    if importlib.util.find_spec("liger_kernel") is None:
        raise CoraError("--liger needs the package liger-kernel (pip install liger-kernel); or leave it out")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    inner = transformers_model(model)
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(inner.config.model_type)
    if apply is None:
        raise CoraError(f"liger-kernel has no kernels for models of type {inner.config.model_type}; leave out --liger")
    off = {name: False for name in _OTHER_KERNELS if name in inspect.signature(apply).parameters}
    with _same_losses(model, examples, form, hardware, "--liger"):
        apply_liger_kernel(inner, off)


def compile_layers(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware) -> None:
    """Let torch.compile compile each decoder layer, once for all layers and lengths; attention stays as it is.

    Raises `CoraError` where torch cannot compile here, as without a C++ compiler, and where the losses differ.
    """
    inner = transformers_model(model)
    names = set(inner._no_split_modules or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    if not layers:
        raise CoraError(f"{type(inner).__name__} names no layers that could be compiled; leave out --compile")
    with _same_losses(model, examples, form, hardware, "--compile"):
        allow_compilations()
        register_packed_attention(apart=True)
        for layer in layers:
            layer.compile(dynamic=True, backend=BACKEND)


@contextlib.contextmanager
def _same_losses(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware, option: str) -> Iterator[None]:
    """Compare the losses of the examples before and after the block. Raises `CoraError` that names `option` where they differ."""
    before = held_out_loss(model, examples, hardware, form)
    yield
    try:
        after = held_out_loss(model, examples, hardware, form)
    except Exception as error:  # compilers raise many unrelated types
        if is_out_of_memory(error):
            raise
        raise CoraError(f"{option} does not work on this machine: {reason(error)}; leave it out") from error
    difference = float(np.abs((after.nll - before.nll) / before.tokens).max())
    if not difference <= TOLERANCES[hardware.dtype if hardware.dtype == torch.float32 else None] * (1 + before.mean):
        raise CoraError(f"{option} changes the loss of a record by {difference:.1e} nats per token; leave it out")
