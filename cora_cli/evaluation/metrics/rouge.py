"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F-measures of `rouge-score`, mean over examples; ours with its Porter stemmer.

Tokens are runs of [a-z0-9], as in `rouge-score`: this ignores most of the syntax of code, and scores other scripts as 0. Hugging Face
`evaluate` does not stem, and prints the median of 1000 bootstrap means in place of the mean that they estimate. Its draws are those of
`evaluate.load("rouge", seed=N)`; without a seed they follow numpy's state when it was loaded.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer, scoring, tokenize

from cora_cli.evaluation.metrics.base import Floats, Metric, check_texts, format_signature, package_version
from cora_cli.evaluation.metrics.lookups import RememberingStemmer

COLUMNS = ("rouge1", "rouge2", "rougeL")
_AGGREGATOR_RESAMPLES = 1000


class _Tokens:
    """Lets `RougeScorer` accept token lists, so that each text is tokenized once for all three variants."""

    def tokenize(self, tokens: list[str]) -> list[str]:
        return tokens


class RougeScores:
    """F-measures of all three variants, with the result for the last input cached for the three metrics that share it."""

    def __init__(self, stem: bool = True) -> None:
        self._stemmer = RememberingStemmer() if stem else None
        self._ngrams = rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=_Tokens())
        self._last: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._scores = np.empty((0, len(COLUMNS)))

    def f_measures(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """F-measures, columns as in `COLUMNS`: (n, 3). Raises `CoraError` as `check_texts` does."""
        given = (tuple(predictions), tuple(references))
        if given != self._last:
            check_texts(*given)
            self._scores = np.array([self._score(*pair) for pair in zip(*given, strict=True)], dtype=np.float64)
            self._last = given
        return self._scores

    def _score(self, prediction: str, reference: str) -> tuple[float, float, float]:
        predicted, expected = (tokenize.tokenize(text, self._stemmer) for text in (prediction, reference))
        ngrams = self._ngrams.score(expected, predicted)
        common = longest_common_subsequence(expected, predicted)
        longest = scoring.fmeasure(common / max(len(predicted), 1), common / max(len(expected), 1))
        return ngrams["rouge1"].fmeasure, ngrams["rouge2"].fmeasure, longest


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004).

    Each row of the table is one integer. `rouge-score` stores the full table as Python lists, which for two texts of 20,000
    words takes gigabytes and minutes.
    """
    shorter, longer = sorted((first, second), key=len)
    matches: dict[str, int] = {}
    for position, token in enumerate(shorter):
        matches[token] = matches.get(token, 0) | (1 << position)
    every = (1 << len(shorter)) - 1
    row = every
    for token in longer:
        hits = row & matches.get(token, 0)
        if hits:
            row = ((row + hits) | (row - hits)) & every
    return len(shorter) - row.bit_count()


def _is_letter(character: str) -> bool:
    """Whether a character is a letter, a digit or a mark on one, in any script."""
    return unicodedata.category(character)[0] in "LNM"


class Rouge(Metric):
    """One of the three variants, 0–1."""

    def __init__(self, name: str, scores: RougeScores | None = None, as_evaluate: bool = False) -> None:
        self.name, self._as_evaluate = name, as_evaluate
        self._column = COLUMNS.index(name)
        self._needed = 2 if name == "rouge2" else 1  # tokens that are compared together
        needed = (
            "fewer than two tokens of the letters a-z and digits, which ROUGE-2 compares as pairs"
            if self._needed > 1
            else "no token of the letters a-z and digits, which alone ROUGE compares"
        )
        self.blind_spot = f"have {needed}, or more letters of other alphabets than these: even a perfect answer may score 0, and a wrong one 1"
        self._scores = scores or RougeScores(stem=not as_evaluate)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """F-measure of each example: (n, 1). An empty text scores 0."""
        return self._scores.f_measures(predictions, references)[:, [self._column]]

    def as_evaluate_prints(self, statistics: Floats, seed: int) -> float | None:
        """In the variant `hf-evaluate`, what `evaluate.load("rouge", seed=seed)` prints: the median of `BootstrapAggregator`.

        `evaluate` draws for one variant of ROUGE after the other, in the order of `COLUMNS`.
        """
        if not self._as_evaluate:
            return None
        generator, scores = np.random.RandomState(seed), statistics[:, 0]
        for _ in range(self._column + 1):
            means = [scores[generator.choice(len(scores), size=len(scores))].mean() for _ in range(_AGGREGATOR_RESAMPLES)]
        return float(np.median(means))

    def unscorable(self, references: Sequence[str]) -> int:
        """References with fewer tokens of [a-z0-9] than are compared together, or with more of other letters and digits."""
        tokens = [tokenize.tokenize(text, None) for text in references]
        return sum(
            len(own) < self._needed or 2 * len("".join(own)) < sum(map(_is_letter, text))
            for own, text in zip(tokens, references, strict=True)
        )

    def signature(self) -> str:
        """Package versions, tokenization, stemmer and aggregation."""
        return format_signature(
            self.name,
            self._as_evaluate,
            score="f1",
            aggregate="mean",
            tok="[a-z0-9]+",
            case="lower",
            stemmer="none" if self._as_evaluate else f"porter-nltk-{package_version('nltk')}",
            empty=0,
            rouge_score=package_version("rouge-score"),
        )
