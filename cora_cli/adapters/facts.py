"""What `cora.json` records about an adapter beyond PEFT's own configuration, and the frozen B that a compact adapter is rebuilt from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cora_cli import rundir
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.errors import CoraError
from cora_cli.methods.parts.starts import start_b
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import PLANNED, method_of
from cora_cli.models.model_path import ModelPath
from cora_cli.reading import read_json
from cora_cli.records import Adapter

SIDE_FILE = "cora.json"
COMPACT_FILE = rundir.COMPACT_ADAPTER


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """What `cora` knows of an adapter beyond PEFT's configuration (`cora.json` in its directory).

    `views`: the adapter changes q_proj, k_proj or v_proj of a model that has them in one fused projection, so it fits only a model whose
    projections are split.
    """

    plan: AdapterPlan
    base: str
    base_revision: str | None
    base_sha256: str
    basis: str | None
    basis_sha256: str | None
    compact: bool
    views: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. `views` is left out if it is off, so that files of earlier versions are the same."""
        values = {**dataclasses.asdict(self), "plan": self.plan.as_dict()}
        return values if self.views else {key: value for key, value in values.items() if key != "views"}


def read_facts(directory: Path) -> AdapterFacts | None:
    """Read `cora.json`; None where another program wrote the adapter. Raises `CoraError` where it is damaged."""
    path = directory / SIDE_FILE
    if not path.exists():
        return None
    values = read_json(path, Adapter)
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(AdapterFacts)}):
        raise CoraError(f"{path} is from another version of cora: this one does not know its key {unknown[0]!r}")
    method_of(values["plan"]["mode"], path)
    plan = AdapterPlan.from_dict(values["plan"])
    if unknown := sorted(plan.own.keys() - PLANNED):
        raise CoraError(f"{path} is from another version of cora: this one does not know the key {unknown[0]!r} of its plan")
    return AdapterFacts(**{**values, "plan": plan})


def starting_b(
    adapter: ModelPath, facts: AdapterFacts, basis_path: Path | None = None, remedy: str = "pass its path with --basis"
) -> Callable[[str, int], torch.Tensor]:
    """The B (out, r) float32 of a compact adapter, by a layer's name and out-dimension: from the recorded basis or seed.

    Raises `CoraError` where the basis is neither at its recorded place nor at `basis_path` (the message ends with `remedy`), or is
    another one.
    """
    basis = _recorded_basis(facts, basis_path, adapter, remedy) if facts.plan.needs_basis else None
    return lambda name, out_features: start_b(facts.plan, basis, name, out_features, facts.plan.rank)


def _recorded_basis(facts: AdapterFacts, basis_path: Path | None, adapter: ModelPath, remedy: str) -> Basis:
    path = basis_path or (Path(facts.basis) if facts.basis else None)
    if path is None or not path.exists():
        raise CoraError(f"adapter {adapter.path} is compact: its B comes from the basis {path}, which does not exist; {remedy}")
    basis = read_basis(path)
    if basis.sha256 != facts.basis_sha256:
        raise CoraError(f"adapter {adapter.path} was trained with the basis {facts.basis_sha256}, but {path} is {basis.sha256}")
    return basis
