"""Laplace-LoRA of a finished run: its curvature, its linearised draws, and what it refuses."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cora_cli import writing
from cora_cli.adapters import posterior
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.adapters.posterior import drawn_models
from cora_cli.cli import app
from cora_cli.device import select_hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.backend import open_transformers
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.generate import BatchedGenerate
from cora_cli.evaluation.mixture import mixture
from cora_cli.evaluation.targets import find_targets
from cora_cli.models.references import resolve_model
from cora_cli.reporting.report import report
from cora_cli.rundir import RunDirectory
from cora_cli.training.laplace import laplace
from cora_cli.training.run import train
from tests.conftest import VOCABULARY
from tests.evaluation.helpers import unsealed

from .families import COMMON, EXPERTS
from .helpers import config_for, record_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("map") / "run"
    train(config_for(tiny_model, tiny_data, output, max_steps=4, target_modules=("q_proj", "v_proj")))
    return output


@pytest.fixture(scope="module")
def fitted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("laplace") / "laplace"
    laplace(str(run), output, limit=8, directions=16, prior_precision=20.0, device="cpu")
    return output


def evaluated(run: Path, output: Path, **settings: Any) -> dict[str, Any]:
    common = {"dtype": "fp32", "device": "cpu", "max_new_tokens": 3, "metrics": ("calibration",), "bootstrap": 100}
    return evaluate(EvaluateConfig(runs=(str(run),), output_dir=str(output), **{**common, **settings}))[0].record


def loaded(run: Path, tiny_model: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return load_adapter(base, resolve_model(str(run))).get_base_model()


def test_a_run_decides_by_no_setting_of_its_own_that_code_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def prepared(config: Any, *_: Any) -> None:
        seen.append(config.trust_remote_code)
        raise CoraError("enough")

    monkeypatch.setattr("cora_cli.training.laplace.prepare", prepared)
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    settings = copied / "config.yaml"
    settings.write_text(settings.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    for trusted in (False, True):
        with pytest.raises(CoraError, match="enough"):
            laplace(str(copied), tmp_path / "out", device="cpu", trust_remote_code=trusted)
    assert seen == [False, True]


def test_the_result_is_the_run_with_a_distribution_around_it(run: Path, fitted: Path, tiny_model: Path, tmp_path: Path):
    assert record_of(fitted)["laplace"]["prior_precision"] == 20
    assert record_of(fitted)["result_sha256"] == RunDirectory(fitted).result_hash() != record_of(run)["result_sha256"]
    loss = record_of(run)["heldout"]["after"]["loss"]
    mean = evaluated(fitted, tmp_path / "mean", draws=0)["metrics"]["nll"]["value"]
    drawn = evaluated(fitted, tmp_path / "drawn", draws=4)
    assert mean == pytest.approx(loss, rel=1e-5)
    assert drawn["metrics"]["nll"]["value"] != pytest.approx(loss, rel=1e-4)
    assert drawn["generation"]["settings"]["draws"] == [4]
    evaluated(run, run / "eval")
    evaluated(fitted, fitted / "eval", draws=4)
    text = report([str(run), str(fitted)], "markdown")
    assert "| laplace lora r=4" in text
    laplace(str(run), tmp_path / "other", limit=8, directions=16, prior_precision=40.0, device="cpu")
    evaluated(tmp_path / "other", tmp_path / "other" / "eval", draws=4)
    text = report([str(fitted), str(tmp_path / "other")], "markdown")
    assert r"| laplace lora prior\_precision=20.0 r=4" in text
    assert r"| laplace lora prior\_precision=40.0 r=4" in text
    merge_adapter(resolve_model(str(fitted)), tmp_path / "merged")
    assert not (tmp_path / "merged" / "posterior.safetensors").exists()


def test_a_damaged_distribution_is_written_by_laplace_alone(fitted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(fitted, tmp_path / "damaged"))
    before = load_file(damaged / "adapter" / "posterior.safetensors")
    save_file({name: 2 * value for name, value in before.items()}, damaged / "adapter" / "posterior.safetensors")
    record = (damaged / "run.json").read_bytes()
    again = config_for(tiny_model, tiny_data, damaged, max_steps=4, target_modules=("q_proj", "v_proj"), resume=True)
    for call in (lambda: evaluated(damaged, tmp_path / "out"), lambda: train(again)):
        with pytest.raises(
            CoraError, match=r"posterior\.safetensors was changed .* again with `cora laplace` into another directory$"
        ):
            call()
    assert (damaged / "run.json").read_bytes() == record


def test_a_precision_without_bound_gives_the_trained_model(run: Path, tmp_path: Path):
    laplace(str(run), tmp_path / "sure", limit=2, prior_precision=1e14, device="cpu")
    loss = record_of(run)["heldout"]["after"]["loss"]
    assert evaluated(tmp_path / "sure", tmp_path / "out", draws=2)["metrics"]["nll"]["value"] == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def experts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with the tokenizer of the tiny model."""
    place, tokenizer = tmp_path_factory.mktemp("models") / "experts", AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", **COMMON | EXPERTS | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("family", ["llama", "experts"])
def test_draws_are_linear_in_the_weights_by_a_central_difference(
    family: str, fitted: Path, tiny_model: Path, experts: Path, tiny_data: Path, tmp_path: Path
):
    base = tiny_model if family == "llama" else experts
    if family == "experts":
        train(config_for(base, tiny_data, tmp_path / "run", max_steps=4, target_modules=("q_proj", "v_proj")))
        laplace(str(tmp_path / "run"), tmp_path / "fitted", limit=8, directions=16, prior_precision=20.0, device="cpu")
        fitted = tmp_path / "fitted"
    model = loaded(fitted, base)
    [draw] = drawn_models(model, resolve_model(str(fitted)), 1)
    with torch.no_grad():
        value = model(IDS).logits
        change = draw(IDS).logits - value
    tangents = {}
    for name, module in draw.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            tangents[name] = module.tangent
    assert len(tangents) == 8
    model = model.double()
    if family == "experts":  # their kernel takes no float64
        model.set_experts_implementation("eager")
    ends = []
    for sign in (1e-3, -1e-3):  # transformers computes norms in float32, whose noise a smaller step would magnify
        with torch.no_grad():
            for name, tangent in tangents.items():
                model.get_submodule(name).weight += sign * tangent
            ends.append(model(IDS).logits)
            for name, tangent in tangents.items():
                model.get_submodule(name).weight -= sign * tangent
    expected = (ends[0] - ends[1]) / 2e-3
    assert change.abs().max() > 0.01
    assert torch.allclose(change.double(), expected, atol=1e-3 * expected.abs().max().item())


class OwnFunction(torch.autograd.Function):
    """As the GELU of BLOOM: with a derivative of its own, backwards alone."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_a_model_without_the_derivatives_of_draws_is_refused_with_the_remedy():
    posterior._enter_level()
    weight = forward_ad.make_dual(torch.ones(2), torch.ones(2))
    with pytest.raises(CoraError, match=r"this model cannot be linearised \(.*jvp.*\); --draws 0 evaluates its mean"):
        posterior._linearised(lambda: OwnFunction.apply(weight))()


def test_generation_takes_the_most_likely_token_of_the_averaged_draws(fitted: Path, tiny_model: Path):
    adapter = resolve_model(str(fitted))
    mixed = mixture(drawn_models(loaded(fitted, tiny_model), adapter, 3))
    prompt = [5, 9, 100, 7]
    [answer] = BatchedGenerate(mixed, [VOCABULARY - 1], VOCABULARY - 1, 1, 4).answer([prompt], lambda: None)
    draws = drawn_models(loaded(fitted, tiny_model), adapter, 3)
    for place, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:place]])
        p = torch.stack([one(ids, use_cache=False).logits[0, -1].softmax(-1) for one in draws]).mean(0)
        assert p[token] > p.max() * 0.999


@pytest.mark.slow
def test_one_draw_shows_how_prompts_are_answered_together(
    fitted: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """All draws are models of one kind, so that an engine that starts does not run each of them on its probes."""
    calls = [0, 0, 0]

    def counted(*arguments: Any) -> list[Any]:
        models = drawn_models(*arguments)
        for place, one in enumerate(models):
            one.forward = functools.wraps(one.forward)(functools.partial(count, place, one.forward))
        return models

    def count(place: int, forward: Any, *arguments: Any, **named: Any) -> Any:
        calls[place] += 1
        return forward(*arguments, **named)

    monkeypatch.setattr("cora_cli.evaluation.backend.drawn_models", counted)
    config = EvaluateConfig(runs=(str(fitted),), output_dir=str(tmp_path), draws=3, batch_size=4, device="cpu", dtype="fp32")
    (target,) = find_targets(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    opened = open_transformers(config, target, select_hardware("cpu", "fp32"), tokenizer, [])
    engine = opened.start([[5, 9, 100, 7], [5, 9], [8, 3, 100]])
    assert calls[0] > 0
    assert calls[1:] == [0, 0]
    engine.answer([[5, 9, 100, 7], [5, 9]], lambda: None)
    assert min(calls[1:]) > 0


def test_the_curvature_is_reproducible_and_a_part_of_the_records_stands_for_all(run: Path, tmp_path: Path):
    first = laplace(str(run), tmp_path / "first", limit=6, device="cpu")
    assert first == laplace(str(run), tmp_path / "second", limit=6, device="cpu")
    assert RunDirectory(tmp_path / "first").result_hash() == RunDirectory(tmp_path / "second").result_hash()
    every = laplace(str(run), tmp_path / "all", device="cpu", directions=1000)
    some = laplace(str(run), tmp_path / "half", device="cpu", directions=1000, limit=18)
    assert every["records"] == 36
    assert 0 < every["decided_directions"] < every["parameters"]
    assert some["prior_precision"] == pytest.approx(every["prior_precision"], rel=0.2)


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_a_run_whose_inputs_have_moved_says_where_to_write_their_new_place(name: str, run: Path, tmp_path: Path):
    shutil.copytree(run, moved := tmp_path / "moved")
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    place = settings[name]
    (moved / "config.yaml").write_text(yaml.safe_dump({**settings, name: f"{place}-gone"}))
    with pytest.raises(CoraError, match=rf"the {name} of {moved} is no longer at {place}-gone; .* into {moved}/config.yaml"):
        laplace(str(moved), tmp_path / "laplace", limit=2)
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    laplace(str(moved), tmp_path / "laplace", limit=2)


def test_what_has_no_laplace_approximation_is_refused(
    run: Path, fitted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    def refused(said: str, name: str) -> None:
        with pytest.raises(CoraError, match=said):
            laplace(name, tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

    refused("is not a cora run", str(tiny_model))
    refused("has a distribution of weights already; name the run that it was made of", str(fitted))
    train(config_for(tiny_model, tiny_data, tmp_path / "xs", mode="lora-xs", max_steps=1))
    refused(
        r"needs a run that trained A and B of each layer as they are .* \(mode lora, .*\), not .* of mode lora-xs",
        str(tmp_path / "xs"),
    )
    other = Path(shutil.copytree(run, tmp_path / "other"))
    text = (other / "config.yaml").read_text()
    assert "split_seed: 0" in text
    (other / "config.yaml").write_text(text.replace("split_seed: 0", "split_seed: 3"))
    refused("the data set of .* is not the one that it was trained with", str(other))
    (other / "config.yaml").write_text(text.replace("weight_decay: 0.0", "weight_decay: 0.5"))
    refused(r"config\.yaml has weight_decay 0\.5, but the run was trained with 0\.0; restore the file", str(other))
    (other / "config.yaml").write_text(f"{text}mood: calm\n")
    refused(r"config\.yaml is damaged or from another version of cora: it has the unknown key mood", str(other))
    (other / "config.yaml").write_text(text.replace("split_seed: 0", "split_seed: none"))
    refused(r'config\.yaml: split_seed is damaged .*: it must be an integer, not "none"', str(other))
    other = Path(shutil.copytree(run, tmp_path / "retokenized"))
    record = unsealed(other / "run.json")
    record["fingerprint"]["tokenizer_sha256"] = "0" * 64
    writing.write_json(other / "run.json", record)
    refused("the tokenizer of .* is not the one that it was trained with", str(other))
    for arguments, said in (
        (["--prior-precision", "0"], "--prior-precision must be positive, not 0"),
        (["--directions", "0"], "--directions must be at least 1, not 0"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
    ):
        result = CliRunner().invoke(app, ["laplace", str(run), "-o", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2
        assert said in result.stderr
    damaged = Path(shutil.copytree(fitted, tmp_path / "damaged"))
    (damaged / "adapter" / "posterior.safetensors").write_bytes(b"no")
    record = unsealed(damaged / "run.json")

    writing.write_json(damaged / "run.json", {**record, "result_sha256": RunDirectory(damaged).result_hash()})
    with pytest.raises(CoraError, match=r"posterior.safetensors cannot be read"):
        evaluated(damaged, tmp_path / "evaluation")
