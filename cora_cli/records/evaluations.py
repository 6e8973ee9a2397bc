"""The shapes of what an evaluation writes: predictions, how they were generated, metrics, and the fates of programs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.reading import fault_of, read_jsonl, read_numbered
from cora_cli.records.sealed import read_sealed
from cora_cli.rundir import EvaluationDirectory

_TOKENS = "reference_tokens"


class Generation(TypedDict):
    """`generation.json`; `template` is the one that `auto` in the settings became, `text_sha256` is of the base's tokenizer, `dataset`
    has the records where no run held them out, `rounded_away` is the share (0-1) of an adapter's change that merging it lost, if much."""

    name: str
    sha256: NotRequired[str]
    settings: dict[str, Any]
    predictions_sha256: NotRequired[str]
    template: NotRequired[str]
    text_sha256: NotRequired[str]
    prompts_cut: NotRequired[int]
    end_tokens: NotRequired[list[int]]
    dataset: NotRequired[str]
    subset: NotRequired[str]
    split: NotRequired[str]
    prompts_trained_on: NotRequired[int]
    not_merged: NotRequired[str]
    rounded_away: NotRequired[float]
    engine: NotRequired[str]
    new_tokens: NotRequired[int]
    seconds: NotRequired[float]
    processes: NotRequired[int]


class UsedGeneration(TypedDict):
    """The copy of `generation.json` in `metrics.json`; empty where the predictions came without it."""

    settings: NotRequired[dict[str, Any]]
    template: NotRequired[str]
    text_sha256: NotRequired[str]
    prompts_cut: NotRequired[int]
    end_tokens: NotRequired[list[int]]
    dataset: NotRequired[str]
    subset: NotRequired[str]
    split: NotRequired[str]
    prompts_trained_on: NotRequired[int]
    rounded_away: NotRequired[float]


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


class Proxy(TypedDict):
    """A proxy of readability: what it is, and its value over the n records that have anything to count."""

    value: float
    ci95: tuple[float, float] | None
    n: int
    what: str


class Bootstrap(TypedDict):
    """How the intervals in `metrics.json` were drawn."""

    resamples: int
    seed: int


class Metrics(TypedDict):
    """`metrics.json`; `copied_from` is the place of the predictions that were scored, where a copy of them was put next to it."""

    format: NotRequired[Literal[1]]
    name: str
    metric_variant: NotRequired[str]
    metrics: dict[str, Metric]
    predictions_sha256: str
    copied_from: NotRequired[str]
    scores_sha256: NotRequired[str]
    bootstrap: NotRequired[Bootstrap]
    generation: UsedGeneration
    shortcomings: NotRequired[dict[str, int]]
    fates: NotRequired[dict[str, int]]
    same_process: NotRequired[dict[str, int | float]]
    readability_proxies: NotRequired[dict[str, Proxy]]


Scores = dict[str, float]
"""A line of `scores.jsonl`."""


class Program(TypedDict):
    """What became of one generated program, apart from its tests and, if it passes only so or only otherwise, in one process with them."""

    fate: str
    detail: str
    same_process_fate: NotRequired[str]
    same_process_detail: NotRequired[str]


class Executed(TypedDict):
    """A line of `executions.jsonl`: the programs of one record."""

    limit_seconds: int | float
    programs: list[Program]


def read_generation(evaluation: EvaluationDirectory) -> dict[str, Any]:
    """`generation.json`; empty if there is none. Raises `CoraError` if it is damaged or was changed after it was written."""
    return read_sealed(evaluation.generation, Generation) if evaluation.generation.exists() else {}


def read_metrics(evaluation: EvaluationDirectory) -> dict[str, Any]:
    """`metrics.json`. Raises `CoraError` if it is missing or damaged, or was changed after it was written."""
    return read_sealed(evaluation.metrics, Metrics)


def answers_hashes(predictions: Path) -> tuple[str, ...]:
    """The SHA-256 by which the answers in a file are known: that of the file and, last, that of it without what calibration adds to finished
    predictions. They are one where nothing was added, and for a damaged file."""
    own = hashing.sha256_file(predictions)
    if _TOKENS.encode() not in predictions.read_bytes():
        return (own,)
    try:
        lines = read_jsonl(predictions, dict[str, Any])
        answers = [{key: value for key, value in line.items() if key != _TOKENS} for line in lines]
        return own, hashing.sha256_text(writing.jsonl_text(answers))
    except (CoraError, ValueError):  # NaN, which Python reads and JSON does not have
        return (own,)


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
        if fault := fault_of(line, Prediction):
            raise CoraError(
                f"{where}: {fault}, as `cora evaluate` writes it; rename or remove that entry if another program wrote the file"
            )
        index = json.dumps(line.get("index"))
        if index != "null" and (first := places.setdefault(index, number)) != number:
            raise CoraError(f"{path}: lines {first} and {number} both answer the record with index {index}; remove one of them")
        lines.append(line)
    return lines


def unread_entries(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The entries of lines of predictions that are none of `Prediction` or of what an evaluation adds, sorted, such as further references."""
    return sorted(
        {name for line in lines for name in line} - Prediction.__annotations__.keys() - {"index", "prompt", "new_tokens"}
    )
