from typing import Any

import pytest
from transformers import (
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PhimoeConfig,
    RobertaConfig,
    RwkvConfig,
    WhisperConfig,
)

from cora_cli.models.configuration import length_limits, remove_dropout, rope_switch
from cora_cli.models.loading import context_length

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 40,
}


def test_dropout_is_removed_under_every_name_and_in_nested_configurations() -> None:
    gpt2 = GPT2Config()
    assert remove_dropout(gpt2) == dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.1)
    assert gpt2.attn_pdrop == 0
    assert remove_dropout(gpt2) == {}
    assert remove_dropout(Gemma3Config(text_config={"attention_dropout": 0.2})) == {"attention_dropout": 0.2}
    assert remove_dropout(PhimoeConfig()) == {"router_jitter_noise": 0.01}


def test_lengths_at_which_attention_or_positions_change() -> None:
    assert length_limits(LlamaConfig()) == set()
    assert length_limits(MistralConfig(sliding_window=8)) == {8}
    assert length_limits(Gemma3Config(text_config={"sliding_window": 16})) == {16}
    assert length_limits(LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=LONGROPE)) == {40}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (MptConfig(max_seq_len=160), 160),
        (WhisperConfig(max_target_positions=48, max_source_positions=1500), 48),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=64), 64),
        (RwkvConfig(context_length=128), 128),
        (Gemma3Config(text_config={"max_position_embeddings": 256}), 256),
    ],
)
def test_the_context_length_under_the_names_of_several_families(config: Any, length: int) -> None:
    assert context_length(config) == length


def test_the_rotary_embedding_of_a_complete_pass_changes_where_the_configuration_says() -> None:
    assert rope_switch(LlamaConfig()) is None
    assert rope_switch(LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=LONGROPE)) == 40
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert rope_switch(LlamaConfig(max_position_embeddings=128, rope_parameters=dynamic)) == 128
