"""Compute with a model in a higher precision than that of its weights, without a copy of them all."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cora_cli.models.own_code.unstored import containers

UNSUPPORTED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a family raises that computes some parts in a precision of its own, which does not go with another one."""
LARGEST_IN_FLOAT64 = 1 << 24
"""Elements of the largest weight up to which double precision takes little time. Larger models have larger faults, too."""


def stays_in_float32(model: Any, name: str) -> bool:
    """Whether transformers keeps a weight in float32 in a model of lower precision, as the family asks for."""
    return not set(name.split(".")).isdisjoint(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def forget_failed_pass(model: torch.nn.Module) -> None:
    """Let a model be called again after a pass that ended in an exception, if it is divided among processes; earlier versions of torch need no call."""
    if reset := getattr(model, "reset_iter_state", None):
        reset()


@contextmanager
def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Each module computes with its own weights in `dtype` while it runs, and has the stored ones again afterwards, bit for bit.

    Quantized weights stay as they are. What the code of a module keeps from one pass to the next, as masks of the pass' precision, is what it was before.
    """
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    contents = [(held, copy.copy(held)) for module in model.modules() for held in containers(module)]
    stored: dict[torch.nn.Module, dict[torch.nn.Parameter, torch.Tensor]] = {}

    def widen(module: torch.nn.Module, *_: object) -> None:
        own = {weight: weight.data for weight in module.parameters(recurse=False) if weight.is_floating_point()}
        stored[module] = own
        for weight, data in own.items():
            weight.data = data.to(dtype)

    def restore(module: torch.nn.Module, *_: object) -> None:
        for weight, data in stored.pop(module, {}).items():
            weight.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.enter_context(_removed(module.register_forward_pre_hook(widen)))
                hooks.enter_context(_removed(module.register_forward_hook(restore, always_call=True)))
        try:
            yield
        finally:
            for module in list(stored):
                restore(module)
            for module, state, buffers in kept:
                for name in vars(module).keys() - state.keys():
                    delattr(module, name)
                vars(module).update(state)
                module._buffers.clear()
                module._buffers.update(buffers)
            for held, content in contents:
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def rounds_by_rows(model: torch.nn.Module) -> bool:
    """Whether a product rounds differently with the number of its rows, in a precision that cannot be raised: quantized weights on a GPU."""
    return bool(getattr(model, "is_quantized", False)) and next(model.parameters()).device.type == "cuda"


def precisions(model: torch.nn.Module) -> list[torch.dtype]:
    """The precisions to compare computations of `model` in, the most exact first; none where its products keep their own."""
    if rounds_by_rows(model):
        return []
    affordable = max(weight.numel() for weight in model.parameters()) <= LARGEST_IN_FLOAT64
    return [torch.float64, torch.float32] if affordable else [torch.float32]
