"""Numbers of models with code of their own that no file holds: computed by the code, and kept by it from pass to pass."""

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from cora_cli.models.own_code.ties import listed_ties

_OF_TORCH = frozenset(vars(torch.nn.Module()))
_DEPTH = 3
"""How deep the tensors may lie that the code of a module keeps in lists, dictionaries and objects."""


@contextlib.contextmanager
def kept_as_read() -> Iterator[None]:
    """Have models with code of their own loaded without a weight that was read being drawn anew.

    transformers has the code initialize each module that holds a tensor that no file has, such as a mask, and code for transformers 4 then
    overwrites the weights of that module, and of those within it, in place. What no file has is that of `restore_buffers`.
    """
    place: Any = PreTrainedModel
    before = place.initialize_weights

    def initialize(self: Any) -> None:
        if not self.is_custom_code():
            before(self)

    place.initialize_weights = initialize
    try:
        yield
    finally:
        place.initialize_weights = before


@torch.no_grad()
def restore_buffers(model: Any, config: Any, stored: Collection[str]) -> list[str]:
    """Give a loaded model with code of its own the buffers, and other tensors of its modules that are not trained, that its class computes, but for
    those that files hold.

    transformers creates models without numbers; its own classes compute such tensors again, and those of other code, such as the frequencies of
    rotary embeddings, would be whatever the memory held. `config` is that which the model was created from, `stored` are the names of the tensors from
    files. Returns the names of trained parameters that no file holds: such code may tell transformers to miss none, and then they are random.
    """
    # An older file may hold one that the code keeps out of files by now; transformers reads no such tensor.
    unstored = {name for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)}
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False) if name in unstored or name not in stored]
    others = [
        (place, name) for place, module in model.named_modules() for name, value in _own_state(module) if _holds_meta(value)
    ]
    unread = _unread(model, stored)
    if not (buffers or others or unread):
        return []
    made = _constructed(type(model), config, model.dtype)
    if missing := [name for name in unread if made.get_parameter(name).requires_grad]:
        return missing
    if unread:
        made = _constructed(type(model), config, model.dtype, with_weights=True)
        for name, weight in unread.items():
            weight.data = made.get_parameter(name).data.to(model.device)
            weight.requires_grad_(False)
    computed = dict(made.named_buffers(remove_duplicate=False))
    for name in buffers:
        if name in computed:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = computed[name].to(model.device)
    for place, name in others:
        module = model.get_submodule(place)
        setattr(module, name, _filled(getattr(module, name), getattr(made.get_submodule(place), name), model.device))
    return []


def containers(module: torch.nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dictionaries and lists in which the code of a module may keep something from one pass to the next."""
    pending = [(value, _DEPTH) for _, value in _own_state(module)]
    while pending:
        value, depth = pending.pop()
        parts = _parts(value) if depth else []
        if parts or isinstance(value, dict | list):
            if not isinstance(value, tuple):
                yield value if isinstance(value, dict | list) else vars(value)
            pending += [(part, depth - 1) for _, part in parts]


def _own_state(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """What the code of a module keeps next to parameters, buffers and other modules."""
    return [(name, value) for name, value in vars(module).items() if name not in _OF_TORCH]


def _holds_meta(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is a tensor without numbers, or has one within, as a list, a dictionary or an object of a class of the code may."""
    if isinstance(value, torch.Tensor):
        return value.is_meta
    return depth > 0 and any(_holds_meta(part, depth - 1) for _, part in _parts(value))


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """The parts of a value that may hold tensors, each behind its key, place or name."""
    if isinstance(value, dict):
        return [*value.items()]
    if isinstance(value, list | tuple):
        return [*enumerate(value)]
    is_of_code = type(value).__module__.startswith("transformers_modules.") and not isinstance(value, torch.nn.Module)
    return [*vars(value).items()] if is_of_code and hasattr(value, "__dict__") else []


def _filled(value: Any, made: Any, device: torch.device) -> Any:
    """A value with the numbers of another, equal one in place of tensors that have none; see `_holds_meta`."""
    if isinstance(value, torch.Tensor):
        return made.to(device) if value.is_meta else value
    theirs = dict(_parts(made))
    parts = [(name, _filled(part, theirs[name], device)) for name, part in _parts(value) if _holds_meta(part)]
    if isinstance(value, tuple):
        filled = [*value]
        for place, part in parts:
            filled[place] = part
        return type(value)(*filled) if hasattr(value, "_fields") else type(value)(filled)
    for name, part in parts:
        if isinstance(value, dict | list):
            value[name] = part
        else:
            setattr(value, name, part)
    return value


def _constructed(kind: Any, config: Any, dtype: torch.dtype, with_weights: bool = False) -> Any:
    """A model of the class `kind` as its code makes it, whose parameters have no numbers, unless they are needed or the code computes with them."""
    with listed_ties():
        try:
            with contextlib.nullcontext() if with_weights else init_empty_weights(include_buffers=False):
                return kind._from_config(copy.deepcopy(config), dtype=dtype)
        except RuntimeError:  # torch's for numbers that a parameter without any cannot give
            return kind._from_config(copy.deepcopy(config), dtype=dtype)


def _unread(model: Any, stored: Collection[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters, under each of their names, that are in no file under any of them; `stored` are the names of the tensors from files."""
    every = dict(model.named_parameters(remove_duplicate=False))
    read = {id(weight) for name, weight in every.items() if name in stored or getattr(weight, "_is_hf_initialized", False)}
    return {name: weight for name, weight in every.items() if id(weight) not in read}
