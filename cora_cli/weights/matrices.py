"""The weight matrices of a language model as its loaded layers have them, and what keeps some of them from being read."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import Checkpoint, type_fault
from cora_cli.models.fused import View, fused_views
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import Skeleton, layer_of, other_modalities, shape_fault, skeleton_of, surplus_fault


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The weight matrices of a loaded language model. The fields are those of `WeightSource`; `keys` has the name of each in the files, by module, and
    `parts` the place of those that are an equal part of its rows, and the number of these parts."""

    keys: dict[str, str]
    parts: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, int]]
    transposed: frozenset[str]
    faults: dict[str, str]
    views: dict[str, View]
    others: frozenset[str]
    skipped: list[str]


def loaded_matrices(model: ModelPath, checkpoint: Checkpoint) -> Matrices:
    """What the files of a model hold, as its loaded layers have it.

    A model that transformers does not know without code of its own keeps the names of its files, and has no views. Raises `CoraError`
    where the configuration of one that it knows describes none, or one of a type that is no causal language model.
    """
    stored = _matrices(checkpoint)
    names, transposed = {key: key for key in stored}, frozenset[str]()
    shared: dict[str, list[str]] = {}
    parts: dict[str, tuple[str, int, int]] = {}
    views: dict[str, View] = {}
    others = frozenset[str]()
    try:
        skeleton = skeleton_of(model)
    except CoraError:
        if is_known(model.config()):
            raise
        transposed, unclear = _stored_across(checkpoint)
        faults = _faults_of_unknown(checkpoint) | unclear
    else:
        others = other_modalities(skeleton.model)
        loaded = skeleton.loaded_names(stored).items()
        faults = _faults(skeleton, checkpoint, others)
        views, shared = fused_views(skeleton.model), skeleton.shared
        names, transposed = (
            {key: name for key, name in loaded if name.removesuffix(".weight") not in others},
            skeleton.transposed,
        )
        parts = skeleton.parts(stored)
    own = {name: key for key, name in names.items()}
    # Two that share a weight have their own where the files hold both.
    together = {other: key for name, key in own.items() for other in shared.get(name, ())} | own
    keys = {name.removesuffix(".weight"): key for name, key in together.items()}
    shapes = {module: checkpoint.shapes[key] for module, key in keys.items()}
    places = {}
    for name, (key, place, count) in parts.items():
        module, (rows, columns) = name.removesuffix(".weight"), checkpoint.shapes[key]
        keys[module], shapes[module], places[module] = key, (rows // count, columns), (place, count)
    oriented = {module: (a, b) if module not in transposed else (b, a) for module, (a, b) in shapes.items()}
    faults |= {name: faults[view.fused] for name, view in views.items() if view.fused in faults}
    views = {name: view for name, view in views.items() if view.fused in keys}
    skipped = sorted({*stored} - {*keys.values()})
    return Matrices(keys, places, oriented | view_shapes(views, oriented), transposed, faults, views, others, skipped)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself would build the model: then only its skeleton says what its layers are called and how they store their weights."""
    return not config.get("auto_map") and config.get("model_type") in CONFIG_MAPPING


def view_shapes(views: Mapping[str, View], shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of each view; `shapes` has those of the fused projections."""
    return {name: (view.layout.outputs_of(view.part), shapes[view.fused][1]) for name, view in views.items()}


def _faults(skeleton: Skeleton, checkpoint: Checkpoint, others: frozenset[str]) -> dict[str, str]:
    """What keeps the linear layers of a known model from being read."""
    names = skeleton.names(checkpoint.shapes)
    keys: dict[str, list[str]] = {}
    for key, (name, _) in names.items():
        keys.setdefault(name, []).append(key)
    converted = {name for name, together in names.values() if together} | skeleton.parts(checkpoint.shapes).keys()
    own = skeleton.model.state_dict()
    shared = {name for key in keys for name in skeleton.shared.get(key, ())}
    next_to: dict[str, str] = {}
    for name in keys.keys() - own.keys() - converted:
        if (layer := layer_of(skeleton.model, name)) is not None:
            next_to[layer] = min(next_to.get(layer, keys[name][0]), keys[name][0])
    surplus = skeleton.surplus_layers(checkpoint.shapes)
    left_out = [name.removesuffix(".weight") for name in keys if any(name.startswith(f"{layer}.") for layer in surplus)]
    found = dict.fromkeys(left_out, surplus_fault(surplus)) if surplus else {}
    for module, layer in skeleton.model.named_modules():
        name = f"{module}.weight"
        if not isinstance(layer, torch.nn.Linear | Conv1D) or module in others or name in converted:
            continue
        stored, expected = keys.get(name, []), tuple(own[name].shape)
        if not stored and name not in shared:
            rest = f", and its files hold {next_to[module]}, which the model does not take" if module in next_to else ""
            found[module] = f"its files hold no weight for {module}, which its config.json describes as {expected}{rest}"
        elif len(stored) > 1:
            found[module] = f"{' and '.join(sorted(stored))} are both the weight of {module}; remove one of them"
        elif stored and (fault := type_fault(checkpoint.types[stored[0]], stored[0])):
            found[module] = fault
        elif stored and (shape := checkpoint.shapes[stored[0]]) != expected:
            found[module] = shape_fault(stored[0], shape, expected)
        elif module in next_to:
            found[module] = _next_to(module, next_to[module])
    return found


def _stored_across(checkpoint: Checkpoint) -> tuple[frozenset[str], dict[str, str]]:
    """The layers of an unknown model whose weights are (in, out), as those of GPT-2's code are, and what keeps square ones from being read.

    The length of a bias is that of the outputs. Where all layers that are not square are so, square ones with a bias are so too.
    """
    biases = {key: checkpoint.shapes.get(f"{key.removesuffix('weight')}bias") for key in _matrices(checkpoint)}
    biased = {
        key.removesuffix(".weight"): checkpoint.shapes[key]
        for key, bias in biases.items()
        if re.search(r"\.\d+\.", key) and bias in [(size,) for size in checkpoint.shapes[key]]
    }
    lengths = {module: checkpoint.shapes[f"{module}.bias"] for module in biased}
    across = {module for module, (rows, columns) in biased.items() if rows != columns and lengths[module] == (columns,)}
    square = {module for module, (rows, columns) in biased.items() if rows == columns}
    if not across:
        return frozenset(), {}
    if len(across | square) == len(biased):
        return frozenset(across | square), {}
    unclear = "is stored as (out, in) or as (in, out) is not known without the model's own code, which has layers of both kinds"
    return frozenset(across), {module: f"whether {module} {unclear}" for module in square}


def _faults_of_unknown(checkpoint: Checkpoint) -> dict[str, str]:
    """What keeps weights from being read of a model whose configuration transformers does not know."""
    found = {
        key.removesuffix(".weight"): f"the index lists {key} in {file}, but that file does not contain it"
        for key, file in checkpoint.missing.items()
        if key.endswith(".weight")
    }
    for key, shape in checkpoint.shapes.items():
        if key.endswith(".weight") and (fault := type_fault(checkpoint.types[key], key)):
            found[key.removesuffix(".weight")] = fault
        elif key.endswith(".weight") and (len(shape) != 2 or 0 in shape):
            found[key.removesuffix(".weight")] = f"{key} has the shape {shape}; a matrix of two dimensions is required"
    for matrix in _matrices(checkpoint):
        module = matrix.removesuffix(".weight")
        known = {f"{module}.weight", f"{module}.bias"}
        if extra := min((key for key in checkpoint.shapes if key.startswith(f"{module}.") and key not in known), default=None):
            found.setdefault(module, _next_to(module, extra))
    return found


def _next_to(module: str, key: str) -> str:
    return f"its files hold {key} next to the weight of {module}, which alone is not what that layer computes; merge it into the weight first"


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """The keys of the weights with two dimensions."""
    return [key for key, shape in checkpoint.shapes.items() if key.endswith(".weight") and len(shape) == 2]
