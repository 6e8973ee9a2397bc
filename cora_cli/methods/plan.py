"""The plan of one adapter: a method with its settings resolved and its numbers checked.

`cora.json` keeps it next to the adapter and `run.json` in the run directory. It is plain data; `Method.plan` creates it.
"""

import dataclasses
import math
from typing import Any, Literal

_ALWAYS_RECORDED = ("outer_rank", "peft")
"""Own settings that `cora.json` lists as null for methods without them, so that equal adapters keep equal hashes across versions."""


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Everything that determines an adapter before its first step, except the basis itself.

    `b_init` and `a_init` name the starts of B and A. `seed` fixes random starts per module, independent of the order in which
    modules are visited. `own` holds the values of the method's own settings.
    """

    mode: str
    b_init: str
    a_init: str
    trains_b: bool
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    dropout: float
    seed: int
    own: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """s in W' = W + s·B·A: alpha / r, or alpha / √r with rank-stabilised scaling (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def needs_basis(self) -> bool:
        """Whether B or A starts as columns of a basis file."""
        return "basis" in (self.b_init, self.a_init)

    @property
    def basis_side(self) -> Literal["output", "input"]:
        """The side of W that the basis has to come from: A's rows live in the input space, B's columns in the output space."""
        return "input" if self.a_init == "basis" else "output"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the method's own settings among the others; `from_dict` reads them back."""
        values = {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}
        own = values.pop("own")
        return {**values, **dict.fromkeys(_ALWAYS_RECORDED), **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterPlan":
        """Inverse of `as_dict`. Raises `KeyError` or `TypeError` for anything else."""
        shared = {field.name for field in dataclasses.fields(cls)} - {"own"}
        own = {key: value for key, value in values.items() if key not in shared and value is not None}
        known = {key: value for key, value in values.items() if key in shared}
        return cls(**{**known, "target_modules": tuple(values["target_modules"])}, own=own)


@dataclasses.dataclass(frozen=True)
class AdapterRequest:
    """What the user asked of a method; None where the method decides. `own` maps the method's own settings to their values."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    dropout: float
    seed: int
    b_init: str | None = None
    a_init: str | None = None
    has_basis: bool = False
    start: str | None = None
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
