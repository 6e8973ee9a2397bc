"""What several test files of the basis need: an in-memory source, a float64 reference in numpy, tiny checkpoints."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
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
