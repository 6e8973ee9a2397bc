"""An adapter as PEFT itself saves it, and the logits by which adapters are compared."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def foreign(base: Path, target: Path, rows: int | None = None, complete: bool = True, **settings) -> torch.Tensor:
    """A LoRA adapter as PEFT itself saves it, on embeddings of `rows` rows, stored `complete` or not; returns the logits of base and adapter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings})
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(target, save_embedding_layers=(bool(rows) or "auto") if complete else False)
    return logits(wrapped)


def copy_of(model: Path, target: Path, kind: torch.dtype, **config) -> Path:
    """The model stored in `kind`, with other entries in its configuration."""
    shutil.copytree(model, target)
    LlamaForCausalLM.from_pretrained(model).to(kind).save_pretrained(target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target
