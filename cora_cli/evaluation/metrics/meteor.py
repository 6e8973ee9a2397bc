"""METEOR as NLTK implements it (Lavie & Agarwal 2007: exact, stem and WordNet matches), mean over examples.

This is not METEOR 1.5: it has no paraphrases and no language-specific weights, and NLTK looks up synonyms by stem, so "car"
matches "auto" but not "automobile". The values are comparable only with NLTK's.
"""

import threading
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import nltk
import numpy as np
from nltk.corpus.reader import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score

from cora_cli import embedded
from cora_cli.evaluation.metrics.base import Floats, Metric, check_texts, format_signature, package_version
from cora_cli.evaluation.metrics.lookups import RememberingStemmer, RememberingWordNet

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5

# The reader is not thread-safe: all its users share the positions in its open files.
_reader_lock = threading.Lock()
_readers: dict[Path, WordNetCorpusReader] = {}


def wordnet_reader(directory: Path) -> WordNetCorpusReader:
    """Load the WordNet of an `nltk_data` directory, once per process.

    `nltk.corpus.wordnet` is not used, because it loads whichever version comes first on the data path.
    """
    with _reader_lock:
        if directory not in _readers:
            if str(directory) not in nltk.data.path:
                # NLTK refuses files outside its data path.
                nltk.data.path.insert(0, str(directory))
            root = nltk.data.find("corpora/wordnet", paths=[str(directory)])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The multilingual functions are not available")
                _readers[directory] = WordNetCorpusReader(root, None)
        return _readers[directory]


class Meteor(Metric):
    """Mean METEOR, 0–1."""

    name = "meteor"
    blind_spot = "without a token for METEOR: even a perfect answer scores 0"

    @cached_property
    def _wordnet(self) -> WordNetCorpusReader:
        return wordnet_reader(embedded.wordnet_directory())

    @cached_property
    def _lookups(self) -> tuple[RememberingStemmer, RememberingWordNet]:
        return RememberingStemmer(), RememberingWordNet(self._wordnet)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """METEOR of each example: (n, 1). An empty text, or a pair without a common word, scores 0."""
        check_texts(predictions, references)
        tokenizer = NLTKWordTokenizer()
        stemmer, wordnet = self._lookups
        with _reader_lock:
            scores = [
                single_meteor_score(
                    tokenizer.tokenize(reference),
                    tokenizer.tokenize(prediction),
                    stemmer=stemmer,
                    wordnet=wordnet,
                    alpha=ALPHA,
                    beta=BETA,
                    gamma=GAMMA,
                )
                for prediction, reference in zip(predictions, references, strict=True)
            ]
        return np.array(scores, dtype=np.float64)[:, None]

    def unscorable(self, references: Sequence[str]) -> int:
        """Empty references; every other character belongs to a token."""
        return sum(not reference.strip() for reference in references)

    def signature(self) -> str:
        """Package version, tokenizer, stemmer, WordNet version, weights. Loads WordNet."""
        return format_signature(
            self.name,
            aggregate="mean",
            tok="NLTKWordTokenizer",
            case="lower",
            stemmer="porter",
            wordnet=self._wordnet.get_version(),
            alpha=ALPHA,
            beta=BETA,
            gamma=GAMMA,
            empty=0,
            nltk=package_version("nltk"),
        )
