"""Runs, models and bases are found again from any folder, or one sentence says which option gives them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cora_cli.basis.artifact import read_basis
from cora_cli.cli import app
from tests.training.helpers import record_result

TRAIN = ["--rank", "4", "--max-steps", "1", "--batch-size", "4", "--test-size", "4", "--device", "cpu", "--dtype", "fp32"]
EVALUATE = ["--metrics", "rouge", "--bootstrap", "100", "--max-new-tokens", "2", "--device", "cpu", "--dtype", "fp32"]


def cora(*words: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def succeed(*words: Any) -> None:
    done = cora(*words)
    assert done.exit_code == 0, done.stderr


@pytest.fixture
def folder(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, a basis and a compact run, all named by relative paths; the working directory is another one."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(place)
    shutil.copytree(tiny_model, place / "base")
    shutil.copy(tiny_data, place / "data.jsonl")
    umask = os.umask(0o027)
    try:
        succeed("extract-basis", "base", "--rank", 8, "--device", "cpu", "-o", "basis.safetensors")
        where = ["--model", "base", "--dataset", "data.jsonl", "--basis", "basis.safetensors", "--output-dir", "run"]
        succeed("train", "--mode", "fb", "--compact", *where, *TRAIN)
    finally:
        os.umask(umask)
    monkeypatch.chdir(tmp_path / "away")
    return place


def test_absolute_paths_are_recorded(folder: Path) -> None:
    base, data, basis = (str(folder / name) for name in ("base", "data.jsonl", "basis.safetensors"))
    record, config = json.loads((folder / "run/run.json").read_text()), yaml.safe_load((folder / "run/config.yaml").read_text())
    facts, adapter = (json.loads((folder / "run/adapter" / name).read_text()) for name in ("cora.json", "adapter_config.json"))
    assert (record["model"]["reference"], record["data"]["dataset"], record["basis"]["path"]) == (base, data, basis)
    assert (config["model"], config["dataset"], config["basis"]) == (base, data, basis)
    assert (facts["base"], facts["basis"], adapter["base_model_name_or_path"], adapter["revision"]) == (base, basis, base, None)
    assert [source.reference for source in read_basis(folder / "basis.safetensors").sources] == [base]


def test_every_file_has_the_mode_of_the_umask(folder: Path) -> None:
    files = [path for path in [folder / "basis.safetensors", *(folder / "run").rglob("*")] if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert any("checkpoint-1" in str(path) for path in files)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_a_run_is_resumed_evaluated_and_merged_from_another_folder(folder: Path, tmp_path: Path) -> None:
    where = ["--model", "../place/base", "--dataset", "../place/data.jsonl", "--basis", "../place/basis.safetensors"]
    shutil.rmtree(folder / "run" / "adapter")
    succeed("train", "--mode", "fb", "--compact", *where, "--output-dir", folder / "run", "--resume", *TRAIN)
    succeed("evaluate", folder / "run", *EVALUATE)
    assert json.loads((folder / "run/eval/generation.json").read_text())["settings"]["model"] == str(folder / "base")
    succeed("merge", folder / "run", "-o", "merged")


def test_an_evaluation_that_is_reused_from_another_place_is_as_recorded(folder: Path, tmp_path: Path) -> None:
    succeed("evaluate", folder / "run", *EVALUATE)
    moved = folder.rename(tmp_path / "moved")
    own = ["--base", moved / "base", "--basis", moved / "basis.safetensors"]
    succeed("evaluate", moved / "run", *own, *EVALUATE)
    succeed("verify", moved / "run")


@pytest.mark.slow
def test_what_was_moved_away_is_asked_for_by_its_option(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "moved")
    run, base, basis = moved / "run", moved / "base", moved / "basis.safetensors"
    for command in (["evaluate", run, *EVALUATE], ["merge", run, "-o", "m"], ["export", run, "-o", "e"]):
        refused = cora(*command)
        assert refused.exit_code == 1
        assert f"in the directory {folder / 'base'}, which is not there; pass its path with --base" in refused.stderr
        refused = cora(*command, "--base", base)
        assert "pass its path with --basis" in refused.stderr
        succeed(*command, "--base", base, "--basis", basis)


def test_an_old_run_with_a_relative_path_names_the_option_and_asks_no_hub(folder: Path) -> None:
    for name, key in (("cora.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        path = folder / "run" / "adapter" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: "base"}))
    record_result(folder / "run")
    refused = cora("merge", folder / "run", "-o", "merged")
    assert refused.exit_code == 1
    assert "in the directory base, which is not there; pass its path with --base" in refused.stderr
    assert "hub" not in refused.stderr


def test_a_base_directory_has_no_revision(tiny_model: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": str(tiny_model), "revision": "main"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    succeed("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    succeed("extract-basis", tmp_path / "adapter", "--rank", 4, "--device", "cpu", "-o", tmp_path / "basis.safetensors")
    succeed("inspect", tmp_path / "adapter", "--rank", 4, "--device", "cpu")


def test_a_complete_model_takes_no_base(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    refused = cora(
        "evaluate", "--model", tiny_model, "--base", tiny_model, "--dataset", tiny_data, "-o", tmp_path / "out", *EVALUATE
    )
    assert refused.exit_code == 1
    assert "is a complete model, which has no base; leave out --base" in refused.stderr
