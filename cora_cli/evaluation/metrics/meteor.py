"""METEOR as NLTK implements it (Lavie & Agarwal 2007: exact, stem and WordNet matches), mean over examples.

This is not METEOR 1.5: it has no paraphrases and no language-specific weights, and NLTK looks up synonyms by stem, so "car"
matches "auto" but not "automobile". The values are comparable only with NLTK's. Ours tokenizes a text as one sentence, so that a period inside it stays with
its word; Hugging Face `evaluate` calls NLTK's `word_tokenize`, which splits it into sentences first.

The penalty for fragments is γ (chunks / matches)^β, so a text of m words that equals its reference has one chunk and scores 1 − 0.5 / m³: a
single word 0.5, two words 0.94. That is the published definition, which has no exception for equal texts.
"""

import threading
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import nltk
import numpy as np
from nltk.corpus.reader import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
from nltk.tokenize.punkt import load_punkt_params
from nltk.translate.meteor_score import single_meteor_score

from cora_cli import embedded
from cora_cli.evaluation.metrics.base import Floats, Metric, check_texts, format_signature, has_no_spaces, package_version
from cora_cli.evaluation.metrics.lookups import RememberingStemmer, RememberingWordNet

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
_WORDS = NLTKWordTokenizer()

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


@lru_cache
def punkt(directory: Path) -> PunktSentenceTokenizer:
    """Load the English sentence splitter of an `nltk_data` directory, whichever others lie on NLTK's data path."""
    if str(directory) not in nltk.data.path:
        nltk.data.path.append(str(directory))
    splitter = PunktSentenceTokenizer()
    splitter._params = load_punkt_params(nltk.data.find("tokenizers/punkt_tab/english/", paths=[str(directory)]))
    return splitter


class Meteor(Metric):
    """Mean METEOR, 0–1."""

    name = "meteor"

    def __init__(self, as_evaluate: bool = False) -> None:
        self._as_evaluate = as_evaluate

    blind_spot = (
        "have no token for METEOR, or no spaces between words, so that a phrase counts as one: even a good answer may score 0"
    )

    def fetch(self) -> None:
        """See `Metric.fetch`: WordNet, and Punkt under `hf-evaluate`."""
        embedded.wordnet_directory()
        if self._as_evaluate:
            embedded.punkt_directory()

    @cached_property
    def _wordnet(self) -> WordNetCorpusReader:
        return wordnet_reader(embedded.wordnet_directory())

    @cached_property
    def _lookups(self) -> tuple[RememberingStemmer, RememberingWordNet]:
        return RememberingStemmer(), RememberingWordNet(self._wordnet)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """METEOR of each example: (n, 1). An empty text, or a pair without a common word, scores 0."""
        check_texts(predictions, references)
        stemmer, wordnet = self._lookups
        with _reader_lock:
            scores = [
                single_meteor_score(
                    self._tokens(reference),
                    self._tokens(prediction),
                    stemmer=stemmer,
                    wordnet=wordnet,
                    alpha=ALPHA,
                    beta=BETA,
                    gamma=GAMMA,
                )
                for prediction, reference in zip(predictions, references, strict=True)
            ]
        return np.array(scores, dtype=np.float64)[:, None]

    @cached_property
    def _splitter(self) -> PunktSentenceTokenizer | None:
        return punkt(embedded.punkt_directory()) if self._as_evaluate else None

    def _tokens(self, text: str) -> list[str]:
        """The words of a text; under `hf-evaluate` what NLTK's `word_tokenize` returns."""
        sentences = self._splitter.tokenize(text) if self._splitter else [text]
        return [token for sentence in sentences for token in _WORDS.tokenize(sentence)]

    def unscorable(self, references: Sequence[str]) -> int:
        """Empty references, in which alone no character belongs to a token, and those in scripts without spaces."""
        return sum(not reference.strip() or has_no_spaces(reference) for reference in references)

    def signature(self) -> str:
        """Package version, tokenizer, stemmer, WordNet version, weights. Loads WordNet."""
        return format_signature(
            self.name,
            self._as_evaluate,
            aggregate="mean",
            tok="word_tokenize-punkt_tab-english" if self._as_evaluate else "NLTKWordTokenizer",
            case="lower",
            stemmer="porter",
            wordnet=self._wordnet.get_version(),
            alpha=ALPHA,
            beta=BETA,
            gamma=GAMMA,
            empty=0,
            nltk=package_version("nltk"),
        )
