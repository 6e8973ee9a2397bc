"""The validated choices about a basis, and which weights share a group under each of them.

This module works on names only and does not import torch; `extraction.merge` checks the shapes.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from cora_cli.errors import CoraError, UsageError

Share = Literal["module", "layer", "projection", "global"]
Merge = Literal["mean", "gram"]
Source = Literal["weights", "delta"]
Side = Literal["output", "input"]
Method = Literal["svd", "pca"]
Component = Literal["top", "bottom"]

_ALLOWED: dict[str, tuple[str, ...]] = {
    "share": get_args(Share),
    "merge": get_args(Merge),
    "source": get_args(Source),
    "side": get_args(Side),
    "method": get_args(Method),
    "component": get_args(Component),
}
DEFAULT_TARGET_MODULES = ("q_proj", "k_proj", "v_proj")
DEFAULT_RANK = 48


@dataclasses.dataclass(frozen=True)
class GroupMapping:
    """Maps a module's full name to its group: `re.sub(pattern, template, module)` if `pattern` matches the complete name."""

    pattern: str
    template: str

    def group_of(self, module: str) -> str | None:
        """The group of `module`, or None if the pattern does not match (a module outside all layers under `--share layer`)."""
        return re.sub(self.pattern, self.template, module, count=1) if re.fullmatch(self.pattern, module) else None


_MAPPINGS: dict[Share, GroupMapping] = {
    "module": GroupMapping(r"^(.+)$", r"\1"),
    "layer": GroupMapping(r"^((?:.*?\.)?\d+)\..+$", r"\1"),
    "projection": GroupMapping(r"^(?:.*\.)?([^.]+)$", r"\1"),
    "global": GroupMapping(r"^.+$", "global"),
}


@dataclasses.dataclass(frozen=True)
class BasisChoices:
    """Every choice that determines a basis. Raises `UsageError` for a value that is not allowed.

    `normalize` divides each weight's ΔW by its Frobenius norm, model by model, before they are merged; it needs `source` "delta".
    """

    share: Share = "module"
    merge: Merge = "mean"
    source: Source = "weights"
    side: Side = "output"
    method: Method = "svd"
    component: Component = "top"
    rank: int = DEFAULT_RANK
    target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    normalize: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"--{name} must be one of {', '.join(allowed)}, not {value!r}")
        if type(self.normalize) is not bool:
            raise UsageError(f"--normalize must be true or false, not {self.normalize!r}")
        if self.normalize and self.source != "delta":
            raise UsageError("--normalize divides the changes ΔW by their norms, so it needs --source delta")
        if type(self.rank) is not int or self.rank < 1:
            raise UsageError(f"--rank must be an integer of at least 1, not {self.rank!r}")
        targets = self.target_modules
        if not isinstance(targets, tuple) or not targets or not all(isinstance(name, str) and name for name in targets):
            raise UsageError(f"--target-modules must list module names such as q_proj,k_proj,v_proj, not {targets!r}")

    @property
    def mapping(self) -> GroupMapping:
        """The mapping from a module's name to its group under `share`."""
        return _MAPPINGS[self.share]

    def require_base(self, has_base: bool) -> None:
        """Raise `UsageError` if `source` is `delta` and there is no base model to subtract."""
        if self.source == "delta" and not has_base:
            raise UsageError("--source delta needs --base: the model that the others were fine-tuned from")

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form; `from_json` reads it.

        `normalize` is left out if it is off, so that bases from before it existed keep their content hash.
        """
        values = {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}
        return values if self.normalize else {key: value for key, value in values.items() if key != "normalize"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "BasisChoices":
        """The inverse of `to_json`. Raises `UsageError` for a value that is not allowed."""
        return cls(**{**value, "target_modules": tuple(value["target_modules"])})


def is_target(module: str, target: str) -> bool:
    """Whether `target` is the full name of `module` or its last components, as PEFT matches them."""
    return module == target or module.endswith("." + target)


def match_targets(modules: Sequence[str], target_modules: Sequence[str], where: str) -> list[str]:
    """The modules that `target_modules` match, layers in numerical order.

    Raises `CoraError` if a target matches none of `modules`; the message names the model `where`.
    """
    for target in target_modules:
        if not any(is_target(module, target) for module in modules):
            known = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            raise CoraError(f"no weight matrix of {where} matches the target module {target!r}; its module names are: {known}")
    found = (module for module in modules if any(is_target(module, target) for target in target_modules))
    return sorted(found, key=natural_order)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key under which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
