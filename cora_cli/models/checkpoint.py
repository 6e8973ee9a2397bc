"""List the tensors of a checkpoint directory without reading their data, and read them one at a time.

Supports safetensors and torch's `.bin`, `.pt` and `.pth` files, sharded or not. No file or memory map stays open between reads, so memory does not grow
with the number of models. `sources` and `factors` interpret the tensors.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.models.model_path import ModelPath
from cora_cli.reading import refuse_pointer

PLAIN_TYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Types whose numbers are the weights themselves. Others need scales or codebooks that a plain read would leave out."""
_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_WRAPPERS = {
    "_orig_mod": "a compiled model",
    "module": "a DistributedDataParallel or DataParallel wrapper",
    "_fsdp_wrapped_module": "an FSDP wrapper",
    "_checkpoint_wrapped_module": "a wrapper for activation checkpointing",
}
"""The names by which training wrappers hold the model that they wrap."""
_ENTRIES = ("state_dict", "model", "model_state_dict", "module")
"""The names under which training programs store a model's tensors next to other state."""


class Checkpoint:
    """Maps each tensor of a model or adapter to its file.

    `shapes` maps each tensor's name to its shape, `types` to the name of its torch type. `missing` maps the tensors that the index lists and no file
    holds to the file that it names: a converter that stores a tied head once may still list it. Raises `CoraError` naming the file if one is missing,
    truncated, or a pickle that contains more than tensors, and where a wrapper of the training has renamed the tensors.
    """

    def __init__(self, model: ModelPath) -> None:
        self.path = model.path
        self._model = model
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self.files: dict[str, Path] = {}
        for file in model.weight_files():
            for name, (shape, kind) in _list_tensors(file).items():
                if name in self.files:
                    if (shape, kind) == (self.shapes[name], self.types[name]) and self._holds_equal(name, file):
                        continue
                    raise CoraError(
                        f"tensor {name} is stored twice, in {self.files[name]} and otherwise in {file.name}; remove the file that is not the model's, or "
                        "save the model again"
                    )
                if wrapper := next((part for part in name.split(".") if part in _WRAPPERS), None):
                    raise CoraError(
                        f"{model.reference} was saved from {_WRAPPERS[wrapper]}: its tensors have names such as {name}, which no model has; "
                        f"save it again from the model inside ({wrapper})"
                    )
                self.shapes[name], self.types[name], self.files[name] = shape, kind, file
        promised = {} if model.is_adapter else model.weight_index()
        self.missing = {name: file for name, file in promised.items() if name not in self.shapes}

    def _holds_equal(self, name: str, file: Path) -> bool:
        """Whether `file` has the same bytes of the tensor `name` as the file in which it was found."""
        one, other = (self._read(place, [name])[name].reshape(-1).view(torch.uint8) for place in (self.files[name], file))
        return torch.equal(one, other)

    def read(self, name: str) -> torch.Tensor:
        """A copy of tensor `name` in its stored type and shape."""
        return self._read(self.files[name], [name])[name]

    def read_all(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor, as `read` gives it; each file is opened once, since its list of tensors takes long where there are thousands."""
        names: dict[Path, list[str]] = {}
        for name, file in self.files.items():
            names.setdefault(file, []).append(name)
        found = {name: tensor for file, own in names.items() for name, tensor in self._read(file, own).items()}
        return {name: found[name] for name in self.shapes}

    def _read(self, file: Path, names: list[str]) -> dict[str, torch.Tensor]:
        began = time.perf_counter()
        with _read_errors(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    tensors = {name: opened.get_tensor(name).clone() for name in names}
            else:
                loaded = load_pickle(file)
                tensors = {name: loaded[name].detach().clone() for name in names}  # a file may hold parameters
        self._model.require_unchanged_file(file)
        self.seconds_reading += time.perf_counter() - began
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        return tensors


def check_type(kind: str, reference: str, name: str) -> None:
    """Raise `CoraError` for a tensor whose numbers alone are not its weights, such as float8 or integers."""
    if fault := type_fault(kind, name):
        raise CoraError(f"{reference}: {fault}")


def type_fault(kind: str, name: str) -> str | None:
    """Why the numbers of a tensor of a type are not its weights; None if they are."""
    if kind in PLAIN_TYPES:
        return None
    return f"{name} is stored as {kind}; use a copy of the model with weights in bf16, fp16 or fp32"


def finite(tensor: torch.Tensor, reference: str, name: str) -> torch.Tensor:
    """Return `tensor` unchanged if it is of a plain floating-point type without NaN or infinity.

    Otherwise raise a `CoraError` that names the model and the tensor.
    """
    check_type(str(tensor.dtype).removeprefix("torch."), reference, name)
    if not is_finite(tensor):
        raise CoraError(
            f"{reference}: {name} holds values that are not finite (NaN or infinity); the model is damaged, use another copy"
        )
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # The extremes are NaN if any entry is; finding them is forty times faster than testing every entry.
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _list_tensors(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the torch type of each tensor of a file, by name."""
    with _read_errors(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: (tuple(one.get_shape()), _SAFETENSORS_TYPES.get(one.get_dtype(), one.get_dtype()))
                    for name, one in slices.items()
                }
        loaded = load_pickle(file).items()
        tensors = {name: value for name, value in loaded if isinstance(value, torch.Tensor)}
        return {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()}


def load_pickle(file: Path) -> dict[str, Any]:
    """The tensors of a file of torch as views of a memory map, which stays open as long as they exist.

    Tensors that are all in one entry, such as `state_dict`, are taken from there. Raises `CoraError` where they are in several places.
    """
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise CoraError(f"{file} holds a {type(loaded).__name__}, not a dictionary of named tensors")
    entries = {name: value for name, value in loaded.items() if isinstance(value, dict) and _holds_tensors(value)}
    if not entries:
        return loaded
    (name, tensors), *more = entries.items()
    if more or _holds_tensors(loaded) or name not in _ENTRIES:
        found = ", ".join(map(repr, entries))
        raise CoraError(
            f"{file} holds tensors in {found}{' and next to it' if _holds_tensors(loaded) else ''}, so it is not clear which are the model's; "
            "save the model's state_dict alone"
        )
    return tensors


def is_wrapped(file: Path) -> bool:
    """Whether the tensors of a file of torch are in an entry of their own, where transformers does not look for them."""
    with _read_errors(file):
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return isinstance(loaded, dict) and not _holds_tensors(loaded)


def _holds_tensors(values: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())


@contextlib.contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """Turn any exception of a damaged or malicious file into a one-sentence `CoraError` that names the file."""
    try:
        yield
    except CoraError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        refuse_pointer(file)
        if file.suffix == ".safetensors":
            raise CoraError(f"{file} is damaged or truncated and cannot be read as safetensors: {reason(error)}") from error
        raise CoraError(
            f"{file} cannot be read as plain tensors: it is damaged, in torch's format from before 2020, or a pickle that "
            f"would run code, which cora never loads; use a safetensors copy of the model ({reason(error)})"
        ) from error
