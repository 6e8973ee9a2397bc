"""What `cora train --probe` measures: energy against direct computation, the examples it takes, and the record that it writes."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.starts import orthonormal
from cora_cli.records import read_probe
from cora_cli.training.config import TrainConfig
from cora_cli.training.observe import tokens_hash
from cora_cli.training.prepare import prepare
from cora_cli.training.probe import describe, energy_inside, probe, probe_examples, write_probe

from .helpers import config_for

FB = {"mode": "fb", "b_init": "orthonormal"}


def test_a_basis_that_contains_the_gradient_has_all_of_its_energy_and_one_outside_of_it_none():
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    gradient = u[:, :3] @ torch.randn(3, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = u[:, :8] @ torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = energy_inside({"within": (gradient, mixed), "outside": (2 * gradient, u[:, 8:12])})
    assert found["matrices"]["within"] == pytest.approx(1.0)
    assert found["matrices"]["outside"] == pytest.approx(0.0, abs=1e-12)
    assert found["total"] == pytest.approx(1 / 5), "a matrix counts by its energy"
    assert found["chance"] == pytest.approx((8 / 40 + 4 * 4 / 40) / 5)
    assert energy_inside({"zero": (gradient, torch.zeros(40, 3))}) is None


def test_random_directions_have_the_chance_of_their_number():
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    draws = [energy_inside({"w": (gradient, torch.randn(30, 6, generator=generator))}) for _ in range(400)]
    assert all(one["chance"] == pytest.approx(6 / 30) for one in draws)
    shares = torch.tensor([one["total"] for one in draws])
    assert float(shares.mean()) == pytest.approx(0.2, abs=4 * float(shares.std()) / 20)


def test_the_energy_is_that_of_the_gradient_at_the_start_of_the_run(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", **FB, probe_examples=3, probe=str(tmp_path / "probe.json"))
    record = write_probe(config)
    prepared = prepare(config)
    examples = prepared.train.examples[-3:]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(ids).logits[0, example.prompt_length - 1 : -1]
        targets = ids[0, example.prompt_length :]
        total, tokens = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), tokens + len(targets)
    (total / tokens).backward()
    energy, held, norms = record["probe"]["energy"], 0.0, 0.0
    for name in prepared.layers:
        gradient = model.get_submodule(name).weight.grad.double()
        inside = float((orthonormal(prepared.plan, name, "B", len(gradient), 4).double().T @ gradient).square().sum())
        norm = float(gradient.square().sum())
        assert energy["output"]["matrices"][name] == pytest.approx(inside / norm, rel=1e-3)
        assert energy["norms_squared"][name] == pytest.approx(norm, rel=1e-3)
        held, norms = held + inside, norms + norm
    assert energy["output"]["total"] == pytest.approx(held / norms, rel=1e-3)
    assert energy["input"] is None, "A starts at zero"
    assert read_probe(tmp_path / "probe.json") == record
    assert record["probe"]["sha256"] == tokens_hash(examples)
    assert record["fingerprint"]["settings"]["b_init"] == "orthonormal"
    assert record["probe"]["curvature"]["parameters"] == record["parameters"]["trained"]
    said = describe(record)
    assert f"gradient energy in the span of B: {held / norms:.4f} of ‖∂L/∂W‖² in 6 matrices" in said
    assert "largest Hessian eigenvalue in 1,536 trained parameters" in said
    assert not (tmp_path / "run").exists()


def test_a_b_from_the_gradient_is_measured_on_other_examples_and_has_more_than_chance(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", b_init="gradient", start_examples=8)
    prepared = prepare(config)
    count = len(prepared.train.examples)
    assert probe_examples(prepared, count - 8) == prepared.train.examples[8:]
    with pytest.raises(
        CoraError, match=rf"--probe-examples {count - 7} needs as many training examples apart from the 8 that the start"
    ):
        probe_examples(prepared, count - 7)
    assert probe_examples(prepared, None) == prepared.train.examples[-min(32, count - 8) :]
    record = probe(dataclasses.replace(config, probe="unused", probe_examples=8), most_products=1)
    energy = record["probe"]["energy"]["output"]
    assert energy["total"] > 2 * energy["chance"]
    assert record["start"]["sha256"] == tokens_hash(prepared.start_examples)
    assert record["start"]["sha256"] != record["probe"]["sha256"]


def test_a_lora_is_measured_inside_its_a_and_a_full_model_by_its_curvature_alone(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", probe=str(tmp_path / "p"), probe_examples=2)
    energy = probe(config, most_products=1)["probe"]["energy"]
    assert energy["output"] is None, "B starts at zero"
    assert 0 < energy["input"]["total"] < 1
    assert energy["input"]["chance"] == pytest.approx(4 / 64)
    found = probe(dataclasses.replace(config, mode="full"), most_products=1)
    assert found["probe"]["energy"] is None
    assert found["probe"]["curvature"]["parameters"] == found["parameters"]["trained"] == found["parameters"]["total"]


def test_the_loss_of_a_method_itself_counts(tiny_model, tiny_data, tmp_path):
    settings = {"mode": "clora", "probe": str(tmp_path / "p"), "probe_examples": 2}
    found = [
        probe(config_for(tiny_model, tiny_data, tmp_path / "run", **settings, clora_weight=weight), most_products=6)
        for weight in (0.0, 1e4)
    ]
    assert found[1]["probe"]["curvature"]["largest_eigenvalue"] > 2 * found[0]["probe"]["curvature"]["largest_eigenvalue"]


def test_what_has_no_gradient_is_refused(tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", b_init="zeros", probe=str(tmp_path / "p"))
    with pytest.raises(CoraError, match="--probe has nothing to measure: a frozen factor is zero"):
        probe(config)


def test_several_processes_are_refused(tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CoraError, match="--probe measures in one process, not in 2"):
        probe(config_for(tiny_model, tiny_data, tmp_path / "run", probe=str(tmp_path / "p")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"probe_examples": 4}, "--probe-examples has no effect without --probe FILE"),
        ({"probe": "p", "probe_examples": 0}, "--probe-examples must be at least 1, not 0"),
        ({"probe": "p", "dry_run": True}, "--probe does not go with --dry-run"),
        ({"probe": "p", "dtype": "bf16"}, "--probe does not go with --dtype bf16"),
        ({"probe": "p", "load_in_4bit": True}, "--probe does not go with --load-in-4bit"),
        ({"probe": "p", "shard": "fsdp"}, "--probe does not go with --shard"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", "mode": "lora", **settings})
