"""The tensors of one checkpoint directory: their names and shapes without their data, and one tensor at a time.

It knows safetensors and `.bin` files, sharded or not, and keeps neither a file nor a memory map open between reads, so that
memory does not grow with the number of models. It does not know what a tensor means (see `sources` and `factors`).
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

_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class Checkpoint:
    """Where each tensor of a model or adapter lies.

    `shapes` maps each tensor's name to its shape. Raises `CoraError` naming the file where one is missing, truncated, or a
    pickle that holds more than tensors.
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
                    raise CoraError(f"tensor {name} is stored twice: in {self._files[name]} and in {file.name}")
                self.shapes[name], self._files[name] = shape, file
        for name, promised_file in promised.items():
            if name not in self.shapes:
                raise CoraError(f"the index of {model.path} says that {promised_file} holds {name}, but it does not")

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored type and shape, in memory of its own."""
        file, began = self._files[name], time.perf_counter()
        with _naming(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    tensor = opened.get_tensor(name).clone()
            else:
                tensor = _load_pickle(file)[name].clone()
        self.seconds_reading += time.perf_counter() - began
        self.bytes_read += tensor.nbytes
        return tensor


def finite(tensor: torch.Tensor, reference: str, name: str) -> torch.Tensor:
    """`tensor`, unless it is no floating-point one or holds NaN or infinity: then a `CoraError` names the model and it."""
    if not tensor.is_floating_point():
        raise CoraError(f"{reference}: {name} is stored as {tensor.dtype}; floating-point weights are needed")
    # The extremes are NaN where any entry is, and found forty times faster than every entry is judged.
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise CoraError(f"{reference}: {name} holds values that are not finite (NaN or infinity); the model is damaged")
    return tensor


def _weight_files(model: ModelPath) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and what an index promises: tensor name -> file name. Same precedence as transformers."""
    if model.is_adapter:
        return model.weight_files(), {}
    for single, index in _LAYOUTS:
        if (model.path / single).exists():
            return [model.path / single], {}
        if (model.path / index).exists():
            weight_map = rundir.read_json(model.path / index).get("weight_map", {})
            files = [model.path / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if file.parent != model.path or not file.exists():
                    raise CoraError(f"{model.path / index} lists {file.name}, which is not in that directory")
            return files, weight_map
    return model.weight_files(), {}


def _list_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    with _naming(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        loaded = _load_pickle(file)
        return {name: tuple(value.shape) for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _load_pickle(file: Path) -> dict[str, Any]:
    """A `.bin` file's tensors as views of a memory map, which lives as long as they do."""
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise CoraError(f"{file} holds a {type(loaded).__name__}, not named tensors")
    return loaded


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what a damaged or hostile file raises, which may be anything, into one sentence that names it."""
    try:
        yield
    except CoraError:
        raise
    except Exception as error:
        if file.suffix == ".safetensors":
            raise CoraError(f"{file} is damaged or truncated and cannot be read as safetensors: {reason(error)}") from error
        raise CoraError(
            f"{file} cannot be read as plain tensors: it is damaged, in torch's format of before 2020, or a pickle that wants "
            f"to run code, which is never done; a safetensors copy of the model would work ({reason(error)})"
        ) from error
