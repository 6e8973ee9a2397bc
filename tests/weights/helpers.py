"""What several test files of the basis need: an in-memory source, a float64 reference in numpy, tiny checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cora_cli.basis.choices import BasisChoices
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.model_path import ModelPath
from cora_cli.weights.sources import WeightSource, open_source

CPU = torch.device("cpu")


class ArraySource(WeightSource):
    """Weights in memory: module name -> array (out, in)."""

    def __init__(self, weights: dict[str, np.ndarray], reference: str = "memory") -> None:
        self.weights = weights
        self.reference, self.revision, self.architecture = reference, None, {}
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.reads: list[str] = []

    def read(self, module: str) -> torch.Tensor:
        self.reads.append(module)
        return torch.from_numpy(self.weights[module].copy())

    def entry_bytes(self, module: str) -> int:
        return self.weights[module].itemsize

    def content_hash(self, modules: Iterable[str]) -> str:
        return "-".join(modules)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return []


def local(path: Path) -> ModelPath:
    return ModelPath(str(path), path, None)


def dense_weights(path: Path) -> dict[str, np.ndarray]:
    """All matrices of a saved model as float64 arrays."""
    source = open_source(local(path))
    return {module: source.read(module).double().numpy() for module in source.shapes}


def reference_matrix(weights: list[np.ndarray], choices: BasisChoices) -> np.ndarray:
    """M, written out: mean or concatenation, transposed for the input side, columns centred for PCA."""
    weights = [weight.T if choices.side == "input" else weight for weight in weights]
    matrix = np.mean(weights, axis=0) if choices.merge == "mean" else np.hstack(weights)
    return matrix - matrix.mean(axis=1, keepdims=True) if choices.method == "pca" else matrix


def reference_directions(matrix: np.ndarray, choices: BasisChoices) -> tuple[np.ndarray, np.ndarray]:
    """The chosen left singular vectors of M and their singular values; the most minor ones first under `bottom`."""
    vectors, values, _ = np.linalg.svd(matrix, full_matrices=False)
    count = min(matrix.shape[0], matrix.shape[1] - (choices.method == "pca"))
    order = np.arange(choices.rank) if choices.component == "top" else np.arange(count - 1, count - choices.rank - 1, -1)
    return vectors[:, order], values[order]


def subspace_error(reference: np.ndarray, found: torch.Tensor) -> float:
    """‖(I − UUᵀ)B‖₂: 0 for the same subspace, 1 where some direction is missed."""
    basis = found.double().numpy()
    return float(np.linalg.norm(basis - reference @ (reference.T @ basis), 2))


def make_llama(
    kv_heads: int = 4, seed: int = 0, vocab: int = 32, layers: int = 2, attention_bias: bool = False
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=24,
        vocab_size=vocab,
        attention_bias=attention_bias,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def make_adapter(base: Path, target: Path, merged: Path | None = None, seed: int = 0, **settings) -> Path:
    """A LoRA adapter saved by PEFT with non-zero factors, and the model that PEFT merges it into."""
    model = make_llama(kv_heads=2)
    model.load_state_dict(type(model).from_pretrained(base).state_dict())
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    model.name_or_path = str(base)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter)
    peft_model.save_pretrained(target)
    if merged:
        peft_model.merge_and_unload().save_pretrained(merged)
    return target


def change_config(directory: Path, **changed) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def change_tensors(directory: Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
