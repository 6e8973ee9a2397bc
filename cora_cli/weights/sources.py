"""The weight matrices of one model by module name, listed without reading data and then read one at a time.

Complete models and LoRA adapters on a base share one interface. `extraction.merge` combines the matrices of several models.
"""

import abc
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import torch

from cora_cli import hashing
from cora_cli.adapters.base import base_of, check_base
from cora_cli.basis.choices import is_target, match_targets, natural_order
from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import PLAIN_TYPES, Checkpoint, finite
from cora_cli.models.fused import VIEWS, Layout, View
from cora_cli.models.model_path import ModelPath
from cora_cli.models.quantized import kind_stated
from cora_cli.models.skeleton import NUMBERED, skeleton_of
from cora_cli.progress import note
from cora_cli.weights.factors import AdapterFactors
from cora_cli.weights.matrices import is_known, loaded_matrices

_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of `config.json` that decide whether two models have the same shape; absent ones are left out."""
    return {key: config[key] for key in _ARCHITECTURE_KEYS if config.get(key) is not None}


class WeightSource(abc.ABC):
    """One model's weight matrices; `shapes` maps module names (as in the loaded model) to (out, in).

    `transposed` holds the modules whose layer stores its weight as (in, out), `skipped` the names in the files of weights that are no
    module of the language model: those of other modalities, and those that the loaded model does not take as they are, such as fused
    experts; `others` holds the modules of other modalities. `views` says which of the modules are rows of another, such as GPT-2's `c_attn.q_proj` of its `c_attn`; both are listed. `biases` names those
    that an adapter trained, `without_factors` the modules that it changes in other ways than by A and B. `faults` says by module what keeps a layer's weight from being read: missing, of another shape, or with tensors next to
    it that would change it.
    """

    reference: str
    revision: str | None
    architecture: dict[str, Any]
    transposed: frozenset[str] = frozenset()
    skipped: Sequence[str] = ()
    others: frozenset[str] = frozenset()
    views: Mapping[str, View] = MappingProxyType({})
    biases: Sequence[str] = ()
    without_factors: Set[str] = frozenset()
    faults: Mapping[str, str] = MappingProxyType({})
    shapes: dict[str, tuple[int, int]]

    def targets(self, target_modules: Sequence[str]) -> list[str]:
        """The modules that `target_modules` match, layers in numerical order.

        Raises `CoraError` if a target matches none, or a layer that cannot be read.
        """
        for module in sorted(self.faults, key=natural_order):
            if any(is_target(module, target) for target in target_modules):
                raise CoraError(f"{self.reference}: {self.faults[module]}")
        return match_targets(list(self.shapes), target_modules, self.reference)

    def say_left_out(self, target_modules: Sequence[str]) -> None:
        """Say which weights that `target_modules` match are not read, which changes are no part of any weight, and where the weights are of several parts
        of a model: what a part reads only code of the model's own may know, which is not run."""
        matched = [module for module in self.shapes if any(is_target(module, target) for target in target_modules)]
        stacks = sorted({found["stack"] for module in matched if (found := NUMBERED.match(module))})
        if len(stacks) > 1:
            note(
                f"{self.reference}: the target modules are layers of several parts: {', '.join(stacks)}; if one of them reads no text, leave it out by the "
                "full names of the others' layers in --target-modules"
            )
        if left_out := [key for key in self.skipped if any(is_target(key.removesuffix(".weight"), t) for t in target_modules)]:
            note(
                f"{self.reference}: weights that are left out, since they belong to no layer of the language model that an adapter changes: "
                f"{len(left_out)}, such as {left_out[0]}"
            )
        if self.biases:
            note(
                f"{self.reference} also trained {len(self.biases)} biases, such as {self.biases[0]}: they are no part of the weights, and "
                "nothing of their change is in what is computed here"
            )

    def without_overlap(self, named: Collection[str]) -> list[str]:
        """Every row of every matrix once: the modules, with views in place of the fused projections of which `named` holds a view."""
        split = {self.views[module].fused for module in named if module in self.views}
        return [
            module
            for module in self.shapes
            if (self.views[module].fused in split if module in self.views else module not in split)
        ]

    @abc.abstractmethod
    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), on the CPU. Raises `CoraError` if it is damaged or not finite."""

    @abc.abstractmethod
    def content_hash(self, modules: Iterable[str]) -> str:
        """SHA-256 over the name, type, shape and bytes of every tensor that determines the weights of `modules`.

        Modules that were read before are not read again.
        """

    @abc.abstractmethod
    def entry_bytes(self, module: str) -> int:
        """Bytes of a number of the weight of `module` in the files; of an adapter's base, since its own factors are small."""

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

    def renamed_modules(self, modules: Collection[str]) -> dict[str, str]:
        """See `Skeleton.renamed_modules`; empty where transformers does not know the model without code of its own."""
        return {}

    def sharing(self, modules: Collection[str]) -> set[str]:
        """The modules whose weight is that of one of `modules`, such as a head's that is the embedding's; none where it is not known."""
        return set()

    def changes_only(self, modules: Collection[str], base: "WeightSource") -> bool:
        """Whether it is known that this model differs from `base` in nothing but the weights of `modules`."""
        return False

    def held_otherwise(self, modules: Iterable[str]) -> str | None:
        """The first of `modules` that is no layer of this model once it is loaded, since a fused projection is changed as another; None if all are."""
        return None


def open_source(model: ModelPath, base: WeightSource | None = None) -> WeightSource:
    """List the weight matrices of a model or of a LoRA adapter; reads headers only.

    An adapter's W is W_base + s·B·A (float64). Its base is `base` if given, else the model that its configuration names.
    Raises `CoraError` if files are missing, damaged or quantised, or if an adapter does not fit its base.
    """
    return AdapterSource(model, base) if model.is_adapter else ModelSource(model)


class ModelSource(WeightSource):
    """A complete model: every two-dimensional `*.weight` of its checkpoint, in the stored type, by its name in the loaded model."""

    def __init__(self, model: ModelPath) -> None:
        self.reference, self.revision = model.reference, model.revision
        self._model = model
        self.architecture = architecture_of(model.language_config())
        _refuse_quantized(model)
        self._checkpoint = Checkpoint(model)
        self._digests: dict[str, str] = {}
        found = loaded_matrices(model, self._checkpoint)
        self._keys, self._parts, self.shapes, self.transposed = found.keys, found.parts, found.shapes, found.transposed
        self.faults, self.views = found.faults, found.views
        self.others, self.skipped = found.others, found.skipped

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in), as stored."""
        view = self.views.get(module)
        stored = view.fused if view else module
        weight = finite(self._checkpoint.read(self._keys[stored]), self.reference, stored)
        if stored in self._parts:
            place, count = self._parts[stored]
            weight = weight.chunk(count)[place].clone()
        weight = weight.T.contiguous() if stored in self.transposed else weight
        weight = view.layout.rows(weight, view.part) if view else weight
        self._digests.setdefault(module, hashing.tensor_digest(module, weight))
        return weight

    def entry_bytes(self, module: str) -> int:
        """See `WeightSource.entry_bytes`."""
        stored = self.views[module].fused if module in self.views else module
        kind: torch.dtype = getattr(torch, self._checkpoint.types[self._keys[stored]])
        return kind.itemsize

    def content_hash(self, modules: Iterable[str]) -> str:
        """See `WeightSource.content_hash`."""
        modules = list(modules)
        for module in modules:
            if module not in self._digests:
                self.read(module)
        return hashing.sha256_json({module: self._digests[module] for module in modules})

    def renamed_modules(self, modules: Collection[str]) -> dict[str, str]:
        """See `WeightSource.renamed_modules`."""
        return skeleton_of(self._model).renamed_modules(modules) if is_known(self._model.config()) else {}

    def sharing(self, modules: Collection[str]) -> set[str]:
        """See `WeightSource.sharing`."""
        keys = {(self._keys.get(module), self._parts.get(module)) for module in modules}
        return {module for module, key in self._keys.items() if (key, self._parts.get(module)) in keys}

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """See `WeightSource.checkpoints`."""
        return [self._checkpoint]


class AdapterSource(WeightSource):
    """A PEFT LoRA adapter on its base: W = W_base + s·B·A, s = alpha / r (alpha / √r under rsLoRA).

    The adapter may change a fused projection as one, or the views of it, as `cora train` does; both are read under the names of both.
    """

    def __init__(self, model: ModelPath, base: WeightSource | None) -> None:
        self.reference, self.revision = model.reference, model.revision
        self._own = AdapterFactors(model)
        self.biases = self._own.biases
        self._base_is_own = base is None
        self.base = base or _open_base(model)
        self.architecture, self.skipped, self.views = self.base.architecture, self.base.skipped, self.base.views
        self.others = self.base.others
        self._layouts = {view.fused: view.layout for view in self.views.values()}
        if self._own.changed - self.base.shapes.keys():
            self._own.rename(self.renamed_modules(self._own.changed))
        # The base's own class puts a prefix before the names in its files of parts that the class for text leaves out.
        parts = tuple(f".{tensor}" for tensor in self.skipped)
        left_out = {module for module in self._own.changed - self.base.shapes.keys() if f".{module}.weight".endswith(parts)}
        apart = self._own.set_apart(self.base.shapes, self.others | left_out)
        self._own.check_full(self.base.shapes, self.base.transposed)
        # A fully saved module may be larger than the base's (new tokens) or absent from the base (a tied or new head).
        shapes = self.base.shapes | self._own.full
        self._own.check(shapes, self.base.reference)
        if both := self._own.changed & {self.views[module].fused for module in self._own.changed if module in self.views}:
            raise CoraError(
                f"{self.reference} changes {min(both)} as one and also the views of it, which no model can have at once"
            )
        self.without_factors = self._own.changed - self._own.ranks.keys()
        adapted = self.base.without_overlap(self._own.changed)
        self._own.check_complete(adapted, self.base.reference, self.architecture.get("model_type"))
        hidden = self._own.hidden | (self.base.sharing(self._own.hidden) - self._own.changed)
        hidden |= self.base.sharing(self._own.of_tokens)  # PEFT gives their rows to a tied head, too, whatever else adapts it
        self.shapes = {module: shape for module, shape in shapes.items() if module not in hidden}
        self.faults = {module: fault for module, fault in self.base.faults.items() if module not in self._own.full} | apart

    def read(self, module: str) -> torch.Tensor:
        """The weight of `module`, (out, in) float64."""
        weight = self._unchanged(module).double()
        if self._rank(module):
            weight += self._update(module)
        return weight

    def _unchanged(self, module: str) -> torch.Tensor:
        """The weight (out, in) below the product of factors: the base's, or one that the adapter holds."""
        view = self.views.get(module)
        if module in self._own.full:
            return self._own.read_full(module)
        if view and view.fused in self._own.full:
            return view.layout.rows(self._own.read_full(view.fused), view.part)
        if (layout := self._layouts.get(module)) and self._is_full(module):
            return layout.put({part: self._unchanged(f"{module}.{part}").T for part in VIEWS}).T
        return self.base.read(module)

    def _is_full(self, module: str) -> bool:
        """Whether the adapter holds a weight of `module`, of views of it, or of what it is a view of."""
        return any(name in self._own.full for name in self._names(module))

    def _names(self, module: str) -> list[str]:
        """`module`, and what else holds rows of it: its views, or the fused projection that it is a view of."""
        also = [self.views[module].fused] if module in self.views else []
        return [module, *also, *([f"{module}.{part}" for part in VIEWS] if module in self._layouts else [])]

    def own_delta(self, module: str, base: WeightSource) -> torch.Tensor | None:
        """s·B·A exactly (zero for a module without an update) if `base` is this adapter's base; else None."""
        if base is not self.base or self._is_full(module):
            return None
        return self._update(module)

    def own_rank(self, module: str, base: WeightSource) -> int | None:
        """See `WeightSource.own_rank`."""
        return None if base is not self.base or self._is_full(module) else self._rank(module)

    def own_factors(self, module: str, base: WeightSource) -> tuple[torch.Tensor, torch.Tensor]:
        """s·B and A."""
        scale, b, a = self._factors(module)
        return scale * b, a

    def _rank(self, module: str) -> int:
        return sum(self._own.ranks.get(name, 0) for name in self._names(module))

    def _update(self, module: str) -> torch.Tensor:
        """s·B·A, (out, in) float64."""
        scale, b, a = self._factors(module)
        return scale * (b @ a)

    def _factors(self, module: str) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The s, B (out, r) and A (r, in), both float64; r = 0 without an update."""
        if module in self._own.ranks:
            return self._own.read(module)
        if (view := self.views.get(module)) and view.fused in self._own.ranks:
            scale, b, a = self._own.read(view.fused)
            return scale, view.layout.rows(b, view.part), a
        layout: Layout | None = self._layouts.get(module)
        if layout and (parts := [part for part in VIEWS if f"{module}.{part}" in self._own.ranks]):
            return 1.0, *layout.place({part: self.own_factors(f"{module}.{part}", self.base) for part in parts})
        out, inside = self.shapes[module]
        return 1.0, torch.zeros((out, 0), dtype=torch.float64), torch.zeros((0, inside), dtype=torch.float64)

    def entry_bytes(self, module: str) -> int:
        """See `WeightSource.entry_bytes`; 4 where the adapter holds the weight itself."""
        return 4 if self._is_full(module) else self.base.entry_bytes(module)

    def changes_only(self, modules: Collection[str], base: WeightSource) -> bool:
        """See `WeightSource.changes_only`."""
        views = {f"{fused}.{part}" for fused in self._layouts if fused in modules for part in VIEWS}
        complete = {fused for fused in self._layouts if all(f"{fused}.{part}" in modules for part in VIEWS)}
        return base is self.base and not self._own.biases and self._own.changed <= {*modules, *views, *complete}

    def held_otherwise(self, modules: Iterable[str]) -> str | None:
        """The first of `modules` that this adapter changes as part of a fused projection, or in parts, and not as a layer of its own."""
        return next((module for module in modules if self._own.changed & {*self._names(module)[1:]}), None)

    def content_hash(self, modules: Iterable[str]) -> str:
        """See `WeightSource.content_hash`; covers the adapter's tensors, their scale, and the base."""
        modules = list(modules)
        rest = self.base.content_hash([module for module in modules if module not in self._own.full])
        names = dict.fromkeys(name for module in modules for name in self._names(module))
        return hashing.sha256_json({"base": rest, "adapter": self._own.digests(names)})

    def renamed_modules(self, modules: Collection[str]) -> dict[str, str]:
        """See `WeightSource.renamed_modules`."""
        return self.base.renamed_modules(modules)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """See `WeightSource.checkpoints`; includes the base's if the adapter opened its base itself."""
        return [self._own.checkpoint, *(self.base.checkpoints if self._base_is_own else [])]


def _refuse_quantized(model: ModelPath) -> None:
    """Raise `CoraError` for a model whose configuration says that its weights are quantised, with what helps where its files hold plain ones."""
    if (stated := kind_stated(model)) is None:
        return
    readable = all(file.suffix == ".safetensors" for file in model.weight_files())
    if readable and all(kind in PLAIN_TYPES for kind in Checkpoint(model).types.values()):
        raise CoraError(
            f"config.json of {model.reference} says that its weights are quantised ({stated}), but its files hold plain ones; if they were merged or "
            "converted, remove quantization_config from it"
        )
    raise CoraError(f"{model.reference} is stored quantised; use a copy with weights in bf16, fp16 or fp32")


def _open_base(adapter: ModelPath) -> WeightSource:
    base = base_of(adapter)
    check_base(adapter, base)
    return open_source(base)
