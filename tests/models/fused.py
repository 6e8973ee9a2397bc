"""Small models of the families with fused projections, and the rows of q, k and v in each, written out."""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.training.families import COMMON, FAMILIES

IDS = torch.tensor([[1, 5, 9, 7, 3, 2, 40, 11]])
HEADS, SIZE = 4, 8
Slices = Callable[[torch.Tensor, int], torch.Tensor]
"""The rows of a fused weight (outputs, in) that are part 0, 1 or 2: q, k or v."""


def stacked(*lengths: int) -> Slices:
    def rows(weight: torch.Tensor, part: int) -> torch.Tensor:
        start = sum(lengths[:part])
        return weight[start : start + lengths[part]]

    return rows


def by_head(weight: torch.Tensor, part: int) -> torch.Tensor:
    starts = range(part * SIZE, 3 * SIZE * HEADS, 3 * SIZE)
    return torch.cat([weight[start : start + SIZE] for start in starts])


def falcon_groups(weight: torch.Tensor, part: int) -> torch.Tensor:
    """Two groups of two queries, a key and a value."""
    blocks = weight.split(4 * SIZE)
    return torch.cat([(block[: 2 * SIZE], block[2 * SIZE : 3 * SIZE], block[3 * SIZE :])[part] for block in blocks])


def codegen(weight: torch.Tensor, part: int) -> torch.Tensor:
    """Four blocks of a query, a value and a key."""
    return torch.cat([block.split(SIZE)[(0, 2, 1)[part]] for block in weight.split(3 * SIZE)])


OLD_FALCON = {"head_dim": None, "model_type": "falcon", "alibi": False, "multi_query": False, "bias": True}
PER_HEAD = {"head_dim": None, "model_type": "gpt_bigcode", "multi_query": False}
DBRX = {
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
}
VARIANTS = {
    "falcon-old": OLD_FALCON,
    "gpt_bigcode-heads": PER_HEAD,
    "dbrx": {**DBRX, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
        },
    },
}
FAMILY_SLICES: dict[str, tuple[str, Slices]] = {
    "bloom": ("query_key_value", by_head),
    "codegen": ("qkv_proj", codegen),
    "dbrx": ("Wqkv", stacked(32, 16, 16)),
    "falcon": ("query_key_value", falcon_groups),
    "falcon-alibi": ("query_key_value", stacked(32, 8, 8)),
    "falcon-old": ("query_key_value", by_head),
    "gpt2": ("c_attn", stacked(32, 32, 32)),
    "gpt_bigcode": ("c_attn", stacked(32, 8, 8)),
    "gpt_bigcode-heads": ("c_attn", by_head),
    "gpt_neox": ("query_key_value", by_head),
    "gpt_neox_japanese": ("query_key_value", by_head),
    "mpt": ("Wqkv", stacked(32, 32, 32)),
    "openai-gpt": ("c_attn", stacked(32, 32, 32)),
    "persimmon": ("query_key_value", by_head),
    "phi3": ("qkv_proj", stacked(32, 16, 16)),
    "phi4_multimodal": ("qkv_proj", stacked(32, 16, 16)),
}


def model_of(family: str):
    """A model with random weights, biases included, without dropout."""
    settings = {**COMMON, **(FAMILIES | VARIANTS)[family]}
    settings = {name: value for name, value in settings.items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type", family), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def weight_of(module) -> torch.Tensor:
    """(out, in)"""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight
