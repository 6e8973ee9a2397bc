"""List the tensors of a checkpoint directory without reading their data, and read them one at a time.

Supports safetensors and `.bin` files, sharded or not. No file or memory map stays open between reads, so memory does not grow
with the number of models. `sources` and `factors` interpret the tensors.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cora_cli import rundir
from cora_cli.errors import CoraError, reason
from cora_cli.models.references import ModelPath
from cora_cli.records import WeightIndex

_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class Checkpoint:
    """Maps each tensor of a model or adapter to its file.

    `shapes` maps each tensor's name to its shape. Raises `CoraError` naming the file if one is missing, truncated, or a pickle
    that contains more than tensors.
    """

    def __init__(self, model: ModelPath) -> None:
        self.path = model.path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self._files: dict[str, Path] = {}
        files, promised = _weight_files(model)
        for file in files:
            for name, shape in _list_tensors(file).items():
                if name in self._files:
                    raise CoraError(
                        f"tensor {name} is stored twice, in {self._files[name]} and in {file.name}; remove one of the files"
                    )
                self.shapes[name], self._files[name] = shape, file
        for name, promised_file in promised.items():
            if name not in self.shapes:
                raise CoraError(f"the index of {model.path} lists {name} in {promised_file}, but that file does not contain it")

    def read(self, name: str) -> torch.Tensor:
        """A copy of tensor `name` in its stored type and shape."""
        file, began = self._files[name], time.perf_counter()
        with _read_errors(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    tensor = opened.get_tensor(name).clone()
            else:
                tensor = _load_pickle(file)[name].clone()
        self.seconds_reading += time.perf_counter() - began
        self.bytes_read += tensor.nbytes
        return tensor


def finite(tensor: torch.Tensor, reference: str, name: str) -> torch.Tensor:
    """Return `tensor` unchanged if it is floating-point without NaN or infinity.

    Otherwise raise a `CoraError` that names the model and the tensor.
    """
    if not tensor.is_floating_point():
        raise CoraError(f"{reference}: {name} is stored as {tensor.dtype}; use a copy of the model with floating-point weights")
    # The extremes are NaN if any entry is; finding them is forty times faster than testing every entry.
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise CoraError(
            f"{reference}: {name} holds values that are not finite (NaN or infinity); the model is damaged, use another copy"
        )
    return tensor


def _weight_files(model: ModelPath) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and the index's tensor name -> file name. The precedence of formats is that of transformers."""
    if model.is_adapter:
        return model.weight_files(), {}
    for single, index in _LAYOUTS:
        if (model.path / single).exists():
            return [model.path / single], {}
        if (model.path / index).exists():
            weight_map = rundir.read_json(model.path / index, WeightIndex)["weight_map"]
            files = [model.path / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if file.parent != model.path or not file.exists():
                    raise CoraError(
                        f"{model.path / index} lists {file.name}, which is not in that directory; download the model again"
                    )
            return files, weight_map
    return model.weight_files(), {}


def _list_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    with _read_errors(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        loaded = _load_pickle(file)
        return {name: tuple(value.shape) for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _load_pickle(file: Path) -> dict[str, Any]:
    """A `.bin` file's tensors as views of a memory map, which stays open as long as they exist."""
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise CoraError(f"{file} holds a {type(loaded).__name__}, not a dictionary of named tensors")
    return loaded


@contextlib.contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """Turn any exception of a damaged or malicious file into a one-sentence `CoraError` that names the file."""
    try:
        yield
    except CoraError:
        raise
    except Exception as error:
        if file.suffix == ".safetensors":
            raise CoraError(f"{file} is damaged or truncated and cannot be read as safetensors: {reason(error)}") from error
        raise CoraError(
            f"{file} cannot be read as plain tensors: it is damaged, in torch's format from before 2020, or a pickle that "
            f"would run code, which cora never loads; use a safetensors copy of the model ({reason(error)})"
        ) from error
