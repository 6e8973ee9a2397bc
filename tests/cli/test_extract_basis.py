"""`cora extract-basis` on the command line: every choice is recorded in the file, and errors leave no file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.cli import app
from tests.conftest import make_model


def cora_extract(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["extract-basis", *map(str, arguments), "--device=cpu"])


@pytest.fixture(scope="module")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny model's shape with other weights."""
    return make_model(tmp_path_factory.mktemp("sibling") / "sibling", seed=7)


def test_defaults_and_models_arrive_in_the_file(tiny_model: Path, sibling: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "basis.safetensors"
    result = cora_extract(tiny_model, sibling, "--rank", 5, "-o", output)
    assert result.exit_code == 0, result.stderr
    basis = read_basis(output)
    assert basis.choices == BasisChoices(rank=5)
    assert [source.reference for source in basis.sources] == [str(tiny_model), str(sibling)]
    assert result.stdout.startswith(f"{output}: 6 groups of rank 5 from 2 models (share module, merge mean, source weights,")
    assert basis.sha256 in result.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_model: Path, sibling: Path, tmp_path: Path) -> None:
    result = cora_extract(tiny_model, sibling, "--rank", 5, "-o", tmp_path / "basis", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("6 groups of rank 5 from 2 models\n")
    assert "peak memory on the processor, about: " in result.stdout
    assert not (tmp_path / "basis").exists()


def test_every_choice_arrives_in_the_file(tiny_multihead_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "basis.safetensors"
    made = [
        BasisChoices("layer", "gram", "weights", "output", "svd", "bottom", 3, ("q_proj", "v_proj")),
        BasisChoices("projection", "mean", "weights", "input", "pca", "top", 4, ("q_proj",)),
        BasisChoices("global", rank=2),
    ]
    for choices in made:
        flags = [
            f"--{name.replace('_', '-')}={value}" for name, value in choices.to_json().items() if isinstance(value, str | int)
        ]
        targets = "--target-modules=" + ",".join(choices.target_modules)
        result = cora_extract(tiny_multihead_model, *flags, targets, "-o", output, "--overwrite")
        assert result.exit_code == 0, result.stderr
        assert read_basis(output).choices == choices


def test_differences_from_a_base_are_those_of_its_weights(tiny_model: Path, sibling: Path, tmp_path: Path) -> None:
    output = tmp_path / "delta.safetensors"
    result = cora_extract(sibling, "--source=delta", "--base", tiny_model, "--rank=4", "-o", output)
    assert result.exit_code == 0, result.stderr
    basis = read_basis(output)
    assert basis.base is not None
    assert basis.base.reference == str(tiny_model)


def test_a_file_configures_it_and_models_may_be_listed_there(tiny_model: Path, sibling: Path, tmp_path: Path) -> None:
    (tmp_path / "extract.yaml").write_text(
        f"models: [{tiny_model}, {sibling}]\noutput: {tmp_path / 'basis.safetensors'}\nrank: 6\ntarget_modules: [v_proj]\n"
    )
    result = cora_extract("--config", tmp_path / "extract.yaml", "--rank=2")
    assert result.exit_code == 0, result.stderr
    assert read_basis(tmp_path / "basis.safetensors").choices == BasisChoices(rank=2, target_modules=("v_proj",))


def test_equal_requests_write_equal_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cora_extract(tiny_model, "--rank=3", "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--rank=0"], 2, "--rank must be an integer of at least 1, not 0"),
        (["--source=delta"], 2, "--source delta needs --base"),
        (["--target-modules= , "], 2, "--target-modules is empty; give it a value, or leave it out"),
        (["--target-modules=q_proj,query"], 1, "matches the target module 'query'; its module names are: "),
        (["--share=layer"], 1, "share"),
        (["--share=global"], 1, "share"),
        (["--side=input", "--share=layer"], 1, "or --merge gram"),
        (["--rank=33"], 1, "33"),
        (["/missing/model"], 1, "model '/missing/model' is neither a directory on this disk nor a hub id"),
        (["--base=/missing/base"], 1, "model '/missing/base' is neither a directory on this disk nor a hub id"),
        (["--device=tpu"], 2, "--device must be auto, cpu, cuda or cuda:<index>, not 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_requests_are_one_line_and_leave_no_file(
    flags: list[str], code: int, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    # The last --device wins, and `cora_extract` adds its own.
    arguments = ["extract-basis", str(tiny_model), "-o", str(tmp_path / "basis.safetensors"), "--rank=4", *flags]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.startswith("cora: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_choice_is_a_usage_error_that_lists_the_known(tiny_model: Path, tmp_path: Path) -> None:
    result = cora_extract(tiny_model, "--share=block", "-o", tmp_path / "basis.safetensors")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in ("--share", "'block'", "module", "layer", "projection", "global"))
    assert list(tmp_path.iterdir()) == []


def test_models_of_different_shapes_are_refused(tiny_model: Path, tiny_multihead_model: Path, tmp_path: Path) -> None:
    result = cora_extract(tiny_model, tiny_multihead_model, "--rank=4", "-o", tmp_path / "basis.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith("cora: error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_only_replaced_on_request(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "basis.safetensors"
    assert cora_extract(tiny_model, "--rank=2", "-o", output).exit_code == 0
    before = output.read_bytes()
    refused = cora_extract(tiny_model, "--rank=3", "-o", output)
    assert (refused.exit_code, refused.stderr) == (1, f"cora: error: {output} exists already; use --overwrite to replace it\n")
    assert output.read_bytes() == before
    assert cora_extract(tiny_model, "--rank=3", "-o", output, "--overwrite").exit_code == 0
    assert read_basis(output).rank == 3


def test_kept_directions_are_those_of_the_stored_weights(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert cora_extract(tiny_model, "--rank=4", "-o", tmp_path / "basis").exit_code == 0
    name = "model.layers.1.self_attn.k_proj"
    weight = load_file(tiny_model / "model.safetensors")[f"{name}.weight"].double()
    left = torch.linalg.svd(weight)[0][:, :4]
    kept = read_basis(tmp_path / "basis").for_module(name, 4, 32).double()
    assert torch.allclose(kept @ kept.T, left @ left.T, atol=1e-6)
