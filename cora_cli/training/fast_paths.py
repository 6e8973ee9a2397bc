"""Options that make a model's layers faster and change nothing else: torch.compile, and the kernels of liger-kernel.

Both are checked, then trusted: a few probes from the data go through the model before and after, and a run whose losses or gradients
differ by more than rounding is refused. The attention of packed rows is chosen in `device` and checked in `batching`.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cora_cli.data.batches import BatchForm, Collator
from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import transformers_model
from cora_cli.training.attention import allow_compilations, register_packed_attention
from cora_cli.training.batching import TOLERANCES
from cora_cli.training.losses import batch_losses

BACKEND = "inductor"
"""torch.compile's backend."""
GRADIENTS = {True: 1e-3, False: 5e-2}
"""The largest difference of the gradients relative to their size, in float32 and otherwise."""
SAMPLED = 4096
"""Entries of the gradient of each trained tensor that are compared, and its norm as well."""
LIGER_MISSING = "--liger needs the package liger-kernel (pip install liger-kernel); or leave it out"
_OTHER_KERNELS = ("rope", "cross_entropy", "fused_linear_cross_entropy")
"""Kernels of liger-kernel that stay off: the first would be replaced for all models of the process, and losses are computed by `losses`."""


def use_liger(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware) -> None:
    """Replace norms and feed-forward layers of a loaded model by the kernels of liger-kernel.

    Raises `CoraError` without the package, for a model that it does not know, and where the losses or gradients differ.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise CoraError(LIGER_MISSING)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    inner = transformers_model(model)
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(inner.config.model_type)
    if apply is None:
        raise CoraError(f"liger-kernel has no kernels for models of type {inner.config.model_type}; leave out --liger")
    off = {name: False for name in _OTHER_KERNELS if name in inspect.signature(apply).parameters}
    with _same_passes(model, examples, form, hardware, "--liger"):
        apply_liger_kernel(inner, off)


def layers_to_compile(model: Any) -> list[Any]:
    """The decoder layers of a model of transformers. Raises `CoraError` for one that does not name them."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise CoraError(f"{type(model).__name__} names no layers that could be compiled; leave out --compile")
    return layers


def compile_layers(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware) -> None:
    """Let torch.compile compile each decoder layer, and let attention stay as it is.

    Layers and lengths share their graphs; the first layer, whose input needs no gradient, and passes without gradients have their own.
    Raises `CoraError` where torch cannot compile here, as without a C++ compiler, and where the losses or gradients differ.
    """
    layers = layers_to_compile(transformers_model(model))
    with _same_passes(model, examples, form, hardware, "--compile"):
        allow_compilations()
        register_packed_attention(apart=True)
        for layer in layers:
            layer.compile(dynamic=True, backend=BACKEND)


@contextlib.contextmanager
def _same_passes(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware, option: str) -> Iterator[None]:
    """Compare losses and gradients of the examples before and after the block. Raises `CoraError` that names `option` where they differ."""
    before = _pass(model, examples, form, hardware)
    yield
    try:
        after = _pass(model, examples, form, hardware)
    except Exception as error:  # compilers raise many unrelated types
        if is_out_of_memory(error):
            raise
        raise CoraError(f"{option} does not work on this machine: {reason(error)}; leave it out") from error
    exact = hardware.dtype == torch.float32
    for what, one, other, allowed in zip(
        ("losses", "gradients"), before, after, (TOLERANCES[torch.float32 if exact else None], GRADIENTS[exact]), strict=True
    ):
        difference = float((other - one).norm() / one.norm()) if one.norm() else float(other.norm())
        if not difference <= allowed:
            raise CoraError(f"{option} changes the {what} of this model by {difference:.1e} of their size; leave it out")


def _pass(model: Any, examples: Sequence[Example], form: BatchForm, hardware: Hardware) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the examples, and of the gradient of each trained tensor its norm and its first entries."""
    batch = Collator(form)([(example, False) for example in examples])
    training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    # The graphs of the training itself are checked, unless dropout would make two passes differ.
    model.train(not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()))
    try:
        with torch.autocast(hardware.device.type, torch.bfloat16, enabled=hardware.dtype == torch.bfloat16):
            passes = [
                {key: value.to(hardware.device) if torch.is_tensor(value) else value for key, value in each.items()}
                for each in batch["passes"]
            ]
            losses = batch_losses(model, {"passes": passes}).float()
        found = torch.autograd.grad(losses.mean(), trained, allow_unused=True) if trained else ()
    finally:
        model.train(training)
    parts = [gradient.float().flatten() for gradient in found if gradient is not None]
    sample = [torch.cat([part.norm()[None], part[:SAMPLED]]) for part in parts]
    return losses.detach().cpu(), torch.cat(sample).cpu() if sample else torch.zeros(1)
