"""What B holds of a target's ΔW, where the truth is planted: steps against the gradient, inside B, outside of it, and both."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cora_cli.errors import CoraError
from cora_cli.inspection.changes import Change
from cora_cli.inspection.own_change import Changes, Gain, Held, gain_of, held_by, read_changes
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.models.references import resolve_model
from cora_cli.training.observe import weight_gradients
from cora_cli.training.probe import Start, begin, span
from cora_cli.training.run import train
from tests.training.helpers import config_for

STEP = 0.05


@pytest.fixture(scope="module")
def start(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    place = tmp_path_factory.mktemp("start") / "run"
    config = config_for(
        tiny_model, tiny_data, place, mode="fb", b_init="orthonormal", validation_size=8, probe_examples=8, probe="p"
    )
    return begin(config)


@pytest.fixture(scope="module")
def gradients(start: Start) -> dict[str, torch.Tensor]:
    """∂L/∂W over the validation records."""
    places = {f"base_model.model.{name}.base_layer": name for name, _ in lora_layers(start.model)}
    found = weight_gradients(
        start.model, list(places), start.prepared.validation.examples, start.prepared.hardware, start.form, "gradient"
    )
    return {places[place]: gradient.double() for place, gradient in found.items()}


def held(start: Start, changes: Changes) -> tuple[Gain, Held]:
    gain = gain_of(start, changes)
    return gain, held_by(start, changes, gain)


def frames(start: Start) -> dict[str, torch.Tensor]:
    return {name: span(factors_of(layer)[1]) for name, layer in lora_layers(start.model)}


def test_a_change_inside_b_is_held_completely_and_one_outside_of_it_not_at_all(start, gradients):
    inside = {name: Change(frame, -STEP * frame.T @ gradients[name]) for name, frame in frames(start).items()}
    gain, found = held(start, inside)
    assert found.energy == pytest.approx(1)
    assert found.function == pytest.approx(1, abs=1e-4)
    assert found.projected == pytest.approx(gain.itself, abs=1e-5)
    assert gain.itself < gain.nothing
    assert found.chance == pytest.approx((2 * 4 / 64 + 4 * 4 / 32) / 6)
    rest = {
        name: Change(-STEP * (gradients[name] - frame @ (frame.T @ gradients[name]))) for name, frame in frames(start).items()
    }
    gain, found = held(start, rest)
    assert found.energy == pytest.approx(0, abs=1e-6)
    assert found.function == pytest.approx(0, abs=1e-4)
    assert found.projected == pytest.approx(gain.nothing, abs=1e-5)


def test_a_small_step_against_the_gradient_is_held_as_far_as_the_gradient_is(start, gradients):
    _, found = held(start, {name: Change(-1e-4 * gradient) for name, gradient in gradients.items()})
    norms = {name: float(gradient.square().sum()) for name, gradient in gradients.items()}
    within = {name: float((frame.T @ gradients[name]).square().sum()) for name, frame in frames(start).items()}
    assert found.energy == pytest.approx(sum(within[name] / norms[name] for name in norms) / len(norms))
    # The loss falls by the step times the squared norm of what is kept of the gradient.
    assert found.function == pytest.approx(sum(within.values()) / sum(norms.values()), rel=0.05)


def test_the_change_of_an_adapter_is_its_product(tiny_model, tiny_data, tmp_path, start):
    train(config_for(tiny_model, tiny_data, tmp_path / "lora", rank=2))
    changes = read_changes(resolve_model(str(tmp_path / "lora")), resolve_model(str(tiny_model)))
    assert changes.keys() == dict(lora_layers(start.model)).keys()
    assert all(change.left.shape[1] == 2 and change.energy > 0 for change in changes.values())
    gain, found = held(start, changes)
    assert 0 < found.energy < 1
    assert gain_of(start, changes) == gain, "the model is as it was"


def test_what_says_nothing_is_refused(start, gradients, tiny_model, tiny_data, tmp_path):
    with pytest.raises(CoraError, match="the change does not lower the loss on the validation records"):
        gain_of(start, {name: Change(STEP * gradient) for name, gradient in gradients.items()})
    first, *others = sorted(gradients)
    with pytest.raises(CoraError, match=f"{first} is adapted by the run or by the change, but not by both"):
        gain_of(start, {name: Change(-STEP * gradients[name]) for name in others})
    without = dataclasses.replace(
        start,
        prepared=dataclasses.replace(start.prepared, validation=dataclasses.replace(start.prepared.validation, examples=[])),
    )
    with pytest.raises(CoraError, match="has no validation records to measure on; train with --validation-size"):
        gain_of(without, {name: Change(-STEP * gradient) for name, gradient in gradients.items()})
    other = config_for(tiny_model, tiny_data, tmp_path / "r", mode="pissa", validation_size=8, probe_examples=4, probe="p")
    with pytest.raises(CoraError, match="mode pissa does not start at the base model"):
        gain_of(begin(other), {name: Change(-STEP * gradient) for name, gradient in gradients.items()})
