"""Runs on q_proj, k_proj and v_proj of a model that has them fused: the run, its plan, its evaluation and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from cora_cli.rundir import RunDirectory
from cora_cli.training.preflight import Measured, preflight
from cora_cli.training.prepare import prepare
from cora_cli.training.run import train
from tests.conftest import VOCABULARY, write_tokenizer
from tests.evaluation.helpers import evaluate_run

from .helpers import assert_b_is_basis, config_for, losses


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with four heads of queries and two of keys and values, with a small tokenizer."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("models") / "phi3"
    Phi3ForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def test_a_run_on_a_basis_trains_the_views_as_planned_and_is_evaluated(phi3, tiny_data, tmp_path, capsys):
    basis = tmp_path / "basis.safetensors"
    extract_basis([resolve_model(str(phi3))], basis, BasisChoices(rank=4), None, torch.device("cpu"))
    config = config_for(phi3, tiny_data, tmp_path / "run", mode="fb", basis=str(basis))
    plan = preflight(config).measured
    record = train(config)
    assert "q_proj, k_proj and v_proj are rows of qkv_proj in this model" in capsys.readouterr().err
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert_b_is_basis(tmp_path / "run", basis)
    assert json.loads((RunDirectory(tmp_path / "run").adapter / "cora.json").read_text())["views"] is True
    assert isinstance(plan, Measured)
    assert plan.parameters == record["parameters"]
    assert (
        "PEFT, transformers and vLLM cannot load it as it is stored; `cora export`"
        in (RunDirectory(tmp_path / "run").adapter / "README.md").read_text()
    )
    assert evaluate_run(tmp_path / "run").record["metrics"]


def test_a_start_from_gradients_is_computed_for_each_view(phi3, tiny_data, tmp_path):
    train(config_for(phi3, tiny_data, tmp_path / "run", mode="lora-one", start_examples=2, max_steps=1))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_rows_of_a_weight_in_4_bits_are_refused_before_it_is_loaded(phi3, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("cora_cli.training.prepare.require_four_bit", lambda: None)
    config = config_for(phi3, tiny_data, tmp_path / "run", load_in_4bit=True)
    with pytest.raises(
        CoraError, match=r"--load-in-4bit holds qkv_proj of .*; adapt all of them with --target-modules qkv_proj"
    ):
        prepare(config)
