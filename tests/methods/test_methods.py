"""Every mode of the table, put into a small model: what trains, where it starts, and the starts that are made of W."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, PeftType, get_peft_model
from transformers import LlamaForCausalLM

from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from tests.methods.helpers import SMALL, observed_in, older_factors, plan_of
from tests.weights.helpers import make_llama

RANK = 4
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
COUNTED = [mode for mode, spec in METHODS.items() if spec.trained]
OF_WEIGHTS = [mode for mode, spec in METHODS.items() if spec.reads_weights and spec.start_from is None]
BOUNDED = [
    mode for mode, spec in METHODS.items() if spec.reads_weights or (spec.start_from == "gradient" and mode != "lora-ga")
]
CHANGED = [mode for mode, spec in METHODS.items() if spec.subtracts_start]


def plan(mode, **changes) -> AdapterPlan:
    defaults = {"rank": RANK, "alpha": 8.0, "rslora": False, "target_modules": tuple(SHAPES), "dropout": 0.0, "seed": 0}
    return METHODS[mode].for_model(plan_of(mode, **{**defaults, **SMALL.get(mode, {}), **changes}), 4)


def installed(model, made: AdapterPlan, basis: Basis | None) -> PeftModel:
    return install_adapter(model, made, basis, observed_in(model, made))


def configured(made: AdapterPlan):
    return METHODS[made.mode].configuration(made)


def facts_of(made: AdapterPlan, base: Path) -> AdapterFacts:
    return AdapterFacts(made, str(base), None, "0" * 64, None, None, compact=False)


@pytest.fixture
def load(tiny_model: Path):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def basis_for(tiny_basis: Path, tiny_input_basis: Path):
    def found(made: AdapterPlan) -> Basis | None:
        return read_basis(tiny_input_basis if made.basis_side == "input" else tiny_basis) if made.needs_basis else None

    return found


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def move(wrapped, scale=0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@pytest.mark.parametrize("mode", COUNTED)
def test_the_table_counts_the_parameters_that_train(mode, load, basis_for):
    made = plan(mode)
    wrapped = installed(load(), made, basis_for(made))
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    shapes = {f"{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    known = METHODS[mode].parameters(shapes, made)
    assert (trained == known > 0) if known is not None else mode == "eva"  # the data decide where its ranks fall


@pytest.mark.parametrize("mode", COUNTED)
def test_before_the_first_step_the_model_is_the_base(mode, load, basis_for):
    made, before = plan(mode), logits(load())
    after = logits(installed(load(), made, basis_for(made)))
    if METHODS[made.mode].subtracts_start:
        assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * before.abs().max())
    else:
        assert torch.equal(after, before) is not METHODS[made.mode].step_0_is_base.startswith("no")
        assert torch.equal(after, before) or not METHODS[mode].starts_at_base(made.as_dict())


@pytest.mark.parametrize("mode", COUNTED)
def test_after_a_step_it_is_not(mode, load, basis_for):
    made = plan(mode)
    wrapped = installed(load(), made, basis_for(made))
    move(wrapped)
    assert not torch.allclose(logits(wrapped), logits(load()), atol=1e-2)


def test_the_a_of_fa_basis_is_the_basis_of_the_input_side_for_queries_and_the_smaller_keys(load, basis_for):
    made = plan("fa-basis")
    basis = basis_for(made)
    for name, layer in lora_layers(install_adapter(load(), made, basis)):
        a, b = factors_of(layer)
        assert torch.equal(a, basis.directions[name][:, :RANK].T)
        assert b.shape == (SHAPES[name.rpartition(".")[2]][0], RANK)
        assert not b.any()


def test_a_basis_of_the_other_side_is_refused(load, basis_for):
    with pytest.raises(CoraError, match="holds output-side directions, but A needs input-side ones"):
        install_adapter(load(), plan("fa-basis"), basis_for(plan("fb")))
    with pytest.raises(CoraError, match=r"k_proj has 32 outputs, .* expects 64; extract one with --side output"):
        install_adapter(load(), plan("fb"), basis_for(plan("fa-basis")))
    with pytest.raises(CoraError, match="mode fa-basis needs a basis to start A from"):
        install_adapter(load(), plan("fa-basis"), None)


@pytest.mark.parametrize("mode", OF_WEIGHTS)
def test_starts_computed_from_a_weight_equal_its_svd_or_qr_factors(mode, load):
    weights = {name: parameter.detach().double().numpy() for name, parameter in load().named_parameters()}
    made = plan(mode)
    for name, layer in lora_layers(install_adapter(load(), made, None)):
        assert sum(tensor.numel() for tensor in layer.lora_A.parameters()) == RANK * 64
        w = weights[f"{name}.weight"]
        a, b = (factor.detach().double().numpy() for factor in factors_of(layer))
        u, values, v = np.linalg.svd(w, full_matrices=False)
        kept = slice(None, RANK) if made.b_init == "principal" else slice(-RANK, None)
        if mode == "lora-xs":
            outer = layer.lora_B["default"].outer.double().numpy()
            assert np.allclose(np.abs(outer), np.abs(u[:, kept]), atol=1e-4)
            assert np.allclose(outer @ a, (u[:, kept] * values[kept]) @ v[kept], atol=1e-4)
            assert not b.any()
            continue
        if mode == "mica":
            assert np.allclose(b @ b.T, u[:, kept] @ u[:, kept].T, atol=1e-4)
            assert not a.any()
            continue
        if mode == "olora":
            q, r = np.linalg.qr(w)
            taken = q[:, :RANK] @ r[:RANK]
        else:
            taken = (u[:, kept] * values[kept]) @ v[kept] / made.scaling
        assert np.allclose(b @ a, taken, atol=1e-4)
        left = layer.get_base_layer().weight.detach().double().numpy()
        assert np.allclose(left + made.scaling * b @ a, w, atol=1e-5)


def test_the_first_adam_step_of_lora_xs_is_that_of_the_authors_factors(load):
    """B = U_r, A = Σ_r V_rᵀ, ΔW = s·U_r R Σ_r V_rᵀ (initialization_utils.py of MohammadrezaBanaei/LoRA-XS), in float64."""
    made, rate = plan("lora-xs"), 0.01
    wrapped = install_adapter(load(), made, None)
    generator = torch.Generator().manual_seed(3)
    for _, layer in lora_layers(wrapped):
        x, pull = (torch.randn(9, width, generator=generator) for width in (64, layer.out_features))
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        (layer.scaling["default"] * b(a(x)) * pull).sum().backward()
        torch.optim.Adam([b.inner], lr=rate).step()
        found = made.scaling * (b.weight @ a.weight).double().numpy()

        gradient = pull.double().numpy().T @ x.double().numpy()  # with respect to W
        u, values, v = np.linalg.svd(layer.get_base_layer().weight.detach().double().numpy(), full_matrices=False)
        theirs_b, theirs_a = u[:, :RANK], values[:RANK, None] * v[:RANK]
        step = -rate * np.sign(made.scaling * theirs_b.T @ gradient @ theirs_a.T)  # Adam's first step, up to its epsilon
        expected = made.scaling * theirs_b @ step @ theirs_a
        assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_gradient_of_r_in_lora_xs_is_that_of_the_weight_between_the_frozen_factors(load):
    """∂L/∂R = s·Bᵀ (∂L/∂W) Aᵀ with B = U_r."""
    generator = torch.Generator().manual_seed(3)
    for _, layer in lora_layers(install_adapter(load(), plan("lora-xs"), None)):
        x, pull = (torch.randn(9, width, generator=generator) for width in (64, layer.out_features))
        (layer(x) * pull).sum().backward()
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"]
        expected = 2.0 * b.outer.double().T @ (pull.double().T @ x.double()) @ a.T
        assert torch.allclose(b.inner.grad.double(), expected, atol=1e-4 * expected.abs().max())
        assert [name for name, one in layer.named_parameters() if one.requires_grad] == ["lora_B.default.inner"]


def test_r_in_lora_xs_starts_at_zero_or_as_the_authors_start_it(load):
    before = logits(load())
    wrapped = install_adapter(load(), plan("lora-xs", r_init_std=1e-5), None)
    drawn = torch.cat([layer.lora_B["default"].inner.flatten() for _, layer in lora_layers(wrapped)])
    assert drawn.std().item() == pytest.approx(1e-5, rel=0.3)
    assert not torch.equal(logits(wrapped), before)
    assert torch.allclose(logits(wrapped), before, atol=1e-3)
    with pytest.raises(UsageError, match=r"--r-init-std must be at least 0, not -1\.0"):
        TrainConfig(mode="lora-xs", r_init_std=-1.0, model="m", dataset="d", output_dir="o")


def test_lora_mini_with_identities_outside_is_lora(load):
    mini = dict(lora_layers(install_adapter(load(), plan("lora-mini", target_modules=("q_proj",), outer_rank=64), None)))
    plain = dict(lora_layers(install_adapter(load(), plan("lora", target_modules=("q_proj",)), None)))
    for name, layer in mini.items():
        for factor in ("lora_A", "lora_B"):
            of_mini, of_lora = getattr(layer, factor)["default"], getattr(plain[name], factor)["default"]
            of_mini.outer.copy_(torch.eye(64))
            torch.nn.init.normal_(of_lora.weight)
            with torch.no_grad():
                of_mini.inner.copy_(of_lora.weight)
        x = torch.randn(3, 64)
        assert torch.allclose(layer(x), plain[name](x), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_lora_xs_from_an_earlier_version_keeps_its_stored_factors(load, tiny_model, tmp_path, monkeypatch):
    made = plan("lora-xs")
    with monkeypatch.context() as earlier:
        earlier.setattr("cora_cli.methods.parts.singular.principal_factors", older_factors)
        wrapped = install_adapter(load(), made, None)
    move(wrapped)
    save_adapter(wrapped, tmp_path / "adapter", facts_of(made, tiny_model))
    loaded = load_adapter(load(), resolve_model(str(tmp_path / "adapter")))
    assert torch.allclose(logits(loaded), logits(wrapped), atol=1e-5)
    for (_, one), (_, other) in zip(lora_layers(loaded), lora_layers(wrapped), strict=True):
        assert all(torch.equal(found, kept) for found, kept in zip(factors_of(one), factors_of(other), strict=True))


@pytest.mark.parametrize("mode", BOUNDED)
def test_a_rank_above_the_directions_of_a_weight_is_refused_before_the_model_is_touched(mode, load):
    model = load()
    with pytest.raises(CoraError, match=f"mode {mode} needs --rank ≤ 32 for .*k_proj, not 33"):
        install_adapter(model, plan(mode, rank=33), None)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("mode", CHANGED)
def test_a_change_of_the_base_is_stored_as_a_plain_lora_on_the_base_itself(mode, rslora, load, tiny_model, tmp_path):
    made = plan(mode, rslora=rslora)
    wrapped = installed(load(), made, None)
    move(wrapped)
    save_adapter(wrapped, tmp_path / "adapter", facts_of(made, tiny_model))
    plain = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    assert plain.peft_config["default"].r == 2 * RANK
    assert torch.allclose(logits(plain), logits(wrapped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["pissa", "olora"])
def test_the_stored_difference_is_the_one_that_peft_itself_converts_to(mode, load, tiny_model, tmp_path):
    made = plan(mode)
    ours = install_adapter(load(), made, None)
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=list(SHAPES), init_lora_weights=mode, task_type="CAUSAL_LM")
    theirs = get_peft_model(load(), config)
    config.init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    for wrapped in (ours, theirs):
        move(wrapped)
    config.init_lora_weights = mode
    theirs.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    save_adapter(ours, tmp_path / "cora", facts_of(made, tiny_model))
    one, other = (logits(PeftModel.from_pretrained(load(), str(tmp_path / name))) for name in ("cora", "peft"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("with_basis", [False, True])
def test_lora_mini_trains_between_orthonormal_outer_factors_or_the_basis(with_basis, load, tiny_basis):
    basis = read_basis(tiny_basis)
    made = plan("lora-mini", has_basis=with_basis, outer_rank=6)
    assert made.needs_basis is with_basis
    for name, layer in lora_layers(install_adapter(load(), made, basis if with_basis else None)):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        assert torch.allclose(a.outer @ a.outer.T, torch.eye(6), atol=1e-6)
        assert torch.allclose(b.outer.T @ b.outer, torch.eye(6), atol=1e-6)
        assert torch.equal(b.outer, basis.directions[name][:, :6]) is with_basis
        assert (a.inner.shape, b.inner.shape) == ((RANK, 6), (6, RANK))
        assert a.inner.any()
        assert not b.inner.any()


def test_an_outer_rank_above_what_a_weight_has_is_refused(load):
    with pytest.raises(
        CoraError, match="k_proj has 32 outputs, fewer than --outer-rank 33: no orthonormal B of that rank exists"
    ):
        install_adapter(load(), plan("lora-mini", outer_rank=33), None)


@pytest.mark.parametrize("mode", ["lora-xs", "lora-mini"])
def test_a_product_computes_with_gradients_what_its_weight_says(mode, load):
    wrapped = install_adapter(load(), plan(mode), None)
    move(wrapped)
    layer = next(layer for _, layer in lora_layers(wrapped))
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(3, 64)
    assert torch.allclose(b(a(x)), x @ (b.weight @ a.weight).T, rtol=1e-4, atol=1e-5)
    b(a(x)).sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {
        key.replace(".", ".default.") for key in METHODS[mode].trained
    }


@pytest.mark.parametrize("mode", ["pissa", "lora-xs", "lora-mini"])
def test_a_stored_equivalent_is_not_trained_on(mode, load, tiny_model, tmp_path):
    made = plan(mode)
    wrapped = install_adapter(load(), made, None)
    move(wrapped)
    save_adapter(wrapped, tmp_path / "adapter", facts_of(made, tiny_model))
    with pytest.raises(
        CoraError,
        match=f"of mode {mode} is stored as an equivalent plain LoRA; to continue training, resume from the run's checkpoints",
    ):
        load_adapter(load(), resolve_model(str(tmp_path / "adapter")), trainable=True)


FOREIGN = {"peft_type": "LOHA", "r": 2, "alpha": 4}


def test_any_method_of_peft_that_adapts_weights_can_be_installed_by_its_own_file(load):
    made = plan("peft", peft=FOREIGN)
    assert (made.rank, made.target_modules) == (2, tuple(SHAPES))
    wrapped = install_adapter(load(), made, None)
    assert torch.equal(logits(wrapped), logits(load()))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 * 4
    assert all("hada_" in name for name in trained)


def test_a_lora_from_a_file_trains_both_of_its_factors(load):
    wrapped = install_adapter(load(), plan("peft", peft={"peft_type": "lora", "r": 2, "target_modules": ["o_proj"]}), None)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2
    assert all("o_proj" in name for name in trained)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "LOHAA"}, "peft_type 'LOHAA' is none of .*LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING does not adapt linear layers"),
        ({"peft_type": "ADALORA"}, "ADALORA needs a call in each step"),
        ({"peft_type": "LORA", "rank": 3}, "PEFT refuses the configuration of LORA: .*rank"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "pissa, olora and mica are modes of their own"),
        ({"peft_type": "SHADOW"}, "SHADOW does not adapt linear layers"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "TRAINABLE_TOKENS does not adapt linear layers"),
        ({"peft_type": "LILY"}, "LILY weights its factors by a mean over all tokens of a batch"),
        ({"peft_type": "BEFT"}, "BEFT adds to the bias and not to the weight, so that the adapter could not be merged"),
        ({"peft_type": "LORA", "target_parameters": ["x"]}, "target_parameters names parameters outside linear layers"),
        ({"peft_type": "LORA", "lora_bias": True}, "lora_bias changes more than the weight"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [5]}, "alora_invocation_tokens applies to some tokens only"),
        (
            {"peft_type": "LORA", "task_type": "SEQ_CLS"},
            "task_type must be CAUSAL_LM, the only task that `cora train` trains, not 'SEQ_CLS'",
        ),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save trains complete modules next to the adapter"),
        ({"peft_type": "LORA", "modules_to_save": ["none"]}, "modules_to_save trains complete modules next to the adapter"),
        ({"peft_type": "LORA", "trainable_token_indices": [1]}, "trainable_token_indices trains rows of the embedding"),
        ({"peft_type": "LORA", "layer_replication": [[0, 2]]}, "layer_replication repeats layers of the base model"),
        ({"peft_type": "LORA", "rank_pattern": {"k_porj": 2}}, "rank_pattern has 'k_porj', which is none of the layers"),
        ({"peft_type": "LORA", "alpha_pattern": {"q_proj": 2, "o_proj": 2}}, "alpha_pattern has 'o_proj', which is none"),
        ({"peft_type": "LORA", "rank_pattern": {"k_proj(": 2}}, "rank_pattern has 'k_proj\\(', which is no regular expression"),
    ],
)
def test_a_file_that_describes_no_adapter_of_weights_is_refused_with_the_reason(values, said, load):
    with pytest.raises(CoraError, match=said):
        install_adapter(load(), plan("peft", peft=values), None)


@pytest.mark.parametrize(("bias", "counted"), [("all", 8), ("lora_only", 4)])
def test_biases_that_a_file_would_train_are_named_with_what_leaves_them_out(bias, counted):
    said = f'{counted} parameters next to the adapter would be trained too, such as .*bias, which .*, because of "bias": "{bias}"; "bias": "none"'
    targets = ["q_proj", "v_proj"]
    with pytest.raises(CoraError, match=said):
        install_adapter(
            make_llama(attention_bias=True),
            plan("peft", peft={"peft_type": "LORA", "bias": bias, "target_modules": targets}),
            None,
        )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"r": "eight"}, 'r must be an integer, not "eight"'),
        ({"r": None}, "r must be an integer, not null"),
        ({"r": 2.5}, "r must be an integer, not 2.5"),
        ({"r": True}, "r must be an integer, not true"),
        ({"alpha": None}, "alpha must be a number, not null"),
        ({"alpha": "8"}, 'alpha must be a number, not "8"'),
        ({"rank_dropout": [0.1]}, "rank_dropout must be a number, not [0.1]"),
        ({"init_weights": "no"}, 'init_weights must be true or false, not "no"'),
        ({"rank_pattern": 3}, "rank_pattern must be an object or null, not 3"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be a list of integers or an integer or null"),
        ({"peft_type": "LORA", "bias": "some"}, 'bias must be "none" or "all" or "lora_only", not "some"'),
        ({"peft_type": "LORA", "use_bdlora": 3}, "use_bdlora must be BdLoraConfig or null, not 3"),
        ({"target_modules": 3}, "target_modules must be a list of names"),
        ({"target_modules": [3]}, "target_modules must be a list of names"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_the_field_and_what_it_takes(values, said):
    with pytest.raises(CoraError, match=re.escape(f": {said}")) as caught:
        configured(plan("peft", peft={"peft_type": "LOHA", **values}))
    assert len(str(caught.value).splitlines()) == 1


def test_a_configuration_within_the_configuration_is_an_object_in_its_file():
    blocks = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
    made = configured(plan("peft", peft={"peft_type": "LORA", "use_bdlora": blocks}))
    assert made.use_bdlora.nblocks == 2


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("LORA", {"kasa_config": {}}, "kasa_config adds terms to the loss"),
        ("LORA", {"monteclora_config": {}}, "monteclora_config adds a term to the loss"),
        ("LORA", {"arrow_config": {"top_k": 2}}, "arrow_config chooses among other adapters"),
        ("LORA", {"eva_config": {"rho": 2.0}}, "eva_config belongs to a start that needs data"),
        ("ADAMSS", {"use_asa": True}, "use_asa needs a call after each step"),
    ],
)
def test_a_method_that_needs_more_than_the_loss_of_the_answers_is_refused(kind, setting, said):
    with pytest.raises(CoraError, match=f"--peft-config: {said}, which `cora train` does not do"):
        configured(plan("peft", peft={"peft_type": kind, **setting}))


@pytest.mark.parametrize(
    "kind", ["C3A", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "LORA", "MISS", "OFT", "VBLORA"]
)
def test_a_configuration_written_by_peft_itself_is_accepted(kind, tmp_path):
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert None in written.values()
    assert configured(plan("peft", peft=written)).peft_type == kind


def test_integers_count_as_floats_and_alphas_may_have_a_decimal_point():
    made = configured(plan("peft", peft={**FOREIGN, "rank_dropout": 0, "alpha": 2.5}))
    assert (made.rank_dropout, made.alpha) == (0.0, 2.5)


def test_a_package_that_a_method_needs_and_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(CoraError, match="PEFT refuses the configuration of ADAMSS: scikit-learn is required"):
        configured(plan("peft", peft={"peft_type": "ADAMSS"}))


def test_a_rank_that_the_file_leaves_open_is_that_of_the_flag(load):
    ranks = []
    for values in ({"peft_type": "LOHA"}, {"peft_type": "LOHA", "r": 2}):
        wrapped = install_adapter(load(), plan("peft", peft=values), None)
        ranks.append(wrapped.peft_config["default"].r)
    assert ranks == [RANK, 2]


@pytest.mark.parametrize(
    ("stated", "made"), [({}, (0, 32)), ({"oft_block_size": 16}, (0, 16)), ({"r": 4, "oft_block_size": 0}, (4, 0))]
)
def test_a_method_that_counts_blocks_gets_no_rank_that_its_file_does_not_state(stated, made):
    planned = plan("peft", peft={"peft_type": "OFT", **stated})
    config = configured(planned)
    assert (config.r, config.oft_block_size) == made
    said = METHODS["peft"].notices(planned)
    assert said == (
        [] if "r" in stated else ["--peft-config states no r, without which OFT has no rank, so --rank has no effect"]
    )


@pytest.mark.parametrize("values", [None, [], {}, {"r": 4}, {"peft_type": "LORA", "target_modules": ".*_proj"}])
def test_a_file_that_is_no_configuration_is_a_usage_error(values):
    with pytest.raises(UsageError, match="--peft-config"):
        plan("peft", peft=values)
