"""The table of modes: what B and A start as, what of them trains, what is stored and where it was published.

The command line's choices, the checks, the trained sets, the parameter counts and the table in the README all come from here. Nothing
here touches a model (that is `install`) or a file (`storage`), so the command line can import it.
"""

import dataclasses
import math
from typing import Any, Literal

from cora_cli.errors import UsageError
from cora_cli.tables import markdown_table

Mode = Literal["lora", "fb", "tb", "full", "rslora", "lora+", "dora", "lora-fa", "fa-basis", "mica", "pissa", "milora", "olora"]
AInit = Literal["zeros", "gaussian", "kaiming"]
BInit = Literal["basis", "zeros", "ones", "random", "orthonormal"]
Decomposition = Literal["principal", "minor", "qr"]
"""Starts that are made of the weight W itself: factors of its largest or smallest singular directions, or of its QR."""

A, B = "lora_A.weight", "lora_B.weight"
Shapes = dict[str, tuple[str, ...]]
_A_ALONE: Shapes = {A: ("r", "in")}
_B_ALONE: Shapes = {B: ("out", "r")}
_BOTH: Shapes = {**_A_ALONE, **_B_ALONE}


@dataclasses.dataclass(frozen=True)
class ModeSpec:
    """One mode that is an adapter.

    `trained` maps each trained tensor of a layer, named as PEFT stores it, to its shape in r, out and in. `peft` goes into PEFT's
    configuration; where it names a start, PEFT makes that start. `changes_base`: the start is taken out of W, so that the model
    begins as it was; stored is the difference from the start, a LoRA of rank 2r on W itself. `choosable_b`: whether `--b-init` may
    replace B's start. `takes` are the settings that mean something to this mode and not to every one.
    """

    b_init: BInit | Decomposition
    a_init: AInit | Decomposition | Literal["basis"]
    trained: Shapes
    summary: str
    paper: str
    peft: dict[str, Any] = dataclasses.field(default_factory=dict)
    takes: frozenset[str] = frozenset({"alpha", "rslora", "a_init"})
    choosable_b: bool = False
    changes_base: bool = False

    @property
    def trains_b(self) -> bool:
        """Whether B itself is trained."""
        return B in self.trained

    @property
    def reads_weights(self) -> bool:
        """Whether a start is made of W, so that r can be at most the smaller of its dimensions."""
        return not {self.b_init, self.a_init}.isdisjoint(("principal", "minor", "qr"))

    def needs_basis(self, b_init: str | None = None) -> bool:
        """Whether a factor starts as a basis; `b_init` is the start of B that was asked for."""
        return "basis" in (b_init or self.b_init, self.a_init)

    def parameters(self, out: int, inside: int, rank: int) -> int:
        """Trained parameters of a layer whose W is (out, inside)."""
        sizes = {"out": out, "in": inside, "r": rank}
        return sum(math.prod(sizes[length] for length in shape) for shape in self.trained.values())


_OWN_START = frozenset({"alpha", "rslora"})
OWN_SETTINGS = frozenset({"alpha", "rslora", "a_init", "lora_plus_ratio"})
"""The settings that `ModeSpec.takes` may name."""

MODES: dict[Mode, ModeSpec] = {
    "lora": ModeSpec("zeros", "kaiming", _BOTH, "B = 0, A random", "2106.09685"),
    "fb": ModeSpec("basis", "zeros", _A_ALONE, "B = basis, frozen; A = 0", "2409.02119", choosable_b=True),
    "tb": ModeSpec("basis", "zeros", _BOTH, "B = basis, A = 0", "2409.02119", choosable_b=True),
    "rslora": ModeSpec(
        "zeros",
        "kaiming",
        _BOTH,
        "as lora, with s = alpha / √r",
        "2312.03732",
        takes=frozenset({"alpha", "a_init"}),
        peft={"use_rslora": True},
    ),
    "lora+": ModeSpec(
        "zeros",
        "kaiming",
        _BOTH,
        "as lora, B at a higher learning rate",
        "2402.12354",
        takes=frozenset({"alpha", "rslora", "a_init", "lora_plus_ratio"}),
    ),
    "dora": ModeSpec(
        "zeros",
        "kaiming",
        {**_BOTH, "lora_magnitude_vector.weight": ("out",)},
        "as lora on the directions of W's rows; their lengths are trained",
        "2402.09353",
        peft={"use_dora": True},
    ),
    # PEFT has an optimizer of this name too, which corrects B's gradient by (AAᵀ)⁻¹. The method of the paper is the frozen A,
    # and all modes share one optimizer here, so that a difference between them is one between the modes.
    "lora-fa": ModeSpec("zeros", "kaiming", _B_ALONE, "A random, frozen; B = 0", "2308.03303"),
    "fa-basis": ModeSpec(
        "zeros",
        "basis",
        _B_ALONE,
        "A = basis of the input side, frozen; B = 0",
        "none: the mirror of fb",
        takes=_OWN_START,
    ),
    "mica": ModeSpec(
        "minor",
        "zeros",
        _A_ALONE,
        "B = W's last left singular vectors, frozen; A = 0",
        "2604.01694",
        peft={"init_lora_weights": "mica"},
        takes=_OWN_START,
    ),
    "pissa": ModeSpec(
        "principal",
        "principal",
        _BOTH,
        "s·B·A = W's first r singular directions, taken out of W",
        "2404.02948",
        peft={"init_lora_weights": "pissa"},
        takes=_OWN_START,
        changes_base=True,
    ),
    "milora": ModeSpec(
        "minor",
        "minor",
        _BOTH,
        "s·B·A = W's last r singular directions, taken out of W",
        "2406.09044",
        takes=_OWN_START,
        changes_base=True,
    ),
    "olora": ModeSpec(
        "qr",
        "qr",
        _BOTH,
        "B·A = Q·R of W, first r, s times which is taken out of W",
        "2406.01775",
        peft={"init_lora_weights": "olora"},
        takes=_OWN_START,
        changes_base=True,
    ),
}
"""Every mode that is an adapter; `full` trains all weights and has none."""

LORA_PLUS_RATIO = 16.0
"""B's learning rate over A's in mode lora+, where none is given: the 2⁴ that its paper advises."""


_SYMBOLS = {A: "A", B: "B", "lora_magnitude_vector.weight": "lengths"}


def modes_table() -> str:
    """The table of modes for the documentation, in Markdown."""
    headers = [
        "mode",
        "start; what is frozen",
        "trained where W is out × in",
        "step 0 is the base model",
        "stored as, for plain PEFT",
        "paper",
    ]
    rows = [
        [
            f"`{name}`",
            spec.summary,
            " + ".join(f"{_SYMBOLS[key]} {'·'.join(shape)}" for key, shape in spec.trained.items()),
            "but for rounding of W" if spec.changes_base else "yes",
            _stored(spec),
            spec.paper,
        ]
        for name, spec in MODES.items()
    ]
    return markdown_table(headers, [*rows, ["`full`", "no adapter", "W out·in, and all else", "yes", "a whole model", "–"]])


def _stored(spec: ModeSpec) -> str:
    if "use_dora" in spec.peft:
        return "DoRA"
    return "LoRA of rank 2r" if spec.changes_base else "LoRA"


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Everything that determines an adapter before its first step, except the basis itself.

    `seed` fixes random starts per module, independent of the order in which modules are visited.
    """

    mode: Mode
    b_init: BInit | Decomposition
    a_init: AInit | Decomposition | Literal["basis"]
    trains_b: bool
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    dropout: float
    seed: int

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
        a_moves = A in self.spec.trained and self.b_init != "zeros"
        b_moves = B in self.spec.trained and self.a_init != "zeros"
        return not (a_moves or b_moves)

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
        choosable = [name for name, other in MODES.items() if other.choosable_b]
        raise UsageError(f"--b-init goes with the modes {' and '.join(choosable)}; mode {mode} starts B as {spec.b_init}")
    if a_init is not None and "a_init" not in spec.takes:
        raise UsageError(f"--a-init does not go with mode {mode}, whose A starts as {spec.a_init}")
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
        rslora=rslora or bool(spec.peft.get("use_rslora")),
        target_modules=target_modules,
        dropout=dropout,
        seed=seed,
    )
