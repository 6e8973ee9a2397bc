"""The low-rank factors of one LoRA adapter, by module: listed without reading data, then read one pair at a time.

It knows PEFT's files, `cora`'s compact ones, and which settings make a weight something else than W + s·B·A; the base under an adapter is `sources`' business.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.models.references import ModelPath
from cora_cli.weights.checkpoint import Checkpoint, finite

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


class AdapterFactors:
    """A LoRA adapter's tensors: `ranks` maps the modules that it updates to their r, `full` those that it replaces to their (out, in).

    `hidden` are modules that it changes in a way that is not W + s·B·A. Raises `CoraError` where files are missing or damaged, or
    where the adapter is of a form whose weights cannot be had from its factors alone.
    """

    def __init__(self, model: ModelPath) -> None:
        self.config = model.adapter_config()
        self.reference = model.reference
        self._check_form()
        self.checkpoint = Checkpoint(model)
        self._starting_b = _starting_b(model)
        self._out: dict[str, int] = {}
        self.full: dict[str, tuple[int, int]] = {}
        self.hidden: set[str] = set()
        self._digests: dict[str, str] = {}
        self._full_keys: dict[str, str] = {}
        self._scale: dict[str, float] = {}
        self._keys: dict[str, dict[str, str]] = {}
        for key, shape in self.checkpoint.shapes.items():
            if found := _ADAPTER_KEY.match(key):
                self._keys.setdefault(found["module"], {})[found["matrix"]] = key
            elif found := _OTHER_KEY.match(key):
                self.hidden.add(found["module"])
            elif found := _FULL_KEY.match(key):
                if len(shape) == 2:
                    self._full_keys[found["module"]], self.full[found["module"]] = key, self._shape(key)
            elif not key.endswith(".bias"):
                raise CoraError(
                    f"{self.reference}: {key} is neither lora_A, lora_B nor a whole module that was saved with them"
                )
        if not self._keys and not self.full:
            raise CoraError(f"{self.reference} holds no lora_A and lora_B: {self.checkpoint.path} is an empty adapter")
        self.ranks = {module: self._rank(module, keys) for module, keys in self._keys.items()}

    def check(self, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
        """Raise `CoraError` unless every update fits a weight of the model `base`, whose modules are `shapes`: name -> (out, in)."""
        for module, keys in self._keys.items():
            if module not in shapes:
                raise CoraError(
                    f"{self.reference}: {keys['A']} matches no module of its base {base}; its keys do not all arrive"
                )
            rank, inside = self._shape(keys["A"])
            outside, rank_of_b = (shapes[module][0], rank) if self._starting_b else self._shape(keys["B"])
            stated = _pattern_value(self.config.get("rank_pattern"), module, self.config.get("r"))
            if (outside, inside) != shapes[module] or not rank == rank_of_b == stated:
                raise CoraError(
                    f"{self.reference}: {module} has lora_A {(rank, inside)} and lora_B {(outside, rank_of_b)}, which do not fit "
                    f"r = {stated} and the weight {shapes[module]} of its base {base}"
                )
            alpha = _pattern_value(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
            self._out[module] = outside
            self._scale[module] = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def read(self, module: str) -> tuple[float, torch.Tensor, torch.Tensor]:
        """s, B (out, r) and A (r, in), both float64, of an updated module, whose ΔW is s·B·A. `check` comes first."""
        a = self._read_factor(module, "A")
        b = self._starting_b(module, self._out[module]) if self._starting_b else self._read_factor(module, "B")
        digests = [rundir.tensor_digest("lora_A", a), rundir.tensor_digest("lora_B", b), self._scale[module]]
        self._digests.setdefault(f"{module}.lora", rundir.sha256_json(digests))
        return self._scale[module], b.double(), a.double()

    def read_full(self, module: str) -> torch.Tensor:
        """The weight, (out, in) as stored, that takes the place of the base's."""
        weight = finite(self.checkpoint.read(self._full_keys[module]), self.reference, module)
        self._digests.setdefault(module, rundir.tensor_digest(module, weight))
        return weight

    def digests(self, modules: Iterable[str]) -> dict[str, str]:
        """SHA-256 of what the adapter holds for `modules`; what was read before is not read again."""
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

    def _check_form(self) -> None:
        if (kind := self.config.get("peft_type")) != "LORA":
            raise CoraError(f"{self.reference} is a {kind} adapter; only LORA adapters are read")
        for setting in _OTHER_FORMS:
            if self.config.get(setting):
                raise CoraError(f"{self.reference} was made with {setting}, so its weights are not W + s·B·A; merge it first")
        if (start := self.config.get("init_lora_weights", True)) not in _STARTS_THAT_KEEP_BASE:
            raise CoraError(f"{self.reference} has init_lora_weights {start!r}, which changes the base weights; merge it first")

    def _rank(self, module: str, keys: dict[str, str]) -> int:
        if missing := ({"A"} if self._starting_b else {"A", "B"}) - keys.keys():
            raise CoraError(f"{self.reference}: {module} has no lora_{missing.pop()}; its keys do not all arrive")
        return self._shape(keys["A"])[0]

    def _shape(self, key: str) -> tuple[int, int]:
        shape = self.checkpoint.shapes[key]
        if len(shape) != 2:
            raise CoraError(f"{self.reference}: {key} has shape {shape}, not two dimensions")
        return shape[0], shape[1]


def _starting_b(model: ModelPath) -> Callable[[str, int], torch.Tensor] | None:
    """What gives the B of a compact adapter by module and out-dimension; None where the adapter holds its own."""
    if not (model.path / rundir.COMPACT_ADAPTER).exists():
        return None
    from cora_cli.adapters.facts import read_facts, starting_b

    facts = read_facts(model.path)
    if facts is None:
        raise CoraError(f"{model.reference} holds A alone, and no cora.json says what its B was")
    return starting_b(model, facts, remedy="put it back, or make a plain model with `cora merge --basis` and use that")


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches as PEFT's `rank_pattern` and `alpha_pattern` do: a regex on the name's end."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
