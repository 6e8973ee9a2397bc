"""How much of the ΔW that a short training on the same data learned lies in the span of B before its first step: of its norm, and of its function.

The model of the start itself carries the change, as `replacements` does it, on records that the run does not train on.
"""

import dataclasses
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from cora_cli.errors import CoraError
from cora_cli.inspection.changes import Change
from cora_cli.inspection.replacements import Update, as_stored, changed_by, projection
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import method_of
from cora_cli.models.model_path import ModelPath
from cora_cli.training.heldout import held_out_loss
from cora_cli.training.probe import Start, span
from cora_cli.weights.sources import open_source

Changes = Mapping[str, Change]
"""The ΔW of each layer by its name in the base model."""


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a change does for the loss of the model that it was learned from: nats per response token without it (`nothing`) and with it."""

    nothing: float
    itself: float


@dataclasses.dataclass(frozen=True)
class Held:
    """Shares of a ΔW inside B: `energy` of its norm, mean over the matrices, with what random directions expect (`chance`); `function` of its
    gain, with the loss of the projected change."""

    energy: float
    chance: float
    function: float
    projected: float


def read_changes(adapter: ModelPath, base: ModelPath) -> dict[str, Change]:
    """The ΔW of an adapter of `base` in each matrix that it adapts."""
    base_source = open_source(base)
    source = open_source(adapter, base_source)
    ranks = {module: source.own_rank(module, base_source) for module in source.shapes}
    return {module: Change(*source.own_factors(module, base_source)) for module, rank in ranks.items() if rank}


def gain_of(start: Start, changes: Changes) -> Gain:
    """The losses over the validation records of the run without and with `changes`.

    Raises `CoraError` where these say nothing: without validation records, for a start that is not the base model, and for a change that
    does not lower their loss.
    """
    plan = start.prepared.plan
    if plan is None or not method_of(plan.mode).starts_at_base(plan.as_dict()):
        raise CoraError(f"mode {start.config.mode} does not start at the base model, to which the change could be added")
    if not start.prepared.validation.examples:
        raise CoraError(f"{start.config.dataset} has no validation records to measure on; train with --validation-size")
    nothing, itself = _loss(start, {}, "no change"), _loss(start, _complete(start, changes), "change")
    if not itself < nothing:
        raise CoraError(
            f"the change does not lower the loss on the validation records ({nothing:.4f} before, {itself:.4f} with it)"
        )
    return Gain(nothing, itself)


def held_by(start: Start, changes: Changes, gain: Gain) -> Held:
    """What the span of B at `start` holds of `changes`, whose `gain` is that of `gain_of` on the same records."""
    frames = {name: span(factors_of(layer)[1]) for name, layer in lora_layers(start.model)}
    inside: dict[str, Update] = {name: [projection(frames[name], update)] for name, update in _complete(start, changes).items()}
    projected = _loss(start, inside, "change inside B")
    return Held(
        energy=fmean(change.captured_by(frames[name]) for name, change in changes.items()),
        chance=fmean(frame.shape[1] / frame.shape[0] for frame in frames.values()),
        function=(gain.nothing - projected) / (gain.nothing - gain.itself),
        projected=projected,
    )


def _complete(start: Start, changes: Changes) -> dict[str, Update]:
    if different := sorted(dict(lora_layers(start.model)).keys() ^ changes.keys()):
        raise CoraError(f"{different[0]} is adapted by the run or by the change, but not by both")
    return {name: [(change.left, change.right)] for name, change in changes.items()}


def _loss(start: Start, updates: Mapping[str, Update], label: str) -> float:
    linears: dict[str, Any] = {name: layer.get_base_layer() for name, layer in lora_layers(start.model)}
    stored = {name: as_stored(update, "output", torch.float32) for name, update in updates.items()}
    hardware = start.prepared.hardware
    with changed_by(linears, stored, hardware.device):
        return held_out_loss(start.model, start.prepared.validation.examples, hardware, start.form, label=label).mean
