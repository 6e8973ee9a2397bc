"""The low-rank factors of one LoRA adapter by module, listed without reading data and then read one pair at a time.

Supports PEFT's adapter files and `cora`'s compact form, and refuses settings whose weights are not W + s·B·A. `sources`
combines an adapter with its base model.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from cora_cli import hashing, rundir
from cora_cli.adapters.elsewhere import start_that_changes_base
from cora_cli.adapters.facts import read_facts, starting_b
from cora_cli.adapters.loading import check_start
from cora_cli.adapters.names import is_target
from cora_cli.adapters.peft_settings import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    OF_TRAINING,
    pattern_value,
    say_other_weight_files,
    say_unknown_settings,
)
from cora_cli.adapters.posterior import say_mean
from cora_cli.adapters.storage import check_is_complete
from cora_cli.errors import CoraError, reason
from cora_cli.limits import bounded
from cora_cli.models.checkpoint import Checkpoint, finite
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import ONE_EXPERT, of_text, without_numbers

_ADAPTER_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight$")
_IN_LAYER = re.compile(r"\.\d+\.")
_FULL_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight$")
_WRAPPED_KEY = re.compile(r"^(?P<module>.+)\.(modules_to_save|original_module)(\.default)?\.(weight|bias)$")
"""What PEFT stores of a resized embedding or head next to its weight, and leaves out as it loads it."""
_BIAS_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)(?P<place>\.base_layer|\.lora_B)?\.bias$")
_OF_PARAMETER = re.compile(r"(\.base_layer)+$")
"""What PEFT puts behind the name of a module of which it adapts several parameters."""
_OTHER_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)\.(?:lora_embedding_[AB]|token_adapter\..+)$")
# Settings under which a LoRA adapter's weight is not W + s·B·A.
_OTHER_FORMS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "kasa_config",
)
_NEVER_MERGED = ("arrow_config", "alora_invocation_tokens")
"""Those whose change depends on the input."""


class AdapterFactors:
    """The tensors of a LoRA adapter.

    `ranks` maps each updated module to its r, and `full` each replaced module to its (out, in). `hidden` holds the modules that
    the adapter changes in other ways than W + s·B·A, `of_tokens` those of them that get rows for single tokens, `biases` the keys of trained biases, which are no part of any W. Raises `CoraError` if files are missing or damaged, or if the adapter's
    weights cannot be computed from its factors alone.
    """

    def __init__(self, model: ModelPath) -> None:
        self.config = model.adapter_config()
        self.reference = model.reference
        self._check_form(model)
        check_is_complete(model)
        say_unknown_settings(model)
        say_other_weight_files(model)
        say_mean(model)
        self.checkpoint = Checkpoint(model)
        self._starting_b = _starting_b(model)
        self._out: dict[str, int] = {}
        self.full: dict[str, tuple[int, int]] = {}
        self.hidden: set[str] = set()
        self.of_tokens: set[str] = set()
        self.biases: list[str] = []
        self._digests: dict[str, str] = {}
        self._full_keys: dict[str, str] = {}
        self._transposed: frozenset[str] = frozenset()
        self._scale: dict[str, float] = {}
        self._keys: dict[str, dict[str, str]] = {}
        self._stored_as: dict[str, str] = {}
        for key, shape in self._that_peft_loads().items():
            if found := _ADAPTER_KEY.match(key):
                self._keys.setdefault(found["module"], {})[found["matrix"]] = key
            elif found := _OTHER_KEY.match(key):
                self.hidden.add(found["module"])
                if ".token_adapter." in key:
                    self.of_tokens.add(found["module"])
            elif "lora_magnitude_vector" in key:
                raise CoraError(f"{self.reference}: {key} is of DoRA, whose weights are not W + s·B·A; merge the adapter first")
            elif found := _FULL_KEY.match(key):
                self._full_keys[found["module"]] = key
                if len(shape) == 2:
                    self.full[found["module"]] = self._shape(key)
            elif _BIAS_KEY.match(key):
                self.biases.append(key)
            elif self._is_saved(owner := key.removeprefix("base_model.model.").rpartition(".")[0]):
                self.hidden.add(owner)
            else:
                raise self._unknown(key)
        self._check_biases()
        if not self._keys and not self.full:
            raise CoraError(
                f"{self.reference} holds no lora_A and lora_B matrices: the adapter in {self.checkpoint.path} is empty"
            )
        self.ranks = {module: self._rank(module, keys) for module, keys in self._keys.items()}

    @property
    def changed(self) -> set[str]:
        """Every module with a weight that the adapter changes, a weight vector included."""
        return {*self._keys, *self._full_keys, *self.hidden}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give the modules that `names` holds the names that it maps them to; a seeded B depends on the name with which it was trained."""
        if self._starting_b:
            return
        self._stored_as = {name: module for module, name in names.items()}
        self._keys = {names.get(module, module): keys for module, keys in self._keys.items()}
        self.ranks = {names.get(module, module): rank for module, rank in self.ranks.items()}
        self.full = {names.get(module, module): shape for module, shape in self.full.items()}
        self._full_keys = {names.get(module, module): key for module, key in self._full_keys.items()}
        self.hidden = {names.get(module, module) for module in self.hidden}

    def set_apart(self, shapes: Mapping[str, tuple[int, int]], others: Collection[str]) -> dict[str, str]:
        """Leave out the factors of what is no weight of the base's modules: of parameters, such as those of experts, and of modules of other
        modalities, which are `others`. `shapes` holds the base's modules.

        Returns why their weights cannot be read, for the modules whose weight PEFT adapts as a parameter.
        """
        parameters = [*map(of_text, _names(self.config.get("target_parameters")))]
        faults = {}
        for module in list(self._keys):
            owner = _OF_PARAMETER.sub("", module)
            if owner in others:
                adapted = True
            elif owner in shapes:
                adapted = any(f".{of_text(owner)}.weight".endswith(f".{parameter}") for parameter in parameters)
            else:
                within = tuple(name.rpartition(".")[0] for name in parameters)
                named = of_text(owner).endswith(within) and not ("" in within and is_target(self.config, module))
                adapted = bool(ONE_EXPERT.search(owner)) or named
            if not adapted:
                continue
            del self._keys[module], self.ranks[module]
            self.hidden.add(owner)
            if owner in shapes:
                faults[owner] = f"{owner} is changed through target_parameters, so its weight is not W + s·B·A; merge it first"
        return faults

    def check(self, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
        """Raise `CoraError` unless every update fits the base model. `shapes` maps its modules to (out, in); `base` names it."""
        with bounded(f"{self.reference}: matching rank_pattern and alpha_pattern"):
            self._check_factors(shapes, base)

    def _check_factors(self, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
        for module, keys in self._keys.items():
            if module not in shapes:
                with_head = next((name for name in shapes if name.endswith(f".{module}")), None)
                remedy = (
                    f"it is of the model without its head, where {with_head} is called so"
                    if with_head
                    else "name the right one with --base"
                )
                raise CoraError(f"{self.reference}: {keys['A']} matches no module of its base {base}; {remedy}")
            rank, in_features = self._shape(keys["A"])
            out_features, rank_of_b = (shapes[module][0], rank) if self._starting_b else self._shape(keys["B"])
            stated = pattern_value(self.config.get("rank_pattern"), self._named(module), self.config.get("r", DEFAULT_RANK))
            if (out_features, in_features) != shapes[module] or not rank == rank_of_b == stated:
                raise CoraError(
                    f"{self.reference}: {module} has lora_A {(rank, in_features)} and lora_B {(out_features, rank_of_b)}, "
                    f"which do not fit r = {stated} and the weight {shapes[module]} of its base {base}"
                )
            if rank < 1:
                raise CoraError(f"{self.reference}: {module} has rank 0; the adapter is empty or damaged")
            alpha = pattern_value(
                self.config.get("alpha_pattern"), self._named(module), self.config.get("lora_alpha", DEFAULT_ALPHA)
            )
            self._out[module] = out_features
            if not alpha:
                stated = "no lora_alpha" if alpha is None else f"lora_alpha 0 for {module}, which leaves its weight as it is"
                raise CoraError(f"{self.reference}: adapter_config.json has {stated}; the adapter is damaged")
            self._scale[module] = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def check_complete(self, modules: Iterable[str], base: str, model_type: str | None) -> None:
        """Raise `CoraError` unless the adapter holds updates for those of the base's `modules` that its configuration names, and no others.

        A configuration without target modules names those that PEFT adapts in models of the type.
        """
        settings = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        try:
            named: Any = LoraConfig(**{name: self.config[name] for name in settings if self.config.get(name) is not None})
        except (TypeError, ValueError, AttributeError) as error:
            raise CoraError(f"{self.reference}: PEFT refuses its adapter_config.json: {reason(error)}") from error
        known = self.ranks.keys() | self._full_keys.keys() | self.hidden
        if named.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            named.target_modules = list({module.rpartition(".")[2] for module in self.ranks})
        if named.target_modules is None and self.config.get("target_parameters"):
            named.target_modules = []
        elif named.target_modules is None:
            named.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
        if not (named.target_modules or self.config.get("target_parameters")):
            raise CoraError(f"{self.reference}: adapter_config.json names no target_modules; PEFT would leave out the adapter")
        with bounded(f"{self.reference}: matching target_modules"):
            lacking = [
                module for module in modules if module not in known and check_target_module_exists(named, self._named(module))
            ]
            unnamed = [
                module
                for module in self.ranks
                if not (check_target_module_exists(named, self._named(module)) or self._follows(module))
            ]
        if unnamed:
            raise CoraError(
                f"{self.reference} holds lora_A and lora_B for {len(unnamed)} layers that its adapter_config.json does not name, such as "
                f"{unnamed[0]}; PEFT would leave them out: correct target_modules, exclude_modules or layers_to_transform there"
            )
        if lacking:
            raise CoraError(
                f"{self.reference} holds no lora_A and lora_B for {len(lacking)} layers of its base {base} that its target_modules name, such "
                f"as {lacking[0]}; the adapter is incomplete"
            )

    def _named(self, module: str) -> str:
        """The name by which the adapter's configuration means a module; that of one which it does not hold, by those of its neighbours."""
        if module in self._stored_as or not self._stored_as:
            return self._stored_as.get(module, module)
        name, stored = min(self._stored_as.items())
        ours, theirs = name.split("."), stored.split(".")
        while ours and theirs and ours[-1] == theirs[-1]:
            del ours[-1], theirs[-1]
        parts = module.split(".")
        return ".".join([*theirs, *parts[len(ours) :]]) if parts[: len(ours)] == ours else module

    def _follows(self, module: str) -> bool:
        """Whether a module is adapted since the one with which it shares its weight is: head and embedding."""
        return bool(self.config.get("ensure_weight_tying")) and not _IN_LAYER.search(module)

    def check_full(self, shapes: Mapping[str, tuple[int, int]], transposed: frozenset[str]) -> None:
        """Raise `CoraError` for a saved weight that does not fit the base's, or of a module that neither the base nor the adapter's
        configuration names.

        `shapes` holds the base's modules. A head that shares the embedding's weight is not among them. Only weights outside the numbered
        layers, those of embedding and head, may have other numbers of rows. `transposed` holds the modules that store theirs as (in, out).
        """
        self._transposed = transposed & self.full.keys()
        self.full |= {module: (out, inside) for module in self._transposed for inside, out in [self.full[module]]}
        for module, key in self._full_keys.items():
            stored, expected = self.full.get(module, self.checkpoint.shapes[key]), shapes.get(module)
            same = expected == stored or (expected is not None and expected[1:] == stored[1:] and not _IN_LAYER.search(module))
            if expected is not None and not same:
                raise CoraError(
                    f"{self.reference}: {key} has the shape {stored}, which does not fit the weight {expected} of its base"
                )
        named = {*_names(self.config.get("target_modules")), "lm_head"}
        for module, key in self._full_keys.items():
            if module not in shapes and not self._is_saved(module) and not {module, module.rpartition(".")[2]} & named:
                raise CoraError(
                    f"{self.reference}: {key} is of no linear layer of its base, and is neither a lora_A or lora_B matrix nor the weight "
                    "of a module in modules_to_save; it must be named as PEFT's save_pretrained names it"
                )

    def _is_saved(self, module: str) -> bool:
        """Whether a module is in modules_to_save, or a part of one; these are endings of names, as in PEFT: norm is also input_layernorm."""
        saved, parts = tuple(map(of_text, _names(self.config.get("modules_to_save")))), of_text(module).split(".")
        return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))

    def read(self, module: str) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The s, B (out, r) and A (r, in) of an updated module, both float64; ΔW = s·B·A. Call `check` first."""
        a = self._read_factor(module, "A")
        b = self._starting_b(module, self._out[module]) if self._starting_b else self._read_factor(module, "B")
        digests = [hashing.tensor_digest("lora_A", a), hashing.tensor_digest("lora_B", b), self._scale[module]]
        self._digests.setdefault(f"{module}.lora", hashing.sha256_json(digests))
        return self._scale[module], b.double(), a.double()

    def read_full(self, module: str) -> torch.Tensor:
        """The weight (out, in), in the stored type, that replaces the base's."""
        weight = finite(self.checkpoint.read(self._full_keys[module]), self.reference, module)
        weight = weight.T.contiguous() if module in self._transposed else weight
        self._digests.setdefault(module, hashing.tensor_digest(module, weight))
        return weight

    def digests(self, modules: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the adapter's tensors for `modules`; tensors that were read before are not read again."""
        names = []
        for module in modules:
            if module in self._keys and f"{module}.lora" not in self._digests:
                self.read(module)
            if module in self.full and module not in self._digests:
                self.read_full(module)
            names += [name for name in (module, f"{module}.lora") if name in self._digests]
        return {name: self._digests[name] for name in names}

    def _read_factor(self, module: str, matrix: str) -> torch.Tensor:
        key = self._keys[module][matrix]
        return finite(self.checkpoint.read(key), self.reference, key)

    def _that_peft_loads(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors but those that act in training alone, or that PEFT stores next to a weight and leaves out as it loads it."""
        shapes = self.checkpoint.shapes
        wrapped = {key: found["module"] for key in shapes if (found := _WRAPPED_KEY.match(key))}
        for key, module in wrapped.items():
            if f"{module}.weight" not in shapes:
                raise self._unknown(key)
        return {key: shape for key, shape in shapes.items() if key not in wrapped and not OF_TRAINING.search(key)}

    def _unknown(self, key: str) -> CoraError:
        return CoraError(f"{self.reference}: {key} is neither a lora_A or lora_B matrix nor the weight of a fully saved module")

    def _check_form(self, model: ModelPath) -> None:
        if (kind := self.config.get("peft_type")) != "LORA":
            raise CoraError(
                f"{self.reference} is a {kind} adapter, and only LORA adapters are read; `cora export` makes a LoRA of many others, `cora merge` a model of most"
            )
        for setting in _OTHER_FORMS:
            if self.config.get(setting):
                remedy = ", nor can it be merged into any" if setting in _NEVER_MERGED else "; merge it first"
                raise CoraError(f"{self.reference} was trained with {setting}, so its weights are not W + s·B·A{remedy}")
        check_start(model)
        if (start := start_that_changes_base(self.config)) is not None:
            raise CoraError(f"{self.reference} has init_lora_weights {start!r}, which changes the base weights; merge it first")

    def _check_biases(self) -> None:
        """Raise `CoraError` for a bias that PEFT would leave out by the adapter's configuration."""
        trained = self.config.get("bias") or "none"
        if trained not in ("none", "all", "lora_only"):
            raise CoraError(f"{self.reference}: adapter_config.json has bias {trained!r}, which PEFT does not know")
        for key in self.biases:
            found = _BIAS_KEY.match(key)
            assert found is not None
            adapted = trained == "all" or (trained == "lora_only" and found["module"] in self._keys)
            saved = found["module"] in self._full_keys or self._is_saved(found["module"])
            of_factor = found["place"] == ".lora_B"
            if not (self.config.get("lora_bias") if of_factor else adapted or saved):
                stated = f"lora_bias {bool(self.config.get('lora_bias'))}" if of_factor else f"bias {trained!r}"
                raise CoraError(
                    f"{self.reference} holds {key}, but its adapter_config.json has {stated}, with which PEFT would leave it out; correct one of "
                    "them"
                )

    def _rank(self, module: str, keys: dict[str, str]) -> int:
        if missing := ({"A"} if self._starting_b else {"A", "B"}) - keys.keys():
            raise CoraError(f"{self.reference}: {module} has no lora_{missing.pop()} matrix; the adapter is incomplete")
        return self._shape(keys["A"])[0]

    def _shape(self, key: str) -> tuple[int, int]:
        shape = self.checkpoint.shapes[key]
        if 0 in shape and self.config.get("r") and read_facts(self.checkpoint.path) is None:
            raise CoraError(f"{self.reference}: {without_numbers(key, shape)}")
        if len(shape) != 2:
            raise CoraError(f"{self.reference}: {key} has shape {shape}; two dimensions are required")
        return shape[0], shape[1]


def _starting_b(model: ModelPath) -> Callable[[str, int], torch.Tensor] | None:
    """The function (module, out-dimension) -> B of a compact adapter; None if the adapter stores its own B."""
    if not (model.path / rundir.COMPACT_ADAPTER).exists():
        return None
    facts = read_facts(model.path)
    if facts is None:
        raise CoraError(f"{model.reference} stores only A, and cora.json, which describes its B, is missing")
    return starting_b(model, facts, remedy="put it back, or write a complete model with `cora merge --basis` and use that")


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []
