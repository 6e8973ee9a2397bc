"""The shape of what `cora train --probe FILE` writes."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cora_cli.records.runs import Data, Fingerprint, Model, Parameters, Plan, Proposal, Seeds, UsedBasis
from cora_cli.records.sealed import read_sealed


class InsideSide(TypedDict):
    """Shares of ‖∂L/∂W‖² in the span of one factor: in all matrices, what random directions expect, and by layer."""

    total: float
    chance: float
    matrices: dict[str, float | None]


class Energy(TypedDict):
    """The gradient's energy: of each matrix, and inside B (output) and A's rows (input); None where that factor is zero."""

    norms_squared: dict[str, float]
    output: InsideSide | None
    input: InsideSide | None


class Curvature(TypedDict):
    """λmax of the loss in the trained parameters; an eigenvalue lies within `error` of it."""

    largest_eigenvalue: float
    error: float
    products: int
    by: str
    parameters: int
    gradient_norm: float


class Measures(TypedDict):
    """What was measured, over which examples, and what it cost."""

    examples: int
    tokens: int
    sha256: str
    seconds: dict[str, float]
    energy: Energy | None
    curvature: Curvature


class Probe(TypedDict):
    """The file: the run that was measured before its first step, as in `run.json`, and the measures."""

    format: int
    sha256: NotRequired[str]
    mode: str
    plan: Plan | None
    fingerprint: Fingerprint
    model: Model
    basis: UsedBasis | None
    parameters: Parameters
    data: Data
    seeds: Seeds
    probe: Measures
    proposal: NotRequired[Proposal]


class Proposed(TypedDict):
    """What a file of `--probe` has where the learning rate was auto."""

    proposal: Proposal


def read_probe(path: Path) -> dict[str, Any]:
    """The record of a probe. Raises `CoraError` where it is missing or damaged, or was changed after it was written."""
    return read_sealed(path, Probe)
