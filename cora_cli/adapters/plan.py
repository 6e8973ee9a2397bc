"""The plan of one adapter: a mode of the table with its overrides resolved and its numbers checked.

It is what `cora.json` keeps beside an adapter. Like `modes` it touches neither model nor file.
"""

import dataclasses
import math
from typing import Any, Literal

from cora_cli.adapters.modes import MODES, A, AInit, B, BInit, Mode, ModeSpec, OtherInit
from cora_cli.errors import UsageError


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Everything that determines an adapter before its first step, except the basis itself.

    `seed` fixes random starts per module, independent of the order in which modules are visited.
    """

    mode: Mode
    b_init: BInit | OtherInit
    a_init: AInit | OtherInit | Literal["basis"]
    trains_b: bool
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    dropout: float
    seed: int
    outer_rank: int | None = None
    peft: dict[str, Any] | None = None

    @property
    def spec(self) -> ModeSpec:
        """The mode's line in the table."""
        return MODES[self.mode]

    @property
    def scaling(self) -> float:
        """s in W' = W + s·B·A: alpha / r, or alpha / √r with rank-stabilised scaling (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def trains_a(self) -> bool:
        """Whether A itself is trained."""
        return A in self.spec.trained

    @property
    def needs_basis(self) -> bool:
        """Whether B or A starts as columns of a basis file."""
        return "basis" in (self.b_init, self.a_init)

    @property
    def basis_side(self) -> Literal["output", "input"]:
        """Which side of W a basis has to come from: A's rows live in the input space, B's columns in the output space."""
        return "input" if self.a_init == "basis" else "output"

    @property
    def cannot_train(self) -> bool:
        """Whether the gradient is zero for ever: ∂L/∂A = s·Bᵀ(∂L/∂W) is with B = 0 frozen, ∂L/∂B with A = 0 frozen, both with A = B = 0."""
        a_stands = not self.trains_a or self.b_init == "zeros"
        b_stands = not self.trains_b or self.a_init == "zeros"
        return bool(self.spec.trained) and self.spec.trained.keys() <= {A, B} and a_stands and b_stands

    @property
    def b_width(self) -> int:
        """How many columns the start of B has: r, or the outer rank where B is a product."""
        return self.outer_rank or self.rank

    def parameters(self, out: int, inside: int) -> int:
        """Trained parameters of a layer whose W is (out, inside)."""
        return self.spec.parameters(out, inside, self.rank, self.outer_rank)

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
    outer_rank: int | None = None,
    has_basis: bool = False,
    peft: dict[str, Any] | None = None,
) -> AdapterPlan:
    """Resolve a mode and its overrides; `has_basis` counts where the mode can do with or without one, `peft` is what the file of mode
    peft says, whose rank and targets beat the others.

    Raises `UsageError` where an override contradicts the mode or a number makes no sense.
    """
    spec = MODES[mode]
    if b_init is not None and not spec.choosable_b:
        choosable = [name for name, other in MODES.items() if other.choosable_b]
        raise UsageError(f"--b-init goes with the modes {' and '.join(choosable)}; mode {mode} starts B as {spec.b_init}")
    if a_init is not None and "a_init" not in spec.takes:
        raise UsageError(f"--a-init does not go with mode {mode}, whose A starts as {spec.a_init}")
    if mode == "peft":
        if not isinstance(peft, dict) or not isinstance(peft.get("peft_type"), str):
            raise UsageError('--peft-config must hold a JSON object with a "peft_type", as PEFT\'s adapter_config.json does')
        if (named := peft.get("target_modules")) is None:
            named = list(target_modules)
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise UsageError("--peft-config: target_modules must be a list of names, which --target-modules can give too")
        peft, target_modules = {**peft, "target_modules": named}, tuple(named)
        # Not every method has a rank, or counts it from one.
        rank = found if isinstance(found := peft.get("r"), int) and found > 0 else rank
    if rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}")
    if outer_rank is not None and outer_rank < rank:
        raise UsageError(
            f"--outer-rank must be at least --rank {rank}, not {outer_rank}: the product would have no more than that rank"
        )
    if not alpha > 0:
        raise UsageError(f"--alpha must be positive, not {alpha}")
    if not 0 <= dropout < 1:
        raise UsageError(f"--dropout must be at least 0 and below 1, not {dropout}")
    if not target_modules:
        raise UsageError("--target-modules must name at least one module")
    return AdapterPlan(
        mode=mode,
        b_init=b_init or ("basis" if has_basis and spec.may_use_basis else spec.b_init),
        a_init=a_init or spec.a_init,
        trains_b=spec.trains_b,
        rank=rank,
        alpha=alpha,
        rslora=rslora or bool(spec.peft.get("use_rslora")),
        target_modules=target_modules,
        dropout=dropout,
        seed=seed,
        outer_rank=(outer_rank or 2 * rank) if "outer_rank" in spec.takes else None,
        peft=peft,
    )
