"""The shapes of what a training run writes: `run.json`, `log.jsonl`, `heldout.jsonl` and stops."""

import datetime
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from cora_cli.errors import CoraError
from cora_cli.reading import checked
from cora_cli.records.sealed import read_sealed, write_sealed
from cora_cli.rundir import RunDirectory


class Plan(TypedDict):
    """An adapter's plan (`methods.plan`), without the settings of single methods."""

    mode: str
    b_init: str
    a_init: str
    trains_b: bool
    rank: int
    alpha: float
    rslora: bool
    target_modules: list[str]
    dropout: float
    seed: int


class Source(TypedDict):
    """A source model of a basis."""

    reference: str
    revision: NotRequired[str | None]


class UsedBasis(TypedDict):
    """The basis of a run; `of_base` says that it is made of the base model's weights alone, by whatever name, and came later."""

    path: str
    sha256: str
    choices: dict[str, Any]
    sources: list[Source]
    of_base: NotRequired[bool]


class Counts(TypedDict):
    """Records and tokens of one part of the data."""

    records: int
    tokens: int
    response_tokens: int
    truncated: int
    dropped: int


class Data(TypedDict):
    """The data of a run."""

    dataset: str
    subset: NotRequired[str]
    split: NotRequired[str]
    test_dataset: NotRequired[str]
    template: str
    template_date: NotRequired[str]
    train: Counts
    test: Counts
    validation: NotRequired[Counts]
    overlapping_dropped: NotRequired[int]
    repeated_held_out: NotRequired[int]
    end_tokens: NotRequired[list[int]]
    held_out_trained_on: NotRequired[int]
    test_sha256: NotRequired[str]
    trained_prompts_sha256: NotRequired[str]


class CarriedTraining(TypedDict):
    """`trained_on.json`, the record of their training that `cora merge` and `cora export` write next to the weights."""

    datasets: list[str]
    sha256: NotRequired[str]
    trained_prompts_sha256: str
    complete: bool
    template_date: str | None
    template: NotRequired[str | None]
    max_length: NotRequired[int | None]
    trust_remote_code: NotRequired[bool | None]


class Loss(TypedDict):
    """A mean loss per response token with its interval, over n records."""

    loss: float
    ci95: tuple[float, float] | None
    n: int
    tokens: int


class Change(TypedDict):
    """The change of a loss with its interval."""

    value: float
    ci95: tuple[float, float] | None


class HeldOut(TypedDict):
    """The held-out loss around training."""

    before: Loss
    after: Loss
    change: Change


class Settings(TypedDict):
    """The settings of a run that other parts of the program read; the rest are only compared and listed."""

    learning_rate: float
    batch_size: int
    gradient_accumulation: int


class Fingerprint(TypedDict):
    """What determines the result of a run."""

    settings: Settings
    model_sha256: str
    tokenizer_sha256: NotRequired[str]
    data_sha256: str


class Model(TypedDict):
    """The base model of a run."""

    reference: str
    revision: str | None


class Parameters(TypedDict):
    """Numbers of parameters."""

    trained: int
    total: int


class Start(TypedDict):
    """What the start of an adapter was computed from: training examples, the SHA-256 of their tokens, and the time until the adapter stood,
    with all passes and decompositions. Earlier versions recorded the time of the passes alone."""

    examples: int
    tokens: int
    seconds: float
    sha256: str


class Proposal(TypedDict):
    """What `--learning-rate auto` measured before the first step, and the learning rate that follows from it."""

    learning_rate: float
    constant: float
    examples: int
    largest_eigenvalue: float
    error: float
    products: int


class Hardware(TypedDict):
    """What a run computed on, and the number type; `shard`, `fast_path` and `tokens_per_row` where they were chosen."""

    device: str
    device_reason: str
    dtype: str
    dtype_reason: str
    threads: int
    processes: NotRequired[int]
    shard: NotRequired[str]
    fast_path: NotRequired[str]
    tokens_per_row: NotRequired[int]


class Seeds(TypedDict):
    """The seeds of a run."""

    seed: int
    split_seed: int


class Run(TypedDict):
    """`run.json` from the start of a run on."""

    format: NotRequired[Literal[1]]
    sha256: NotRequired[str]
    status: str
    warmup_steps: NotRequired[int]
    sealed_checkpoints: NotRequired[bool]
    started: str
    mode: str
    plan: Plan | None
    fingerprint: Fingerprint
    model: Model
    basis: UsedBasis | None
    parameters: Parameters
    data: Data
    hardware: Hardware
    hardware_before: NotRequired[list[Hardware]]
    versions: dict[str, str]
    versions_before: NotRequired[dict[str, str]]
    seeds: Seeds
    resumed: NotRequired[int]
    start: NotRequired[Start]
    proposal: NotRequired[Proposal]
    laplace: NotRequired[dict[str, Any]]
    error: NotRequired[str]


class Speed(TypedDict):
    """Steps and their speed."""

    steps: int
    tokens_per_second: float | None


class FinishedRun(Run):
    """`run.json` of a finished run."""

    finished: str
    result_sha256: str
    result_files: NotRequired[dict[str, str]]
    speed: Speed
    peak_memory_bytes: int
    heldout: HeldOut | None
    heldout_sha256: NotRequired[str]
    log_sha256: NotRequired[str]
    largest_angle_rad: float | None
    is_base_model: bool
    validation: NotRequired[Loss | None]


class Stop(TypedDict):
    """`stops/<step>.json`: the validation loss of a run that stopped at a step."""

    step: int
    validation: Loss
    sha256: NotRequired[str]


class LogLine(TypedDict):
    """A line of `log.jsonl`."""

    step: int
    loss: NotRequired[float]
    tokens: NotRequired[int]
    seconds: NotRequired[float]
    heldout_loss: NotRequired[float]


class HeldOutLine(TypedDict):
    """A line of `heldout.jsonl`: one record's negative log-likelihood before and after training, and its response tokens."""

    before: float
    after: float
    tokens: int


def read_run(run: RunDirectory) -> dict[str, Any]:
    """`run.json`. Raises `CoraError` if it is missing or damaged, or was changed after it was written."""
    record = read_sealed(run.record, Run)
    checked(record, FinishedRun if record["status"] == "finished" else Run, run.record)
    return record


def write_run(run: RunDirectory, record: Mapping[str, Any]) -> None:
    """Write `run.json`, with the hash of its contents."""
    write_sealed(run.record, record)


def template_date(run: Mapping[str, Any]) -> str:
    """The date for a chat template that writes one, by the `run.json` of a run; earlier versions took that of the day on which it started."""
    recorded: str | None = run["data"].get("template_date")
    try:
        return recorded or datetime.datetime.fromisoformat(run["started"]).astimezone().date().isoformat()
    except ValueError as error:
        raise CoraError(
            f"a run.json is damaged: started must be a time such as 2026-11-26T09:00:00+00:00, not {run['started']!r}"
        ) from error
