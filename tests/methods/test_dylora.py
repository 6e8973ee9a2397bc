"""DyLoRA: what a step uses and trains, and its adapter at lower ranks."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.methods.dylora import drawn_rank
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import ADAPTER, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json
from cora_cli.reporting.found import find_experiments
from cora_cli.training.config import TrainConfig
from cora_cli.training.laplace import laplace
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for

METHOD = METHODS["dylora"]
COMMON = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


def step(number: int) -> Step:
    return Step(number, 100, None)  # type: ignore[arg-type]


@pytest.fixture
def install(tiny_model: Path):
    def installed(made):
        wrapped = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), made, None)
        for _, layer in lora_layers(wrapped):
            torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.1)
        return wrapped

    return installed


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_uses_the_first_b_pairs_and_trains_the_last_of_them_or_all(frozen, install):
    """ΔW = (alpha / b)·B[:, :b]·A[:b]; with G = ∂L/∂W, ∂A = (alpha / b)·B[:, :b]ᵀ·G, in float64."""
    made = plan_of("dylora", **COMMON, dylora_frozen=frozen)
    wrapped = install(made)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    for number in range(1, 9):
        b = drawn_rank(made, number)
        METHOD.before_step(wrapped, made, step(number))
        for _, layer in lora_layers(wrapped):
            factor_a, factor_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            change = (layer(x) - layer.get_base_layer()(x)).double()
            wide_a, wide_b = factor_a.weight.detach().double(), factor_b.weight.detach().double()
            assert torch.allclose(change, 8 / b * x.double() @ (wide_b[:, :b] @ wide_a[:b]).T, atol=1e-4)
            wrapped.zero_grad()
            (change.float().square().sum() / 2).backward()
            g = change.detach().T @ x.double()
            learning = slice(b - 1, b) if frozen else slice(0, b)
            expected_a, expected_b = torch.zeros_like(wide_a), torch.zeros_like(wide_b)
            expected_a[learning] = (8 / b * wide_b.T @ g)[learning]
            expected_b[:, learning] = (8 / b * g @ wide_a.T)[:, learning]
            assert torch.allclose(factor_a.weight.grad.double(), expected_a, rtol=1e-3, atol=1e-3)
            assert torch.allclose(factor_b.weight.grad.double(), expected_b, rtol=1e-3, atol=1e-3)
        METHOD.after_step(wrapped, made, step(number))
    assert all(layer.scaling[ADAPTER] == 2.0 and layer.lora_A[ADAPTER].first is None for _, layer in lora_layers(wrapped))


@pytest.mark.parametrize("frozen", [True, False])
def test_ten_steps_of_adamw_are_those_of_the_papers_formula(frozen, tiny_model):
    """W + (alpha / r)·(√(r/b)·B[:, :b])·(√(r/b)·A[:b]), written into a plain model, with all of A and B in the optimizer."""
    made = plan_of("dylora", **COMMON, dylora_frozen=frozen)
    ours = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), made, None)
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    factors = {
        f"{name}.weight": tuple(
            torch.nn.Parameter(getattr(layer, f"lora_{one}")[ADAPTER].weight.detach().clone()) for one in "AB"
        )
        for name, layer in lora_layers(ours)
    }
    trained = {"lr": 0.02, "weight_decay": 0.0}
    mine = torch.optim.AdamW([one for one in ours.parameters() if one.requires_grad], **trained)
    theirs = torch.optim.AdamW([one for pair in factors.values() for one in pair], **trained)

    def expected_loss(b: int) -> torch.Tensor:
        changed = {}
        for key, (wide_a, wide_b) in factors.items():
            a, past = (4 / b) ** 0.5 * wide_a[:b], (4 / b) ** 0.5 * wide_b[:, :b]
            if frozen:
                a, past = torch.cat([a[:-1].detach(), a[-1:]]), torch.cat([past[:, :-1].detach(), past[:, -1:]], 1)
            changed[key] = plain.get_parameter(key).detach() + 8 / 4 * past @ a
        return torch.func.functional_call(plain, changed, (), {"input_ids": IDS, "labels": IDS}).loss

    drawn = []
    for number in range(1, 11):
        drawn.append(drawn_rank(made, number))
        mine.zero_grad(set_to_none=False)
        theirs.zero_grad(set_to_none=False)
        METHOD.before_step(ours, made, step(number))
        loss, expected = ours(input_ids=IDS, labels=IDS).loss, expected_loss(drawn[-1])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        loss.backward()
        expected.backward()
        mine.step()
        theirs.step()
        METHOD.after_step(ours, made, step(number))
    assert set(drawn) == {1, 2, 3, 4}
    for name, layer in lora_layers(ours):
        for one, wanted in zip("AB", factors[f"{name}.weight"], strict=True):
            assert torch.allclose(getattr(layer, f"lora_{one}")[ADAPTER].weight, wanted, atol=2e-3)


def test_the_ranks_are_uniform_and_those_of_the_seed():
    made, other = (plan_of("dylora", **{**COMMON, "seed": seed}) for seed in (0, 1))
    drawn = [drawn_rank(made, number) for number in range(1, 401)]
    assert all(70 <= drawn.count(rank) <= 130 for rank in (1, 2, 3, 4))
    assert drawn != [drawn_rank(other, number) for number in range(1, 401)]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dylora") / "run"
    train(config_for(tiny_model, tiny_data, output, mode="dylora", max_steps=6, learning_rate=0.03))
    return output


@torch.no_grad()
def test_an_export_at_a_rank_is_the_first_pairs_with_the_scaling_of_that_rank(run, tiny_model, tmp_path):
    assert export_adapter(resolve_model(str(run)), tmp_path / "two", rank=2) == 2
    full, cut = (load_file(path / "adapter_model.safetensors") for path in (run / "adapter", tmp_path / "two"))
    for key, tensor in full.items():
        assert torch.equal(cut[key], tensor[:2] if ".lora_A." in key else tensor[:, :2])
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    for key in (key for key in full if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = model.get_parameter(f"{name}.weight")
        weight += 8 / 2 * full[key.replace("_A", "_B")][:, :2] @ full[key][:2]
    exported = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), str(tmp_path / "two")).eval()
    assert exported.peft_config["default"].r == 2
    assert torch.allclose(exported(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-3)


def test_a_run_is_evaluated_at_several_ranks_each_in_its_own_place(run, tmp_path, capsys):
    settings = {
        "device": "cpu",
        "dtype": "fp32",
        "max_new_tokens": 4,
        "metrics": ("rouge1",),
        "bootstrap": 100,
        "with_base": True,
    }
    results = evaluate(EvaluateConfig(runs=(str(run),), ranks=("1", "4"), **settings))
    assert [result.name for result in results[1:]] == [f"{run} rank 1", f"{run} rank 4"]
    for rank in (1, 4):
        assert read_json(run / f"eval-rank-{rank}" / "generation.json")["settings"]["rank"] == rank
    export_adapter(resolve_model(str(run)), tmp_path / "one", rank=1)
    alone = {"dataset": str(run / "test.jsonl"), "output_dir": str(tmp_path / "out"), **settings, "with_base": False}
    evaluate(EvaluateConfig(model=str(tmp_path / "one"), **alone))
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == (run / "eval-rank-1/predictions.jsonl").read_bytes()
    # A report of the run has a row for each rank.
    (experiment,) = find_experiments([str(run)])
    assert [row.label for row in experiment.rows] == ["dylora", f"{run} rank 1", f"{run} rank 4"]
    assert len({row.group for row in experiment.rows}) == 1
    assert [row.evaluation for row in experiment.rows[1:]] == [run / "eval-rank-1", run / "eval-rank-4"]
    # One that answers other records is left out.
    evaluate(EvaluateConfig(runs=(str(run),), ranks=("2",), limit=2, **{**settings, "with_base": False}))
    (experiment,) = find_experiments([str(run)])
    assert [row.evaluation for row in experiment.rows[1:]] == [run / "eval-rank-1", run / "eval-rank-4"]
    assert f"{run}/eval-rank-2 is left out: it answers other records than {run}/eval-rank-1" in capsys.readouterr().err


def test_the_ranks_of_a_laplace_approximation_are_those_of_its_mean(run, tmp_path):
    laplace(str(run), tmp_path / "laplace", limit=4, device="cpu")
    settings = {"metrics": ("calibration",), "device": "cpu", "dtype": "fp32", "max_new_tokens": 2, "ranks": ("2",)}
    with pytest.raises(CoraError, match="belongs to its full rank: --ranks cuts its mean; give --draws 0 as well"):
        evaluate(EvaluateConfig(runs=(str(tmp_path / "laplace"),), **settings))
    mean, trained = (
        evaluate(EvaluateConfig(runs=(str(place),), output_dir=str(tmp_path / place.name / "out"), draws=draws, **settings))
        for place, draws in ((tmp_path / "laplace", 0), (run, None))
    )
    assert mean[0].record["metrics"] == trained[0].record["metrics"]


def test_a_rank_that_was_not_trained_is_refused(run, tiny_model, tiny_data, tmp_path):
    with pytest.raises(CoraError, match=r"has the ranks 1 to 4, not 5"):
        export_adapter(resolve_model(str(run)), tmp_path / "out", rank=5)
    with pytest.raises(CoraError, match=r"has the ranks 1 to 4, not 0"):
        export_adapter(resolve_model(str(run)), tmp_path / "out", rank=0)
    train(config_for(tiny_model, tiny_data, tmp_path / "lora", max_steps=1))
    with pytest.raises(CoraError, match="cannot be cut to rank 2: only mode dylora trains for lower ranks, not mode lora"):
        evaluate(EvaluateConfig(runs=(str(tmp_path / "lora"),), ranks=("2",), metrics=("rouge1",), device="cpu"))
    for settings, said in (
        ({"runs": ("r",), "ranks": ("0",)}, "--ranks must be positive integers, separated by commas, not '0'"),
        ({"runs": ("r",), "ranks": ("2", "x")}, "--ranks must be positive integers, separated by commas, not '2,x'"),
        ({"from_predictions": "p", "ranks": ("2",)}, "--ranks has no effect with --from"),
        ({"runs": ("r",), "ranks": ("2",), "backend": "vllm"}, "--ranks needs --backend transformers"),
    ):
        with pytest.raises(UsageError, match=said):
            EvaluateConfig(**settings)
    with pytest.raises(UsageError, match="--dylora-frozen does not apply to mode lora"):
        TrainConfig(model="m", dataset="d", output_dir="o", mode="lora", dylora_frozen=False)
    with pytest.raises(UsageError, match="--rslora does not apply to mode dylora"):
        TrainConfig(model="m", dataset="d", output_dir="o", mode="dylora", rslora=True)
