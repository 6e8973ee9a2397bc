"""The changes that earlier models made to one base, layer by layer as products of factors: what adapters of `--start-models` start from."""

from collections.abc import Sequence

import torch

from cora_cli.adapters.base import check_base
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import Observed
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.progress import note
from cora_cli.weights.planned import open_planned
from cora_cli.weights.sources import WeightSource, open_source

_NEGLIGIBLE = 1e-6
"""Singular values of ΔW below this fraction of the largest are rounding errors of the weights."""


class StartModels:
    """Adapters on the model `base`, or complete models of its shapes. `observed` reads them.

    Raises `CoraError` where one is another model's adapter or has other shapes in `layers`, and where two have the same content; complete
    models only if `adapters_only` is off.
    """

    def __init__(
        self, references: Sequence[str], base: ModelPath, layers: Sequence[str], adapters_only: str | None = None
    ) -> None:
        self._layers = layers
        self._base = open_source(base)
        self._sources: list[WeightSource] = []
        others = [name for name in self._base.without_overlap(layers) if name not in layers]
        self.hashes: dict[str, str] = {}
        """SHA-256 of each model's files, by reference."""
        for reference in references:
            model = resolve_model(reference)
            _check_kind(model, adapters_only)
            if model.is_adapter:
                check_base(model, base)
            digest = model.content_hash()
            if digest in self.hashes.values():
                raise CoraError(f"--start-models: {reference} has the same content as another of them")
            self.hashes[model.reference] = digest
            source = open_source(model, self._base if model.is_adapter else None)
            _check_shapes(source, self._base, layers)
            if not model.is_adapter:
                note(
                    f"{reference} is a complete model; of its changes, the start has those to the layers of --target-modules alone"
                )
            elif also := [*(name for name in others if source.own_rank(name, self._base)), *source.without_factors - {*layers}]:
                note(f"{reference} also changes {len(also)} layers that --target-modules leaves out, such as {min(also)}")
            source.say_left_out(layers)
            self._sources.append(source)

    def observed(self) -> dict[str, Observed]:
        """B (out, k) and A (k, in) of every model, by layer. Raises `CoraError` where no model changes any layer."""
        found = {name: Observed(sources=[self._factors(source, name) for source in self._sources]) for name in self._layers}
        if not any(len(a) for one in found.values() for _, a in one.sources):
            raise CoraError("--start-models change none of the layers of --target-modules")
        return found

    def _factors(self, source: WeightSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if source.own_rank(name, self._base) is not None:
            b, a = source.own_factors(name, self._base)
            return b.float(), a.float()
        u, values, v = torch.linalg.svd(source.read(name).double() - self._base.read(name).double(), full_matrices=False)
        kept = int((values > _NEGLIGIBLE * values[0]).sum())
        return (u[:, :kept] * values[:kept]).float(), v[:kept].float()


def check_start_models(
    references: Sequence[str], base: ModelPath, layers: Sequence[str], adapters_only: str | None = None
) -> None:
    """Raise `CoraError` as `StartModels` does, as far as names and shapes tell. Computes no hashes; models without weights are not checked."""
    whole = open_planned(base)
    for number, reference in enumerate(references):
        model = resolve_model(reference, weights=False)
        _check_kind(model, adapters_only)
        if reference in references[:number]:
            raise CoraError(f"--start-models: {reference} has the same content as another of them")
        if model.has_weights:
            _check_shapes(open_planned(model, whole if model.is_adapter else None), whole, layers)


def _check_kind(model: ModelPath, adapters_only: str | None) -> None:
    if adapters_only and not model.is_adapter:
        raise CoraError(f"{adapters_only} starts from the factors of LoRA adapters, but {model.reference} is a complete model")


def _check_shapes(source: WeightSource, base: WeightSource, layers: Sequence[str]) -> None:
    for name in layers:
        if source.shapes.get(name) != base.shapes[name]:
            raise CoraError(
                f"--start-models: {source.reference} has no weight {name} of the base model's shape {base.shapes[name]}"
            )
