"""Reads one measure of one row from disk, with its per-example statistics, and checks it against the recorded value.

This module knows the files of a single run or evaluation; `collect` goes over the rows.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cora_cli import hashing, records
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import LOWER_IS_BETTER, NAMES
from cora_cli.evaluation.shortcomings import count_shortcomings
from cora_cli.intervals import Interval, with_width
from cora_cli.reading import read_jsonl
from cora_cli.reporting.report_rows import clean
from cora_cli.rundir import EvaluationDirectory, RunDirectory
from cora_cli.training.heldout import HeldOutLoss, loss_change

Floats = NDArray[np.float64]
LOSS = "heldout_loss"
"""The name of the held-out loss among the measures: nats per response token."""
_RECOMPUTED = LOWER_IS_BETTER | {"sacrebleu"}
"""Metrics that are no mean of the stored scores; they are computed again from the predictions."""
# Recomputed means agree up to rounding in the last digits stored in JSON.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """One measure of one row: its value, its recorded 95 % bootstrap interval over n examples, and its (n, k) statistics.

    `unscorable` counts the references of which the value says nothing (`Metric.unscorable`).

    The statistics are those of `evaluation.metrics`; for the held-out loss they are the nats and the tokens of each record.
    """

    value: float
    ci95: Interval
    n: int
    signature: str
    statistics: Floats
    unscorable: int = 0


def read_loss(run: RunDirectory, record: dict[str, Any], when: str, thorough: bool = False) -> Measure:
    """The held-out loss "before" or "after" training. Raises `CoraError` if the per-record losses do not give the value in `record`, or, if
    `thorough`, what `check_losses` compares.
    """
    if thorough:
        check_losses(run, record)
    lines = read_jsonl(run.heldout, records.HeldOutLine)
    statistics = np.array([[float(line[when]), float(line["tokens"])] for line in lines]).reshape(-1, 2)
    summary = (record["heldout"] or {}).get(when)
    tokens = statistics[:, 1].sum()
    value = float(statistics[:, 0].sum() / tokens) if tokens else math.nan
    if summary is None or len(lines) != summary["n"] or not math.isclose(value, summary["loss"], rel_tol=_ROUNDING):
        raise CoraError(
            f"{run.heldout} was altered after it was written: its {len(lines)} records do not give the loss in run.json"
        )
    _check_hash(run.heldout, record.get("heldout_sha256"), "run.json")
    return Measure(value, _interval(summary["ci95"], len(lines)), len(lines), "nats per response token", statistics)


def read_log(run: RunDirectory, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a finished run's `log.jsonl`; none where a run without steps wrote none. Raises `CoraError` if it is gone, or was changed since."""
    if not run.log.exists():
        if record.get("log_sha256"):
            raise CoraError(f"{run.log} does not exist, although the training wrote it; restore it")
        return []
    # Earlier versions recorded no hash.
    if record.get("log_sha256") not in (None, hashing.sha256_file(run.log)):
        raise CoraError(f"{run.log} was changed after the training wrote it; restore it")
    return read_jsonl(run.log, records.LogLine)


def check_losses(run: RunDirectory, record: dict[str, Any]) -> None:
    """Raise `CoraError` unless the losses, their intervals and their change in `record` are those of the single records."""
    for when in ("before", "after"):
        read_loss(run, record, when)
    lines = read_jsonl(run.heldout, records.HeldOutLine)
    tokens = np.array([line["tokens"] for line in lines], dtype=float)
    before, after = (HeldOutLoss(np.array([line[when] for line in lines]), tokens) for when in ("before", "after"))
    computed = {"before": before.summary(), "after": after.summary(), "change": loss_change(before, after)}
    for name, values in computed.items():
        for key, ours in values.items():
            theirs = record["heldout"][name][key]
            pairs = zip(theirs, ours, strict=True) if isinstance(theirs, list) and isinstance(ours, list) else [(theirs, ours)]
            # Earlier versions recorded an interval where there is none.
            if ours is not None and not all(_is_close(*pair) for pair in pairs):
                raise CoraError(
                    f"{run.record} was changed after it was written: its heldout.{name}.{key} is {theirs}, but {run.heldout.name} gives {ours}"
                )


def _is_close(one: float | None, other: float) -> bool:
    return one is not None and math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def read_evaluation(
    evaluation: EvaluationDirectory, wanted: tuple[str, ...] | None
) -> tuple[dict[str, Measure], dict[str, Any], str]:
    """Measures by metric, the generation settings with a hash of the prompts, how many of them are repeated, the number and the `shortcomings` of the answers, a hash of the records
    whatever their order and the metrics that are `left_out`, and a hash of the reference answers.

    `wanted` restricts the metrics. Raises `CoraError` if a file is damaged or does not give the values in `metrics.json`.
    """
    record = records.read_metrics(evaluation)
    if not evaluation.predictions.exists():
        raise CoraError(
            f"{evaluation.predictions} does not exist, so {evaluation.metrics.name} cannot be checked; copy the predictions that were scored to it"
        )
    lines = read_jsonl(evaluation.predictions, records.Prediction)
    scores = read_jsonl(evaluation.scores, records.Scores)
    if hashing.sha256_file(evaluation.predictions) != record["predictions_sha256"]:
        raise CoraError(f"{evaluation.predictions} was altered after it was scored; run `cora evaluate` again")
    _check_hash(evaluation.scores, record.get("scores_sha256"), "metrics.json")
    if lacking := [name for name in NAMES if scores and name in scores[0] and name not in record["metrics"]]:
        raise CoraError(
            f"{evaluation.metrics} was changed after it was written: it has no {lacking[0]}, which {evaluation.scores.name} has"
        )
    _check_copy(evaluation, record)
    measures = {}
    for name in NAMES:
        if name not in record["metrics"] or (wanted and name not in wanted):
            continue
        metric = record["metrics"][name]
        signature = clean(metric["signature"])
        if name not in _RECOMPUTED and not all(name in score for score in scores):
            raise CoraError(f"{evaluation.scores} was altered after it was written: a line of it has no {name}")
        statistics = _statistics(name, signature, scores, lines, evaluation)
        value = _value(name, statistics) if len(statistics) else math.nan
        if len(statistics) != metric["n"] or not math.isclose(value, metric["value"], rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            raise CoraError(
                f"{evaluation.scores} was altered after it was written: it does not give the {name} in metrics.json"
            )
        value, unscorable = float(metric["value"]), metric.get("unscorable", 0)
        measures[name] = Measure(
            value, _interval(metric["ci95"], metric["n"]), len(statistics), signature, statistics, unscorable
        )
    references = [line["reference"] for line in lines]
    prompts = [line.get("prompt") for line in lines]
    known: dict[str, Any] = {"answers": len(lines), "shortcomings": count_shortcomings(lines)}
    # Answers that are a few labels occur as often in other records.
    known["unordered_sha256"] = hashing.sha256_json(
        sorted(hashing.sha256_json(pair) for pair in zip(prompts, references, strict=True))
    )
    known["left_out"] = [name for name in NAMES if wanted and name in record["metrics"] and name not in wanted]
    if None not in prompts:  # another program's answers may have none
        known["prompts_sha256"] = hashing.sha256_json(prompts)
        known["repeated_prompts"] = len(prompts) - len({*map(repr, prompts)})
    return measures, {**record["generation"], **known}, hashing.sha256_json(references)


def _check_copy(evaluation: EvaluationDirectory, record: Mapping[str, Any]) -> None:
    """Raise `CoraError` where `metrics.json` and the `generation.json` of the same predictions differ in how these were generated."""
    generation, copy = records.read_generation(evaluation), record["generation"]
    if generation.get("predictions_sha256") != record["predictions_sha256"]:
        return
    if different := sorted(key for key in {*generation, *copy} if generation.get(key) != copy.get(key)):
        raise CoraError(
            f"{evaluation.generation} and the copy of it in {evaluation.metrics.name} have another {different[0]}: one of them was changed after "
            "it was written"
        )


def read_counts(evaluation: EvaluationDirectory) -> dict[str, Any]:
    """What `metrics.json` counts in programs, if anything: `fates`, `same_process` and `readability_proxies`."""
    record = records.read_metrics(evaluation)
    return {name: record[name] for name in ("fates", "same_process", "readability_proxies") if name in record}


def _check_hash(path: Path, expected: str | None, where: str) -> None:
    """Raise `CoraError` if a file does not have its recorded hash: records in another order have the same mean but are paired wrongly."""
    if expected is not None and hashing.sha256_file(path) != expected:
        raise CoraError(f"{path} was altered after it was written: it does not have the hash in {where}")


def _statistics(
    name: str, signature: str, scores: list[dict[str, Any]], lines: list[dict[str, Any]], evaluation: EvaluationDirectory
) -> Floats:
    if name not in _RECOMPUTED:
        return np.array([[float(score[name])] for score in scores])
    texts = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    if name in LOWER_IS_BETTER:
        from cora_cli.evaluation.metrics.calibration import Calibration, tokens_of

        # The stored scores are values of single records; the value of all is over their tokens.
        return Calibration(name, tokens_of(lines, evaluation.predictions)).statistics(*texts)
    from cora_cli.evaluation.metrics.bleu import SacreBleu

    # The stored scores are sentence BLEU. Corpus BLEU needs n-gram counts, which are recomputed from the texts.
    tokenize = re.search(r"\|tok:(\w+)", signature)
    metric = SacreBleu(tokenize[1]) if tokenize else SacreBleu()
    return metric.statistics(*texts)


def _value(name: str, statistics: Floats) -> float:
    return float(value_function(name)(statistics.sum(axis=0), len(statistics)))


def value_function(name: str) -> Any:
    """The measure as a function of summed statistics (..., k) and their count; see `intervals.ValueFunction`."""
    if name == "sacrebleu":
        from cora_cli.evaluation.metrics.bleu import SacreBleu

        return SacreBleu().value
    if name in LOWER_IS_BETTER:
        from cora_cli.evaluation.metrics.calibration import Calibration

        return Calibration(name, None).value
    if name == LOSS:
        return lambda sums, n: sums[..., 0] / sums[..., 1]
    return lambda sums, n: sums[..., 0] / n


def _interval(values: Any, n: int) -> Interval:
    """The recorded interval; earlier versions recorded one of width zero where there is none."""
    if values is None or n == 1:
        return None
    low, high = values
    return with_width(float(low), float(high))
