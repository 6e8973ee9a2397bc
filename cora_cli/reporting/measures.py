"""One number of one row, read from disk and checked against what was recorded, with the per-example statistics behind it.

It knows the files of one run or evaluation; which rows there are, and which may be missing, is `collect`'s business.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import NAMES
from cora_cli.reporting.report_rows import clean
from cora_cli.rundir import EvaluationDirectory, RunDirectory

Floats = NDArray[np.float64]
LOSS = "heldout_loss"
"""The name of the held-out loss among the measures: nats per response token."""
# The sums of a mean agree to the last digits that JSON holds.
_ROUNDING = 1e-9
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a file that was altered by hand can raise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """One number of one row: its value, its recorded 95 % bootstrap interval over n examples, and (n, k) statistics behind it.

    The statistics are those of `evaluation.metrics`; of the held-out loss they are nats and tokens of each record.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    signature: str
    statistics: Floats


def read_loss(run: RunDirectory, record: dict[str, Any], when: str) -> Measure:
    """The held-out loss "before" or "after" training. Raises `CoraError` where the records do not give what `record` says."""
    lines = rundir.read_jsonl(run.heldout)
    statistics = np.array([[float(line[when]), float(line["tokens"])] for line in lines]).reshape(-1, 2)
    summary = record["heldout"][when]
    value = float(statistics[:, 0].sum() / statistics[:, 1].sum())
    if len(lines) != summary["n"] or not math.isclose(value, summary["loss"], rel_tol=_ROUNDING):
        raise CoraError(
            f"{run.heldout} was altered after it was written: its {len(lines)} records do not give the loss of run.json"
        )
    return Measure(value, _interval(summary["ci95"]), len(lines), "nats per response token", statistics)


def read_evaluation(
    evaluation: EvaluationDirectory, wanted: tuple[str, ...] | None
) -> tuple[dict[str, Measure], dict[str, Any], str]:
    """Measures by metric, how the answers were made, and what identifies the records.

    `wanted` restricts the metrics. Raises `CoraError` where a file is damaged, or does not give what `metrics.json` says.
    """
    record = rundir.read_json(evaluation.metrics)
    if not evaluation.predictions.exists():
        raise CoraError(f"{evaluation.predictions} does not exist, so {evaluation.metrics.name} cannot be checked")
    lines = rundir.read_jsonl(evaluation.predictions)
    scores = rundir.read_jsonl(evaluation.scores)
    try:
        if rundir.sha256_file(evaluation.predictions) != record["predictions_sha256"]:
            raise CoraError(f"{evaluation.predictions} was altered after it was scored; run `cora evaluate` again")
        measures = {}
        for name in NAMES:
            if name not in record["metrics"] or (wanted and name not in wanted):
                continue
            metric = record["metrics"][name]
            statistics = _statistics(name, scores, lines)
            value = _value(name, statistics)
            if len(statistics) != metric["n"] or not math.isclose(value, metric["value"], rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                raise CoraError(
                    f"{evaluation.scores} was altered after it was written: it does not give the {name} of metrics.json"
                )
            measures[name] = Measure(
                float(metric["value"]), _interval(metric["ci95"]), len(statistics), clean(metric["signature"]), statistics
            )
        references = rundir.sha256_json([line["reference"] for line in lines])
        return measures, dict(record["generation"]), references
    except DAMAGE as error:
        raise damaged(evaluation.root, error) from error


def _statistics(name: str, scores: list[dict[str, Any]], lines: list[dict[str, Any]]) -> Floats:
    if name != "sacrebleu":
        return np.array([[float(score[name])] for score in scores])
    from cora_cli.evaluation.metrics.bleu import SacreBleu

    # The scores on disk are sentence BLEU; the corpus value is a function of counts, which the texts give again.
    return SacreBleu().statistics([line["prediction"] for line in lines], [line["reference"] for line in lines])


def _value(name: str, statistics: Floats) -> float:
    return float(value_function(name)(statistics.sum(axis=0), len(statistics)))


def value_function(name: str) -> Any:
    """The measure as a function of summed statistics (..., k) and their count: see `intervals.ValueFunction`."""
    if name == "sacrebleu":
        from cora_cli.evaluation.metrics.bleu import SacreBleu

        return SacreBleu().value
    if name == LOSS:
        return lambda sums, n: sums[..., 0] / sums[..., 1]
    return lambda sums, n: sums[..., 0] / n


def _interval(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def damaged(path: Path, error: BaseException) -> CoraError:
    """One of `DAMAGE`, met below `path`, as a sentence."""
    return CoraError(f"{path} was damaged or made by another version: {type(error).__name__} at {clean(str(error))[:80]}")
