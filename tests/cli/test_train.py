"""`cora train` on the command line: a run that works, and every error in one line before anything is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cora_cli.basis.choices import BasisChoices
from cora_cli.cli import app
from cora_cli.extraction.extract import extract_basis
from cora_cli.lock import own_output
from cora_cli.models.references import resolve_model
from cora_cli.records import read_probe
from tests.evaluation.helpers import unsealed
from tests.training.helpers import log_lines


def cora_train(*arguments: Any) -> Any:
    """`cora train`; a later `--model=` or `--dataset=` stands in place of an earlier one, of which the command line takes one."""
    given = [str(argument) for argument in arguments]
    last = {flag: place for place, one in enumerate(given) for flag in ("--model=", "--dataset=") if one.startswith(flag)}
    kept = [one for place, one in enumerate(given) if last.get(f"{one.partition('=')[0]}=", place) == place]
    return CliRunner().invoke(app, ["train", *kept])


@pytest.fixture
def usual(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that would work."""
    small = ["--mode=lora", "--rank=4", "--max-steps=2", "--batch-size=4", "--test-size=4", "--device=cpu", "--dtype=fp32"]
    return [f"--model={tiny_model}", f"--dataset={tiny_data}", f"--output-dir={tmp_path / 'run'}", *small]


def test_a_run_prints_its_summary_and_can_be_repeated_from_its_configuration(usual: list[str], tmp_path: Path) -> None:
    first = cora_train(*usual, "--learning-rate=1e-2", "--target-modules=q_proj, v_proj", "--alpha=6", "--rslora")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.splitlines()[0].startswith("mode lora: 2 steps, ")
    assert first.stdout.splitlines()[1].startswith("held-out loss 1")
    assert "n = 4 records" in first.stdout

    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["target_modules"], written["alpha"], written["rslora"]) == (["q_proj", "v_proj"], 6.0, True)
    again = cora_train("--config", tmp_path / "run" / "config.yaml", "--output-dir", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "again")]
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "again")

    finished = cora_train("--config", tmp_path / "run" / "config.yaml", "--resume")
    assert finished.exit_code == 0
    assert "is already finished" in finished.stderr
    assert finished.stdout == first.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(usual: list[str], tmp_path: Path) -> None:
    result = cora_train(*usual, "--dry-run")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mode lora: training 2,560 of 588,608 parameters (0.43 %); the adapter takes ")
    assert lines[1].startswith("2 steps of 4 examples: ")
    assert lines[3].startswith("peak memory on the processor, fp32, computed: ")
    # At its peak, the largest forward pass, there are no gradients yet.
    assert [line.split()[0] for line in lines[4:9]] == ["weights", "adapter", "optimizer", "activations", "logits"]
    assert any(line.startswith("> ") for line in lines)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_one_step_counts_one_step(usual: list[str]) -> None:
    lines = cora_train(*[flag for flag in usual if "--max-steps" not in flag], "--max-steps=1", "--dry-run").stdout.splitlines()
    assert lines[1].startswith("1 step of 4 examples: ")


def test_a_probe_prints_and_writes_its_measures_and_trains_nothing(usual: list[str], tmp_path: Path) -> None:
    place = tmp_path / "probe.json"
    result = cora_train(*usual, "--mode=fb", "--b-init=orthonormal", "--probe", place, "--probe-examples=2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mode fb before its first step, over 2 training examples (")
    assert lines[1].startswith("gradient energy in the span of B: 0.")
    assert lines[2].startswith("largest Hessian eigenvalue in ")
    assert read_probe(place)["mode"] == "fb"
    assert not (tmp_path / "run").exists()
    again = cora_train(*usual, "--mode=fb", "--b-init=orthonormal", "--probe", place)
    assert (again.exit_code, again.stdout) == (2, "")
    assert f"{place} exists already; choose a new file for --probe" in again.stderr


def test_a_probe_in_several_processes_is_refused_before_one_waits_for_the_others(
    usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with own_output(tmp_path / "probe.json"):
        result = cora_train(*usual, "--probe", tmp_path / "probe.json")
    assert result.exit_code == 1
    assert "--probe measures in one process, not in 2" in result.stderr


def test_a_run_that_cannot_train_says_so(usual: list[str]) -> None:
    result = cora_train(*usual, "--mode=fb", "--b-init=zeros")
    assert result.exit_code == 0, result.stderr
    assert "mode fb: 0 steps, peak memory" in result.stdout
    assert "no parameter could be trained: this run equals the base model" in result.stdout


def assert_refused(result: Any, code: int, message: str) -> None:
    """Exit code, and one line on stderr that starts as all errors do and says `message`."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    lines = result.stderr.splitlines()
    assert [line.startswith("cora: error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert message in lines[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--mode=fb"], 2, "mode fb needs --basis FILE"),
        (["--mode=fb", "--basis=/missing.safetensors"], 1, "basis /missing.safetensors does not exist"),
        (["--rank=0"], 2, "--rank must be at least 1, not 0"),
        (["--rank=-3"], 2, "--rank must be at least 1, not -3"),
        (["--learning-rate=nan"], 2, "--learning-rate must be a finite number, not nan"),
        (["--learning-rate=-1"], 2, "--learning-rate must be positive, not -1.0"),
        (["--epochs=inf"], 2, "--epochs must be a finite number, not inf"),
        (
            ["--max-steps=0", "--batch-size=0"],
            2,
            "--max-steps must be at least 1, not 0; --batch-size must be at least 1, not 0",
        ),
        (["--dropout=1.5"], 2, "--dropout must be at least 0 and below 1, not 1.5"),
        (["--test-size=-1"], 2, "--test-size must be a count, or a share between 0 and 1, not -1.0"),
        (["--test-size=40"], 1, "holds 40 records, so holding out 40 leaves none to train on"),
        (
            ["--max-length=2"],
            1,
            "all 36 training records were dropped: no response fits into --max-length 2",
        ),
        (["--target-modules=q_proj,query"], 1, "target module 'query' matches nothing in this model; its linear layers are"),
        (["--mode=fb", "--b-init=ones", "--target-modules=mlp"], 1, "target module 'mlp' is a LlamaMLP, not a linear layer"),
        (["--mode=fb", "--b-init=orthonormal", "--rank=33"], 1, "has 32 outputs, fewer than --rank 33"),
        (["--b-init=random"], 2, "--b-init applies to the modes fb and tb"),
        (["--model=/missing/model"], 1, "model '/missing/model' is neither a directory on this disk nor a hub id"),
        (["--dataset=/missing.jsonl"], 1, "dataset /missing.jsonl does not exist"),
        (["--dataset=builtin:poems"], 1, "poems"),
        (["--device=tpu"], 2, "--device must be auto, cpu, cuda or cuda:<index>, not 'tpu'"),
        (["--device=cuda:7"], 1, "--device cuda:7 is not available"),
        (
            ["--mode=full", "--load-in-4bit"],
            2,
            "--load-in-4bit does not apply to mode full, which needs the weights themselves",
        ),
        (["--mode=peft"], 2, "mode peft needs --peft-config FILE"),
        (["--mode=peft", "--peft-config=/missing.json"], 1, "/missing.json does not exist"),
        (["--mode=vera", "--alpha=4"], 2, "--alpha does not apply to mode vera"),
        (["--outer-rank=8"], 2, "--outer-rank does not apply to mode lora"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_refused(flags: list[str], code: int, message: str, usual: list[str], tmp_path: Path) -> None:
    assert_refused(cora_train(*usual, *flags), code, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp\n', "d.jsonl, line 2: not valid JSON"),
        (
            "d.jsonl",
            '{"instruction": "a", "output": "b"}\n\n{"instruction": "a"}\n',
            "d.jsonl, line 3: column output is missing",
        ),
        (
            "d.jsonl",
            '{"title": "a", "body": "b"}\n',
            "d.jsonl, line 1: found the columns body, title; a record needs",
        ),
        ("d.jsonl", '{"instruction": "a", "output": 3}\n', "d.jsonl, line 1: output must be text, not 3"),
        ("d.jsonl", "[1]\n", "d.jsonl, line 1: expected a record with named columns, found [1]"),
        ("d.jsonl", "", "d.jsonl holds no records"),
        ("d.json", '[{"instruction": "a", "output": "b"},\n {"instruction" "a"}]', "d.json, line 2: not valid JSON"),
        ("d.txt", "text", "d.txt has the ending .txt; supported endings are .json, .jsonl, .ndjson, .csv, .tsv, .parquet"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "d.jsonl, line 1: messages must be a list"),
    ],
)
def test_malformed_data_are_refused_naming_file_and_line(
    name: str, text: str, message: str, usual: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert_refused(cora_train(*usual, f"--dataset={tmp_path / name}"), 1, message)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unsuitable_basis_is_refused(
    usual: list[str], tiny_basis: Path, tiny_multihead_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cut, other = tmp_path / "cut.safetensors", tmp_path / "other.safetensors"
    cut.write_bytes(tiny_basis.read_bytes()[:-100])
    extract_basis([resolve_model(str(tiny_multihead_model))], other, BasisChoices(rank=4), None, torch.device("cpu"))
    for basis, flags, message in (
        (cut, [], f"{cut} is not a complete safetensors file, so it cannot be read as a basis"),
        (other, [], f"basis {other} was extracted from models with num_key_value_heads = 4, but this model has 2"),
        (tiny_basis, ["--rank=9"], f"--rank 9 is too large: basis {tiny_basis} holds 8 directions; use --rank 8 or less"),
        (
            tiny_basis,
            ["--target-modules=o_proj"],
            f"basis {tiny_basis} has no group for module model.layers.0.self_attn.o_proj",
        ),
        (tiny_basis, ["--target-modules=query"], f"no weight matrix of {tiny_model} matches the target module 'query'"),
    ):
        assert_refused(cora_train(*usual, "--mode=fb", f"--basis={basis}", *flags), 1, message)
    assert {path.name for path in tmp_path.iterdir()} == {cut.name, other.name}


@pytest.mark.parametrize("flags", [["--rank=5"], ["--outer-rank=10"]])
def test_a_basis_with_fewer_directions_than_the_outer_rank_is_refused_by_that_flag(
    flags: list[str], usual: list[str], tiny_basis: Path, tmp_path: Path
) -> None:
    refused = f"--outer-rank 10 is too large: basis {tiny_basis} holds 8 directions; use --outer-rank 8 or less, or extract one"
    assert_refused(cora_train(*usual, "--mode=lora-mini", f"--basis={tiny_basis}", *flags), 1, refused)
    assert list(tmp_path.iterdir()) == []


def test_a_basis_of_the_input_side_serves_as_a_and_is_refused_as_b_of_weights_that_are_not_square(
    usual: list[str], tiny_input_basis: Path, tmp_path: Path
) -> None:
    refused = cora_train(*usual, "--mode=fb", f"--basis={tiny_input_basis}")
    message = f"k_proj has 32 outputs, but group model.layers.0.self_attn.k_proj of basis {tiny_input_basis} expects 64"
    assert_refused(refused, 1, message)
    assert list(tmp_path.iterdir()) == []
    result = cora_train(*usual, "--mode=fa-basis", f"--basis={tiny_input_basis}")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        # Two pairs of factors of rank 2, (out + in) each.
        ({"peft_type": "LOHA", "r": 2, "alpha": 4}, 2 * 2 * 2 * (128 + 2 * 96)),
        # 64 / 16 skew-symmetric blocks in each of six layers.
        ({"peft_type": "OFT", "r": 0, "oft_block_size": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}, 6 * 4 * 120),
    ],
)
def test_any_method_of_peft_trains_by_its_own_file(
    method: dict[str, Any], trained: int, usual: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "method.json"
    file.write_text(json.dumps(method))
    result = cora_train(*usual, "--mode=peft", f"--peft-config={file}", "--learning-rate=1e-2")
    assert result.exit_code == 0, result.stderr
    record = unsealed(tmp_path / "run" / "run.json")
    assert record["parameters"]["trained"] == trained
    assert record["heldout"]["change"]["value"] < 0
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == method["peft_type"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"peft_type": "LOHA", "rang": 2}', 1, "PEFT refuses the configuration of LOHA"),
        ('{"peft_type": "LOHA", "r": "two"}', 1, "PEFT refuses the configuration of LOHA"),
        ('{"peft_type": "LOHA", "r": "eight"}', 1, 'configuration of LOHA: r must be an integer, not "eight"'),
        ('{"peft_type": "LOHA", "alpha": null}', 1, "configuration of LOHA: alpha must be a number, not null"),
        ('{"peft_type": "LOHA", "target_modules": 3}', 2, "--peft-config: target_modules must be a list of names"),
        ('{"peft_type": "OFT", "r": 3, "oft_block_size": 16}', 1, "PEFT refuses the configuration of OFT"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}', 1, "PREFIX_TUNING does not adapt linear layers"),
        ('{"peft_type": "LOHA",', 1, "method.json is not valid JSON"),
        ("[]", 2, '--peft-config must hold a JSON object with a "peft_type"'),
    ],
)
def test_a_file_that_describes_no_method_is_refused(
    text: str, code: int, message: str, usual: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "method.json"
    file.write_text(text)
    assert_refused(cora_train(*usual, "--mode=peft", f"--peft-config={file}"), code, message)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_damaged_or_invalid_model_is_refused(usual: list[str], tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"

    def refused(message: str) -> None:
        assert_refused(cora_train(*usual, f"--model={model}"), 1, message)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    model.mkdir()
    refused(f"{model} is not a model: {model} has neither config.json nor adapter_config.json")
    (model / "adapter_config.json").write_text("{}")
    refused(f"{model} is an adapter; training needs a complete model: write one with `cora merge")
    shutil.rmtree(model)
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    gone = weights.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(
        f"model {model} is incomplete: 1 weights that its config.json requires are missing, such as model.layers.1.self_attn.k_proj.weight"
    )
    save_file(
        {**weights, "model.layers.1.self_attn.k_proj.weight": gone[:16].clone()}, model / "model.safetensors", {"format": "pt"}
    )
    refused(
        f"{model}: model.layers.1.self_attn.k_proj.weight has the shape (16, 64), but its config.json describes (32, 64); correct one of them"
    )
    (model / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-1])
    refused(f"{model}/model.safetensors is damaged or truncated and cannot be read as safetensors")
    (model / "model.safetensors").unlink()
    refused(f"{model} holds no weights")
    (model / "config.json").write_text('{"model_type": ')
    refused("config.json")


def test_an_output_directory_that_is_taken_is_left_alone(usual: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(
        cora_train(*usual, f"--output-dir={tmp_path / 'file'}"), 1, "file is a file; choose a new or empty directory"
    )
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "file").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished"}')
    assert_refused(cora_train(*usual), 1, f"output directory {tmp_path / 'run'} already contains a run")
    assert_refused(cora_train(*usual, "--resume"), 1, "run.json is damaged or from another version of cora: basis is missing")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "run.json"]


def test_a_report_needs_its_package(usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(
        cora_train(*usual, "--report-to=trackio"), 1, "--report-to trackio needs the package trackio: pip install trackio"
    )
    assert list(tmp_path.iterdir()) == []
