from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_llama(kv_heads: int = 4, seed: int = 0, vocab: int = 32, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=24,
        vocab_size=vocab,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def square_models(tmp_path_factory) -> list[Path]:
    """Three multi-head models (square q, k, v) of one architecture."""
    root = tmp_path_factory.mktemp("square")
    for seed in range(3):
        make_llama(seed=seed).save_pretrained(root / f"m{seed}")
    return [root / f"m{seed}" for seed in range(3)]


@pytest.fixture(scope="session")
def grouped_models(tmp_path_factory) -> list[Path]:
    """Two grouped-query models: k and v are (8, 16), q is (16, 16)."""
    root = tmp_path_factory.mktemp("grouped")
    for seed in range(2):
        make_llama(kv_heads=2, seed=seed).save_pretrained(root / f"m{seed}")
    return [root / f"m{seed}" for seed in range(2)]
