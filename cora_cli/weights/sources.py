"""The weight matrices of one model by module name, listed without reading data and then read one at a time.

Complete models and LoRA adapters on a base share one interface. `extraction.merge` combines the matrices of several models.
"""

import abc
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import Checkpoint, finite
from cora_cli.models.references import ModelPath, recorded_base, resolve_model
from cora_cli.models.skeleton import other_modalities, skeleton_of
from cora_cli.weights.factors import AdapterFactors

_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
_COMPILED = "_orig_mod."


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of `config.json` that decide whether two models have the same shape; absent ones are left out."""
    return {key: config[key] for key in _ARCHITECTURE_KEYS if config.get(key) is not None}


class WeightSource(abc.ABC):
    """One model's weight matrices; `shapes` maps module names (as in the loaded model) to (out, in).

    `transposed` holds the modules whose layer stores its weight as (in, out), `skipped` the names in the files of weights that are no
    module of the language model: those of other modalities, and those that the loaded model does not take as they are, such as fused
    experts.
    """

    reference: str
    revision: str | None
    architecture: dict[str, Any]
    transposed: frozenset[str] = frozenset()
    skipped: Sequence[str] = ()
    shapes: dict[str, tuple[int, int]]

    @abc.abstractmethod
    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), on the CPU. Raises `CoraError` if it is damaged or not finite."""

    @abc.abstractmethod
    def content_hash(self, modules: Iterable[str]) -> str:
        """SHA-256 over the name, type, shape and bytes of every tensor that determines the weights of `modules`.

        Modules that were read before are not read again.
        """

    @property
    @abc.abstractmethod
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that this source opened itself; a base that the caller passed in is not among them."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return sum(checkpoint.bytes_read for checkpoint in self.checkpoints)

    @property
    def seconds_reading(self) -> float:
        """Seconds spent so far on reading them from files."""
        return sum(checkpoint.seconds_reading for checkpoint in self.checkpoints)

    def own_delta(self, module: str, base: "WeightSource") -> torch.Tensor | None:
        """W − W_base, (out, in) float64, if it is known without reading `base`; else None."""
        return None

    def own_rank(self, module: str, base: "WeightSource") -> int | None:
        """The r of `own_factors`, from shapes alone (0 if W = W_base); None if W − W_base is not a known low-rank product."""
        return None

    def own_factors(self, module: str, base: "WeightSource") -> tuple[torch.Tensor, torch.Tensor]:
        """L (out, r) and R (r, in) float64 with L R = W − W_base, without reading `base`; only if `own_rank` is not None."""
        raise NotImplementedError


def open_source(model: ModelPath, base: WeightSource | None = None) -> WeightSource:
    """List the weight matrices of a model or of a LoRA adapter; reads headers only.

    An adapter's W is W_base + s·B·A (float64). Its base is `base` if given, else the model that its configuration names.
    Raises `CoraError` if files are missing, damaged or quantised, or if an adapter does not fit its base.
    """
    return AdapterSource(model, base) if model.is_adapter else ModelSource(model)


class ModelSource(WeightSource):
    """A complete model: every two-dimensional `*.weight` of its checkpoint, in the stored type, by its name in the loaded model."""

    def __init__(self, model: ModelPath) -> None:
        config = model.config()
        self.reference, self.revision = model.reference, model.revision
        self.architecture = architecture_of(model.language_config())
        if config.get("quantization_config"):
            raise CoraError(f"{model.reference} is stored quantised; use a copy with weights in bf16, fp16 or fp32")
        self._checkpoint = Checkpoint(model)
        self._digests: dict[str, str] = {}
        if compiled := next((name for name in self._checkpoint.shapes if _COMPILED in name), None):
            raise CoraError(
                f"{model.reference} was saved from a compiled model: its tensors have names such as {compiled}, which no model has; "
                f"save it again from the model without torch.compile ({_COMPILED.rstrip('.')})"
            )
        self._keys, self.shapes, self.transposed = loaded_matrices(model, self._checkpoint)
        self.skipped = sorted(set(_matrices(self._checkpoint)) - set(self._keys.values()))

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), as stored."""
        weight = finite(self._checkpoint.read(self._keys[module]), self.reference, module)
        weight = weight.T.contiguous() if module in self.transposed else weight
        self._digests.setdefault(module, rundir.tensor_digest(module, weight))
        return weight

    def content_hash(self, modules: Iterable[str]) -> str:
        """See `WeightSource.content_hash`."""
        modules = list(modules)
        for module in modules:
            if module not in self._digests:
                self.read(module)
        return rundir.sha256_json({module: self._digests[module] for module in modules})

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """See `WeightSource.checkpoints`."""
        return [self._checkpoint]


class AdapterSource(WeightSource):
    """A PEFT LoRA adapter on its base: W = W_base + s·B·A, s = alpha / r (alpha / √r under rsLoRA)."""

    def __init__(self, model: ModelPath, base: WeightSource | None) -> None:
        self.reference, self.revision = model.reference, model.revision
        self._own = AdapterFactors(model)
        self._base_is_own = base is None
        self.base = base or self._open_base()
        self.architecture = self.base.architecture
        self._own.check_full(self.base.shapes)
        if self._own.config.get("fan_in_fan_out") and (wrong := sorted(self._own.ranks.keys() - self.base.transposed)):
            raise CoraError(
                f"{self.reference} has fan_in_fan_out, but its base {self.base.reference} stores {wrong[0]} as (out, in); merge it first"
            )
        # A fully saved module may be larger than the base's (new tokens) or absent from the base (a tied or new head).
        shapes = self.base.shapes | self._own.full
        self._own.check(shapes, self.base.reference)
        self.shapes = {module: shape for module, shape in shapes.items() if module not in self._own.hidden}

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in) float64."""
        weight = (self._own.read_full(module) if module in self._own.full else self.base.read(module)).double()
        if module in self._own.ranks:
            weight += self._update(module)
        return weight

    def own_delta(self, module: str, base: WeightSource) -> torch.Tensor | None:
        """s·B·A exactly (zero for a module without an update) if `base` is this adapter's base; else None."""
        if base is not self.base or module in self._own.full:
            return None
        return self._update(module) if module in self._own.ranks else torch.zeros(self.shapes[module], dtype=torch.float64)

    def own_rank(self, module: str, base: WeightSource) -> int | None:
        """See `WeightSource.own_rank`."""
        return None if base is not self.base or module in self._own.full else self._own.ranks.get(module, 0)

    def own_factors(self, module: str, base: WeightSource) -> tuple[torch.Tensor, torch.Tensor]:
        """s·B and A."""
        if module not in self._own.ranks:
            out, inside = self.shapes[module]
            return torch.zeros((out, 0), dtype=torch.float64), torch.zeros((0, inside), dtype=torch.float64)
        scale, b, a = self._own.read(module)
        return scale * b, a

    def content_hash(self, modules: Iterable[str]) -> str:
        """See `WeightSource.content_hash`; covers the adapter's tensors, their scale, and the base."""
        modules = list(modules)
        rest = self.base.content_hash([module for module in modules if module not in self._own.full])
        return rundir.sha256_json({"base": rest, "adapter": self._own.digests(modules)})

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """See `WeightSource.checkpoints`; includes the base's if the adapter opened its base itself."""
        return [self._own.checkpoint, *(self.base.checkpoints if self._base_is_own else [])]

    def _update(self, module: str) -> torch.Tensor:
        """s·B·A, (out, in) float64."""
        scale, b, a = self._own.read(module)
        return scale * (b @ a)

    def _open_base(self) -> WeightSource:
        name = recorded_base(self._own.config)
        if not name:
            raise CoraError(f"{self.reference} does not name its base model; pass it with --base")
        try:
            found = resolve_model(name)
        except CoraError as error:
            raise CoraError(
                f"cannot find the base model of adapter {self.reference} (pass its path with --base): {error}"
            ) from error
        return open_source(found)


def loaded_matrices(
    model: ModelPath, checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, tuple[int, int]], frozenset[str]]:
    """The key in the files and the shape (out, in) of each weight matrix of the loaded language model, by module; and the modules that
    store their weight as (in, out).

    A model that transformers does not know without code of its own keeps the names of its files.
    """
    stored = _matrices(checkpoint)
    names, transposed = {key: key for key in stored}, frozenset[str]()
    with contextlib.suppress(CoraError):
        skeleton = skeleton_of(model)
        others = other_modalities(skeleton.model)
        loaded = skeleton.loaded_names(stored).items()
        names, transposed = (
            {key: name for key, name in loaded if name.removesuffix(".weight") not in others},
            skeleton.transposed,
        )
    keys = {name.removesuffix(".weight"): key for key, name in names.items()}
    shapes = {module: checkpoint.shapes[key] for module, key in keys.items()}
    oriented = {module: (a, b) if module not in transposed else (b, a) for module, (a, b) in shapes.items()}
    return keys, oriented, transposed


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """The keys of the weights with two dimensions."""
    return [key for key, shape in checkpoint.shapes.items() if key.endswith(".weight") and len(shape) == 2]
