"""The weight matrices of a model for a plan: their shapes are known, and their data need not be here.

A model without weights is described by its configuration alone.
"""

from collections.abc import Iterable

import torch
from transformers.pytorch_utils import Conv1D

from cora_cli.adapters.base import base_of
from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.fused import fused_views
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import other_modalities, skeleton_of
from cora_cli.weights.matrices import view_shapes
from cora_cli.weights.sources import AdapterSource, ModelSource, WeightSource, architecture_of


class PlannedSource(WeightSource):
    """A complete model without weights: its linear layers and embeddings, in the type that its configuration names."""

    def __init__(self, model: ModelPath, trust_remote_code: bool = False) -> None:
        self.reference, self.revision = model.reference, model.revision
        self.architecture = architecture_of(model.language_config())
        self.shapes = {}
        self._bytes: dict[str, int] = {}
        skeleton = skeleton_of(model, trust_remote_code).model
        self.others = other_modalities(skeleton)
        for name, module in skeleton.named_modules():
            if name not in self.others and isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding):
                rows, columns = module.weight.shape
                self.shapes[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
                self._bytes[name] = module.weight.element_size()
        self.views = fused_views(skeleton)
        self.shapes |= view_shapes(self.views, self.shapes)
        self._bytes |= {name: self._bytes[view.fused] for name, view in self.views.items()}

    def entry_bytes(self, module: str) -> int:
        """See `WeightSource.entry_bytes`."""
        return self._bytes[module]

    def read(self, module: str) -> torch.Tensor:
        """Raises `CoraError`: there is nothing to read."""
        raise CoraError(f"{self.reference} holds no weights")

    def content_hash(self, modules: Iterable[str]) -> str:
        """Raises `CoraError`, as `read` does."""
        raise CoraError(f"{self.reference} holds no weights")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """None."""
        return []


def open_planned(model: ModelPath, base: WeightSource | None = None) -> WeightSource:
    """As `open_source`, also for a model, or the base of an adapter, that holds no weights."""
    if model.is_adapter:
        return AdapterSource(model, base or open_planned(base_of(model, weights=False)))
    return ModelSource(model) if model.has_weights else PlannedSource(model)
