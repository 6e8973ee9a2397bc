"""Optimizations of the metrics must not change a value: caches of words, batches by length, threads, streams."""

import random
import threading

import numpy as np
import pytest
import torch
from bert_score.utils import get_bert_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer

from cora_cli import embedded
from cora_cli.data.builtin import load_builtin
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import GROUPS, bertscore, encoding, score_all
from cora_cli.evaluation.metrics.base import StreamingMetric
from cora_cli.evaluation.metrics.bertscore import BertScore
from cora_cli.evaluation.metrics.lookups import RememberingStemmer, RememberingWordNet
from cora_cli.evaluation.metrics.meteor import Meteor, wordnet_reader
from cora_cli.evaluation.metrics.rouge import RougeScores

FEW = settings(derandomize=True, deadline=None, max_examples=60)
WORDS = ["car", "auto", "dog", "dogs", "running", "ran", "run", "generously", "Big", "large", "the", "of", "猫", ".", "x=1;"]
TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.text(max_size=30))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def wordnet():
    return wordnet_reader(embedded.wordnet_directory())


@pytest.fixture(scope="module")
def meteor():
    return Meteor()


@pytest.fixture(scope="module")
def scorer():
    return BertScore()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def builtin_pairs(count):
    """Responses of the built-in data sets, and the same with some words shuffled."""
    generator = random.Random(0)
    references = [record["output"] for name in ("instruct", "code") for record in load_builtin(name).test[: count // 2]]
    predictions = []
    for text in references:
        words = [word for word in text.split() if generator.random() > 0.1] or ["nothing"]
        index = generator.randrange(len(words))
        words[index] = generator.choice(references).split()[0]
        predictions.append(" ".join(words))
    return predictions, references


def test_values_on_the_shipped_data_are_those_of_the_libraries(meteor, wordnet):
    predictions, references = builtin_pairs(80)
    scorer, tokenize = rouge_scorer.RougeScorer(list(GROUPS["rouge"]), use_stemmer=True), NLTKWordTokenizer().tokenize
    rouge = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    expected = [[scores[name].fmeasure for name in GROUPS["rouge"]] for scores in rouge]
    assert RougeScores().f_measures(predictions, references).tolist() == expected
    alone = [
        single_meteor_score(tokenize(reference), tokenize(prediction), wordnet=wordnet)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    assert meteor.statistics(predictions, references)[:, 0].tolist() == alone


@FEW
@given(PAIRS)
def test_meteor_with_caches_equals_nltk(meteor, wordnet, pairs):
    tokenize = NLTKWordTokenizer().tokenize
    predictions, references = zip(*pairs, strict=True)
    expected = [single_meteor_score(tokenize(r), tokenize(p), wordnet=wordnet) for p, r in pairs]
    assert meteor.statistics(predictions, references)[:, 0].tolist() == expected


@FEW
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=12)), max_size=8))
def test_cached_stems_and_synsets_are_those_of_nltk(wordnet, words):
    stemmer, remembered = RememberingStemmer(), RememberingWordNet(wordnet)
    for word in words * 2:
        assert stemmer.stem(word) == PorterStemmer().stem(word)
        assert remembered.synsets(word) == wordnet.synsets(word)


def test_bertscore_encodes_every_distinct_text_once_and_from_short_to_long(scorer, monkeypatch):
    seen = []
    original = bertscore.embeddings

    def watched(model, token_ids, *rest):
        seen.extend(token_ids)
        return original(model, token_ids, *rest)

    monkeypatch.setattr(bertscore, "embeddings", watched)
    predictions = ["a cat", "a much longer text about cats", "a cat", "", "a cat"]
    references = ["a cat", "a dog", "a much longer text about cats", "a reference whose prediction is empty", "a dog"]
    scores = scorer.statistics(predictions, references)[:, 0]
    assert len({tuple(ids) for ids in seen}) == len(seen) == 4
    for part in (seen[:4], seen[4:]):
        assert [len(ids) for ids in part] == sorted(len(ids) for ids in part)
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert scores[3] == 0.0


@pytest.mark.parametrize("matched_tokens", [64, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 8192))])
def test_bertscore_does_not_depend_on_how_many_pairs_are_matched_together(scorer, monkeypatch, matched_tokens):
    predictions, references = builtin_pairs(24)
    predictions[3:6] = [predictions[2]] * 3
    expected = [scorer.statistics([p], [r])[0, 0] for p, r in zip(predictions, references, strict=True)]
    monkeypatch.setattr(bertscore, "_MATCHED_TOKENS", matched_tokens)
    np.testing.assert_allclose(scorer.statistics(predictions, references)[:, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_embeddings_by_threads_are_those_of_bert_score_in_the_given_order(scorer, two_threads, monkeypatch):
    encoder = scorer._encoder
    texts = sorted({text for texts in builtin_pairs(20) for text in texts}, key=len)
    ids = [bertscore.sent_encode(encoder.tokenizer, text) for text in texts]
    monkeypatch.setattr(encoding, "BATCH_TOKENS_CPU", 128)
    threads = set()
    original = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda *given: threads.add(threading.current_thread().name) or original(*given))
    found = list(encoding.embeddings(encoder.model, ids, encoder.tokenizer.pad_token_id, "cpu"))
    assert all(name.startswith("encoder") for name in threads)
    assert torch.get_num_threads() == 2
    weights = {i: 1.0 for row in ids for i in row}
    for text, row, embedding in zip(texts, ids, found, strict=True):
        expected = get_bert_embedding([text], encoder.model, encoder.tokenizer, weights, device="cpu")[0][0]
        assert embedding.shape[0] == len(row)
        torch.testing.assert_close(embedding, expected, atol=2e-5, rtol=0)


def test_an_error_in_a_thread_is_raised_and_leaves_the_threads_of_torch_as_they_were(scorer, two_threads, monkeypatch):
    def fail(_, batch, *__):
        raise RuntimeError(f"no memory for {len(batch)} texts")

    monkeypatch.setattr(encoding, "_encode", fail)
    with pytest.raises(RuntimeError, match="no memory for 4 texts"):
        list(encoding.embeddings(None, [[1] * 128] * 100, 0, "cpu"))
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


def test_a_reader_that_stops_early_stops_the_threads(scorer, two_threads, monkeypatch):
    encoded = []
    monkeypatch.setattr(encoding, "_encode", lambda _, batch, *__: encoded.append(batch) or batch)
    stream = encoding.embeddings(None, [[1] * 512] * 1000, 0, "cpu")
    next(stream)
    stream.close()
    assert len(encoded) < 20
    assert torch.get_num_threads() == 2


@FEW
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 80))
def test_batches_keep_every_text_in_order_and_within_the_limit(lengths, limit):
    texts = [[i] * length for i, length in enumerate(lengths)]
    batches = encoding.token_batches(texts, limit)
    assert [ids for batch in batches for ids in batch] == texts
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= limit


def test_the_report_is_that_of_each_metric_whatever_order_it_streams_in(scorer, monkeypatch):
    predictions, references = builtin_pairs(12)
    backwards = BertScore.stream
    monkeypatch.setattr(BertScore, "stream", lambda self, *texts: reversed(list(backwards(self, *texts))))
    monkeypatch.setattr(bertscore, "_MATCHED_TOKENS", 100)
    report = score_all(["bertscore_f1", "rouge1"], predictions, references, bootstrap=5)
    assert issubclass(BertScore, StreamingMetric)
    expected = [scorer.statistics([p], [r])[0, 0] for p, r in zip(predictions, references, strict=True)]
    assert report.per_example["bertscore_f1"] == pytest.approx(expected, abs=1e-6)
    assert tuple(report.statistics) == ("bertscore_f1", "rouge1")


def test_unequal_counts_are_refused_before_anything_is_encoded():
    with pytest.raises(CoraError, match="2 predictions and 1 references"):
        next(BertScore().stream(["a", "b"], ["a"]))
