"""The shapes of what a grid writes: its plan, its steps, known hashes and jobs."""

from typing import Any, Literal, NotRequired, TypedDict

PLAN = "plan.json"
"""What the rows of a grid are, in its directory."""


class PlannedRow(TypedDict):
    """A row of a grid's `plan.json`; one that only extracts a basis has no data."""

    name: str
    printed: str | None
    group: str | None
    mode: str
    label: str
    rank: int | None
    n_models: int | None
    sources: list[str]
    learning_rate: float | None
    seed: int
    model: str
    dataset: str | dict[str, Any] | None
    run: str | None
    evaluation: str | None
    basis: str | None
    stage: NotRequired[str | None]
    members: NotRequired[list[str]]


class PlannedStep(TypedDict):
    """A step of a grid's `plan.json`."""

    name: str
    kind: str
    output: str
    facts: dict[str, Any]
    needs: list[str]
    argv: list[str]
    stop_at: NotRequired[int | None]


class PlannedSweep(TypedDict):
    """The sweep of a method in a grid's `plan.json`. The keys of `losses` are learning rates and optimizer steps as text."""

    method: list[str | int | None]
    planned: list[float]
    losses: dict[str, dict[str, float | None]]
    dropped: dict[str, int]
    chosen: float | None
    added: float | None


class GridPlan(TypedDict):
    """A grid's `plan.json`; `steps`, `margin`, `template_date`, `tokenizer_sha256`, `end_tokens`, `seeds_before` and `sha256`, the hash of the rest, came later."""

    name: str
    title: str
    paper_table: str | None
    preset: Literal["small"] | None
    conditions: list[str]
    rows: list[PlannedRow]
    steps: NotRequired[list[PlannedStep]]
    margin: NotRequired[float | dict[str, float] | None]
    template_date: NotRequired[str]
    tokenizer_sha256: NotRequired[str]
    end_tokens: NotRequired[list[int]]
    sha256: NotRequired[str]
    looks: NotRequired[int | None]
    seeds_before: NotRequired[list[int]]
    sweeps: NotRequired[list[PlannedSweep]]


class StepRecord(TypedDict):
    """The record of a step of a grid."""

    key: str
    facts: dict[str, Any]
    status: str
    results_of_needs: dict[str, str | None]
    error: NotRequired[str]
    diverged: NotRequired[bool]
    texts: NotRequired[dict[str, Any]]
    stops: NotRequired[dict[str, str]]


class RunStatus(TypedDict):
    """What a grid needs to know of the run that a step wrote."""

    status: str
    diverged: NotRequired[bool]


class FinishedStep(StepRecord):
    """The record of a finished step."""

    files: dict[str, str]
    result: str
    seconds: float


class KnownHash(TypedDict):
    """An entry of a grid's `hashes.json`."""

    state: list[list[Any]]
    sha256: str


class EndedStep(TypedDict):
    """The exit code of a step that a job of a cluster ran."""

    job: str
    code: int


class Job(TypedDict):
    """The record of a job of a cluster."""

    job: str
    argv: list[str]
