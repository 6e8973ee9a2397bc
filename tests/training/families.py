"""Small models of real families, two layers of hidden size 32 with random weights, and how training and evaluation treat each.

`python -m tests.training.families FILE` measures all of them and writes the table of docs/families.md (`make families`).
"""

import contextlib
import dataclasses
import io
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, logging

from cora_cli.adapters.install import install_adapter
from cora_cli.data.batches import Collator
from cora_cli.data.encode import Example
from cora_cli.device import Hardware, select_packed_attention
from cora_cli.evaluation.generate import transformers_engine
from cora_cli.methods.parts.layers import factors_of, linear_weight, lora_layers
from cora_cli.models.configuration import load_configuration, remove_dropout, route_as_evaluated
from cora_cli.models.fused import VIEWS, fused_views
from cora_cli.models.loading import load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import build_skeleton
from cora_cli.render.markdown_table import markdown_table
from cora_cli.training.batching import choose_batching
from cora_cli.training.heldout import held_out_loss
from cora_cli.training.losses import batch_losses
from tests.methods.helpers import plan_of

LAYERS = 2
COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {
    "d_model": 32,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "init_std": 0.3,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
BERT = {"is_decoder": True, "num_key_value_heads": None}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
WINDOW = {"sliding_window": 8}
BY_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
}
LONG = {
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 5.0],
        "original_max_position_embeddings": 40,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bart": DECODER,
    "bert": BERT,
    "bert-generation": BERT,
    "big_bird": BERT,
    "biogpt": {},
    "bitnet": {},
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "camembert": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "codegen": {"n_layer": LAYERS, "n_head": 4, "n_positions": 160, "n_embd": 32, "rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "ctrl": {"n_layer": LAYERS, "n_head": 4, "n_embd": 32, "dff": 48, "n_positions": 160},
    "cwm": WINDOW,
    "data2vec-text": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "deepseek_v2": {**LATENT, "head_dim": 4},
    "deepseek_v3": LATENT,
    "deepseek_v32": {**LATENT, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 8},
    "diffllama": {},
    "doge": {"keep_window_size": 8},
    "dots1": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "electra": {**BERT, "embedding_size": 32},
    "ernie": BERT,
    "ernie4_5": {},
    "exaone4": WINDOW,
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {"head_dim": None, "model_type": "falcon", "alibi": True, "multi_query": True, "parallel_attn": False},
    "falcon_mamba": {"state_size": 8, "num_key_value_heads": None},
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma3n_text": {
        **WINDOW,
        **BY_LAYER,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**WINDOW, **BY_LAYER, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {**EXPERTS, **WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gptj": {"n_layer": LAYERS, "n_head": 4, "n_positions": 160, "n_embd": 32, "rotary_dim": 4},
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "jetmoe": {**EXPERTS, "kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "mamba": {"state_size": 8, "num_key_value_heads": None},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "marian": DECODER,
    "mbart": DECODER,
    "megatron-bert": BERT,
    "ministral": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpt": {"n_layers": LAYERS, "n_heads": 4, "d_model": 32, "max_seq_len": 160, "expansion_ratio": 2},
    "mvp": DECODER,
    "nemotron": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention"],
        "n_routed_experts": 4,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "openai-gpt": {"n_positions": 160},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "pegasus": DECODER,
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": WINDOW,
    "phi3-longrope": {"model_type": "phi3", **LONG},
    "phimoe": {**EXPERTS, **WINDOW},
    "plbart": DECODER,
    "qwen2": {},
    "qwen2-window": {"model_type": "qwen2", **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_5_text": {**DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {**EXPERTS, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "rembert": {**BERT, "input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "roberta-prelayernorm": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "roc_bert": {
        **BERT,
        "enable_pronunciation": False,
        "enable_shape": False,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
    },
    "roformer": {**BERT, "embedding_size": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 160},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "trocr": DECODER,
    "whisper": {**DECODER, "max_target_positions": 160, "max_source_positions": 16},
    "xglm": {"d_model": 32, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 48},
    "xlm-roberta": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "xlm-roberta-xl": {**BERT, "pad_token_id": 1, "bos_token_id": 0},
    "xmod": {**BERT, "default_language": "en_XX", "languages": ["en_XX"], "pad_token_id": 1, "bos_token_id": 0},
    "zamba2": {
        **MAMBA,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}


def build(family: str) -> Any:
    """The configuration of a family, or of a variant named after its `model_type`."""
    settings = {name: value for name, value in {**COMMON, **FAMILIES[family]}.items() if value is not None}
    return AutoConfig.for_model(settings.pop("model_type", family), **settings)


_PROJECTION = re.compile(r"w?[qkv]|query|key|value|receptance|(q|k|v|kv|qkv)_.*|in_proj_qkvz?", re.IGNORECASE)
"""Names of layers that compute queries, keys or values."""


def projections(family: str) -> str:
    """What q_proj, k_proj and v_proj are in a family: its own layers, views of a fused one, or other layers, by name."""
    model = build_skeleton(build(family))
    if views := fused_views(model):
        return f"views of {next(iter(views.values())).fused.rpartition('.')[2]}"
    linears = [name.rpartition(".")[2] for name, module in model.named_modules() if linear_weight(module) is not None]
    found = list(dict.fromkeys(name for name in linears if name in VIEWS or _PROJECTION.fullmatch(name)))
    return "own" if set(found) >= set(VIEWS) else ", ".join(found) or "none"


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a family is trained and evaluated, and how far that is from plain attention, one example or prompt at a time.

    `loss`: the largest relative difference of a record's held-out loss, and of the loss of a training batch. `answers`: the share of
    greedy answers that are those of `generate` alone. `merged`: the largest difference of the logits of adapter and merged model, relative
    to the largest logit.
    """

    batches: str
    reason: str
    loss: float
    engine: str
    answers: float
    merged: float


END, NEW = 2, 4
HARDWARE = Hardware(torch.device("cpu"), torch.float32, "", "")
# State-space models apply the weights of the first two without calling the layers, and a router returns more than its product.
NOT_ADAPTED = ("out_proj", "dt_proj", "router")


def measure(family: str) -> Measured:
    """Treat a family as `train`, `evaluate` and `merge` do, in float32, and compare with models of transformers that this program did not touch."""
    examples, prompts = _examples(), _prompts()
    torch.manual_seed(0)
    stored = AutoModelForCausalLM.from_config(build(family)).eval()
    evaluated, model = _loaded(stored, trains=False), _loaded(stored, trains=True)
    answers, engine = _answers(evaluated, prompts)
    alone = [_answers_alone(stored, prompt) for prompt in prompts]

    batching = choose_batching(model, select_packed_attention("cpu"), examples, HARDWARE, trains=True)
    plain = _plain(stored, build(family), "eager" if batching.form.kind == "packed" else batching.attention)
    expected = [_loss_alone(plain, example) for example in examples]
    held_out = held_out_loss(model, examples, HARDWARE, batching.form).nll
    model.train()
    with torch.no_grad():
        trained = batch_losses(model, Collator(batching.form)([(example, False) for example in examples])).double().sum().item()
    differences = [abs(found - wanted) / wanted for found, wanted in zip(held_out, expected, strict=True)]
    return Measured(
        batching.form.kind,
        batching.reason,
        max(*differences, abs(trained - sum(expected)) / sum(expected)),
        engine,
        sum(found == wanted for found, wanted in zip(answers, alone, strict=True)) / len(prompts),
        _merged(plain.eval(), examples[0]),
    )


def _examples() -> list[Example]:
    """Records on both sides of every window and length above; three begin alike."""
    generator = torch.Generator().manual_seed(0)
    stem = _random(20, generator)
    lengths = ((30, 5, 0), (7, 3, 0), (60, 30, 20), (25, 22, 20), (44, 2, 0), (12, 11, 0), (90, 40, 20))
    return [Example(stem[:shared] + _random(length - shared, generator), prompt) for length, prompt, shared in lengths]


def _prompts() -> list[list[int]]:
    """Prompts, longest first, of which three begin alike and two are of one length, on both sides of every window and length; one crosses a length."""
    generator = torch.Generator().manual_seed(1)
    stem = _random(40, generator)
    lengths = ((70, 0), (60, 40), (55, 40), (48, 40), (38, 0), (30, 0), (30, 0), (12, 0), (7, 0))
    return [stem[:shared] + _random(length - shared, generator) for length, shared in lengths]


def _random(tokens: int, generator: torch.Generator) -> list[int]:
    found: list[int] = torch.randint(3, COMMON["vocab_size"], (tokens,), generator=generator).tolist()
    return found


def _loaded(stored: Any, trains: bool) -> Any:
    """The model as `evaluate` loads it from its files, or as `train` does."""
    with tempfile.TemporaryDirectory() as folder:
        stored.save_pretrained(folder)
        path = ModelPath(stored.config.model_type, Path(folder), None)
        config = load_configuration(path)
        if trains:
            remove_dropout(config)
        model = load_model(path, torch.float32, HARDWARE.device, None, config=config)
    if trains:
        route_as_evaluated(model)
    return model


def _plain(model: Any, config: Any, attention: str) -> Any:
    """The same model in another attention of transformers, with what its configuration states of dropout, which evaluation leaves out."""
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def _loss_alone(model: Any, example: Example) -> float:
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids).logits[0, example.prompt_length - 1 : -1].double()
    return functional.cross_entropy(logits, ids[0, example.prompt_length :], reduction="sum").item()


class _Tokenizer:
    """What the engines ask of a tokenizer; its padding has no embedding row."""

    pad_token_id, eos_token_id = 100_000, END


def _answers(model: Any, prompts: Sequence[list[int]]) -> tuple[list[list[int]], str]:
    """The answers of the chosen engine in batches of four, and its name."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = transformers_engine(model, _Tokenizer, [END], prompts, 4, NEW)
    waves = [prompts[start : start + engine.wave] for start in range(0, len(prompts), engine.wave)]
    name = next((f"{engine.name}, {how}" for how in ("one length", "one prompt") if how in said.getvalue()), engine.name)
    return [answer for wave in waves for answer in engine.answer(wave, lambda: None)], name


@torch.inference_mode()
def _answers_alone(model: Any, prompt: list[int]) -> list[int]:
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=END, pad_token_id=0)
    ids = torch.tensor([prompt])
    found: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()
    return found


def _merged(model: Any, example: Example) -> float:
    """Adapt every linear layer but the head, whichever way round it stores its weight, with random factors, and compare logits before and
    after the merge."""
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if linear_weight(module) is not None and module is not head]
    # PEFT also adapts the fused weights of experts where a target has the name of one of their projections.
    fused = hasattr(model.config, "n_routed_experts")
    targets = tuple(
        name
        for name in linears
        if name.rpartition(".")[2] not in NOT_ADAPTED and "expert" not in name and not (fused and ".mlp." in name)
    )
    plan = plan_of("lora", rank=2, alpha=2.0, rslora=False, dropout=0.0, seed=0, target_modules=targets)
    adapted = install_adapter(model, plan, None).eval()
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        for number, (_, layer) in enumerate(lora_layers(adapted)):
            torch.nn.init.normal_(factors_of(layer)[1], std=0.1, generator=torch.Generator().manual_seed(number))
        before = adapted(input_ids=ids).logits
        after = adapted.merge_and_unload()(input_ids=ids).logits
    return ((before - after).abs().max() / before.abs().max()).item()


def table() -> str:
    """How many families there are and are packed, and a row for each."""
    rows = []
    for family in FAMILIES:
        found = measure(family)
        why = "" if found.batches == "packed" else found.reason
        rows.append(
            [
                family,
                projections(family),
                f"{found.loss:.0e}",
                f"{found.merged:.0e}",
                f"{found.engine}, {found.answers:.0%} equal",
                found.batches,
                why,
            ]
        )
    packed = sum(cells[5] == "packed" for cells in rows)
    headers = ["family", "q, k, v", "loss", "merged", "answers", "batches", "because"]
    return f"{len(rows)} configurations, {packed} of them packed.\n\n{markdown_table(headers, rows)}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
