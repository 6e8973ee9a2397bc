"""ScalaBL: its start, its first step against the formulas in float64, its noise, and what is stored and evaluated of the distribution."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.adapters.posterior import drawn_models
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.parts.sampled import divergence
from cora_cli.methods.parts.starts import kaiming_uniform
from cora_cli.methods.registry import METHODS
from cora_cli.methods.scalabl import cycle_weight
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json, read_jsonl
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for

METHOD = METHODS["scalabl"]
COMMON = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


def step(number: int = 1, **changes) -> Step:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5, "initial_lr": 1.0}])
    return Step(number, 10, optimizer, **{"examples": 38, "batch": 104, **changes})  # type: ignore[arg-type]


def factors(model) -> list:
    return [(name, layer.lora_A["default"], layer) for name, layer in lora_layers(model)]


@pytest.fixture
def wrapped(tiny_model: Path):
    made = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan_of("scalabl", **COMMON), None)
    for _, _, layer in factors(made):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return made


def test_it_starts_as_the_singular_values_and_vectors_of_loras_a_with_small_deviations(tiny_model: Path):
    made = plan_of("scalabl", **COMMON)
    model = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), made, None)
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    for name, a, layer in factors(model):
        random = kaiming_uniform(made, name, "A", (4, layer.in_features)).double()
        assert torch.allclose(a.weight.double().T @ a.weight.double(), random.T @ random, atol=1e-6)
        assert torch.allclose(a.directions @ a.directions.T, torch.eye(4), atol=1e-5)
        deviation = a.log_deviation.exp()
        assert deviation.min() >= 0.05 / math.sqrt(2) * 0.9999
        assert deviation.max() <= 0.05 * 1.0001
        assert len(set(deviation[:, 0].tolist())) == 4


def test_without_noise_it_is_lora_with_the_rows_of_v_scaled(wrapped, tiny_model: Path):
    plain = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan_of("lora", **COMMON), None)
    for (_, a, layer), (_, theirs) in zip(factors(wrapped), lora_layers(plain), strict=True):
        theirs.lora_A["default"].weight.data = (a.log_mean.exp() * a.directions).detach()
        theirs.lora_B["default"].weight.data = layer.lora_B["default"].weight.detach().clone()
    assert torch.allclose(wrapped(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_the_divergence_is_that_of_two_gaussians_and_zero_where_they_are_equal():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = torch.distributions.Normal(a.exp(), b.exp()), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence
    assert divergence(a, b, "posterior-prior").item() == pytest.approx(kl(q, p).sum().item())
    assert divergence(a, b, "prior-posterior").item() == pytest.approx(kl(p, q).sum().item())
    for direction in ("posterior-prior", "prior-posterior"):
        none = divergence(torch.full((3,), -torch.inf), torch.zeros(3), direction)
        assert none.item() == 0


@pytest.mark.parametrize("direction", ["posterior-prior", "prior-posterior"])
def test_a_step_draws_once_and_follows_the_divergence_by_sgd(wrapped, direction: str):
    made = plan_of("scalabl", **COMMON, kl_learning_rate=0.1, kl_direction=direction)
    before = {name: (a.log_mean.detach().double(), a.log_deviation.detach().double()) for name, a, _ in factors(wrapped)}
    METHOD.before_step(wrapped, made, step())
    for _, a, layer in factors(wrapped):
        x = torch.randn(3, layer.in_features)
        rows = (a.log_mean.exp() + a.log_deviation.exp() * a.noise) * a.directions
        assert torch.allclose(a(x), x @ rows.T, atol=1e-5)
        assert torch.equal(a(x), a(x))
    METHOD.after_step(wrapped, made, step())
    rate = 0.1 * 0.5 * 2**1 / (2**5 - 1)  # M = ⌊100·38^(π/8) / 104⌋ = 4
    for name, a, _ in factors(wrapped):
        mean, deviation = before[name]
        if direction == "posterior-prior":
            of_mean, of_deviation = (2 * mean).exp(), (2 * deviation).exp() - 1
        else:
            of_mean = (2 * mean - 2 * deviation).exp()
            of_deviation = 1 - (1 + (2 * mean).exp()) / (2 * deviation).exp()
        assert torch.allclose(a.log_mean.double(), mean - rate * of_mean, atol=1e-6)
        assert torch.allclose(a.log_deviation.double(), deviation - rate * of_deviation, atol=1e-5)
        assert a.noise is None


def test_the_weights_of_a_cycle_double_and_start_again():
    weights = [cycle_weight(step(number)) for number in range(1, 6)]
    assert weights == [2 / 31, 4 / 31, 8 / 31, 16 / 31, 2 / 31]
    assert cycle_weight(step(1, examples=10**6, batch=1)) == 0  # of a cycle of 22,000 steps


def test_the_first_step_is_adam_on_the_sampled_loss_and_sgd_on_the_divergence(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    """Adam's first step has the size of the learning rate in the direction of the gradient at the drawn weights; B alone has one."""
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="scalabl", max_steps=2, warmup_ratio=0.0, save_steps=1)
    train(config)
    state = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    plan = config.adapter_plan()
    start = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan, None)
    rate = 0.2 * cycle_weight(Step(1, 2, None, 36, 8))  # type: ignore[arg-type]
    for name, a, _ in factors(start):
        key = f"base_model.model.{name}.lora_A"
        expected = a.log_mean.double() - rate * (2 * a.log_mean.double()).exp()
        assert torch.allclose(state[f"{key}.log_mean"].double(), expected, rtol=1e-6)
        assert torch.equal(state[f"{key}.directions"], a.directions)
        moved = state[f"base_model.model.{name}.lora_B.weight"].abs()
        assert moved.max().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scalabl") / "run"
    train(config_for(tiny_model, tiny_data, output, mode="scalabl", max_steps=4, scalabl_deviation=0.5, learning_rate=0.05))
    return output


def evaluated(run: Path, output: Path, **settings):
    common = {"dtype": "fp32", "device": "cpu", "max_new_tokens": 3, "metrics": ("calibration",), "bootstrap": 100}
    return evaluate(EvaluateConfig(runs=(str(run),), output_dir=str(output), **{**common, **settings}))[0].record


def test_draws_are_averaged_and_the_mean_is_what_was_trained(run: Path, tiny_model: Path, tmp_path: Path):
    loss = read_json(run / "run.json")["heldout"]["after"]["loss"]
    mean = evaluated(run, tmp_path / "mean", draws=0)
    assert mean["metrics"]["nll"]["value"] == pytest.approx(loss, rel=1e-5)
    assert "draws" not in mean["generation"]["settings"]
    drawn = evaluated(run, tmp_path / "drawn", draws=3)
    assert drawn["generation"]["settings"]["draws"] == [3]
    assert drawn["metrics"]["nll"]["value"] != pytest.approx(loss, rel=1e-3)
    adapter = resolve_model(str(run))
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter).get_base_model()
    models = drawn_models(model, adapter, 3)
    [line, *_] = read_jsonl(tmp_path / "drawn" / "predictions.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer(line["prompt"])["input_ids"]
    ids = tokenizer(line["prompt"] + line["reference"])["input_ids"] + [2]
    with torch.no_grad():
        p = torch.stack([one(torch.tensor([ids])).logits[0].softmax(-1) for one in models]).mean(0)
    expected = [-p[place - 1, ids[place]].log().item() for place in range(len(prompt), len(ids))]
    assert line["reference_tokens"]["nll"] == pytest.approx(expected, rel=1e-3)


def test_a_draw_scales_the_rows_of_a_by_the_learned_deviation(run: Path, tiny_model: Path):
    adapter = resolve_model(str(run))
    checkpoint = load_file(run / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter).get_base_model()
    name = "model.layers.1.self_attn.v_proj"
    stored = model.get_submodule(name).lora_A["default"].weight.detach()
    scales = []
    for one in drawn_models(model, adapter, 60):
        a = one.get_submodule(name).lora_A["default"].weight
        scale = (a * stored).sum(1) / stored.square().sum(1)
        assert torch.allclose(a, scale[:, None] * stored, atol=1e-5)
        scales.append(scale)
        assert one.get_submodule(name).base_layer.weight is model.get_submodule(name).base_layer.weight
    key = f"base_model.model.{name}.lora_A"
    expected = (checkpoint[f"{key}.log_deviation"] - checkpoint[f"{key}.log_mean"]).exp()[:, 0]
    found = torch.stack(scales)
    assert torch.allclose(found.mean(0), torch.ones(4), atol=(4 * expected.max() / 60**0.5).item())
    assert torch.allclose(found.std(0), expected, rtol=0.35)


def test_merging_and_exporting_write_the_mean_and_say_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    merge_adapter(resolve_model(str(run)), tmp_path / "merged")
    export_adapter(resolve_model(str(run)), tmp_path / "exported")
    assert capsys.readouterr().err.count("has a distribution of weights; what is written here is its mean") == 2
    assert not (tmp_path / "exported" / "posterior.safetensors").exists()


def test_what_makes_no_sense_is_refused(run: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path):
    common = {"model": "m", "dataset": "d", "output_dir": "o"}
    for settings, said in (
        ({"mode": "scalabl", "scalabl_deviation": 0.0}, "--scalabl-deviation must be positive, not 0.0"),
        ({"mode": "scalabl", "kl_learning_rate": -1.0}, "--kl-learning-rate must be at least 0, not -1.0"),
        ({"mode": "lora", "kl_learning_rate": 1.0}, "--kl-learning-rate does not apply to mode lora"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**common, **settings)
    with pytest.raises(UsageError, match="--draws must be at least 0, not -1"):
        EvaluateConfig(runs=("run",), draws=-1)
    with pytest.raises(CoraError, match=r"mode scalabl needs --rank ≤ 64 for model.layers.0.self_attn.q_proj, not 65"):
        train(config_for(tiny_model, tiny_data, tmp_path / "wide", mode="scalabl", rank=65))
    train(config_for(tiny_model, tiny_data, tmp_path / "lora"))
    with pytest.raises(
        CoraError, match="lora has no distribution of weights: --draws applies to runs of mode scalabl and of `cora laplace`"
    ):
        evaluated(tmp_path / "lora", tmp_path / "out", draws=2)
