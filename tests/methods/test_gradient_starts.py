"""Starts from gradients and inputs, against the papers' formulas in float64 and PEFT's own; the tests of all methods run on them too."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.gradient import approximation_factors, left_directions
from cora_cli.methods.parts.layers import Observed, factors_of, lora_layers
from cora_cli.methods.parts.singular import context_factors
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import first_adam_step, observed_in, plan_of

RANK = 4
FB = {"mode": "fb", "b_init": "gradient"}
SETTINGS = {"rank": RANK, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def layers_of(model, mode, **changes):
    """By layer: the layer, what was observed for it in float64, and W before."""
    plan = plan_of(mode, **{**SETTINGS, **changes})
    observed = observed_in(model, plan)
    weights = {name: model.get_submodule(name).weight.detach().double().numpy().copy() for name in observed}
    return [(layer, observed[name], weights[name]) for name, layer in lora_layers(install_adapter(model, plan, None, observed))]


def leading(matrix, rank):
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def test_lora_sb_starts_as_the_best_approximation_of_a_sign_step_with_orthonormal_factors(load):
    for layer, observed, _ in layers_of(load(), "lora-sb", start_step=0.02):
        gradient = observed.gradient.double().numpy()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
        assert np.allclose(layer.get_delta_weight("default").detach(), leading(-0.02 * np.sign(gradient), RANK), atol=1e-5)
        assert torch.allclose(a @ a.T, torch.eye(RANK), atol=1e-5)
        assert torch.allclose(b.outer.T @ b.outer, torch.eye(RANK), atol=1e-5)
        assert [name for name, one in layer.named_parameters() if one.requires_grad] == ["lora_B.default.inner"]


def test_the_first_adam_step_of_lora_sb_is_a_sign_step_between_its_factors(load):
    for layer, _, _ in layers_of(load(), "lora-sb", start_step=0.02):
        before = layer.get_delta_weight("default").detach().double()
        a, outer = layer.lora_A["default"].weight.double(), layer.lora_B["default"].outer.double()
        after, gradient = first_adam_step(layer, 0.01)
        expected = before - 0.01 * outer @ (outer.T @ gradient @ a.T).sign() @ a
        assert torch.allclose(after, expected.detach(), atol=1e-5)


def test_the_step_of_lora_sb_is_the_first_step_of_the_learning_rate_unless_it_is_given():
    method = METHODS["lora-sb"]
    assert method.for_run(plan_of("lora-sb", **SETTINGS), 1e-3, 4).own["start_step"] == 2.5e-4
    assert method.for_run(plan_of("lora-sb", **SETTINGS), 1e-3, 0).own["start_step"] == 1e-3
    assert method.for_run(plan_of("lora-sb", **SETTINGS, start_step=0.5), 1e-3, 4).own["start_step"] == 0.5


def test_lora_one_starts_as_a_scaled_step_along_the_gradient_and_leaves_w_alone(load):
    for layer, observed, weight in layers_of(load(), "lora-one", start_gamma=32.0):
        gradient = observed.gradient.double().numpy()
        scale = 12 / np.sqrt(RANK) / (32 * np.linalg.norm(gradient, 2))
        assert np.allclose(layer.get_delta_weight("default").detach(), scale * leading(-gradient, RANK), atol=1e-6)
        a, b = (factor.detach().double() for factor in factors_of(layer))
        assert torch.allclose(a @ a.T, b.T @ b, atol=1e-6), "both take the root of the singular values"
        assert np.array_equal(layer.base_layer.weight.detach().double().numpy(), weight)


def test_lora_ga_takes_different_singular_vectors_for_a_and_b_and_subtracts_their_product(load):
    for layer, observed, weight in layers_of(load(), "lora-ga"):
        u, _, v = np.linalg.svd(observed.gradient.double().numpy(), full_matrices=False)
        a, b = (factor.detach().double().numpy() for factor in factors_of(layer))
        squared = len(weight) ** 0.5 / 16  # out^½ / γ
        assert np.allclose(a.T @ a, squared * v[:RANK].T @ v[:RANK], atol=1e-5)
        assert np.allclose(b @ b.T, squared * u[:, RANK : 2 * RANK] @ u[:, RANK : 2 * RANK].T, atol=1e-5)
        assert np.allclose(layer.base_layer.weight.detach() + 3.0 * b @ a, weight, atol=1e-5)


def test_the_directions_of_lora_ga_are_those_of_peft_which_scales_them_otherwise(load):
    from peft.tuners.lora.config import LoraGAConfig

    model = load()
    config = LoraConfig(
        r=RANK,
        target_modules=["q_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r"),
        lora_alpha=12,
    )
    # Singular values far apart, since PEFT's decomposition is a randomised one.
    gradients, generator = {}, torch.Generator().manual_seed(2)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            left, right = (torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in "AB")
            gradients[name] = module._peft_loraga_grad = (left * 0.5 ** torch.arange(64)) @ right
    for name, layer in lora_layers(get_peft_model(model, config)):
        theirs_a, theirs_b = factors_of(layer)
        ours_a, ours_b = approximation_factors(gradients[name], RANK, 16.0)
        for one, other in ((theirs_a.T, ours_a.T), (theirs_b, ours_b)):
            cosines = (torch.nn.functional.normalize(one, dim=0) * torch.nn.functional.normalize(other, dim=0)).sum(0)
            assert torch.allclose(cosines.abs(), torch.ones(RANK), atol=1e-3)


@pytest.mark.parametrize(("part", "method"), [("first", "ipm"), ("last", "kpm")])
def test_corda_starts_as_peft_starts_it(part, method, load):
    model = load()
    config = LoraConfig(
        r=RANK,
        target_modules=["q_proj"],
        init_lora_weights="corda",
        lora_alpha=12,
        corda_config=CordaConfig(corda_method=method),
    )
    inputs = {}

    def see(name):
        return lambda _, given: inputs.__setitem__(name, given[0].detach()[0])

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in model.named_modules() if name.endswith("q_proj")]
    tokens = torch.randint(3, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    preprocess_corda(model, config, run_model=lambda: model(tokens))
    for hook in hooks:
        hook.remove()
    theirs = dict(lora_layers(get_peft_model(model, config)))
    plan = plan_of("corda", **{**SETTINGS, "target_modules": ("q_proj",)}, corda_part=part)
    observed = {name: Observed(inputs=x.T @ x / len(x)) for name, x in inputs.items()}
    ours = dict(lora_layers(install_adapter(load(), plan, None, observed)))
    for name, layer in ours.items():
        products = [(b @ a).detach() for a, b in map(factors_of, (layer, theirs[name]))]
        assert torch.allclose(*products, atol=2e-3 * products[1].abs().max())
        assert torch.allclose(layer.base_layer.weight, theirs[name].base_layer.weight, atol=1e-3)


def test_a_factor_of_c_cancels_in_the_product_of_corda_and_moves_its_root_from_a_to_b():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 12, generator=generator), torch.randn(100, 12, generator=generator)
    inputs = x.T @ x / 100
    a, b = context_factors(weight, inputs, RANK, 3.0, last=False)
    scaled_a, scaled_b = context_factors(weight, 49.0 * inputs, RANK, 3.0, last=False)
    assert torch.allclose(scaled_b @ scaled_a, b @ a, atol=1e-4)
    signs = (a * scaled_a).sum(1).sign()
    assert torch.allclose(signs[:, None] * scaled_a, a / 7, atol=1e-4)
    assert torch.allclose(scaled_b * signs, 7 * b, atol=1e-3)


def test_corda_with_alpha_equal_to_the_rank_has_the_authors_factors(load):
    for layer, observed, weight in layers_of(load(), "corda", alpha=float(RANK)):
        c = observed.inputs.double().numpy()
        c = c + 0.01 * c.diagonal().mean() * np.eye(len(c))
        u, values, v = np.linalg.svd(weight @ c, full_matrices=False)
        a, b = (factor.detach().double().numpy() for factor in factors_of(layer))
        root = np.sqrt(values[:RANK])
        assert np.allclose(np.abs(b), np.abs(u[:, :RANK] * root), atol=1e-3)
        assert np.allclose(np.abs(a), np.abs(root[:, None] * v[:RANK] @ np.linalg.inv(c)), atol=1e-3)


def test_all_directions_of_corda_together_are_w(load):
    for layer, _, weight in layers_of(load(), "corda", rank=32, target_modules=("v_proj",)):
        a, b = factors_of(layer)
        assert np.allclose(12 / 32 * (b @ a).detach(), weight, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "rank", "said"),
    [
        ("fb", 33, r"mode fb with --b-init gradient needs --rank ≤ 32 for .*v_proj, not 33"),
        ("lora-ga", 17, r"mode lora-ga needs --rank ≤ 16 for .*v_proj, half of its smaller dimension, not 17"),
        ("eva", 65, r"mode eva needs --rank ≤ 64 for .*q_proj, the number of its inputs, not 65"),
        ("lora-sb", 33, r"mode lora-sb needs --rank ≤ 32 for .*v_proj, not 33"),
    ],
)
def test_a_rank_without_enough_directions_is_refused(mode, rank, said, load):
    with pytest.raises(CoraError, match=said):
        layers_of(load(), mode, rank=rank, **({"b_init": "gradient"} if mode == "fb" else {}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "lora-one", "start_gamma": 0.0}, r"--start-gamma must be positive, not 0\.0"),
        ({"mode": "lora-sb", "start_step": -1.0}, r"--start-step must be positive, not -1\.0"),
        ({"mode": "lora-ga", "start_examples": 0}, "--start-examples must be at least 1, not 0"),
        ({"mode": "lora", "start_examples": 4}, "--start-examples does not apply to mode lora"),
        ({"mode": "lora-sb", "alpha": 4.0}, "--alpha does not apply to mode lora-sb"),
        ({"mode": "eva", "eva_rho": 0.5}, r"--eva-rho must be at least 1, not 0\.5"),
        ({"mode": "lora-ga", "load_in_4bit": True}, "--load-in-4bit does not apply to mode lora-ga"),
        (
            {**FB, "load_in_4bit": True},
            "--load-in-4bit does not apply to mode fb with --b-init gradient, which needs the weights",
        ),
        ({**FB, "shard": "fsdp"}, "--shard does not apply to mode fb with --b-init gradient, whose start needs passes"),
        ({**FB, "compact": True}, "--compact stores only A, and a B from the gradient cannot be rebuilt"),
        ({**FB, "basis": "b"}, "--basis has no effect where B starts as gradient"),
        ({**FB, "start_examples": 0}, "--start-examples must be at least 1, not 0"),
        ({"mode": "fb", "basis": "b", "start_examples": 4}, "--start-examples has no effect where B starts as basis"),
        ({"mode": "lora", "b_init": "gradient"}, "--b-init applies to the modes fb and tb"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", **settings})


def test_eva_starts_as_the_principal_directions_of_the_inputs_and_shares_out_the_ranks(load):
    model, plan = load(), plan_of("eva", **SETTINGS, eva_rho=1.5)
    observed, spectra = {}, {}
    for place, name in enumerate(observed_in(model, plan)):
        directions = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(place)))[0]
        spectra[name] = (0.95 - 0.2 * place) ** torch.arange(64)
        observed[name] = Observed(inputs=(place + 1) * (directions * spectra[name]) @ directions.T)
    layers = dict(lora_layers(install_adapter(model, plan, None, observed)))
    shares = [(float(share), name) for name, values in spectra.items() for share in (values / values.sum())[:6]]
    kept = [name for _, name in sorted(shares, reverse=True)[: RANK * len(layers)]]
    ranks = {name: kept.count(name) for name in layers}
    assert len(set(ranks.values())) > 1
    for name, layer in layers.items():
        a, b = factors_of(layer)
        vectors = np.linalg.eigh(observed[name].inputs.double().numpy())[1][:, ::-1][:, : ranks[name]]
        assert a.shape == (ranks[name], 64)
        assert np.allclose((a.T @ a).detach(), vectors @ vectors.T, atol=1e-4)
        assert not b.any()
        assert layer.scaling["default"] == 12.0 / RANK


def test_the_most_ranks_of_a_layer_are_rounded_as_in_peft(load, monkeypatch):
    seen = []
    monkeypatch.setattr("cora_cli.methods.parts.input_directions.shared_out", lambda _, rank, most: seen.append(most) or {})
    layers_of(load(), "eva", eva_rho=1.7)  # 6.8
    layers_of(load(), "eva", eva_rho=1.6)  # 6.4
    assert seen == [7, 6]


def test_eva_gives_every_layer_the_same_rank_where_rho_is_one(load):
    assert {len(factors_of(layer)[0]) for layer, *_ in layers_of(load(), "eva", eva_rho=1.0)} == {RANK}


@pytest.mark.parametrize("mode", ["fb", "tb"])
def test_b_from_the_gradient_is_its_leading_left_singular_vectors_with_the_signs_of_a_basis(mode, load):
    for layer, observed, weight in layers_of(load(), mode, b_init="gradient"):
        u, _, _ = np.linalg.svd(observed.gradient.double().numpy())
        a, b = (factor.detach().double().numpy() for factor in factors_of(layer))
        assert np.allclose(abs(u[:, :RANK].T @ b), np.eye(RANK), atol=1e-5)
        assert (b[abs(b).argmax(0), range(RANK)] > 0).all()
        assert not a.any()
        assert np.array_equal(layer.base_layer.weight.detach().double().numpy(), weight)


def test_a_gradient_with_fewer_directions_than_the_rank_is_refused():
    thin = torch.randn(64, RANK - 1) @ torch.randn(RANK - 1, 32)
    with pytest.raises(
        CoraError, match=r"the gradient of some\.layer .* numerical rank of 3, less than --rank 4; raise --start-examples"
    ):
        left_directions(thin, RANK, "some.layer")
    assert left_directions(thin, RANK - 1, "some.layer").shape == (64, RANK - 1)
