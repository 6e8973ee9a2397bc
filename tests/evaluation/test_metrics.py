import json
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer

from cora_cli import embedded
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.metrics import GROUPS, build_metrics, parse_metrics, scales, score_all
from cora_cli.evaluation.metrics import TEXT_NAMES as NAMES
from cora_cli.evaluation.metrics.bertscore import BertScore
from cora_cli.evaluation.metrics.bleu import SacreBleu
from cora_cli.evaluation.metrics.meteor import Meteor, wordnet_reader
from cora_cli.evaluation.metrics.rouge import Rouge, RougeScores, longest_common_subsequence
from cora_cli.intervals import bootstrap_interval, paired_difference

from .helpers import PREDICTIONS, REFERENCES

"""The metrics that compare texts."""
FEW = settings(derandomize=True, deadline=None, max_examples=60)
WORDS = st.lists(st.sampled_from(["the", "cats", "cat", "running", "run", "on", "mat", "猫", "x=1;", "."]), max_size=12).map(
    " ".join
)
TEXTS = st.one_of(WORDS, st.text(max_size=30))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)

ALL_BUT_BERTSCORE = NAMES[:-1]


# --- names -----------------------------------------------------------------------------------------------------------


def test_groups_and_names_parse_into_table_order():
    assert parse_metrics("rouge,meteor,bleu,bertscore") == NAMES
    assert parse_metrics(" bleu, rouge ,rouge1") == ("rouge1", "rouge2", "rougeL", "sacrebleu")
    assert parse_metrics("bertscore_f1") == ("bertscore_f1",)


@pytest.mark.parametrize("text", ["rogue", "rouge,chrf", "", " , "])
def test_unknown_or_no_metrics_are_refused_with_what_is_allowed(text):
    with pytest.raises(UsageError, match="rouge, meteor, bleu, bertscore"):
        parse_metrics(text)


def test_importing_the_registry_loads_nothing_heavy():
    code = (
        "import sys, cora_cli.evaluation.metrics as m; m.parse_metrics('rouge,bertscore');"
        "print(sorted({'torch', 'numpy', 'nltk', 'transformers', 'sacrebleu', 'evaluate', 'rouge_score'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- ROUGE -----------------------------------------------------------------------------------------------------------


@FEW
@given(PAIRS)
def test_rouge_equals_rouge_score(pairs):
    predictions, references = zip(*pairs, strict=True)
    scorer = rouge_scorer.RougeScorer(list(GROUPS["rouge"]), use_stemmer=True)
    expected = [scorer.score(reference, prediction) for prediction, reference in pairs]
    shared = RougeScores()
    for name in GROUPS["rouge"]:
        found = Rouge(name, shared).statistics(predictions, references)[:, 0]
        assert found.tolist() == [scores[name].fmeasure for scores in expected]


@FEW
@given(st.text("abc", max_size=70), st.text("abcd", max_size=140))
def test_the_longest_common_subsequence_equals_the_full_table(first, second):
    table = rouge_scorer._lcs_table(first, second)
    assert longest_common_subsequence(first, second) == table[-1][-1]


def test_rouge_notices_that_a_list_was_changed_in_place():
    metric, predictions = Rouge("rouge1"), ["a cat"]
    assert metric.statistics(predictions, ["a cat"])[0, 0] == 1.0
    predictions[0] = "a dog"
    assert metric.statistics(predictions, ["a cat"])[0, 0] == 0.5


def test_the_three_rouge_metrics_tokenize_once(monkeypatch):
    scored = []
    original = RougeScores._score
    monkeypatch.setattr(RougeScores, "_score", lambda self, *pair: scored.append(pair) or original(self, *pair))
    score_all(GROUPS["rouge"], PREDICTIONS, REFERENCES, bootstrap=10)
    assert len(scored) == len(PREDICTIONS)


# --- BLEU ------------------------------------------------------------------------------------------------------------


@FEW
@given(PAIRS)
def test_sacrebleu_equals_corpus_bleu_and_sentence_bleu(pairs):
    predictions, references = zip(*pairs, strict=True)
    metric = SacreBleu()
    statistics = metric.statistics(predictions, references)
    expected = sacrebleu.corpus_bleu(list(predictions), [list(references)]).score
    assert float(metric.value(statistics.sum(axis=0), len(pairs))) == pytest.approx(expected, abs=1e-9)
    sentences = [sacrebleu.sentence_bleu(prediction, [reference]).score for prediction, reference in pairs]
    assert metric.example_scores(statistics).tolist() == pytest.approx(sentences, abs=1e-9)


def test_bleu_of_resampled_counts_equals_corpus_bleu_of_the_resampled_texts():
    generator = random.Random(0)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "every", "red", "house", "today"]
    pairs = [[" ".join(generator.choices(vocabulary, k=9)) for _ in range(2)] for _ in range(30)]
    predictions, references = zip(*pairs, strict=True)
    metric = SacreBleu()
    statistics = metric.statistics(predictions, references)
    draws = [[generator.randrange(30) for _ in range(30)] for _ in range(8)]
    found = metric.value(np.array([statistics[draw].sum(axis=0) for draw in draws]), 30)
    expected = [sacrebleu.corpus_bleu([predictions[i] for i in draw], [[references[i] for i in draw]]).score for draw in draws]
    assert len(set(expected)) > 1
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_the_bleu_signature_is_sacrebleus_own():
    signature = SacreBleu().signature()
    assert signature == f"sacrebleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


# --- METEOR ----------------------------------------------------------------------------------------------------------


def test_meteor_equals_nltk():
    tokenize, wordnet = NLTKWordTokenizer().tokenize, wordnet_reader(embedded.wordnet_directory())
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    expected = [
        single_meteor_score(tokenize(reference), tokenize(prediction), wordnet=wordnet) for prediction, reference in pairs
    ]
    assert Meteor().statistics(PREDICTIONS, REFERENCES)[:, 0].tolist() == expected
    assert 0 < expected[0] < 1


def test_meteor_matches_stems_and_synonyms_and_ignores_case():
    predictions = ["running", "car", "HELLO", "猫 が", "car"]
    scores = Meteor().statistics(predictions, ["runs", "auto", "hello", "猫 が", "idea"])[:, 0]
    assert scores.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.9375, 0.0])


def test_the_meteor_signature_names_the_wordnet_version():
    assert "|wordnet:3.0|alpha:0.9|beta:3.0|gamma:0.5|" in Meteor().signature()


# --- all together ----------------------------------------------------------------------------------------------------


def test_the_report_has_every_metric_with_value_interval_n_and_signature(bertscore):
    report = score_all(NAMES, PREDICTIONS, REFERENCES, bootstrap=50)
    assert tuple(report.metrics) == NAMES
    for name, entry in report.metrics.items():
        assert set(entry) == {"value", "ci95", "n", "unscorable", "signature"}
        assert entry["n"] == len(report.per_example[name]) == len(report.statistics[name]) == 6
        assert entry["ci95"][0] <= entry["ci95"][1]
        assert entry["signature"].startswith(f"{name}|")
        assert entry["signature"].endswith("|bs:50|seed:0|ci:percentile")
        if name != "sacrebleu":
            assert entry["value"] == pytest.approx(np.mean(report.per_example[name]))
    assert report.metrics["bertscore_f1"]["signature"].startswith(bertscore.signature())
    json.dumps(report.metrics, allow_nan=False)
    json.dumps(report.per_example, allow_nan=False)


def test_the_intervals_are_those_of_each_metric_alone():
    names = ALL_BUT_BERTSCORE[::-1]  # BLEU first: its statistics have more columns than the others
    report = score_all(names, PREDICTIONS, REFERENCES, bootstrap=80, seed=4, confidence=0.9)
    for name, metric in build_metrics(names).items():
        expected = bootstrap_interval(report.statistics[name], metric.value, 80, seed=4, confidence=0.9)
        assert report.metrics[name]["ci90"] == pytest.approx(expected, rel=1e-9)


def test_scoring_in_steps_changes_nothing(monkeypatch):
    whole = score_all(ALL_BUT_BERTSCORE, PREDICTIONS, REFERENCES, bootstrap=20)
    monkeypatch.setattr("cora_cli.evaluation.metrics._EXAMPLES_PER_STEP", 4)
    assert score_all(ALL_BUT_BERTSCORE, PREDICTIONS, REFERENCES, bootstrap=20).metrics == whole.metrics


def test_the_statistics_serve_a_paired_test_of_corpus_bleu():
    better = score_all(["sacrebleu"], REFERENCES[:3], REFERENCES[:3], bootstrap=5).statistics["sacrebleu"]
    worse = score_all(["sacrebleu"], PREDICTIONS[:3], REFERENCES[:3], bootstrap=5).statistics["sacrebleu"]
    value = build_metrics(["sacrebleu"])["sacrebleu"].value
    expected = 100.0 - sacrebleu.corpus_bleu(PREDICTIONS[:3], [REFERENCES[:3]]).score
    assert paired_difference(better, worse, value).difference == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_empty_very_long_and_non_latin_texts_are_scored(name, bertscore):
    metric = bertscore if name == "bertscore_f1" else build_metrics([name])[name]
    long = " ".join(f"word{i % 5000} runs" for i in range(10_000))
    predictions = [long, "", "", "привет мир как твои дела", "\x00\x07", "so it ends", long]
    references = ["word7 ran", "", "text", "привет мир как твои дела", "bell", "", long]
    statistics = metric.statistics(predictions, references)
    scores = metric.example_scores(statistics)
    assert statistics.dtype == np.float64
    assert np.isfinite(scores).all()
    assert (scores[[1, 2, 5]] == 0).all()
    top = 100 if name == "sacrebleu" else 1
    assert scores[6] == pytest.approx(top, rel=1e-4)
    if name.startswith("rouge"):
        assert scores[3] == 0  # its tokens are [a-z0-9]+
    else:
        assert scores[3] == pytest.approx(top, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_counts_are_refused_by_every_metric(name):
    metric = build_metrics([name])[name]
    with pytest.raises(CoraError, match="2 predictions and 1 references"):
        metric.statistics(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], ["a"], "2 predictions and 1 references"),
        ([], [], "nothing to score"),
        (["a", None], ["a", "b"], "prediction 1 must be text, not NoneType"),
        (["a"], [["a"]], "reference 0 must be text, not list"),
        (["a", "\ud800"], ["a", "b"], "prediction 1 is not valid Unicode"),
    ],
)
def test_invalid_input_is_refused(predictions, references, message):
    with pytest.raises(CoraError, match=message):
        score_all(["rouge1"], predictions, references)


@pytest.mark.parametrize("options", [{"bootstrap": 0}, {"confidence": 1.0}, {"names": ["bleu"]}, {"names": []}])
def test_invalid_requests_are_usage_errors(options):
    with pytest.raises(UsageError):
        score_all(**({"names": ["rouge1"], "predictions": ["a"], "references": ["a"]} | options))


# --- evaluate.Metric -------------------------------------------------------------------------------------------------


def test_the_evaluate_classes_give_the_same_values_combined_and_in_batches(tmp_path):
    import evaluate

    from cora_cli.evaluation.metrics.huggingface import BertScore as HubBertScore
    from cora_cli.evaluation.metrics.huggingface import Meteor as HubMeteor
    from cora_cli.evaluation.metrics.huggingface import Rouge as HubRouge
    from cora_cli.evaluation.metrics.huggingface import SacreBleu as HubSacreBleu

    modules = [cls(cache_dir=str(tmp_path)) for cls in (HubRouge, HubMeteor, HubSacreBleu, HubBertScore)]
    assert all(isinstance(module, evaluate.Metric) for module in modules)
    combined = evaluate.combine(modules)
    for start in (0, 4):
        combined.add_batch(predictions=PREDICTIONS[start : start + 4], references=REFERENCES[start : start + 4])
    found = combined.compute()
    expected = score_all(NAMES, PREDICTIONS, REFERENCES, bootstrap=5).metrics
    assert found == pytest.approx({name: expected[name]["value"] for name in NAMES}, abs=1e-6)
    direct = HubSacreBleu(keep_in_memory=True, cache_dir=str(tmp_path)).compute(predictions=["a b"], references=["a b c"])
    assert direct == {"sacrebleu": sacrebleu.corpus_bleu(["a b"], [["a b c"]]).score}


def test_the_evaluate_classes_need_no_network_and_write_only_to_their_cache(tmp_path, monkeypatch):
    import evaluate

    from cora_cli.evaluation.metrics.huggingface import Rouge as HubRouge

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "default"))
    found = HubRouge(cache_dir=str(tmp_path / "given")).compute(predictions=["a b c"], references=["a b c"])
    assert found == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize("text", ["今天天气很不错。", "สวัสดีครับ", "👍🏽"])
def test_a_perfect_answer_without_a_token_that_a_metric_compares_counts_as_unscorable(text):
    report = score_all(["rouge1", "sacrebleu"], [text, "Hello"], [text, "Hello"], bootstrap=100)
    assert report.metrics["rouge1"]["value"] == 0.5
    assert report.metrics["rouge1"]["unscorable"] == 1
    assert report.metrics["sacrebleu"]["unscorable"] == 2, "no reference has four tokens, so corpus BLEU is 0"


def test_the_tokenizer_of_bleu_can_be_chosen_and_is_in_the_signature():
    text = "今天天气很不错，我们去公园散步吧。"
    metric = score_all(["sacrebleu"], [text], [text], bootstrap=100, bleu_tokenize="zh").metrics["sacrebleu"]
    assert (round(metric["value"], 6), metric["unscorable"]) == (100.0, 0)
    assert "|tok:zh|" in metric["signature"]


def test_references_of_fewer_than_four_tokens_leave_bleu_little_to_count_whatever_the_others_are():
    texts = ["yes", "北京", "not quite sure", "one two three four"]
    metrics = score_all(["meteor", "sacrebleu"], texts, texts, bootstrap=100).metrics
    assert (metrics["sacrebleu"]["unscorable"], metrics["meteor"]["unscorable"]) == (3, 0)


@pytest.mark.parametrize(
    ("reference", "tokenize", "count"),
    [
        ("今天天气很不错，我们去公园散步吧。", "13a", 1),
        ("今天 天气 很 不错 ， 我们 去 公园 散步 吧 。", "13a", 0),
        ("今天天气很不错，我们去公园散步吧。", "zh", 0),
        ("สวัสดีครับ ผมชื่อสมชาย", "13a", 1),
        ("สวัสดีครับ ผมชื่อสมชาย", "zh", 1),
        ("สวัสดีครับ ผมชื่อสมชาย", "char", 0),
        ("오늘은 날씨가 정말 좋네요", "13a", 0),
        ("int x = 5; // 变量", "13a", 0),
    ],
)
def test_references_without_spaces_are_unscorable_where_a_phrase_counts_as_one_word(reference: str, tokenize: str, count: int):
    texts = [reference, "one two three four"]
    metrics = score_all(["meteor", "sacrebleu"], texts, texts, bootstrap=100, bleu_tokenize=tokenize).metrics
    assert metrics["sacrebleu"]["unscorable"] == count
    assert tokenize != "13a" or metrics["meteor"]["unscorable"] == count


@pytest.mark.parametrize(
    ("reference", "count"),
    [
        ("建国は1949年十月一日です", 1),
        ("в 2024 году", 1),
        ("Café à 3 €, très bon", 0),
        ("int x = 5; // 变量", 0),
        ("2024", 0),
        ("…", 1),
    ],
)
def test_references_mostly_of_other_letters_than_rouge_compares_are_unscorable(reference: str, count: int):
    report = score_all(["rouge1"], ["1949", "b"], [reference, "b"], bootstrap=100)
    assert report.metrics["rouge1"]["unscorable"] == count


def test_a_reference_of_one_token_is_unscorable_where_pairs_of_tokens_are_compared():
    report = score_all(["rouge1", "rouge2"], ["yes", "not sure"], ["yes", "not sure"], bootstrap=100)
    found = {name: (metric["value"], metric["unscorable"]) for name, metric in report.metrics.items()}
    assert found == {"rouge1": (1.0, 0), "rouge2": (0.5, 1)}
    assert "two tokens" in build_metrics(["rouge2"])["rouge2"].blind_spot


def test_texts_that_the_encoder_does_not_know_are_unscorable():
    metric = build_metrics(["bertscore_f1"])["bertscore_f1"]
    assert metric.unscorable(["\u1400\u1401", "word", "", "word \u1400", "word \u1400 \u1401"]) == 3


@pytest.mark.parametrize(("words", "said"), [(510, False), (511, True)])
def test_texts_of_which_the_encoder_reads_only_the_beginning_are_counted(words: int, said: bool, capsys):
    text = " the" * words
    list(BertScore().stream([text, "a"], [text, "b"]))
    assert ("1 of 2 examples have a text of more than the 512 tokens" in capsys.readouterr().err) is said


def test_texts_that_spell_a_control_token_of_the_encoder_are_counted(capsys):
    list(BertScore().stream(["fill in the [MASK]", "a", "[mask]"], ["fill in the gap", "b", "c"]))
    assert "1 of 3 examples have a text that spells a control token of the encoder, such as [MASK]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["rouge1"], "on a scale of 0-1"),
        (["sacrebleu"], "sacrebleu 0-100"),
        (["rouge1", "sacrebleu"], "sacrebleu 0-100, the others 0-1"),
        (["nll"], "nll in nats per reference token; lower is better: nll"),
        (["nll", "ece"], "nll in nats per reference token, the others 0-1; lower is better: nll, ece"),
    ],
)
def test_only_the_scales_of_the_metrics_at_hand_are_named(names, said):
    assert scales(names) == said
