"""`check_hardware` runs its whole list on a processor, and a wrong result fails the check that compares it."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.cli.doctor import CHECKS
from cora_cli.device import select_hardware
from cora_cli.experiments import hardware_check
from cora_cli.experiments.hardware_check import Check, check_hardware
from cora_cli.training import fast_paths


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(hardware_check, "RANK", 4)
    monkeypatch.setattr(hardware_check, "TIMED_RANK", 4)


def run(tmp_path, model) -> dict[str, Check]:
    return {check.name: check for check in check_hardware("cpu", "fp32", tmp_path, str(model))}


@pytest.fixture
def even_model(tiny_model, tmp_path):
    """The tiny model with layers of as many inputs as bitsandbytes holds in 4 bits on a processor: a multiple of 64."""
    model = shutil.copytree(tiny_model, tmp_path / "even", ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(model)
    config.intermediate_size = 128
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return model


@pytest.mark.slow
def test_every_check_passes_on_a_processor_or_says_what_it_needs(even_model, tmp_path):
    found = run(tmp_path, even_model)
    assert {name: check.passed for name, check in found.items()} == {
        "attention": True,
        "layouts": None,
        "packing": True,
        "speed": True,
        "memory": None,
        "options": None,
        "training": True,
        "repetition": True,
        "answers": True,
        "4-bit": True if find_spec("bitsandbytes") else None,
        "extraction": True,
    }
    assert tuple(found) == CHECKS
    assert ("needs the package bitsandbytes" in found["4-bit"].found) is (found["4-bit"].passed is None)
    assert found["training"].figures["fb"]["cosine"] == pytest.approx(1)
    assert all(figures["tokens_per_second"] > 0 for figures in found["speed"].figures.values())
    assert all(json.dumps(check.figures) for check in found.values())


def test_an_attention_that_ignores_the_layout_fails_its_check(tmp_path, monkeypatch):
    def causal(module, query, key, value, mask, **_):
        keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2), None

    monkeypatch.setattr(hardware_check, "segment_attention", causal)
    attention = next(check_hardware("cpu", "fp32", tmp_path))
    assert attention.passed is False
    assert attention.line().startswith("FAILED   attention")


def test_a_check_that_raises_has_failed_and_the_next_one_runs(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(hardware_check, "segment_attention", lambda *_, **__: 1 / 0)
    checks = check_hardware("cpu", "fp32", tmp_path, str(tiny_model))
    assert next(checks).found == "ZeroDivisionError: division by zero"
    assert next(checks).name == "layouts"


def test_the_command_writes_what_it_found_and_exits_with_1_where_a_check_failed(tmp_path, monkeypatch):
    found = [Check("attention", True, "fine", {"error": 0.0}, 1.0), Check("answers", False, "1 of 8", {}, 2.0)]
    monkeypatch.setattr(hardware_check, "check_hardware", lambda *_: iter(found))
    output = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["doctor", "--device=cpu", "--gpu-check", "--output", str(output)])
    assert result.exit_code == 1
    assert result.stderr == "failed on this machine: answers\n"
    assert [check["name"] for check in json.loads(output.read_text())["checks"]] == ["attention", "answers"]


def test_an_output_without_the_check_is_refused():
    result = CliRunner().invoke(app, ["doctor", "--output=found.json"])
    assert result.exit_code == 2
    assert "--gpu-check" in result.stderr


@pytest.mark.slow
def test_the_speed_of_compiled_layers_is_shown_with_their_number_of_graphs(tmp_path, tiny_model, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for name, value in (("TIMED_STEPS", 4), ("TIMED_BATCH", 2)):
        monkeypatch.setattr(hardware_check, name, value)
    monkeypatch.setattr(fast_paths, "BACKEND", count)
    bench = hardware_check._Bench(select_hardware("cpu", "fp32"), tmp_path, str(tiny_model))
    bench._gpu = True  # a processor compiles with this backend
    passed, said, figures = bench.options()
    assert passed
    assert graphs
    assert figures["--compile"]["graphs"] == len(graphs)
    assert said.endswith(f"--compile compiled {len(graphs)} graphs")
