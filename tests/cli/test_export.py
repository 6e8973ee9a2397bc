"""`cora export` from its command line: a plain LoRA that PEFT reads, or one sentence and nothing written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    BdLoraConfig,
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    MontecloraConfig,
    PeftModel,
    PeftType,
    VeloraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cora_cli.adapters.elsewhere import is_plain_lora
from cora_cli.cli import app
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from cora_cli.weights.sources import open_source

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"mode": "pissa"},
    # More than the 32 rows of k_proj and v_proj.
    "vera": {"mode": "vera", "learning_rate": 0.3, "rank": 40},
    "compact": {"mode": "fb", "compact": True},
    "dora": {"mode": "dora"},
    "full": {"mode": "full", "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind."""
    root = tmp_path_factory.mktemp("trained")
    for kind, settings in KINDS.items():
        basis = str(tiny_basis) if settings["mode"] == "fb" else None
        size = {"rank": 4, "max_steps": 1, "batch_size": 8, "test_size": 4.0}
        where = {"model": str(tiny_model), "dataset": str(tiny_data), "output_dir": str(root / kind), "basis": basis}
        train(TrainConfig(**where, device="cpu", dtype="fp32", **{**size, "learning_rate": 0.03, **settings}))
    return {kind: root / kind for kind in KINDS}


def cora(command: str, *arguments: Any) -> Any:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(24).reshape(2, 12) * 31 + 5).logits


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(
    "choice",
    [{"layers_to_transform": [1]}, {"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": r".*\.0\..*"}],
)
def test_an_adapter_of_some_layers_is_exported_as_a_lora_of_these(
    choice: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False, base_model_name_or_path=str(tiny_model), **choice)
    wrapped = get_peft_model(base(), config)
    wrapped.save_pretrained(tmp_path / "loha")
    result = cora("export", tmp_path / "loha", "-o", tmp_path / "lora")
    assert result.exit_code == 0, result.stderr
    found = PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(found), logits(wrapped.eval()))
    result = cora("merge", tmp_path / "lora", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"r": 4}, 4),
        ({"r": 7}, 7),  # of 64 inputs, so that the last block is cut
        ({"r": 4, "mini_r": 2, "init_weights": "mini"}, 2),
        ({"r": 4, "init_weights": "bat"}, 64),  # whose change depends on W and has its rank
    ],
)
def test_the_change_of_miss_is_exported_in_each_of_its_variants(
    options: dict[str, Any], rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    wrapped: Any = get_peft_model(
        base(), MissConfig(target_modules=["q_proj"], base_model_name_or_path=str(tiny_model), **options)
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "miss_block" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "miss")
    result = cora("export", tmp_path / "miss", "-o", tmp_path / "lora")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'lora'}: a LoRA of rank {rank}\n"), result.stderr
    found = PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(found), logits(wrapped), rtol=1e-4, atol=1e-4)
    assert (logits(found) - logits(base())).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "rank"), [("pissa", 8), ("vera", 40), ("compact", 4)])
def test_the_exported_lora_has_the_effect_of_the_run_in_plain_peft(
    kind: str, rank: int, trained: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    result = cora("export", trained[kind], "-o", tmp_path / "lora")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'lora'}: a LoRA of rank {rank}\n"
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["base_model_name_or_path"]) == ("LORA", rank, str(tiny_model))
    assert cora("merge", trained[kind], "-o", tmp_path / "merged").exit_code == 0
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (tiny_model, tmp_path / "merged")
    )
    before, wanted = logits(base), logits(merged)
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("OFT", {"r": 0, "oft_block_size": 8}),
        ("HRA", {"r": 4}),
        ("ROAD", {"group_size": 16}),
        ("IA3", {"feedforward_modules": []}),
        ("HIRA", {"r": 4}),
        ("SHIRA", {"r": 4}),
        ("PVERA", {"r": 4}),
        ("OSF", {}),
        ("LN_TUNING", {}),
        ("DoRA", {"use_dora": True}),
        ("KaSA", {"kasa_config": KasaConfig()}),
        (
            "BD-LoRA",
            {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)},
        ),
    ],
)
def test_a_method_of_which_peft_makes_no_lora_is_refused_by_its_name(
    method: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("LORA" if method in ("DoRA", "KaSA", "BD-LoRA") else method)]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, config(target_modules=["q_proj", "v_proj"], **options)).save_pretrained(tmp_path / "adapter")
    result = cora("export", tmp_path / "adapter", "-o", tmp_path / "lora")
    assert (result.exit_code, result.stdout) == (1, "")
    no_lora = "has no equivalent LoRA" if config is LoraConfig else "PEFT does not convert to LoRA"
    assert result.stderr.strip().splitlines()[-1] == (
        f"cora: error: {tmp_path}/adapter uses {method}, which {no_lora}; `cora merge` writes it as a plain model"
    )
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("options", [{"velora_config": VeloraConfig()}, {"monteclora_config": MontecloraConfig(num_samples=2)}])
def test_what_acts_in_training_alone_is_no_part_of_a_lora(options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path=str(tiny_model), **options
    )
    wrapped = get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = wrapped.merge_and_unload().model.layers[0].self_attn.q_proj.weight.double()
    source = open_source(resolve_model(str(tmp_path / "adapter")))
    torch.testing.assert_close(source.read("model.layers.0.self_attn.q_proj"), wanted, rtol=0, atol=1e-6)
    assert cora("export", tmp_path / "adapter", "-o", tmp_path / "lora").exit_code == 0
    assert is_plain_lora(resolve_model(str(tmp_path / "lora")))
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in exported} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("method", "options"), [("LILY", {"stride_A": 1, "num_B": 2}), ("BEFT", {})])
def test_a_method_that_cannot_be_merged_is_not_said_to_be(
    method: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, config(target_modules=["v_proj"], **options)).save_pretrained(tmp_path / "adapter")
    result = cora("export", tmp_path / "adapter", "-o", tmp_path / "lora")
    assert result.exit_code == 1
    without = f"uses {method}, which PEFT does not convert to LoRA; `cora evaluate`, on transformers"
    assert without in " ".join(result.stderr.split())
    assert cora("merge", tmp_path / "adapter", "-o", tmp_path / "merged").exit_code == 1


@pytest.mark.parametrize(
    ("kind", "need"),
    [("POLY", "a task number with each prompt"), ("XLORA", "other adapters, which it mixes anew for each token")],
)
def test_an_adapter_that_needs_more_than_its_files_is_refused_by_its_kind(
    kind: str, need: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind}))
    for command in ("export", "merge"):
        result = cora(command, tmp_path / "adapter", "-o", tmp_path / "out")
        assert result.exit_code == 1
        assert f"adapter is of {kind}, which needs {need}; cora does not load such adapters" in " ".join(result.stderr.split())


def test_a_prompt_is_not_said_to_be_one_that_merge_writes(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PROMPT_TUNING](num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    for command, what in (("export", "exported"), ("merge", "merged")):
        result = cora(command, tmp_path / "adapter", "-o", tmp_path / "out")
        assert result.exit_code == 1
        assert result.stderr.strip().splitlines()[-1] == (
            f"cora: error: adapter {tmp_path}/adapter cannot be {what}: PROMPT_TUNING changes the input, not the weights; `cora evaluate`, on "
            "transformers, evaluates it as it is"
        )


def test_refusals_are_one_line_and_write_nothing(trained: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    unfinished, damaged = (Path(shutil.copytree(trained["pissa"], tmp_path / name)) for name in ("unfinished", "damaged"))
    shutil.rmtree(unfinished / "adapter")
    weights = damaged / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "lora"
    for arguments, code, message in (
        ((trained["full"], "-o", out), 1, "is a complete model: there is no adapter to export"),
        ((trained["dora"], "-o", out), 1, "which has no equivalent LoRA; `cora merge` writes it as a plain model"),
        ((trained["pissa"], "-o", tmp_path / "there"), 1, "exists already; choose a new directory"),
        ((trained["pissa"], "-o", out, "--base", trained["dora"]), 1, "is an adapter, not a complete model"),
        ((unfinished, "-o", out), 1, "adapter_config.json is missing"),
        ((damaged, "-o", out), 1, "was changed after its training had finished"),
        ((tmp_path / "nowhere", "-o", out), 1, "neither a directory on this disk nor a hub id"),
        ((trained["pissa"],), 2, "--output"),
    ):
        result = cora("export", *arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        assert {path.name for path in tmp_path.iterdir()} == {"there", "unfinished", "damaged"}
    assert not list((tmp_path / "there").iterdir())


def test_an_adapter_that_saves_embedding_and_head_is_exported_and_merged_in_our_words(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    saved = config(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted: Any = get_peft_model(base, saved)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = logits(adapted.eval())

    result = cora("export", tmp_path / "adapter", "-o", tmp_path / "lora")
    assert result.exit_code == 0, result.stderr
    again = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(again, str(tmp_path / "lora")).eval()), wanted)

    result = cora("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    said = f"note: {tmp_path / 'adapter'} changes the embedding or the head, which were one weight: merged, each has its own"
    assert said in result.stderr.splitlines()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
