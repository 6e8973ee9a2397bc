import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import (
    AngleMeter,
    check_trained_set,
    install_adapter,
    target_linears,
)
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.parts.starts import start_a, start_b
from cora_cli.methods.plan import AdapterPlan
from tests.adapters.helpers import IDS, logits
from tests.methods.helpers import plan_of

RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj")
STARTS = [  # mode, --b-init, --a-init
    ("lora", None, None),
    ("fb", None, None),
    ("tb", None, None),
    ("fb", "zeros", "kaiming"),
    ("fb", "ones", None),
    ("fb", "random", None),
    ("fb", "orthonormal", None),
    ("tb", "orthonormal", "gaussian"),
    ("fb", None, "gaussian"),
    ("fb", None, "kaiming"),
]


def plan(mode="fb", **changes) -> AdapterPlan:
    defaults = {"rank": RANK, "alpha": 8.0, "rslora": False, "target_modules": TARGETS, "dropout": 0.0, "seed": 0}
    return plan_of(mode, **{**defaults, **changes})


@pytest.fixture(scope="module")
def basis(tiny_basis: Path) -> Basis:
    return read_basis(tiny_basis)


@pytest.fixture
def model(tiny_model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_names(model, *factors) -> set[str]:
    return {f"base_model.model.{name}.lora_{factor}.default.weight" for name, _ in lora_layers(model) for factor in factors}


def turn(model, seed=1, scale=0.1) -> None:
    """Give every A and B random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for factor in factors_of(layer):
                factor.add_(torch.randn(factor.shape, generator=generator), alpha=scale)


@pytest.mark.parametrize(("mode", "b_init", "a_init"), STARTS)
def test_each_factor_starts_as_the_table_says(mode, b_init, a_init, model, basis):
    made = plan(mode, b_init=b_init, a_init=a_init)
    wrapped = install_adapter(model, made, basis if made.needs_basis else None)
    layers = dict(lora_layers(wrapped))
    assert len(layers) == 6
    for name, layer in layers.items():
        a, b = factors_of(layer)
        outside, inside = layer.get_base_layer().weight.shape
        assert a.shape == (RANK, inside)
        assert b.shape == (outside, RANK)
        assert a.dtype == b.dtype == torch.float32
        if made.b_init == "basis":
            assert torch.equal(b, basis.directions[name][:, :RANK]), "bit for bit"
        elif made.b_init in ("zeros", "ones"):
            assert b.eq(float(made.b_init == "ones")).all()
        elif made.b_init == "orthonormal":
            assert torch.allclose(b.T @ b, torch.eye(RANK), atol=1e-6)
        assert a.any().item() is (made.a_init != "zeros")


@pytest.mark.parametrize(("mode", "b_init", "a_init"), STARTS)
def test_before_the_first_step_the_model_is_the_base_unless_a_product_of_starts_is_not_zero(mode, b_init, a_init, model, basis):
    made = plan(mode, b_init=b_init, a_init=a_init)
    before = logits(model)
    wrapped = install_adapter(model, made, basis if made.needs_basis else None)
    assert torch.equal(logits(wrapped), before) is ("zeros" in (made.a_init, made.b_init))


@pytest.mark.parametrize(("mode", "b_init", "a_init"), STARTS)
def test_exactly_the_planned_factors_are_trained(mode, b_init, a_init, model, basis):
    made = plan(mode, b_init=b_init, a_init=a_init)
    wrapped = install_adapter(model, made, basis if made.needs_basis else None)
    assert trained(wrapped) == expected_names(wrapped, *("A" if mode == "fb" else "AB"))


@pytest.mark.parametrize("mode", ["lora", "fb", "tb"])
def test_a_backward_pass_gives_gradients_to_the_trained_factors_only(mode, model, basis):
    wrapped = install_adapter(model, plan(mode), basis)
    wrapped(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained(wrapped)
    # One factor starts at zero, so the other has no gradient yet; the first moves.
    moving = "B" if mode == "lora" else "A"
    assert all(wrapped.get_parameter(name).grad.any() for name in expected_names(wrapped, moving))


def disable_and_enable_layers(wrapped) -> None:
    wrapped.base_model.disable_adapter_layers()
    wrapped.base_model.enable_adapter_layers()


def disable_for_a_while(wrapped) -> None:
    with wrapped.disable_adapter():
        pass


@pytest.mark.parametrize(
    "action",
    [
        lambda wrapped: wrapped.set_adapter("default"),
        lambda wrapped: wrapped.base_model.set_adapter("default"),
        disable_for_a_while,
        disable_and_enable_layers,
        lambda wrapped: wrapped.train().eval(),
    ],
    ids=["set_adapter", "base_model.set_adapter", "disable_adapter", "disable_and_enable_layers", "train_and_eval"],
)
@pytest.mark.parametrize("mode", ["fb", "tb"])
def test_a_frozen_b_stays_frozen_whatever_peft_switches(mode, action, model, basis):
    made = plan(mode)
    wrapped = install_adapter(model, made, basis)
    action(wrapped)
    assert trained(wrapped) == expected_names(wrapped, *("A" if mode == "fb" else "AB"))
    check_trained_set(wrapped, made)


@pytest.mark.parametrize(
    ("mode", "name", "flag", "said"),
    [
        ("fb", "lora_B", True, "1 differ, such as .*lora_B.default.weight \\(trained\\)"),
        ("fb", "lora_A", False, "1 differ, such as .*lora_A.default.weight \\(frozen\\)"),
        ("tb", "lora_B", False, "lora_B.default.weight \\(frozen\\)"),
        ("lora", "embed_tokens", True, "lm_head.weight \\(trained\\)"),
    ],
)
def test_a_flag_that_someone_flipped_is_found(mode, name, flag, said, model, basis):
    made = plan(mode)
    wrapped = install_adapter(model, made, basis)
    check_trained_set(wrapped, made)
    next(parameter for key, parameter in wrapped.named_parameters() if name in key).requires_grad_(flag)
    with pytest.raises(CoraError, match=said):
        check_trained_set(wrapped, made)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_forward_is_that_of_the_weights_plus_s_b_a(rslora, model, basis, tiny_model):
    wrapped = install_adapter(model, plan("tb", rslora=rslora, alpha=6.0), basis)
    turn(wrapped)
    by_hand = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    scaling = 6.0 / (math.sqrt(RANK) if rslora else RANK)
    with torch.no_grad():
        for name, layer in lora_layers(wrapped):
            a, b = factors_of(layer)
            by_hand.get_submodule(name).weight += scaling * b.double() @ a.double()
    assert torch.allclose(logits(wrapped).double(), logits(by_hand), rtol=1e-4, atol=1e-4)


def test_factors_are_float32_on_a_bfloat16_base(tiny_model, basis):
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    wrapped = install_adapter(model, plan("fb"), basis)
    assert {factor.dtype for _, layer in lora_layers(wrapped) for factor in factors_of(layer)} == {torch.float32}
    name, layer = next(lora_layers(wrapped))
    assert torch.equal(factors_of(layer)[1], basis.directions[name][:, :RANK])


def test_targets_are_whole_names_or_last_parts_in_the_models_order(model):
    whole = "model.layers.1.self_attn.o_proj"
    assert list(target_linears(model, (whole, "self_attn.q_proj"))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        whole,
    ]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("query", "target module 'query' matches nothing in this model; its linear layers are .*down_proj.*q_proj"),
        ("proj", "target module 'proj' matches nothing"),
        ("embed_tokens", "target module 'embed_tokens' is a Embedding, not a linear layer"),
        ("self_attn", "target module 'self_attn' is a LlamaAttention, not a linear layer"),
        (
            "lm_head",
            r"lm_head shares its weight with model.embed_tokens.weight, so it cannot be adapted alone; layers with weights of their own are down_proj, .*: name them with",
        ),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(target, said, model):
    with pytest.raises(CoraError, match=said):
        install_adapter(model, plan("lora", target_modules=("q_proj", target)), None)


@pytest.mark.parametrize(
    ("changes", "with_basis", "said"),
    [
        ({}, False, "mode fb needs a basis to start B from"),
        ({"rank": 9}, True, "--rank 9 is too large: basis .* holds 8 directions"),
        ({"rank": 33, "b_init": "orthonormal"}, False, "k_proj has 32 outputs, fewer than --rank 33"),
        ({"target_modules": ("q_proj", "o_proj")}, True, "has no group for module model.layers.0.self_attn.o_proj"),
    ],
)
def test_a_start_that_cannot_be_had_is_refused_before_the_model_is_touched(changes, with_basis, said, model, basis):
    before = [type(module) for module in model.modules()]
    with pytest.raises(CoraError, match=said):
        install_adapter(model, plan("fb", **changes), basis if with_basis else None)
    assert [type(module) for module in model.modules()] == before


def test_a_basis_of_other_shapes_is_refused(tiny_multihead_model, basis):
    model = LlamaForCausalLM.from_pretrained(tiny_multihead_model, dtype=torch.float32)
    with pytest.raises(CoraError, match=r"k_proj has 64 outputs, but group .* expects 32"):
        install_adapter(model, plan("fb"), basis)


def test_random_starts_have_the_distributions_that_they_claim():
    rank, inside = 64, 512
    gaussian = start_a(plan("lora", rank=rank, a_init="gaussian"), "layer", inside)
    assert gaussian.std().item() == pytest.approx(1 / rank, rel=0.03)
    assert abs(gaussian.mean().item()) < 1e-4 * rank
    kaiming = start_a(plan("lora", rank=rank), "layer", inside)
    bound = 1 / math.sqrt(inside)  # √(6 / ((1 + 5)·fan_in)), as torch starts a linear layer
    assert kaiming.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert kaiming.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    random = start_b(plan("fb", rank=rank, b_init="random"), None, "layer", inside, rank)
    assert random.shape == (inside, rank)
    assert random.abs().max().item() == pytest.approx(1 / math.sqrt(rank), rel=0.01)


def test_an_orthonormal_start_is_orthonormal_and_favours_no_direction():
    made = [start_b(plan("fb", b_init="orthonormal", seed=seed), None, "layer", 16, RANK) for seed in range(400)]
    for b in made[:20]:
        assert torch.allclose(b.T @ b, torch.eye(RANK), atol=1e-6)
    # Uniform over frames: E[B] = 0 (which QR without its signs would miss) and E[BBᵀ] = (r / d)·I.
    assert torch.stack(made).mean(0).abs().max() < 5 * 0.25 / 20
    assert torch.allclose(torch.stack([b @ b.T for b in made]).mean(0), torch.eye(16) * RANK / 16, atol=0.06)


@pytest.mark.parametrize(("b_init", "a_init"), [("random", "kaiming"), ("orthonormal", "gaussian")])
def test_random_starts_depend_on_seed_and_module_and_on_nothing_else(b_init, a_init):
    def starts(seed, name):
        made = plan("tb", b_init=b_init, a_init=a_init, seed=seed)
        return start_b(made, None, name, 32, RANK), start_a(made, name, 48)

    first = starts(0, "model.layers.0.q_proj")
    torch.manual_seed(99)
    torch.randn(7)
    assert all(map(torch.equal, first, starts(0, "model.layers.0.q_proj")))
    for other in (starts(1, "model.layers.0.q_proj"), starts(0, "model.layers.1.q_proj")):
        assert not any(map(torch.equal, first, other))


def test_random_starts_do_not_depend_on_which_other_modules_are_adapted(model, tiny_model):
    few = dict(lora_layers(install_adapter(model, plan("lora", target_modules=("v_proj",)), None)))
    other = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    many = dict(lora_layers(install_adapter(other, plan("lora", target_modules=("o_proj", "v_proj", "q_proj")), None)))
    assert len(few) == 2
    for name, layer in few.items():
        assert torch.equal(factors_of(layer)[0], factors_of(many[name])[0])


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-4, 0.3, 1.5, math.pi / 2])
def test_the_angle_meter_sees_an_angle_of_known_size(angle, model, basis):
    wrapped = install_adapter(model, plan("tb"), basis)
    wrapped.double()
    meter = AngleMeter(wrapped)
    _, layer = list(lora_layers(wrapped))[3]
    b = factors_of(layer)[1]
    start = b.detach().numpy().copy()
    frame, _ = np.linalg.qr(start)
    outside = np.linalg.qr(np.hstack([frame, np.random.default_rng(0).standard_normal((len(start), 1))]))[0][:, -1]
    turned = start.copy()
    turned[:, 1] = math.cos(angle) * frame[:, 1] + math.sin(angle) * outside
    # The columns may be mixed and stretched: the angle is one between spaces.
    mixed = turned @ np.array([[2.0, 1, 0, 0], [0, 1, 0, 3], [0, 0, 1, 0], [1, 0, 0, 1]])
    with torch.no_grad():
        b.copy_(torch.from_numpy(mixed))
    assert meter.largest() == pytest.approx(angle, rel=1e-6, abs=1e-12 if angle < 1 else 1e-7)
    assert meter.largest() == pytest.approx(
        scipy.linalg.subspace_angles(start, mixed).max(), rel=1e-6, abs=1e-12 if angle < 1 else 1e-7
    )


@pytest.mark.parametrize("scale", [3e-8, 1e-7, 1e-3, 0.3, 100.0])
def test_the_angle_meter_agrees_with_scipy_over_all_layers(scale, model, basis):
    wrapped = install_adapter(model, plan("tb"), basis)
    meter = AngleMeter(wrapped)
    starts = [factors_of(layer)[1].detach().double().numpy().copy() for _, layer in lora_layers(wrapped)]
    assert meter.largest() < 1e-12
    turn(wrapped, scale=scale)
    ends = [factors_of(layer)[1].detach().double().numpy() for _, layer in lora_layers(wrapped)]
    expected = max(scipy.linalg.subspace_angles(start, end).max() for start, end in zip(starts, ends, strict=True))
    assert expected > 0
    assert meter.largest() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("b_init", ["zeros", "ones"])
def test_a_b_without_a_frame_has_no_angle(b_init, model):
    with pytest.raises(CoraError, match=r"q_proj starts with linearly dependent columns"):
        AngleMeter(install_adapter(model, plan("tb", b_init=b_init), None))
