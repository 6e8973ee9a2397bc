"""Cached Porter stems and WordNet synsets, because most words of a text occur many times.

Both classes return exactly what `nltk` returns and have the methods that `rouge-score` and `nltk` call.
"""

from functools import lru_cache

from nltk.corpus.reader import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer

# Far more than the distinct words of a set of predictions; a bound on memory if the text is noise.
WORDS_KEPT = 1 << 17


class RememberingStemmer:
    """A Porter stemmer with a cache; `stem(word)` returns what `nltk` returns."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=WORDS_KEPT)(PorterStemmer().stem)


class RememberingWordNet:
    """WordNet with a cache, for METEOR: `synsets(word)` returns the reader's list, which callers must not modify."""

    def __init__(self, reader: WordNetCorpusReader) -> None:
        self.synsets = lru_cache(maxsize=WORDS_KEPT)(reader.synsets)
