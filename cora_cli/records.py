"""The shapes of the JSON files that `cora` reads: its own records, and those parts of other programs' files that it uses.

`reading` compares a file with its shape and names the key that differs, so the code behind it can use every required key. Keys that
came with a later version are not required: old directories stay readable.
"""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cora_cli.errors import CoraError
from cora_cli.reading import checked, read_json, read_numbered
from cora_cli.rundir import EvaluationDirectory, RunDirectory


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
    """The basis of a run."""

    path: str
    sha256: str
    choices: dict[str, Any]
    sources: list[Source]


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
    template: str
    template_date: NotRequired[str]
    train: Counts
    test: Counts
    validation: NotRequired[Counts]
    overlapping_dropped: NotRequired[int]
    test_sha256: NotRequired[str]
    trained_prompts_sha256: NotRequired[str]


class CarriedTraining(TypedDict):
    """`trained_on.json`, the record of their training that `cora merge` and `cora export` write next to the weights."""

    datasets: list[str]
    trained_prompts_sha256: str
    complete: bool
    template_date: str | None


class Loss(TypedDict):
    """A mean loss with its interval, over n records."""

    loss: float
    ci95: tuple[float, float] | None
    n: int


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
    """What the start of an adapter was computed from: training examples, the SHA-256 of their tokens, and the time it took."""

    examples: int
    tokens: int
    seconds: float
    sha256: str


class Seeds(TypedDict):
    """The seeds of a run."""

    seed: int
    split_seed: int


class Run(TypedDict):
    """`run.json` from the start of a run on."""

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
    hardware: dict[str, str | int]
    versions: dict[str, str]
    seeds: Seeds
    resumed: NotRequired[int]
    start: NotRequired[Start]
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
    speed: Speed
    peak_memory_bytes: int
    heldout: HeldOut | None
    largest_angle_rad: float | None
    is_base_model: bool
    validation: NotRequired[Loss | None]


class Stop(TypedDict):
    """`stops/<step>.json`: the validation loss of a run that stopped at a step."""

    step: int
    validation: Loss


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


class Generation(TypedDict):
    """`generation.json`."""

    name: str
    settings: dict[str, Any]
    predictions_sha256: NotRequired[str]
    prompts_cut: NotRequired[int]
    prompts_trained_on: NotRequired[int]
    not_merged: NotRequired[str]
    engine: NotRequired[str]
    new_tokens: NotRequired[int]
    seconds: NotRequired[float]
    processes: NotRequired[int]


class UsedGeneration(TypedDict):
    """The copy of `generation.json` in `metrics.json`; empty where the predictions came without it."""

    settings: NotRequired[dict[str, Any]]
    prompts_cut: NotRequired[int]
    prompts_trained_on: NotRequired[int]


class Sample(TypedDict):
    """One of several answers in a line of `predictions.jsonl`."""

    prediction: str


class ReferenceTokens(TypedDict):
    """What a model predicts where a record's reference stands: four lists with an entry for each reference token, the end token included.

    `nll` is −log p of the token in nats, `brier` the squared distance of the probabilities from certainty in it, `confidence` the
    probability of the most likely token, and `correct` whether that is the reference's.
    """

    nll: list[float]
    brier: list[float]
    confidence: list[float]
    correct: list[bool]


class Prediction(TypedDict):
    """A line of `predictions.jsonl`, by whichever program."""

    prediction: str
    reference: str
    finish_reason: NotRequired[str | None]
    samples: NotRequired[list[Sample]]
    problem: NotRequired[dict[str, Any]]
    reference_tokens: NotRequired[ReferenceTokens]


class PartialPrediction(TypedDict):
    """A line of `predictions.partial.jsonl`."""

    index: int
    prompt: str
    reference: str
    prediction: str
    finish_reason: str
    new_tokens: int


class Metric(TypedDict):
    """A metric with its interval, over n records."""

    value: float
    ci95: tuple[float, float] | None
    n: int
    unscorable: NotRequired[int]
    evaluate_prints: NotRequired[float]
    signature: str


class Metrics(TypedDict):
    """`metrics.json`."""

    name: str
    metric_variant: NotRequired[str]
    metrics: dict[str, Metric]
    predictions_sha256: str
    generation: UsedGeneration
    fates: NotRequired[dict[str, int]]
    readability_proxies: NotRequired[dict[str, Any]]


Scores = dict[str, float]
"""A line of `scores.jsonl`."""


class Program(TypedDict):
    """What became of one generated program."""

    fate: str
    detail: str


class Executed(TypedDict):
    """A line of `executions.jsonl`: the programs of one record."""

    limit_seconds: int | float
    programs: list[Program]


class Judgment(TypedDict):
    """A line of `judgments.jsonl`: the outcome of one request.

    `names` are the judged answers in the order shown. `request_sha256` is that of the first request for the judgment, also where `attempt` says
    that this one asked again. Only the outcome "judged" has a `judgment`. `tokens_in` and `tokens_out` are what the judge counted, or estimates.
    """

    request_sha256: str
    rubric: str
    record: int
    names: list[str]
    repeat: int
    attempt: int
    outcome: Literal["judged", "malformed", "lost", "failed"]
    judgment: dict[str, float | str] | None
    reply: str | None
    reason: str | None
    tokens_in: int
    tokens_out: int
    estimated: bool
    model: str | None


class Estimate(TypedDict):
    """A value with its 95 % interval over n records; no interval where they do not give one."""

    value: float
    ci95: tuple[float, float] | None
    n: int


class Retest(TypedDict):
    """How far two judgments of one answer agree; `noise` is the standard deviation of one score. Null where nothing varies."""

    kappa: Estimate | None
    agreement: Estimate | None
    noise: NotRequired[Estimate | None]


class JudgedShare(TypedDict):
    """A share as the judge sees it, and corrected for its measured errors (null where it cannot be)."""

    observed: Estimate | None
    corrected: Estimate | None


class JudgedCriterion(TypedDict):
    """One criterion: means by name of the answers, and what the anchors say. The last three are null for one that is not anchored."""

    anchored: bool
    scores: dict[str, Estimate | None]
    gold_minus_shuffled: Estimate | None
    length_slope: Estimate | None
    length_correlation: Estimate | None
    retest: Retest | None
    sensitivity: Estimate | None
    specificity: Estimate | None
    accepted: dict[str, JudgedShare] | None


class JudgedPairs(TypedDict):
    """Preferences: the share of wins of one answer over another (ties half), and what the anchors and both orders say."""

    wins: dict[str, JudgedShare]
    gold_over_shuffled: Estimate | None
    order_bias: Estimate | None
    order_flips: Estimate | None
    length_bias: Estimate | None
    retest: Retest | None


class JudgedRubric(TypedDict):
    """The results of a rubric: `criteria`, or `pairs` where it asks for preferences. `failed` counts judgments that were not obtained, by name."""

    sha256: str
    pass_mark: float
    criteria: dict[str, JudgedCriterion]
    pairs: JudgedPairs | None
    asked: int
    failed: dict[str, int]
    disqualified: list[str]


class JudgedSystem(TypedDict):
    """The answers of one model that were judged."""

    name: str
    predictions: str
    predictions_sha256: str


class JudgeIdentity(TypedDict):
    """What decides about a judge's replies apart from the message; the rest is only compared."""

    model: str


class Judging(TypedDict):
    """`judge.json`."""

    format: int
    judge: JudgeIdentity
    served_models: list[str]
    records: int
    retest: bool
    seed: int
    systems: list[JudgedSystem]
    rubrics: dict[str, JudgedRubric]
    tokens: dict[str, int]
    cost: float | None
    judgments_sha256: str


class Adapter(TypedDict):
    """`cora.json`."""

    plan: Plan
    base: str
    base_revision: str | None
    base_sha256: str
    basis: str | None
    basis_sha256: str | None
    compact: bool


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
    """A grid's `plan.json`; `steps`, `margin`, `template_date` and `tokenizer_sha256` came later."""

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
    looks: NotRequired[int | None]
    sweeps: NotRequired[list[PlannedSweep]]


class StepRecord(TypedDict):
    """The record of a step of a grid."""

    key: str
    facts: dict[str, Any]
    status: str
    results_of_needs: dict[str, str | None]
    error: NotRequired[str]
    diverged: NotRequired[bool]
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


class Job(TypedDict):
    """The record of a job of a cluster."""

    job: str
    argv: list[str]


class ModelConfig(TypedDict):
    """The entries of a model's `config.json` that decide about its weights; transformers reads the rest."""

    model_type: str
    hidden_size: NotRequired[int | None]
    num_hidden_layers: NotRequired[int | list[int] | None]
    vocab_size: NotRequired[int | None]
    quantization_config: NotRequired[dict[str, Any] | None]
    text_config: NotRequired[dict[str, Any] | None]


class GenerationConfig(TypedDict, total=False):
    """The entries of `generation_config.json` that decide how a model answers, or that transformers computes with."""

    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    do_sample: bool | None
    max_length: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    num_beams: int | None
    use_cache: bool | None


class AdapterConfig(TypedDict, total=False):
    """The entries of `adapter_config.json` that weights are computed from; PEFT reads the rest."""

    peft_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    r: int | None
    lora_alpha: float | None
    use_rslora: bool | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    bias: str | None
    lora_bias: bool | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None


class WeightIndex(TypedDict):
    """The index of a model in several files."""

    weight_map: dict[str, str]


def read_run(run: RunDirectory) -> dict[str, Any]:
    """`run.json`. Raises `CoraError` naming the file and the key if it is missing or damaged."""
    record: dict[str, Any] = read_json(run.record, Run)
    checked(record, FinishedRun if record["status"] == "finished" else Run, run.record)
    return record


def template_date(run: Mapping[str, Any]) -> str:
    """The date for a chat template that writes one, by the `run.json` of a run; earlier versions took that of the day on which it started."""
    recorded: str | None = run["data"].get("template_date")
    try:
        return recorded or datetime.datetime.fromisoformat(run["started"]).astimezone().date().isoformat()
    except ValueError as error:
        raise CoraError(
            f"a run.json is damaged: started must be a time such as 2026-11-26T09:00:00+00:00, not {run['started']!r}"
        ) from error


def read_generation(evaluation: EvaluationDirectory) -> dict[str, Any]:
    """`generation.json`; empty if there is none. Raises `CoraError` naming the file and the key if it is damaged."""
    found: dict[str, Any] = read_json(evaluation.generation, Generation) if evaluation.generation.exists() else {}
    return found


def read_predictions(path: Path, *texts: str) -> list[dict[str, Any]]:
    """The lines of a `predictions.jsonl`, by whichever program, which all have text under the keys `texts`.

    Raises `CoraError` naming the file and the lines if one is damaged, or if two answer the record with one `index`.
    """
    lines = []
    places: dict[str, int] = {}
    for number, line in read_numbered(path):
        where = f"{path}, line {number}"
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in texts):
            wanted = " and ".join([", ".join(f'"{key}"' for key in texts[:-1]), f'"{texts[-1]}"'])
            raise CoraError(f"{where}: expected text under {wanted}, found {json.dumps(line, ensure_ascii=False)[:80]}")
        checked(line, Prediction, where)
        index = json.dumps(line.get("index"))
        if index != "null" and (first := places.setdefault(index, number)) != number:
            raise CoraError(f"{path}: lines {first} and {number} both answer the record with index {index}; remove one of them")
        lines.append(line)
    return lines
