"""What is looked up word by word, the Porter stem and the synsets of WordNet, remembered: most words of a text come again and again.

Both give exactly what `nltk` gives and have the methods that `rouge-score` and `nltk` call; they score nothing.
"""

from functools import lru_cache

from nltk.corpus.reader import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer

# Far more words than a language uses in a set of predictions, and bounded where the text is noise.
WORDS_KEPT = 1 << 17


class RememberingStemmer:
    """A Porter stemmer; `stem(word)` is that of `nltk`."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=WORDS_KEPT)(PorterStemmer().stem)


class RememberingWordNet:
    """The one method of a WordNet that METEOR needs; `synsets(word)` is that of the reader, and must not be changed by who gets it."""

    def __init__(self, reader: WordNetCorpusReader) -> None:
        self.synsets = lru_cache(maxsize=WORDS_KEPT)(reader.synsets)
