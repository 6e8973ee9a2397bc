"""What a run says about its inputs before it reads weights."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cora_cli.errors import CoraError
from cora_cli.training.preflight import preflight
from cora_cli.training.prepare import layers_without
from cora_cli.training.run import train
from tests.training.families import build
from tests.training.helpers import config_for

LINEARS = [f"model.layers.{n}.{part}" for n in range(3) for part in ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj")]


def test_layers_of_another_kind_that_no_target_matches_are_named() -> None:
    every = [
        *LINEARS,
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.1.linear_attn.in_proj",
    ]
    assert layers_without(["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"], every) == ["model.layers.1"]


def test_other_stacks_and_heads_are_no_layers_to_adapt() -> None:
    every = [*LINEARS, "visual.blocks.0.qkv", "lm_head"]
    assert layers_without([f"model.layers.{n}.mlp.experts.0.up_proj" for n in range(3)], every) == []
    assert layers_without(["lm_head"], every) == []


@pytest.mark.parametrize("planned", [False, True])
def test_activations_that_a_model_cannot_compute_again_are_refused_before_the_run(
    planned: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = build("openai-gpt")
    config.vocab_size = len(AutoTokenizer.from_pretrained(tiny_model))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    settings = {"gradient_checkpointing": True, "target_modules": ("c_attn",)}
    with pytest.raises(
        CoraError, match=r"--gradient-checkpointing does not apply to .*activations of OpenAIGPTLMHeadModel again"
    ):
        (preflight if planned else train)(config_for(tmp_path / "model", tiny_data, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
