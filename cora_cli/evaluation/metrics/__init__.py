"""The registry of metrics, and `score_all`, which computes them with bootstrap confidence intervals.

Importing this module is fast: the dependencies of a metric are imported when that metric is created.
"""

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from cora_cli.errors import UsageError

if TYPE_CHECKING:
    from cora_cli.evaluation.metrics.base import Floats, Metric
    from cora_cli.evaluation.metrics.pass_at import Attempts
    from cora_cli.records import ReferenceTokens

GROUPS = {
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "meteor": ("meteor",),
    "bleu": ("sacrebleu",),
    "bertscore": ("bertscore_f1",),
    "calibration": ("nll", "brier", "ece"),
}
"""Names that `--metrics` accepts, and the metrics that each stands for."""

TEXT_NAMES = tuple(name for group, names in GROUPS.items() if group != "calibration" for name in names)
"""The metrics that compare texts."""
_SINGLE = (*TEXT_NAMES, *GROUPS["calibration"])
PASS_AT = {f"pass@{k}": k for k in (1, 2, 3, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100)}
"""The metrics that need the programs to be run, and the number of programs that each is about."""
NAMES = (*_SINGLE, *PASS_AT)
"""Every metric, in the order of the columns in tables."""

_PLAIN = {
    "meteor": "Meteor",
}
"""The class of each metric that needs nothing but the variant, in the module of the metric's name."""

LOWER_IS_BETTER = frozenset(GROUPS["calibration"])
HIGHEST = {**dict.fromkeys(NAMES, 1.0), "sacrebleu": 100.0, "nll": math.inf, "brier": 2.0}
"""The upper end of each metric's scale, which begins at 0."""

Variant = Literal["ours", "hf-evaluate"]
"""`hf-evaluate` has what `evaluate.load` of Hugging Face computes by default: ROUGE without stemming, METEOR on NLTK's `word_tokenize`,
sacrebleu's defaults, and BERTScore without idf and without rescaling, on the encoder that is set."""

# Small enough that the progress bar moves.
_EXAMPLES_PER_STEP = 256


@dataclass(frozen=True)
class ScoreReport:
    """Metrics of one set of predictions.

    `metrics` maps each name to `value`, `ci95`, `n`, `unscorable` (`Metric.unscorable`) and `signature`, as in `metrics.json`, and to
    `evaluate_prints` where `evaluate` prints a random number instead of `value` (`Metric.as_evaluate_prints`). `per_example` has one score per
    example, in input order; for `sacrebleu` this is sentence BLEU, whose mean is not the corpus value. `statistics` has the
    (n, k) arrays for `intervals.paired_difference`.
    """

    metrics: dict[str, dict[str, Any]]
    per_example: dict[str, list[float]]
    statistics: "dict[str, Floats]"


def comparable_signature(signature: str) -> str:
    """The signature without the name of an encoder, a folder that lies elsewhere on another machine: the hashes of its weights and of its
    tokenizer say what it is."""
    return re.sub(r"\|(?:encoder|scale):[^|]*", "", signature) if "|weights:sha256-" in signature else signature


def parse_metrics(text: str) -> tuple[str, ...]:
    """The metrics in a comma-separated list of groups or names, in table order, without duplicates.

    Raises `UsageError` that lists the valid names if one is unknown or none is given.
    """
    wanted: set[str] = set()
    for part in (part.strip() for part in text.split(",")):
        if part in GROUPS:
            wanted.update(GROUPS[part])
        elif part in NAMES:
            wanted.add(part)
        elif part:
            raise UsageError(f"unknown metric {part!r}; {_allowed()}")
    if not wanted:
        raise UsageError(f"--metrics names no metric; {_allowed()}")
    return tuple(name for name in NAMES if name in wanted)


_SCALES = {"sacrebleu": "0-100", "nll": "in nats per reference token", "brier": "0-2"}


def scales(names: Iterable[str]) -> str:
    """The scales of metrics, for the line below a table."""
    names = list(names)
    own = [f"{name} {scale}" for name, scale in _SCALES.items() if name in names]
    others = [] if len(own) == len(names) else ["the others 0-1" if own else "on a scale of 0-1"]
    lower = [name for name in names if name in LOWER_IS_BETTER]
    return ", ".join([*own, *others]) + (f"; lower is better: {', '.join(lower)}" if lower else "")


def unscorable_references(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each of the `metrics` of a `metrics.json` with references of which its value says nothing, how many, and which."""
    return {
        name: f"{count} of {metrics[name]['n']} references {metric.blind_spot}"
        for name, metric in build_metrics(metrics).items()
        if (count := metrics[name].get("unscorable"))
    }


def build_metrics(
    names: Iterable[str],
    *,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    bleu_tokenize: str = "13a",
    device: str = "cpu",
    variant: Variant = "ours",
    attempts: "Attempts | None" = None,
    tokens: "Sequence[ReferenceTokens] | None" = None,
) -> "dict[str, Metric]":
    """Create metric objects by name; models and word lists are loaded on first use.

    `bertscore_model` and `bertscore_layer` select the BERTScore encoder, which runs on `device` (a torch device), and
    `bleu_tokenize` sacrebleu's tokenizer. `attempts` is what became of the programs, which pass@k counts. `tokens` has what calibration is
    computed from, for each example.
    Raises `UsageError` if a name or the variant is unknown, or the variant does not have that tokenizer.
    """
    if problem := variant_problem(variant, bleu_tokenize):
        raise UsageError(problem)
    as_evaluate = variant != "ours"
    built: dict[str, Metric] = {}
    rouge_scores = None
    for name in names:
        if name in GROUPS["rouge"]:
            from cora_cli.evaluation.metrics.rouge import Rouge, RougeScores

            rouge_scores = rouge_scores or RougeScores(stem=not as_evaluate)
            built[name] = Rouge(name, rouge_scores, as_evaluate)
        elif name in _PLAIN:
            module = importlib.import_module(f"{__name__}.{name}")
            built[name] = getattr(module, _PLAIN[name])(as_evaluate)
        elif name == "sacrebleu":
            from cora_cli.evaluation.metrics.bleu import SacreBleu

            built[name] = SacreBleu(bleu_tokenize, as_evaluate)
        elif name == "bertscore_f1":
            from cora_cli.evaluation.metrics.bertscore import BertScore

            built[name] = BertScore(bertscore_model, bertscore_layer, device, as_evaluate)
        elif name in PASS_AT:
            from cora_cli.evaluation.metrics.pass_at import PassAt

            built[name] = PassAt(PASS_AT[name], attempts)
        elif name in GROUPS["calibration"]:
            from cora_cli.evaluation.metrics.calibration import Calibration

            built[name] = Calibration(name, tokens)
        else:
            raise UsageError(f"metric must be one of {', '.join(_SINGLE)} or pass@k, not {name!r}")
    return built


def variant_problem(variant: str, bleu_tokenize: str) -> str | None:
    """Why a variant of the metrics cannot be computed; None if it can."""
    if variant not in get_args(Variant):
        return f"--metric-variant must be one of {', '.join(get_args(Variant))}, not {variant!r}"
    if variant != "ours" and bleu_tokenize != "13a":
        return f"--bleu-tokenize {bleu_tokenize} contradicts --metric-variant {variant}, whose tokenizer is 13a"
    return None


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
    bleu_tokenize: str = "13a",
    device: str = "cpu",
    variant: Variant = "ours",
    attempts: "Attempts | None" = None,
    tokens: "Sequence[ReferenceTokens] | None" = None,
) -> ScoreReport:
    """Compute metrics with percentile bootstrap intervals over examples.

    Prediction i is compared with reference i; calibration is that of the reference's `tokens`. All metrics use the same `bootstrap` resamples, drawn with `seed`. The interval's
    key follows `confidence`: `ci95`, `ci90`. Raises `CoraError` if the counts differ, nothing is given or an entry is not text,
    and `UsageError` for unknown names and invalid settings.
    """
    import numpy as np

    from cora_cli import intervals
    from cora_cli.evaluation.metrics.base import check_texts

    metrics = build_metrics(
        names,
        bertscore_model=bertscore_model,
        bertscore_layer=bertscore_layer,
        bleu_tokenize=bleu_tokenize,
        device=device,
        variant=variant,
        attempts=attempts,
        tokens=tokens,
    )
    if not metrics:
        raise UsageError(f"no metric is named; {_allowed()}")
    if bootstrap < 1 or not 0 < confidence < 1:
        raise UsageError(f"bootstrap must be at least 1 and confidence between 0 and 1, not {bootstrap} and {confidence}")
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
        interval = intervals.interval_of_sums(own, own_sums, metric.value, confidence)
        results[name] = {
            "value": float(metric.value(own.sum(axis=0), n)),
            f"ci{100 * confidence:g}": interval and list(interval),
            "n": n,
            "unscorable": metric.unscorable(references),
            "signature": f"{metric.signature()}|{resampling}",
        }
        if (printed := metric.as_evaluate_prints(own, seed)) is not None:
            results[name]["evaluate_prints"] = printed
        per_example[name] = metric.example_scores(own).tolist()
    return ScoreReport(results, per_example, statistics)


def _statistics(metrics: "dict[str, Metric]", predictions: Sequence[str], references: Sequence[str]) -> "dict[str, Floats]":
    """Per-example statistics (n, k) of every metric; one progress bar for text metrics, and one for each that runs a model."""
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
    return f"choose from {', '.join(GROUPS)} (or single metrics: {', '.join(_SINGLE)}), and {', '.join(PASS_AT)} for programs"
