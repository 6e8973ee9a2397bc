"""Corpus BLEU of `sacrebleu` with its defaults (13a tokenization unless told otherwise, exponential smoothing, mixed case), 0–100.

`sacrebleu` counts the n-grams of each example once; the corpus value is computed from their sums and equals `corpus_bleu`.
Scores of single examples are sentence BLEU, whose mean is not the corpus value. Hugging Face `evaluate` calls `corpus_bleu` with the
same defaults, so both variants have the same value.
"""

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from cora_cli.evaluation.metrics.base import Floats, Metric, check_texts, format_signature, has_no_spaces

ORDER = 4


class SacreBleu(Metric):
    """Corpus BLEU, 0–100."""

    name = "sacrebleu"
    blind_spot = (
        "have fewer tokens than the four that BLEU counts together, which leaves nothing of that length to count, or no spaces between words, so "
        "that a phrase counts as one: even good answers may score low, or 0; for a language without spaces choose --bleu-tokenize"
    )

    def __init__(self, tokenize: str = "13a", as_evaluate: bool = False) -> None:
        self._tokenize, self._as_evaluate = tokenize, as_evaluate
        self._sentence = BLEU(effective_order=True, tokenize=tokenize)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """Counts of each example (n, 10): lengths of prediction and reference, matched 1- to 4-grams, all 1- to 4-grams.

        Raises `CoraError` as `check_texts` does; `sacrebleu` itself accepts lists of different lengths.
        """
        check_texts(predictions, references)
        rows = []
        for prediction, reference in zip(predictions, references, strict=True):
            score = self._sentence.sentence_score(prediction, [reference])
            rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
        return np.array(rows, dtype=np.float64)

    def value(self, sums: Floats, n: int) -> Floats:
        """Corpus BLEU of summed counts: (..., 10) -> (...)."""
        return bleu_of_counts(sums, effective_order=False)

    def example_scores(self, statistics: Floats) -> Floats:
        """Sentence BLEU with effective order, as `sacrebleu.sentence_bleu`: (n, 10) -> (n,)."""
        return bleu_of_counts(statistics, effective_order=True)

    def unscorable(self, references: Sequence[str]) -> int:
        """References without n-grams of the highest order, and those in scripts without spaces that the tokenizer does not divide."""
        is_short = self.statistics(references, references)[:, -1] == 0
        # `zh` divides Chinese characters alone, `char` all.
        divided = [self._sentence.tokenizer(reference) for reference in references]
        return sum(bool(short) or has_no_spaces(text) for short, text in zip(is_short, divided, strict=True))

    def signature(self) -> str:
        """The signature that `sacrebleu` itself prints for the corpus value."""
        corpus = BLEU(tokenize=self._tokenize)
        corpus.corpus_score(["a"], [["a"]])  # sacrebleu needs a scored corpus to know the number of references
        name = format_signature(self.name, self._as_evaluate)
        return f"{name}|{corpus.get_signature()}"


def bleu_of_counts(counts: Floats, *, effective_order: bool) -> Floats:
    """BLEU (Papineni et al. 2002) with exponential smoothing: (..., 10) -> (...), 0–100.

    BP · exp(mean of log pₙ), where the j-th order without a match has pₙ = 100 / (2ʲ · totalₙ). With `effective_order` the mean
    is over the orders for which the prediction is long enough; without it, one missing order makes the score 0. A prediction
    without any match scores 0.
    """
    predicted, expected = counts[..., 0], counts[..., 1]
    matched, total = counts[..., 2 : 2 + ORDER], counts[..., 2 + ORDER :]
    present = total > 0
    smoothing = 2.0 ** np.cumsum((matched == 0) & present, axis=-1)
    # Missing orders get a placeholder here and are handled below.
    precision = 100.0 * np.where(matched > 0, matched, 1 / smoothing) / np.where(present, total, 1.0)
    logarithms = np.where(present, np.log(precision), 0.0)
    orders = np.maximum(present.sum(axis=-1), 1) if effective_order else ORDER
    shortfall = np.where(predicted < expected, 1 - expected / np.maximum(predicted, 1), 0.0)
    score = np.exp(shortfall + logarithms.sum(axis=-1) / orders)
    scored = matched.any(axis=-1) if effective_order else matched.any(axis=-1) & present.all(axis=-1)
    return np.asarray(np.where(scored, score, 0.0))
