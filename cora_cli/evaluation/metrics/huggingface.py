"""The metrics as `evaluate.Metric` classes, for code that uses the interface of Hugging Face `evaluate`.

They give the same values as `score_all`, without intervals, and need no network, unlike `evaluate.load`. With
`compute(variant="hf-evaluate")` they compute what `evaluate.load` does by default.
"""

from functools import lru_cache
from typing import Any, ClassVar

import datasets
import evaluate

from cora_cli.evaluation.metrics import GROUPS, build_metrics
from cora_cli.evaluation.metrics.base import Metric


@lru_cache(maxsize=8)
def _shared_metrics(names: tuple[str, ...], **options: Any) -> dict[str, Metric]:
    """Create metrics once, so that an encoder stays in memory between calls of `compute`."""
    return build_metrics(names, **options)


class _LocalMetric(evaluate.Metric):
    """Collects texts with `evaluate` and scores them with the metrics of this package.

    As in every `evaluate.Metric`, added examples are stored in `cache_dir` until `compute` (by default `HF_METRICS_CACHE`), or
    in memory with `keep_in_memory=True`.
    """

    names: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    url: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="\npredictions: list of texts\nreferences: list of texts, one for each prediction\n",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
            reference_urls=[self.url],
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float]:
        texts = list(predictions), list(references)
        values = {}
        for name, metric in _shared_metrics(self.names, **options).items():
            statistics = metric.statistics(*texts)
            values[name] = float(metric.value(statistics.sum(axis=0), len(statistics)))
        return values


class Rouge(_LocalMetric):
    """`rouge1`, `rouge2` and `rougeL`, 0–1."""

    names = GROUPS["rouge"]
    description = "ROUGE-1, ROUGE-2 and ROUGE-L: mean F-measure with Porter stemming."
    url = "https://aclanthology.org/W04-1013"


class Meteor(_LocalMetric):
    """`meteor`, 0–1."""

    names = GROUPS["meteor"]
    description = "METEOR as NLTK computes it: mean over examples."
    url = "https://aclanthology.org/W07-0734"


class SacreBleu(_LocalMetric):
    """`sacrebleu`, 0–100."""

    names = GROUPS["bleu"]
    description = "Corpus BLEU with the defaults of sacrebleu."
    url = "https://aclanthology.org/W18-6319"


class BertScore(_LocalMetric):
    """`bertscore_f1`; `compute` takes `bertscore_model`, `bertscore_layer` and `device`."""

    names = GROUPS["bertscore"]
    description = "BERTScore F1 without idf and without rescaling: mean over examples."
    url = "https://arxiv.org/abs/1904.09675"
