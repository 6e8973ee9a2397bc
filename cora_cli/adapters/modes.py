"""The table of modes: what B and A start as, what of them trains, what is stored and where it was published.

The command line's choices, the checks, the trained sets, the parameter counts and the table in the README all come from here. Nothing
here touches a model (that is `install`) or a file (`storage`), so the command line can import it.
"""

import dataclasses
import math
from typing import Any, Literal

from cora_cli.render.tables import markdown_table

Mode = Literal[
    "lora",
    "fb",
    "tb",
    "full",
    "rslora",
    "lora+",
    "dora",
    "lora-fa",
    "fa-basis",
    "mica",
    "pissa",
    "milora",
    "olora",
    "vera",
    "lora-xs",
    "lora-mini",
    "peft",
]
AInit = Literal["zeros", "gaussian", "kaiming"]
BInit = Literal["basis", "zeros", "ones", "random", "orthonormal"]
OtherInit = Literal["principal", "minor", "qr", "file"]
"""Starts that no flag gives: factors of W's largest or smallest singular directions or of its QR, or what a file of PEFT says."""

A, B = "lora_A.weight", "lora_B.weight"
Shapes = dict[str, tuple[str, ...]]
_A_ALONE: Shapes = {A: ("r", "in")}
_B_ALONE: Shapes = {B: ("out", "r")}
_BOTH: Shapes = {**_A_ALONE, **_B_ALONE}
A_INNER, B_INNER = "lora_A.inner", "lora_B.inner"
"""The trained part of a factor that is a product with a frozen outer part."""


@dataclasses.dataclass(frozen=True)
class ModeSpec:
    """One mode that is an adapter.

    `trained` maps each trained tensor of a layer, named as PEFT stores it, to its shape in r, out, in and the outer rank k; empty
    where a file decides. `peft` goes into PEFT's configuration; where it names a start or a type, PEFT makes the start. `takes` are
    the settings that mean something to this mode and not to every one. `choosable_b`: whether `--b-init` may replace B's start;
    `may_use_basis`: whether B's start is a basis where one is given. `changes_base`: the start is taken out of W, so that the model
    begins as it was; stored is the difference from the start, a LoRA of rank 2r on W itself.
    """

    b_init: BInit | OtherInit
    a_init: AInit | OtherInit | Literal["basis"]
    trained: Shapes
    summary: str
    paper: str
    peft: dict[str, Any] = dataclasses.field(default_factory=dict)
    takes: frozenset[str] = frozenset({"alpha", "rslora", "a_init"})
    choosable_b: bool = False
    may_use_basis: bool = False
    changes_base: bool = False

    @property
    def trains_b(self) -> bool:
        """Whether B itself is trained."""
        return B in self.trained

    @property
    def reads_weights(self) -> bool:
        """Whether a start is made of W, so that r can be at most the smaller of its dimensions."""
        return not {self.b_init, self.a_init}.isdisjoint(("principal", "minor", "qr"))

    @property
    def starts_in_peft(self) -> bool:
        """Whether PEFT makes the start."""
        return not self.peft.keys().isdisjoint(("init_lora_weights", "peft_type"))

    @property
    def stored_otherwise(self) -> bool:
        """Whether what is stored for others to read is not what was trained: a product of factors, or a difference from the start."""
        return self.changes_base or not self.trained.keys().isdisjoint((A_INNER, B_INNER))

    def needs_basis(self, b_init: str | None = None) -> bool:
        """Whether a factor starts as a basis; `b_init` is the start of B that was asked for."""
        return "basis" in (b_init or self.b_init, self.a_init)

    def parameters(self, out: int, inside: int, rank: int, outer_rank: int | None = None) -> int:
        """Trained parameters of a layer whose W is (out, inside)."""
        sizes = {"out": out, "in": inside, "r": rank, "k": outer_rank or 0}
        return sum(math.prod(sizes[length] for length in shape) for shape in self.trained.values())


_OWN_START = frozenset({"alpha", "rslora"})
OWN_SETTINGS = frozenset({"alpha", "rslora", "a_init", "lora_plus_ratio", "outer_rank", "peft_config"})
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
    "vera": ModeSpec(
        "zeros",
        "kaiming",
        {"vera_lambda_b": ("out",), "vera_lambda_d": ("r",)},
        "A and B random, frozen, the same in every layer; vectors scale their rows",
        "2310.11454",
        takes=frozenset(),
        peft={"peft_type": "VERA"},
    ),
    # The paper starts R at N(0, 10⁻⁵), which Adam's first step forgets; from R = 0 the model begins as the base exactly.
    "lora-xs": ModeSpec(
        "principal",
        "principal",
        {B_INNER: ("r", "r")},
        "A = V_rᵀ and U_r Σ_r of W, frozen; B = U_r Σ_r R with R = 0",
        "2405.17604",
        takes=_OWN_START,
    ),
    "lora-mini": ModeSpec(
        "orthonormal",
        "kaiming",
        {A_INNER: ("r", "k"), B_INNER: ("k", "r")},
        "outer A and outer B random orthonormal, or outer B = basis, frozen; inner A random, inner B = 0",
        "2411.15804",
        takes=frozenset({"alpha", "rslora", "outer_rank"}),
        may_use_basis=True,
    ),
    "peft": ModeSpec(
        "file",
        "file",
        {},
        "any other method of PEFT that adapts weights, from --peft-config",
        "–",
        takes=frozenset({"peft_config"}),
        peft={"peft_type": None},
    ),
}
"""Every mode that is an adapter; `full` trains all weights and has none."""

LORA_PLUS_RATIO = 16.0
"""B's learning rate over A's in mode lora+, where none is given: the 2⁴ that its paper advises."""


_SYMBOLS = {
    **{A: "A", B: "B", "lora_magnitude_vector.weight": "lengths", "vera_lambda_b": "b", "vera_lambda_d": "d"},
    **{A_INNER: "inner A", B_INNER: "inner B"},
}


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
            " + ".join(f"{_SYMBOLS[key]} {'·'.join(shape)}" for key, shape in spec.trained.items()) or "as the file says",
            _first_step(spec),
            _stored(spec),
            spec.paper,
        ]
        for name, spec in MODES.items()
    ]
    return markdown_table(headers, [*rows, ["`full`", "no adapter", "W out·in, and all else", "yes", "a whole model", "–"]])


def _first_step(spec: ModeSpec) -> str:
    if not spec.trained:
        return "as the file says"
    # PEFT takes the lengths of W's rows in the precision of W.
    rounded = spec.changes_base or "use_dora" in spec.peft
    return "but for rounding of W" if rounded else "yes"


def _stored(spec: ModeSpec) -> str:
    if "use_dora" in spec.peft:
        return "DoRA"
    if "peft_type" in spec.peft:
        return "VeRA" if spec.peft["peft_type"] == "VERA" else "PEFT's own form"
    return "LoRA of rank 2r" if spec.changes_base else "LoRA"
