"""Which models predict the next token from earlier ones alone."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cora_cli.errors import CoraError
from cora_cli.models.skeleton import require_causal
from tests.training.families import FAMILIES, build


def causal_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["bart", "bert", "roformer", "gemma", "gpt_neox", "llama", "mamba", "trocr", "whisper"])
def test_causal_families_are_accepted(family: str) -> None:
    require_causal(causal_model(build(family)), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted_as_causal(family: str) -> None:
    require_causal(causal_model(build(family)), family)


@pytest.mark.parametrize("family", ["bert", "electra", "rembert", "roberta", "roformer"])
def test_an_encoder_is_refused_by_name_and_setting(family: str) -> None:
    config = build(family)
    config.is_decoder = False
    with pytest.raises(
        CoraError, match=f"m is a {family} model whose tokens attend to later ones.*set is_decoder to true in its config"
    ):
        require_causal(causal_model(config), "m")


def test_bidirectional_attention_is_refused_by_its_setting() -> None:
    config = build("gemma3_text")
    config.use_bidirectional_attention = True
    with pytest.raises(CoraError, match="set use_bidirectional_attention to false"):
        require_causal(causal_model(config), "m")


def test_a_model_without_attention_is_causal() -> None:
    require_causal(causal_model(AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=1, vocab_size=9)), "m")
