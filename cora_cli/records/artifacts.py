"""The shapes of the metadata in adapters and basis files."""

from typing import Any, NotRequired, TypedDict

from cora_cli.records.runs import Plan


class Adapter(TypedDict):
    """`cora.json`."""

    plan: Plan
    base: str
    base_revision: str | None
    base_sha256: str
    basis: str | None
    basis_sha256: str | None
    compact: bool
    views: NotRequired[bool]


class BasisSource(TypedDict):
    """A source model of a basis, in the basis file."""

    reference: str
    revision: str | None
    hash: str


class Choices(TypedDict):
    """The choices about a basis; `basis.choices` checks their values."""

    share: str
    merge: str
    source: str
    side: str
    method: str
    component: str
    rank: int
    target_modules: list[str]
    normalize: NotRequired[bool]


class LayerEnergy(TypedDict):
    """How much of one weight's energy a pooled basis keeps (`basis.artifact.LayerEnergy`)."""

    kept: float
    chance: float
    own: float


class BasisFile(TypedDict):
    """The metadata of a basis file."""

    choices: Choices
    group_pattern: str
    group_template: str
    gaps: dict[str, bool]
    modules: dict[str, tuple[int, int]]
    layers: NotRequired[dict[str, LayerEnergy]]
    sources: list[BasisSource]
    base: BasisSource | None
    architecture: dict[str, Any]
    cora_version: str
    sha256: str
