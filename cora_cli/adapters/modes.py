"""The table of modes: what B and A start as and which of them trains, and the plan of one adapter.

Nothing here touches a model (that is `install`) or a file (`storage`), so the command line can import it.
"""

import dataclasses
import math
from typing import Any, Literal

from cora_cli.errors import UsageError

Mode = Literal["lora", "fb", "tb", "full"]
AInit = Literal["zeros", "gaussian", "kaiming"]
BInit = Literal["basis", "zeros", "ones", "random", "orthonormal"]


@dataclasses.dataclass(frozen=True)
class ModeSpec:
    """Starts and trained factors of one mode. `choosable_b`: whether `--b-init` may replace B's start."""

    b_init: BInit
    a_init: AInit
    trains_b: bool
    choosable_b: bool


MODES: dict[Mode, ModeSpec] = {
    "lora": ModeSpec(b_init="zeros", a_init="kaiming", trains_b=True, choosable_b=False),
    "fb": ModeSpec(b_init="basis", a_init="zeros", trains_b=False, choosable_b=True),
    "tb": ModeSpec(b_init="basis", a_init="zeros", trains_b=True, choosable_b=True),
}
"""Every mode that is an adapter; `full` trains all weights and has none."""


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Everything that determines an adapter before its first step, except the basis itself.

    `seed` fixes random starts per module, independent of the order in which modules are visited.
    """

    mode: Mode
    b_init: BInit
    a_init: AInit
    trains_b: bool
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    dropout: float
    seed: int

    @property
    def scaling(self) -> float:
        """s in W' = W + s·B·A: alpha / r, or alpha / √r with rank-stabilised scaling (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def needs_basis(self) -> bool:
        """Whether B starts as columns of a basis file."""
        return self.b_init == "basis"

    @property
    def cannot_train(self) -> bool:
        """Whether the gradient is zero for ever: with B = 0 frozen, ∂L/∂A = s·Bᵀ(∂L/∂W) = 0; with A = B = 0, both are."""
        return self.b_init == "zeros" and (not self.trains_b or self.a_init == "zeros")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON side file; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterPlan":
        """Inverse of `as_dict`."""
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})


def plan_adapter(
    mode: Mode,
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    target_modules: tuple[str, ...],
    dropout: float,
    seed: int,
    b_init: BInit | None = None,
    a_init: AInit | None = None,
) -> AdapterPlan:
    """Resolve a mode and its overrides.

    Raises `UsageError` where an override contradicts the mode or a number makes no sense.
    """
    spec = MODES[mode]
    if b_init is not None and not spec.choosable_b:
        raise UsageError(f"--b-init goes with the modes fb and tb; mode {mode} starts B as {spec.b_init}")
    if rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}")
    if not alpha > 0:
        raise UsageError(f"--alpha must be positive, not {alpha}")
    if not 0 <= dropout < 1:
        raise UsageError(f"--dropout must be at least 0 and below 1, not {dropout}")
    if not target_modules:
        raise UsageError("--target-modules must name at least one module")
    return AdapterPlan(
        mode=mode,
        b_init=b_init or spec.b_init,
        a_init=a_init or spec.a_init,
        trains_b=spec.trains_b,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target_modules=target_modules,
        dropout=dropout,
        seed=seed,
    )
