"""Every method in the embedded SmolLM2-135M: as many numbers train as the published formulas say.

The formulas stand here once more, written from the papers, for W (o, i) and rank r, and not from the methods' own tables.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig

from cora_cli.adapters.install import install_adapter, target_linears
from cora_cli.basis.artifact import Basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.methods.parts.layers import Observed
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.planning.memory import fake_model, fakes
from cora_cli.training.record import parameter_counts
from tests.methods.helpers import plan_of

RANK, LAYERS, HEADS = 8, 4, 9
SHAPES = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576)}


class Case(NamedTuple):
    """How many numbers of one W (o, i) train; those that a model has once; and what the method is asked for."""

    of_layer: Callable[[int, int], int]
    of_model: int = 0
    own: Mapping[str, Any] = MappingProxyType({})


def both(o: int, i: int) -> int:
    return RANK * (o + i)


def a_alone(_: int, i: int) -> int:
    return RANK * i


def b_alone(o: int, _: int) -> int:
    return RANK * o


def nothing(_: int, __: int) -> int:
    return 0


def square(even: bool) -> Callable[[int, int], int]:
    """MoRA's q², q = ⌊√((o + i)·r) + ½⌋, which is even in type 6."""

    def count(o: int, i: int) -> int:
        q = math.floor(math.sqrt((o + i) * RANK) + 0.5)
        return (q - q % 2 if even else q) ** 2

    return count


CASES = {
    **{
        name: Case(both)
        for name in ("lora", "rslora", "lora+", "tb", "pissa", "milora", "olora", "corda", "lora-one", "lora-ga")
    },
    **{name: Case(both) for name in ("clora", "cola", "dylora", "flat-lora", "lora-rite", "xgblora", "hira")},
    **{name: Case(a_alone) for name in ("fb", "mica")},
    **{name: Case(b_alone) for name in ("lora-fa", "fa-basis", "lori", "miss")},
    "dora": Case(lambda o, i: RANK * (o + i) + o),
    "adalora": Case(lambda o, i: 12 * (o + i + 1)),  # r₀ = 1.5 r
    "eva": Case(both, own={"eva_rho": 1.0}),
    "increlora": Case(
        lambda o, i: (1 + 3) * (o + i) + 1, own={"growth_rank": 3}
    ),  # at the start: ρ = 1, and three pairs in reserve
    "melora": Case(both, own={"mini_loras": 4}),  # n blocks of r·(o + i)/n
    "mora-1": Case(square(even=False)),
    "mora-6": Case(square(even=True)),
    # u = 3 own ranks, and r − u = 5 that repeat a chunk of A 5 times, ⌈576/5⌉ = 116 long, and one of B 7 times.
    "prolora": Case(
        lambda o, i: 3 * (o + i) + 5 * (math.ceil(i / 5) + math.ceil(o / 7)),
        own={"unshared_rank": 3, "a_copies": 5, "b_copies": 7},
    ),
    # One tensor for the 30 q and one for the 60 k and v: r·(o + i/H + H + L + M) each.
    "lorta": Case(nothing, RANK * (576 + 64 + HEADS + LAYERS + 1) + RANK * (192 + 64 + HEADS + LAYERS + 2)),
    "scalabl": Case(lambda o, i: RANK * (o + i) + 2 * RANK),
    "qa-lora": Case(lambda o, i: RANK * (i // 32 + o)),
    "lora-xs": Case(lambda _, __: RANK**2),
    "lora-sb": Case(lambda _, __: RANK**2, own={"start_step": 0.01}),
    "lora-mini": Case(lambda _, __: RANK * (40 + 40), own={"outer_rank": 40}),
    "eigenlorax": Case(lambda _, __: 2 * (6 + 10) * RANK, own={"eigen_directions": 6, "eigen_random": 10}),
    "randlora": Case(lambda o, i: math.ceil(min(o, i) / RANK) * (RANK + min(o, i))),  # n bases, each with λ (r) and γ (min)
    "vera": Case(lambda o, _: o + RANK),
    "vb-lora": Case(lambda o, i: RANK * 20 * (o + i) // 48, 20 * 48, {"bank_vectors": 20, "bank_length": 48}),
    "uni-lora": Case(nothing, 1234, {"theta_length": 1234}),
    "sharelora-a": Case(b_alone, 3 * RANK * 576),
    "sharelora-b": Case(a_alone, RANK * (576 + 192 + 192)),
    "sharelora-ab": Case(nothing, 3 * RANK * 576 + RANK * (576 + 192 + 192)),
    "mean-delta": Case(nothing),
}

OF_NUMBERS = ("corda", "eigenlorax", "uni-lora", "xgblora")
"""Methods whose start depends on the values of tensors; two of the blocks have values for them."""


def test_every_method_is_counted() -> None:
    assert CASES.keys() == METHODS.keys() - {"full", "peft"}


def drawn_basis(side: Any) -> Basis:
    """Orthonormal directions of each projection, as `cora extract-basis --share projection` would store them."""
    axis = 0 if side == "output" else 1
    found = {name: torch.linalg.qr(torch.randn(shape[axis], RANK)).Q for name, shape in SHAPES.items()}
    choices = BasisChoices(share="projection", side=side, rank=RANK)
    return Basis(Path("drawn"), choices, choices.mapping, found, {}, {}, {}, {}, (), None, {})


def observed_in(shapes: dict[str, tuple[int, int]]) -> dict[str, Observed]:
    """The factors of five adapters, a gradient and the second moments of inputs for every layer."""
    found = {}
    for name, (o, i) in shapes.items():
        sources = [(torch.randn(o, 3), torch.randn(3, i)) for _ in range(5)]
        found[name] = Observed(sources, gradient=torch.randn(o, i), inputs=torch.eye(i))
    return found


@pytest.mark.parametrize("mode", CASES)
def test_in_layers_of_smollm2_as_many_numbers_train_as_the_formula_says(mode: str) -> None:
    case, config = CASES[mode], AutoConfig.from_pretrained(resolve_model("builtin:smollm2").path)
    settings = {"rank": RANK, "alpha": 16.0, "rslora": False, "target_modules": tuple(SHAPES), "dropout": 0.0, "seed": 0}
    plan = METHODS[mode].for_model(plan_of(mode, **settings, **case.own), config.num_attention_heads)
    basis = drawn_basis(plan.basis_side) if plan.needs_basis else None
    config.num_hidden_layers = layers = 2 if mode in OF_NUMBERS else LAYERS
    with contextlib.nullcontext() if mode in OF_NUMBERS else fakes():
        model = fake_model(config, False, torch.float32)
        linears = target_linears(model, plan.target_modules)
        shapes = {name: (one.out_features, one.in_features) for name, one in linears.items()}
        if mode in OF_NUMBERS:
            for name in shapes:
                torch.nn.init.normal_(model.get_submodule(name).weight, std=0.1)
        trained = parameter_counts(install_adapter(model, plan, basis, observed_in(shapes)), plan)["trained"]
    assert shapes == {
        f"model.layers.{layer}.self_attn.{kind}": shape for layer in range(layers) for kind, shape in SHAPES.items()
    }
    of_layers = layers * sum(case.of_layer(*shape) for shape in SHAPES.values())
    assert trained == METHODS[mode].parameters(shapes, plan) == of_layers + case.of_model
