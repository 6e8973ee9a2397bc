"""The weight matrices of one model, by module name: listed without reading data, then read one at a time.

Whole models and LoRA adapters on a base look alike from outside; how the matrices of several are merged is not known here.
"""

import abc
import hashlib
import re
from collections.abc import Iterable
from typing import Any

import torch

from cora_cli import rundir
from cora_cli.basis.checkpoint import Checkpoint
from cora_cli.errors import CoraError
from cora_cli.models import ModelPath, resolve_model

_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
# Their Conv1D layers store (in, out), so that "output side" would silently mean the input.
_TRANSPOSED_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_ADAPTER_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight$")
_FULL_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight$")
_OTHER_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)\.(?:lora_embedding_[AB]|token_adapter\..+)$")
# Settings under which a LoRA adapter's weight is not W + s·B·A.
_OTHER_FORMS = (
    "use_dora",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "kasa_config",
    "monteclora_config",
)
# Every other named start (PiSSA, OLoRA, CorDA, LoftQ, …) rewrites the base, on whose remainder the adapter then rests.
_STARTS_THAT_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a model's `config.json` that say whether two models have the same shape; absent ones are left out."""
    return {key: config[key] for key in _ARCHITECTURE_KEYS if config.get(key) is not None}


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 over name, type, shape and bytes of a CPU tensor."""
    digest = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class WeightSource(abc.ABC):
    """One model's weight matrices; `shapes` maps module names (as in the checkpoint) to (out, in)."""

    reference: str
    revision: str | None
    architecture: dict[str, Any]
    shapes: dict[str, tuple[int, int]]

    @abc.abstractmethod
    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), on the CPU. Raises `CoraError` where it is damaged or not finite."""

    @abc.abstractmethod
    def content_hash(self, modules: Iterable[str]) -> str:
        """SHA-256 over name, type, shape and bytes of what determines the weights of `modules`.

        Modules that were read before are not read again.
        """

    @property
    @abc.abstractmethod
    def checkpoints(self) -> list[Checkpoint]:
        """What is read for this source alone; a base that was given counts for itself."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return sum(checkpoint.bytes_read for checkpoint in self.checkpoints)

    @property
    def seconds_reading(self) -> float:
        """Time spent so far on bringing them from files to memory."""
        return sum(checkpoint.seconds_reading for checkpoint in self.checkpoints)

    def own_delta(self, module: str, base: "WeightSource") -> torch.Tensor | None:
        """W − W_base, (out, in) float64, where it is known without reading `base`; else None."""
        return None


def open_source(model: ModelPath, base: WeightSource | None = None) -> WeightSource:
    """List the weight matrices of a model or of a LoRA adapter; reads headers only.

    An adapter's W is W_base + s·B·A (float64), on `base` where given, else on the model that its configuration names.
    Raises `CoraError` where files are missing, damaged or quantised, or where an adapter does not fit its base.
    """
    return AdapterSource(model, base) if model.is_adapter else ModelSource(model)


class ModelSource(WeightSource):
    """A whole model: every two-dimensional `*.weight` of its checkpoint, in the stored type."""

    def __init__(self, model: ModelPath) -> None:
        config = model.config()
        self.reference, self.revision = model.reference, model.revision
        self.architecture = architecture_of(config)
        if (model_type := config.get("model_type")) in _TRANSPOSED_TYPES:
            raise CoraError(f"{model.reference} is a {model_type} model, whose weights are stored (in, out): not supported")
        if config.get("quantization_config"):
            raise CoraError(f"{model.reference} is stored quantised; its weights are needed in bf16, fp16 or fp32")
        self._checkpoint = Checkpoint(model)
        self._digests: dict[str, str] = {}
        self.shapes = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self._checkpoint.shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), as stored."""
        weight = _finite(self._checkpoint.read(f"{module}.weight"), self.reference, module)
        self._digests.setdefault(module, tensor_digest(module, weight))
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
        self._config = model.adapter_config()
        self.reference, self.revision = model.reference, model.revision
        self._check_form()
        self._base_is_own = base is None
        self.base = base or self._open_base()
        self.architecture = self.base.architecture
        self._checkpoint = Checkpoint(model)
        self._digests: dict[str, str] = {}
        self._full: dict[str, str] = {}
        self._scale: dict[str, float] = {}
        factors: dict[str, dict[str, str]] = {}
        hidden: set[str] = set()
        for key, shape in self._checkpoint.shapes.items():
            if found := _ADAPTER_KEY.match(key):
                factors.setdefault(found["module"], {})[found["matrix"]] = key
            elif found := _OTHER_KEY.match(key):
                hidden.add(found["module"])  # changed in a way that is not W + s·B·A: not offered at all
            elif found := _FULL_KEY.match(key):
                if len(shape) == 2:
                    self._full[found["module"]] = key
            elif not key.endswith(".bias"):
                raise CoraError(
                    f"{self.reference}: {key} is neither lora_A, lora_B nor a whole module that was saved with them"
                )
        # A saved whole module may have grown (new tokens) or be absent from the base (a tied or new head).
        shapes = self.base.shapes | {module: self._shape(key) for module, key in self._full.items()}
        for module, keys in factors.items():
            self._check_factors(module, keys, shapes)
        self._factors = {module: (keys["A"], keys["B"]) for module, keys in factors.items()}
        if not self._factors and not self._full:
            raise CoraError(f"{self.reference} holds no lora_A and lora_B: {self._checkpoint.path} is an empty adapter")
        self.shapes = {module: shape for module, shape in shapes.items() if module not in hidden}

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in) float64."""
        weight = (self._read_full(module) if module in self._full else self.base.read(module)).double()
        if module in self._factors:
            weight += self._update(module)
        return weight

    def own_delta(self, module: str, base: WeightSource) -> torch.Tensor | None:
        """s·B·A exactly (zero where the adapter leaves `module` alone), if `base` is this adapter's own."""
        if base is not self.base or module in self._full:
            return None
        return self._update(module) if module in self._factors else torch.zeros(self.shapes[module], dtype=torch.float64)

    def content_hash(self, modules: Iterable[str]) -> str:
        """See `WeightSource.content_hash`; covers the adapter's tensors, their scale, and the base."""
        modules = list(modules)
        for module in modules:
            if module in self._factors and f"{module}.lora" not in self._digests:
                self._update(module)
            if module in self._full and module not in self._digests:
                self._read_full(module)
        names = [name for module in modules for name in (module, f"{module}.lora") if name in self._digests]
        replaced = set(self._full)
        rest = self.base.content_hash([module for module in modules if module not in replaced])
        return rundir.sha256_json({"base": rest, "adapter": {name: self._digests[name] for name in names}})

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """See `WeightSource.checkpoints`; the base's are among them where the adapter opened it itself."""
        return [self._checkpoint, *(self.base.checkpoints if self._base_is_own else [])]

    def _check_form(self) -> None:
        if (kind := self._config.get("peft_type")) != "LORA":
            raise CoraError(f"{self.reference} is a {kind} adapter; only LORA adapters are read")
        for setting in _OTHER_FORMS:
            if self._config.get(setting):
                raise CoraError(f"{self.reference} was made with {setting}, so its weights are not W + s·B·A; merge it first")
        if (start := self._config.get("init_lora_weights", True)) not in _STARTS_THAT_KEEP_BASE:
            raise CoraError(f"{self.reference} has init_lora_weights {start!r}, which changes the base weights; merge it first")

    def _open_base(self) -> WeightSource:
        name, revision = self._config.get("base_model_name_or_path"), self._config.get("revision")
        if not name:
            raise CoraError(f"{self.reference} does not name the model it rests on; give it with --base")
        try:
            found = resolve_model(f"{name}@{revision}" if revision else name)
        except CoraError as error:
            raise CoraError(f"the base of adapter {self.reference} cannot be had, --base would name it: {error}") from error
        return open_source(found)

    def _check_factors(self, module: str, keys: dict[str, str], shapes: dict[str, tuple[int, int]]) -> None:
        if missing := {"A", "B"} - keys.keys():
            raise CoraError(f"{self.reference}: {module} has no lora_{missing.pop()}; its keys do not all arrive")
        if module not in shapes:
            raise CoraError(
                f"{self.reference}: {keys['A']} matches no module of its base {self.base.reference}; its keys do not all arrive"
            )
        (rank, inside), (outside, rank_of_b) = self._shape(keys["A"]), self._shape(keys["B"])
        stated = _pattern_value(self._config.get("rank_pattern"), module, self._config.get("r"))
        if (outside, inside) != shapes[module] or not rank == rank_of_b == stated:
            raise CoraError(
                f"{self.reference}: {module} has lora_A {(rank, inside)} and lora_B {(outside, rank_of_b)}, which do not fit "
                f"r = {stated} and the weight {shapes[module]} of its base {self.base.reference}"
            )
        alpha = _pattern_value(self._config.get("alpha_pattern"), module, self._config.get("lora_alpha"))
        self._scale[module] = alpha / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _shape(self, key: str) -> tuple[int, int]:
        shape = self._checkpoint.shapes[key]
        if len(shape) != 2:
            raise CoraError(f"{self.reference}: {key} has shape {shape}, not two dimensions")
        return shape[0], shape[1]

    def _update(self, module: str) -> torch.Tensor:
        """s·B·A, (out, in) float64."""
        a, b = (_finite(self._checkpoint.read(key), self.reference, key) for key in self._factors[module])
        digests = [tensor_digest("lora_A", a), tensor_digest("lora_B", b), self._scale[module]]
        self._digests.setdefault(f"{module}.lora", rundir.sha256_json(digests))
        return self._scale[module] * (b.double() @ a.double())

    def _read_full(self, module: str) -> torch.Tensor:
        weight = _finite(self._checkpoint.read(self._full[module]), self.reference, module)
        self._digests.setdefault(module, tensor_digest(module, weight))
        return weight


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches as PEFT's `rank_pattern` and `alpha_pattern` do: a regex on the name's end."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _finite(tensor: torch.Tensor, reference: str, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise CoraError(f"{reference}: {name} is stored as {tensor.dtype}; floating-point weights are needed")
    # The extremes are NaN where any entry is, and found forty times faster than every entry is judged.
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise CoraError(f"{reference}: {name} holds values that are not finite (NaN or infinity); the model is damaged")
    return tensor
