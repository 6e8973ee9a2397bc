"""How much of what a model learned lies in a common space: the loss on its own data with its ΔW replaced by parts of it, or by others'.

`measure` says how much of a ΔW's norm a basis holds, which need not be what its task needs. `replacements` computes what is put in its
place, `own_data` finds the records, and the losses are those of `training.heldout`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from cora_cli.adapters.install import check_applied
from cora_cli.adapters.loading import load_adapter
from cora_cli.basis.choices import Side
from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware, select_packed_attention
from cora_cli.errors import CoraError
from cora_cli.inspection.changes import change_of, read_matrix
from cora_cli.inspection.measure import Kept
from cora_cli.inspection.own_data import OwnData
from cora_cli.inspection.replacements import (
    ITSELF,
    NOTHING,
    REPLACEMENTS,
    Update,
    as_stored,
    changed_by,
    kept_energy,
    replace_change,
)
from cora_cli.intervals import Interval, has_ratio, paired_difference, ratio_interval
from cora_cli.methods.parts.layers import linear_weight, transformers_model
from cora_cli.methods.parts.starts import seeded
from cora_cli.models.fused import split_projections
from cora_cli.models.loading import load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import progress, say
from cora_cli.training.batching import choose_batching
from cora_cli.training.heldout import HeldOutLoss, held_out_loss
from cora_cli.weights.sources import WeightSource


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A model with one of `REPLACEMENTS` in place of its ΔW, on its own records.

    `loss`: nats per response token. `gain`: by how much it is below the loss with NOTHING, on the same records. `share`: the share of the
    function, gain / gain of ITSELF; None where ITSELF is not shown to gain anything. `energy`: the share of the norm, `kept_energy`, mean
    over the matrices that the model changed; None if there are none. Intervals (95 %) are over records; None for a single one and where all agree.
    """

    loss: float
    gain: float
    gain_interval: Interval
    share: float | None
    share_interval: Interval
    energy: float | None


@dataclasses.dataclass(frozen=True)
class Function:
    """What each replacement of the ΔW of `model` does on `records` records of `dataset`, with `tokens` response tokens, in precision `dtype`."""

    model: str
    dataset: str
    records: int
    tokens: int
    dtype: str
    replaced: dict[str, Replaced]


def measure_function(
    data: Mapping[str, OwnData],
    paths: Mapping[str, ModelPath],
    models: Mapping[str, WeightSource],
    base_path: ModelPath,
    base: WeightSource,
    modules: Sequence[str],
    target_modules: tuple[str, ...],
    kept: Kept,
    rank: int,
    side: Side,
    seed: int,
    hardware: Hardware,
) -> list[Function]:
    """Score every model that has `data` with each replacement of its change in the weights of `modules`; one model is in memory at a time.

    What a model changes elsewhere stays, in every replacement: its other matrices, norms, biases and embedding are its own. `modules` are
    those that `target_modules` match, and `kept` holds the directions that `measure` found there. Raises `CoraError` where the model does
    not call such layers, or losses are not finite.
    """
    say(hardware.describe())
    # Models that differ from the base in these matrices alone are all scored with one copy of it.
    alike = [name for name in data if models[name].changes_only(modules, base)]
    host: _Host | None = None
    found = {}
    for name in sorted(data, key=alike.__contains__, reverse=True):
        if host is None or name not in alike:
            host = None  # before the next one is loaded
            path, users = (base_path, alike) if name in alike else (paths[name], [name])
            examples = [example for one in users for example in data[one].examples]
            host = _Host(path, base_path, base, modules, target_modules, examples, hardware)
        updates, energies = _updates(name, models, base, modules, kept, rank, side, seed, hardware)
        losses = {by: host.loss(data[name].examples, updates[by], f"{name}, {by}") for by in REPLACEMENTS}
        found[name] = _function(name, data[name].dataset, hardware, losses, energies)
    return [found[name] for name in data]


def check_hosts(
    names: Iterable[str], models: Mapping[str, WeightSource], base: WeightSource, target_modules: tuple[str, ...]
) -> None:
    """Raise `CoraError` for a model among `names` in which `measure_function` could not replace the weights that `target_modules` match."""
    modules = base.targets(target_modules)
    for name in names:
        lacking = None if models[name].changes_only(modules, base) else models[name].held_otherwise(modules)
        if lacking is not None:
            raise CoraError(
                f"{models[name].reference} adapts a fused projection as one, or its rows apart, and {lacking} is the other of the two; write it as a "
                "complete model with `cora merge` and name that"
            )


class _Host:
    """The model at `path` with the weights of `base` in `modules`, ready to measure `examples`."""

    def __init__(
        self,
        path: ModelPath,
        base_path: ModelPath,
        base: WeightSource,
        modules: Sequence[str],
        target_modules: tuple[str, ...],
        examples: Sequence[Example],
        hardware: Hardware,
    ) -> None:
        self._hardware = hardware
        # As in training: frozen weights in the precision of the hardware, those of a complete model in float32.
        complete = path is not base_path and not path.is_adapter
        loaded = load_model(
            path if complete else base_path, torch.float32 if complete else hardware.dtype, hardware.device, None
        )
        # Not PEFT's model, which wants an adapter's layer to be left where all are taken out below.
        inner = self.model = transformers_model(load_adapter(loaded, path, base=base_path) if path.is_adapter else loaded)
        split_projections(inner, target_modules)
        self._layers = {module: _plain_layer(inner, module) for module in modules}
        if path is not base_path:
            for module, layer in self._layers.items():
                _set_weight(layer, base.read(module))
        check_applied(inner, target_modules, examples[0].input_ids[:8], hardware.dtype)
        batching = choose_batching(
            self.model, select_packed_attention(hardware.device.type, hardware.dtype), examples, hardware
        )
        say(batching.describe())
        self._form: BatchForm = batching.form

    def loss(self, examples: Sequence[Example], updates: Mapping[str, Update], label: str) -> HeldOutLoss:
        """The loss of each of `examples` with `updates` added to the layers of that name."""
        with changed_by(self._layers, updates, self._hardware.device):
            found = held_out_loss(self.model, examples, self._hardware, self._form, label=label)
        if not math.isfinite(found.mean):
            raise CoraError(f"the loss of {label}, is {found.mean}: the model's output is not finite")
        return found


def _plain_layer(model: torch.nn.Module, module: str) -> torch.nn.Module:
    """The layer `module` of `model`, without the adapter that it may have there."""
    layer: Any = model.get_submodule(module)
    if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
        place, _, name = module.rpartition(".")
        setattr(model.get_submodule(place), name, layer)
    return layer


def _set_weight(layer: Any, weight: torch.Tensor) -> None:
    """Give a linear layer the `weight` (out, in) in its own type; a layer that shared its weight no longer does."""
    found = linear_weight(layer)
    assert found is not None, "`measure_function` takes only modules that are linear layers"
    stored = weight.T if found.transposed else weight
    layer.weight = torch.nn.Parameter(stored.to(layer.weight).contiguous(), requires_grad=False)


def _updates(
    name: str,
    models: Mapping[str, WeightSource],
    base: WeightSource,
    modules: Sequence[str],
    kept: Kept,
    rank: int,
    side: Side,
    seed: int,
    hardware: Hardware,
) -> tuple[dict[str, dict[str, Update]], dict[str, float | None]]:
    """The update of each module by replacement, and the mean `kept_energy` of each replacement."""
    found: dict[str, dict[str, Update]] = {by: {} for by in REPLACEMENTS}
    energies: dict[str, list[float]] = {by: [] for by in REPLACEMENTS}
    with progress(f"replacements for {name}", len(modules), "matrices") as shown:
        for module in modules:
            base_weight = read_matrix(base, module, hardware.device, side)
            changes = {model: change_of(source, module, base, base_weight, side) for model, source in models.items()}
            own, random = changes.pop(name), partial(_random_directions, seed, module, len(base_weight))
            for by, update in replace_change(own, list(changes.values()), kept.get((name, module)), rank, random).items():
                if own.energy > 0:
                    energies[by].append(kept_energy(own, update))
                found[by][module] = as_stored(update, side, hardware.dtype)
            shown.advance(note=module)
    return found, {by: fmean(values) if values else None for by, values in energies.items()}


def _random_directions(seed: int, module: str, rows: int, count: int) -> torch.Tensor:
    """Orthonormal columns (rows, count) float64, uniform over all such frames."""
    drawn = torch.randn((rows, count), generator=seeded(seed, module, "inspect"), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def _function(
    name: str, dataset: str, hardware: Hardware, losses: Mapping[str, HeldOutLoss], energies: Mapping[str, float | None]
) -> Function:
    nothing, itself = losses[NOTHING], losses[ITSELF]
    learned = nothing.nll - itself.nll
    gained = _gain(nothing, itself)
    replaced = {}
    for by, loss in losses.items():
        gain, gain_interval = _gain(nothing, loss)
        share, share_interval = None, None
        if gained[1] and gained[1][0] > 0 and has_ratio(learned):
            share, share_interval = gain / gained[0], ratio_interval(nothing.nll - loss.nll, learned)
        replaced[by] = Replaced(loss.mean, gain, gain_interval, share, share_interval, energies[by])
    return Function(name, dataset, len(nothing.nll), int(nothing.tokens.sum()), hardware.dtype_name, replaced)


def _gain(before: HeldOutLoss, after: HeldOutLoss) -> tuple[float, Interval]:
    """By how much the loss fell, with its interval over the same records."""
    one, other = (np.stack([loss.nll, loss.tokens], axis=1) for loss in (before, after))
    found = paired_difference(one, other, lambda sums, _: sums[..., 0] / sums[..., 1])
    return found.difference, found.ci95
