"""The registry of metrics, and `score_all`, which computes any of them with intervals.

Importing it is cheap: what a metric needs is loaded when that metric is built. It generates nothing and writes no file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cora_cli.errors import UsageError

if TYPE_CHECKING:
    from cora_cli.evaluation.metrics.base import Floats, Metric

GROUPS = {
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "meteor": ("meteor",),
    "bleu": ("sacrebleu",),
    "bertscore": ("bertscore_f1",),
}
"""What a user writes in `--metrics`, and the metrics that it stands for."""

NAMES = tuple(name for names in GROUPS.values() for name in names)
"""Every metric, in the order of all tables."""

# Small enough for a bar that moves.
_EXAMPLES_PER_STEP = 256


@dataclass(frozen=True)
class ScoreReport:
    """Metrics of one set of predictions.

    `metrics` has `value`, `ci95`, `n` and `signature` for each name, as `metrics.json` holds them; `per_example` a score for each
    example in the given order (for `sacrebleu` it is sentence BLEU, whose mean is not the corpus value); `statistics` the (n, k)
    arrays for `intervals.paired_difference`.
    """

    metrics: dict[str, dict[str, Any]]
    per_example: dict[str, list[float]]
    statistics: "dict[str, Floats]"


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of the metrics in a comma-separated list of groups or names, in table order, each once.

    Raises `UsageError` with all that is allowed where one is unknown or none is given.
    """
    wanted: set[str] = set()
    for part in (part.strip() for part in text.split(",")):
        if part in GROUPS:
            wanted.update(GROUPS[part])
        elif part in NAMES:
            wanted.add(part)
        elif part:
            raise UsageError(f"metric {part!r} is unknown; {_allowed()}")
    if not wanted:
        raise UsageError(f"no metric is named in {text!r}; {_allowed()}")
    return tuple(name for name in NAMES if name in wanted)


def build_metrics(
    names: Iterable[str], *, bertscore_model: str | None = None, bertscore_layer: int | None = None, device: str = "cpu"
) -> "dict[str, Metric]":
    """Metric objects by name; models and word lists are loaded at their first use.

    `bertscore_model` and `bertscore_layer` choose BERTScore's encoder, `device` (a torch device) is where it runs.
    Raises `UsageError` where a name is unknown.
    """
    built: dict[str, Metric] = {}
    rouge_scores = None
    for name in names:
        if name in GROUPS["rouge"]:
            from cora_cli.evaluation.metrics.rouge import Rouge, RougeScores

            rouge_scores = rouge_scores or RougeScores()
            built[name] = Rouge(name, rouge_scores)
        elif name == "meteor":
            from cora_cli.evaluation.metrics.meteor import Meteor

            built[name] = Meteor()
        elif name == "sacrebleu":
            from cora_cli.evaluation.metrics.bleu import SacreBleu

            built[name] = SacreBleu()
        elif name == "bertscore_f1":
            from cora_cli.evaluation.metrics.bertscore import BertScore

            built[name] = BertScore(bertscore_model, bertscore_layer, device)
        else:
            raise UsageError(f"metric {name!r} is unknown; the names are {', '.join(NAMES)}")
    return built


def score_all(
    names: Iterable[str],
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    device: str = "cpu",
) -> ScoreReport:
    """Compute metrics with percentile bootstrap intervals over examples.

    Prediction i is compared with reference i. All metrics see the same `bootstrap` resamples, drawn from `seed`. With another
    `confidence` than 0.95 the interval's key follows it (`ci90`). Raises `CoraError` where the counts differ, nothing is given or an
    entry is no text, and `UsageError` for unknown names and impossible settings.
    """
    import numpy as np

    from cora_cli import intervals
    from cora_cli.evaluation.metrics.base import check_texts

    metrics = build_metrics(names, bertscore_model=bertscore_model, bertscore_layer=bertscore_layer, device=device)
    if not metrics:
        raise UsageError(f"no metric is named; {_allowed()}")
    if bootstrap < 1 or not 0 < confidence < 1:
        raise UsageError(f"bootstrap must be at least 1 and confidence inside (0, 1), not {bootstrap} and {confidence}")
    check_texts(predictions, references)

    n = len(predictions)
    statistics = _statistics(metrics, predictions, references)

    sums = intervals.bootstrap_sums(np.hstack(list(statistics.values())), bootstrap, seed)
    resampling = f"bs:{bootstrap}|seed:{seed}|ci:percentile"
    results, per_example, first = {}, {}, 0
    for name, metric in metrics.items():
        own = statistics[name]
        own_sums = sums[:, first : first + own.shape[1]]
        first += own.shape[1]
        results[name] = {
            "value": float(metric.value(own.sum(axis=0), n)),
            f"ci{100 * confidence:g}": list(intervals.interval_of_sums(own, own_sums, metric.value, confidence)),
            "n": n,
            "signature": f"{metric.signature()}|{resampling}",
        }
        per_example[name] = metric.example_scores(own).tolist()
    return ScoreReport(results, per_example, statistics)


def _statistics(metrics: "dict[str, Metric]", predictions: Sequence[str], references: Sequence[str]) -> "dict[str, Floats]":
    """Statistics (n, k) of every metric, with a bar for those that read words and one for each that runs a model."""
    import numpy as np

    from cora_cli.evaluation.metrics.base import StreamingMetric, in_order
    from cora_cli.progress import progress

    n = len(predictions)
    found: dict[str, Floats] = {}
    parts: dict[str, list[Floats]] = {name: [] for name, metric in metrics.items() if not isinstance(metric, StreamingMetric)}
    if parts:
        with progress("metrics", n, "examples") as shown:
            for start in range(0, n, _EXAMPLES_PER_STEP):
                step = slice(start, start + _EXAMPLES_PER_STEP)
                for name, blocks in parts.items():
                    blocks.append(metrics[name].statistics(predictions[step], references[step]))
                shown.advance(len(predictions[step]))
    for name, metric in metrics.items():
        if isinstance(metric, StreamingMetric):
            with progress(name, n, "examples") as shown:
                streamed = []
                for indices, rows in metric.stream(predictions, references):
                    streamed.append((indices, rows))
                    shown.advance(len(rows))
                found[name] = in_order(streamed)
        else:
            found[name] = np.concatenate(parts[name])
    return found


def _allowed() -> str:
    return f"choose among {', '.join(GROUPS)} (or single ones: {', '.join(NAMES)})"
