import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cora_cli.basis.artifact import read_basis
from cora_cli.cli import app
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.training.helpers import record_result

RANK, ALPHA = 8, 24.0
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"},
    "rslora": {"mode": "lora", "rslora": True},
    "fb": {"mode": "fb"},
    "compact": {"mode": "fb", "compact": True},
}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind, far enough from the base to tell."""
    root = tmp_path_factory.mktemp("trained")
    for kind, settings in KINDS.items():
        config = TrainConfig(
            model=str(tiny_model),
            dataset=str(tiny_data),
            output_dir=str(root / kind),
            basis=str(tiny_basis) if settings["mode"] == "fb" else None,
            rank=RANK,
            alpha=ALPHA,
            max_steps=2,
            batch_size=8,
            learning_rate=0.03,
            dtype="fp32",
            device="cpu",
            **settings,
        )
        train(config)
    return {kind: root / kind for kind in KINDS}


def cora_merge(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def load(path: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """(2, 12, vocabulary) logits of fixed tokens."""
    return model(torch.arange(24).reshape(2, 12) * 31 + 5).logits


def expected_logits(kind: str, run: Path, base: Path, basis: Path) -> torch.Tensor:
    """Logits of the base after W + s·B·A by hand, from the files alone; B of a frozen mode straight from the basis."""
    adapter = RunDirectory(run).adapter
    (weights,) = adapter.glob("*.safetensors")
    factors = load_file(weights)
    scaling = ALPHA / (RANK**0.5 if kind == "rslora" else RANK)
    model = load(base)
    changed = 0
    with torch.no_grad():
        for key, a in factors.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                module = model.get_submodule(name)
                frozen = kind in ("fb", "compact")
                b = read_basis(basis).directions[name][:, :RANK] if frozen else factors[key.replace("lora_A", "lora_B")]
                module.weight += scaling * (b @ a)
                changed += 1
    assert changed == 6
    return logits(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_run_is_a_plain_model_with_the_logits_of_base_plus_adapter(
    trained: dict[str, Path], tiny_model: Path, tiny_basis: Path, tmp_path: Path, kind: str
) -> None:
    result = cora_merge(trained[kind], "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'merged'}: 6 layers merged\n"
    found, base = logits(load(tmp_path / "merged")), logits(load(tiny_model))
    torch.testing.assert_close(found, expected_logits(kind, trained[kind], tiny_model, tiny_basis), atol=1e-5, rtol=1e-5)
    assert (found - base).abs().max() > 0.1
    assert not list((tmp_path / "merged").glob("adapter*"))
    text = "def f(x):\n    return x  # ein Satz"
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (tmp_path / "merged", tiny_model)]
    assert ids[0] == ids[1]


def test_an_adapter_directory_merges_as_its_run(trained: dict[str, Path], tmp_path: Path) -> None:
    for source, output in ((trained["lora"], "run"), (RunDirectory(trained["lora"]).adapter, "adapter")):
        assert cora_merge(source, "-o", tmp_path / output).exit_code == 0
    one, other = (load_file(tmp_path / output / "model.safetensors") for output in ("run", "adapter"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("dtype", "stored"), [("stored", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_precision_is_the_bases_own_unless_asked_for(
    trained: dict[str, Path], tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    result = cora_merge(trained["lora"], "-o", tmp_path / "merged", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {stored}
    assert load(tmp_path / "merged", "auto").dtype == stored


def test_weights_are_rounded_once(trained: dict[str, Path], tmp_path: Path) -> None:
    for dtype in ("bf16", "fp32"):
        assert cora_merge(trained["lora"], "-o", tmp_path / dtype, "--dtype", dtype).exit_code == 0
    rounded, exact = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("bf16", "fp32"))
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.to(torch.bfloat16))


def test_fp32_keeps_an_update_of_a_bf16_base_that_bf16_rounds_away(
    trained: dict[str, Path], tiny_model: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    load(tiny_model).to(torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    error = {}
    for dtype in ("stored", "fp32"):
        result = cora_merge(trained["lora"], "-o", tmp_path / dtype, "--base", half, "--dtype", dtype)
        assert result.exit_code == 0, result.stderr
        expected = expected_logits("lora", trained["lora"], half, tiny_basis)
        error[dtype] = (logits(load(tmp_path / dtype)) - expected).abs().max().item()
    assert error["fp32"] < 1e-5
    assert error["stored"] > 1e-3


def test_a_moved_basis_of_a_compact_run_is_named_by_its_flag(
    trained: dict[str, Path], tiny_basis: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained["compact"], tmp_path / "run"))
    side = run / "adapter" / "cora.json"
    side.write_text(side.read_text().replace(str(tiny_basis), str(tmp_path / "gone.safetensors")))
    record_result(run)
    refused = cora_merge(run, "-o", tmp_path / "merged")
    assert refused.exit_code == 1
    assert "pass its path with --basis" in refused.stderr
    assert not (tmp_path / "merged").exists()
    assert cora_merge(run, "-o", tmp_path / "merged", "--basis", tiny_basis).exit_code == 0


def test_refusals_are_one_line_and_write_nothing(
    trained: dict[str, Path], tiny_model: Path, tiny_multihead_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    damaged = Path(shutil.copytree(trained["lora"], tmp_path / "damaged"))
    weights = damaged / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "merged"
    for arguments, code, message in (
        ((trained["lora"], "-o", tmp_path / "there"), 1, "exists already; choose a new directory"),
        ((tiny_model, "-o", out), 1, "is a complete model: there is nothing to merge"),
        ((tmp_path / "empty", "-o", out), 1, "neither config.json nor adapter_config.json"),
        ((tmp_path / "nowhere", "-o", out), 1, "neither a directory on this disk nor a hub id"),
        ((trained["lora"], "-o", out, "--base", trained["fb"]), 1, "is an adapter, not a complete model"),
        ((trained["lora"], "-o", out, "--base", tiny_multihead_model), 1, "cannot be loaded"),
        ((trained["lora"], "-o", out, "--basis", trained["lora"] / "run.json"), 1, "run.json has no effect, since"),
        ((damaged, "-o", out), 1, "was changed after its training had finished"),
        ((trained["lora"],), 2, "--output"),
        ((trained["lora"], "-o", out, "--dtype", "int8"), 2, "--dtype"),
    ):
        result = cora_merge(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        assert {path.name for path in tmp_path.iterdir()} == {"there", "empty", "damaged"}
    assert not list((tmp_path / "there").iterdir())
