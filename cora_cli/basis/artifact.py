"""The basis file: one safetensors file with the directions, their singular values and the models they come from.

Reading it refuses a file that is truncated, altered or meant for another model. `extraction` computes the basis.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from cora_cli import __version__, hashing, rundir, writing
from cora_cli.basis.choices import BasisChoices, GroupMapping, Side, is_target, natural_order
from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import Malformed, fault_of, parse_json, refuse_pointer
from cora_cli.records import BasisFile

FORMAT_VERSION = 1
# A single metadata entry: safetensors writes several in no fixed order, and equal bases should give equal files.
_METADATA_KEY = "cora_basis"
_KINDS = ("basis", "singular_values", "total_energy")
_ORTHONORMAL = 1e-4


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """A source model of a basis: what the user wrote, the hub revision, and the hash of the weights that were used."""

    reference: str
    revision: str | None
    hash: str


@dataclasses.dataclass(frozen=True)
class LayerEnergy:
    """Shares (0-1) of the energy ‖M‖_F² of one weight: `kept` in the pooled directions of its group, `chance` (R / rows) what random
    directions keep, and `own` in as many directions of that weight alone, the most that any can keep.

    Under `--component bottom`, `own` is what the weight's own bottom directions hold.
    """

    kept: float
    chance: float
    own: float


class TargetWeights(Protocol):
    """What `Basis.check_base` needs from a model: its shapes, and the hash of some of its weights."""

    reference: str
    shapes: dict[str, tuple[int, int]]

    def content_hash(self, modules: Iterable[str]) -> str:
        """SHA-256 of the weights of `modules`."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """A common subspace per group, with its provenance.

    `directions` maps each group to its B, (out, R) float32 with orthonormal columns, or (in, R) for the input side;
    `singular_values` to σ, (R,) float64; `total_energy` to ‖M‖_F², a float64 scalar; and `gaps` to whether its subspace is
    unique. `modules` maps each module's name to its (out, in), and `mapping` any module's name to its group. `layers` has the
    energies of each module whose group has several; it is empty if none has, and for bases of earlier versions.
    """

    path: Path
    choices: BasisChoices
    mapping: GroupMapping
    directions: dict[str, torch.Tensor]
    singular_values: dict[str, torch.Tensor]
    total_energy: dict[str, torch.Tensor]
    gaps: dict[str, bool]
    modules: dict[str, tuple[int, int]]
    sources: tuple[SourceRecord, ...]
    base: SourceRecord | None
    architecture: dict[str, Any]
    cora_version: str = __version__
    layers: dict[str, LayerEnergy] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """R, the largest rank that a run can use."""
        return self.choices.rank

    @property
    def base_hash(self) -> str | None:
        """Content hash of the target weights that were subtracted under `--source delta`; else None."""
        return self.base.hash if self.base else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of tensors and choices, independent of the paths of the file and the models."""
        tensors = {name: hashing.tensor_digest(name, tensor) for name, tensor in self.tensors().items()}
        return hashing.sha256_json({"tensors": tensors, "choices": self.choices.to_json()})

    @property
    def explained_variance(self) -> dict[str, float]:
        """For each group, Σ σ² of the kept directions divided by ‖M‖_F², between 0 and 1."""
        return {
            group: float(values.square().sum() / self.total_energy[group]) for group, values in self.singular_values.items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in the file."""
        kinds = zip(_KINDS, (self.directions, self.singular_values, self.total_energy), strict=True)
        return {f"{kind}/{group}": tensor.contiguous() for kind, groups in kinds for group, tensor in groups.items()}

    def for_module(self, name: str, rank: int, features: int, side: Side = "output") -> torch.Tensor:
        """B for module `name`, or Aᵀ if `side` is `input`: the first `rank` directions of its group, (features, rank) float32.

        `features` is the module's dimension on that side. Raises `CoraError` if the basis has no group for the module or
        was not extracted from it, the dimension differs, `rank` exceeds R, or `side` is `input` and the basis holds output-side directions.
        """
        if side == "input" and self.choices.side != "input":
            raise CoraError(
                f"basis {self.path} holds output-side directions, but A needs input-side ones; extract one with --side input"
            )
        group = self.mapping.group_of(name)
        if group is None or group not in self.directions:
            known = sorted(self.directions, key=natural_order)
            shown = ", ".join(known[:3]) + (f", … ({len(known)} in all)" if len(known) > 3 else "")
            raise CoraError(f"basis {self.path} has no group for module {name}, only for {shown}; extract one that includes it")
        if self.choices.share != "module" and not any(is_target(name, target) for target in self.choices.target_modules):
            raise CoraError(
                f"basis {self.path} was extracted from {', '.join(self.choices.target_modules)}, and not from {name}; extract one that includes it with "
                "--target-modules"
            )
        directions = self.directions[group]
        if features != len(directions):
            remedy = "one from models of this architecture" if side == self.choices.side else f"one with --side {side}"
            raise CoraError(
                f"{name} has {features} {side}s, but group {group} of basis {self.path} expects {len(directions)}; "
                f"extract {remedy}"
            )
        self._check_rank(rank)
        return directions[:, :rank].clone()

    def check_model(
        self,
        architecture: Mapping[str, Any],
        module_shapes: Mapping[str, tuple[int, int]],
        rank: int,
        side: Side = "output",
        flag: str = "--rank",
    ) -> None:
        """Raise `CoraError` unless this basis fits a model as its B, or as its A if `side` is `input`.

        `architecture` is the model's (see `weights.sources.architecture_of`), `module_shapes` the (out, in) of the modules to adapt,
        and `flag` the option that sets `rank`.
        """
        if key := differing_key(self.architecture, architecture):
            raise CoraError(
                f"basis {self.path} was extracted from models with {key} = {self.architecture[key]}, but this model has "
                f"{architecture[key]}; extract a basis from models of this architecture"
            )
        self._check_rank(rank, flag)
        for name, (out_features, in_features) in module_shapes.items():
            self.for_module(name, rank, in_features if side == "input" else out_features, side)

    def check_base(self, model: TargetWeights) -> None:
        """Raise `CoraError` if this basis holds differences from another base than `model`; reads its target weights as `other_base` does."""
        if other := self.other_base(model):
            raise CoraError(f"{other}; train that base, or extract again with --base {model.reference}")

    def other_base(self, model: TargetWeights) -> str | None:
        """What says that this basis holds differences from another base than `model`, or None.

        Reads the target weights of `model` if the basis was extracted with `--source delta`; otherwise reads nothing.
        """
        if self.base is None:
            return None
        missing = [module for module, shape in self.modules.items() if model.shapes.get(module) != shape]
        found = None if missing else model.content_hash(self.modules)
        if found != self.base.hash:
            what = f"has no weight {missing[0]} {self.modules[missing[0]]}" if missing else f"has {found}"
            return (
                f"basis {self.path} holds differences from base {self.base.reference} (content hash {self.base.hash}), but "
                f"{model.reference} {what}"
            )
        return None

    def _check_rank(self, rank: int, flag: str = "--rank") -> None:
        if not 1 <= rank <= self.rank:
            raise CoraError(
                f"{flag} {rank} is too large: basis {self.path} holds {self.rank} directions; use {flag} {self.rank} or less, "
                f"or extract one with --rank {rank}"
            )


def differing_key(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first entry by which two architectures (see `weights.sources.architecture_of`) differ; the vocabulary may, because fine-tuning can add tokens.

    The text part of an image-and-text model is of its type where transformers loads that part alone, as `cora merge` writes it.
    """
    common = sorted(one.keys() & other.keys() - {"vocab_size"})
    found = (key for key in common if one[key] != other[key])
    return next((key for key in found if key != "model_type" or _loaded_type(one[key]) != _loaded_type(other[key])), None)


def _loaded_type(model_type: str) -> str:
    """The type of what transformers loads as a causal model from a configuration of a type: of some image-and-text models the text part alone."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # which takes longer than all else here

    known = model_type in CONFIG_MAPPING
    loaded = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[model_type], None) if known else None
    return str(getattr(getattr(loaded, "config_class", None), "model_type", model_type))


class StandInBasis(Basis):
    """A basis that does not exist yet, for plans on fake tensors: it has a group for every module and no numbers."""

    def for_module(self, name: str, rank: int, features: int, side: Side = "output") -> torch.Tensor:
        """Zeros (features, rank)."""
        return torch.zeros(features, rank)


def stand_in_basis() -> Basis:
    """A `StandInBasis`."""
    choices = BasisChoices()
    return StandInBasis(Path(), choices, choices.mapping, {}, {}, {}, {}, {}, (), None, {})


def write_basis(path: Path, basis: Basis) -> None:
    """Write `basis` to `path` atomically; equal bases give equal bytes. Raises `CoraError` if the disk write fails."""
    record = _record(basis)
    record["digest"] = hashing.sha256_json(record)
    metadata = {_METADATA_KEY: json.dumps(record, sort_keys=True, ensure_ascii=False)}
    data = safetensors.torch.save(basis.tensors(), metadata)
    with writing.atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_basis(path: Path) -> Basis:
    """Read and verify a basis file.

    Raises `CoraError` if it is missing, truncated, altered, of an unknown format version, or not a basis.
    """
    record, tensors = _load(path)
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CoraError(
            f"{path} is a basis of format version {version}, but this cora reads version {FORMAT_VERSION}; extract it again"
        )
    stated = record.pop("digest", None)
    if hashing.sha256_json(record) != stated:
        raise _altered(path, "its metadata does not match its digest")
    if fault := fault_of(record, BasisFile):
        raise _altered(path, f"in its metadata, {fault}")
    if unknown := _unknown_key(record):
        raise CoraError(f"{path} is from another version of cora: this one does not know the key {unknown!r} of its metadata")
    try:
        choices = BasisChoices.from_json(record["choices"])
    except UsageError as error:  # which speaks of flags
        raise _altered(path, f"in its metadata, {error}") from error
    if (record["group_pattern"], record["group_template"]) != dataclasses.astuple(choices.mapping):
        raise _altered(path, f"its groups are not those of --share {choices.share}")
    groups = sorted(record["gaps"], key=natural_order)
    basis = Basis(
        path=path,
        choices=choices,
        mapping=choices.mapping,
        **{
            field: {group: _take(path, tensors, f"{kind}/{group}") for group in groups}
            for field, kind in zip(("directions", "singular_values", "total_energy"), _KINDS, strict=True)
        },
        gaps={group: record["gaps"][group] for group in groups},
        modules={name: (out, inside) for name, (out, inside) in record["modules"].items()},
        sources=tuple(SourceRecord(**source) for source in record["sources"]),
        base=SourceRecord(**record["base"]) if record["base"] else None,
        architecture=record["architecture"],
        cora_version=record["cora_version"],
        layers={name: LayerEnergy(**energy) for name, energy in record.get("layers", {}).items()},
    )
    if tensors:
        raise _altered(path, f"it holds {min(tensors)}, which its metadata does not list")
    _check_tensors(basis)
    if basis.sha256 != record["sha256"]:
        raise _altered(path, f"its content hash is {basis.sha256}, but its metadata says {record['sha256']}")
    return basis


def holds_other_tensors(path: Path) -> bool:
    """Whether a file is a complete one of `safetensors` and no basis, such as the weights of a model."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _METADATA_KEY not in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def _record(basis: Basis) -> dict[str, Any]:
    """The JSON metadata of a basis file."""
    return {
        "format_version": FORMAT_VERSION,
        "choices": basis.choices.to_json(),
        "group_pattern": basis.mapping.pattern,
        "group_template": basis.mapping.template,
        "sources": [dataclasses.asdict(source) for source in basis.sources],
        "base": dataclasses.asdict(basis.base) if basis.base else None,
        "architecture": basis.architecture,
        "modules": {name: list(shape) for name, shape in basis.modules.items()},
        "gaps": basis.gaps,
        # Left out where it is empty, so that such bases equal those of earlier versions.
        **({"layers": {name: dataclasses.asdict(energy) for name, energy in basis.layers.items()}} if basis.layers else {}),
        "cora_version": basis.cora_version,
        "sha256": basis.sha256,
    }


def _unknown_key(record: Mapping[str, Any]) -> str | None:
    """A key of one of the parts of the metadata that this version does not know; None if there is none."""
    parts = [
        ("choices", BasisChoices, [record["choices"]]),
        ("sources", SourceRecord, record["sources"]),
        ("base", SourceRecord, [record["base"] or {}]),
        ("layers", LayerEnergy, record.get("layers", {}).values()),
    ]
    for name, kind, entries in parts:
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted({key for entry in entries for key in entry} - known):
            return f"{name}.{unknown[0]}"
    return None


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    rundir.require_basis(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        path.open("rb").close()  # safetensors says of a file that may not be read that there is none
        refuse_pointer(path)
        raise CoraError(f"{path} is not a complete safetensors file, so it cannot be read as a basis: {error}") from error
    if _METADATA_KEY not in metadata:
        raise CoraError(f"{path} is a safetensors file but not a basis: its metadata has no {_METADATA_KEY}")
    try:
        record = parse_json(metadata[_METADATA_KEY])
    except Malformed as error:
        raise _altered(path, f"its metadata is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _altered(path, "its metadata is not a JSON object")
    return record, tensors


def _altered(path: Path, reason: str) -> CoraError:
    return CoraError(f"basis {path} was altered or damaged after it was written: {reason}; extract it again")


def _take(path: Path, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise _altered(path, f"{name} is missing")
    return tensors.pop(name)


def _check_tensors(basis: Basis) -> None:
    """Raise `CoraError` unless shapes, types and orthonormality agree with the metadata."""
    axis = 1 if basis.choices.side == "input" else 0
    rows = {basis.mapping.group_of(module): shape[axis] for module, shape in basis.modules.items()}
    for name, tensor in basis.tensors().items():
        kind, _, group = name.partition("/")
        shape = {"basis": (rows.get(group), basis.rank), "singular_values": (basis.rank,), "total_energy": ()}[kind]
        if tuple(tensor.shape) != shape:
            raise _altered(basis.path, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        expected = torch.float32 if kind == "basis" else torch.float64
        if tensor.dtype != expected or not bool(torch.isfinite(tensor).all()):
            raise _altered(basis.path, f"{name} does not hold finite {expected} values")
    for group, directions in basis.directions.items():
        wide = directions.double()
        error = (wide.T @ wide - torch.eye(basis.rank, dtype=torch.float64)).abs().max().item()
        if error > _ORTHONORMAL:
            raise _altered(basis.path, f"the columns of basis/{group} are not orthonormal (off by {error:.1e})")
