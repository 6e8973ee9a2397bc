import json
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer

from cora_cli import embedded
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.metrics import GROUPS, build_metrics, comparable_signature, parse_metrics, scales, score_all
from cora_cli.evaluation.metrics import TEXT_NAMES as NAMES
from cora_cli.evaluation.metrics.bertscore import BertScore, recommended_layer
from cora_cli.evaluation.metrics.bleu import SacreBleu
from cora_cli.evaluation.metrics.meteor import Meteor, wordnet_reader
from cora_cli.evaluation.metrics.rouge import Rouge, RougeScores, longest_common_subsequence
from cora_cli.intervals import bootstrap_interval, paired_difference

"""The metrics that compare texts."""
FEW = settings(derandomize=True, deadline=None, max_examples=60)
WORDS = st.lists(st.sampled_from(["the", "cats", "cat", "running", "run", "on", "mat", "猫", "x=1;", "."]), max_size=12).map(
    " ".join
)
TEXTS = st.one_of(WORDS, st.text(max_size=30))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)

PREDICTIONS = ["The cat sat on the mat.", "def f(x):\n    return x + 1", "42", "", "Paris is the capital of France", "banana"]
REFERENCES = [
    "A cat is sitting on a mat.",
    "def f(y): return y + 1",
    "photosynthesis",
    "hello",
    "The capital of France is Paris.",
    "",
]
ALL_BUT_BERTSCORE = NAMES[:-1]


@pytest.fixture(scope="module")
def bertscore():
    return BertScore()


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    # "t5" in the path makes bert-score's own loader expect a T5 model.
    directory = tmp_path_factory.mktemp("t5") / "encoder"
    directory.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(["hello world the cat " * 9], vocab_size=300, min_frequency=1, special_tokens=special)
    tokenizer.save_model(str(directory))
    RobertaTokenizer.from_pretrained(str(directory)).save_pretrained(directory)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    RobertaModel(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


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


# --- BERTScore -------------------------------------------------------------------------------------------------------


def test_bertscore_equals_bert_score_one_pair_at_a_time(bertscore):
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=str(embedded.encoder_directory()), num_layers=6, device="cpu")
    found = bertscore.statistics(PREDICTIONS, REFERENCES)[:, 0]
    for score, prediction, reference in zip(found, PREDICTIONS, REFERENCES, strict=True):
        expected = scorer.score([prediction], [reference])[2].item() if prediction and reference else 0.0
        assert score == pytest.approx(expected, abs=1e-5)


def test_bertscore_does_not_depend_on_the_batch(bertscore):
    # Unrelated words have negative similarities, which are below the similarity 0 of padding.
    generator = random.Random(0)
    words = [
        "quark",
        "aorta",
        "ledger",
        "fjord",
        "banjo",
        "enzyme",
        "treaty",
        "gazebo",
        "lichen",
        "turbine",
        "sonnet",
        "mortgage",
    ]
    pairs = [[" ".join(generator.choices(words, k=generator.randint(1, 4))) for _ in range(2)] for _ in range(20)]
    pairs.append(["word " * 60, "y " * 80])
    predictions, references = map(list, zip(*pairs, strict=True))
    together = bertscore.statistics(predictions, references)[:, 0]
    alone = [bertscore.statistics([prediction], [reference])[0, 0] for prediction, reference in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    backwards = bertscore.statistics(predictions[::-1], references[::-1])[::-1, 0]
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_bertscore_truncates_texts_beyond_the_encoders_positions(bertscore):
    reference = "a sentence about words"
    long, cut = "word " * 20_000, "word " * 510  # 512 positions, two of them special
    scores = bertscore.statistics([long, cut, "word " * 509], [reference] * 3)[:, 0]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert abs(scores[1] - scores[2]) > 1e-6


def test_texts_without_a_token_score_zero_and_stay_in_the_mean(bertscore):
    scores = bertscore.statistics(["", " \n", "\u200b", "same", "same"], ["a", "a", "a", "", "same"])[:, 0]
    assert scores.tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-5)
    assert "|empty:0|" in bertscore.signature()


def test_the_bertscore_signature_shows_encoder_layer_and_content(bertscore, tiny_roberta, tmp_path):
    embedded_signature = bertscore.signature()
    assert embedded_signature.startswith("bertscore_f1|encoder:builtin:all-MiniLM-L6-v2|layer:6|scale:NOT-roberta-large-L17|")
    own = [BertScore(str(tiny_roberta), layer=layer).signature() for layer in (2, 3)]
    assert own[0].startswith(f"bertscore_f1|encoder:{tiny_roberta}|layer:2|scale:NOT-roberta-large-L17|weights:sha256-")
    assert own[0] != own[1]
    moved = BertScore(str(shutil.copytree(tiny_roberta, tmp_path / "elsewhere")), layer=2).signature()
    assert moved != own[0]
    assert comparable_signature(moved) == comparable_signature(own[0]) != comparable_signature(own[1])
    weights = {part for text in (embedded_signature, own[0]) for part in text.split("|") if part.startswith("weights:")}
    assert len(weights) == 2


def test_a_roberta_encoder_gets_its_position_offset_prefix_space_and_float32(tiny_roberta):
    from bert_score import BERTScorer
    from transformers import AutoTokenizer, RobertaModel

    metric = BertScore(str(tiny_roberta), layer=2)
    predictions, references = ["hello the cat", "cat " * 50], ["world cat", "hello world"]
    found = metric.statistics(predictions, references)[:, 0]
    assert "|max-tokens:32|prefix-space:yes|" in metric.signature()

    # The same with bert-score's own scorer, given a model and tokenizer that it cannot load itself.
    scorer = BERTScorer.__new__(BERTScorer)
    scorer._model = RobertaModel.from_pretrained(tiny_roberta, dtype=torch.float32, num_hidden_layers=2).eval()
    scorer._tokenizer = AutoTokenizer.from_pretrained(tiny_roberta, add_prefix_space=True, model_max_length=32)
    scorer._idf, scorer.device, scorer.all_layers, scorer._rescale_with_baseline = False, "cpu", False, False
    expected = [scorer.score([p], [r])[2].item() for p, r in zip(predictions, references, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_layer_comes_from_the_encoders_name():
    assert recommended_layer("roberta-large") == 17
    assert recommended_layer("FacebookAI/roberta-large@main") == 17
    assert recommended_layer("microsoft/deberta-v3-base") == 9
    with pytest.raises(CoraError, match="set --bertscore-layer"):
        recommended_layer("org/unheard-of")


def test_an_encoder_without_that_many_layers_is_refused(tiny_roberta):
    with pytest.raises(CoraError, match="has 3 layers, so layer 4"):
        BertScore(str(tiny_roberta), layer=4).signature()


def test_an_encoder_that_lacks_weights_is_refused(tiny_roberta, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny_roberta.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"lacks 1 weights .* encoder.layer.0.output.dense.weight"):
        BertScore(str(tmp_path), layer=2).signature()


def test_an_encoder_of_t5_needs_no_decoder(tiny_roberta, tmp_path):
    from transformers import T5Config, T5EncoderModel, T5Model

    directory = tmp_path / "t5"
    directory.mkdir()
    for file in tiny_roberta.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            (directory / file.name).write_bytes(file.read_bytes())
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2, pad_token_id=1)
    complete = T5Model(config)
    values = []
    for stored in (complete, T5EncoderModel(config)):
        stored.load_state_dict(complete.state_dict(), strict=False)
        stored.save_pretrained(directory)
        values.append(BertScore(str(directory), layer=2).statistics(["the cat"], ["hello world"]))
    assert values[0].tolist() == values[1].tolist()


@pytest.fixture
def bert(tmp_path):
    """A function that makes an encoder with a tokenizer of 300 bytes and special tokens, changed in place."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    def made(rows=300, change=lambda model: None, **special):
        vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special).save_pretrained(tmp_path)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertModel(BertConfig(vocab_size=rows, max_position_embeddings=32, **sizes))
        change(model)
        model.save_pretrained(tmp_path)
        return BertScore(str(tmp_path), layer=1)

    return made


@pytest.mark.parametrize("special", [{}, {"pad_token": "<pad>"}], ids=["without", "beyond the embedding"])
def test_the_padding_token_of_an_encoder_does_not_matter(bert, special):
    texts = ["a", "longer words", "two"], ["b", "c d e f g h", "three"]
    metric = bert(rows=256, **special)
    alone = [metric.statistics([one], [other])[0] for one, other in zip(*texts, strict=True)]
    np.testing.assert_allclose(metric.statistics(*texts), alone, atol=1e-6)


def test_a_token_without_a_row_in_the_encoders_embedding_is_refused_by_name(bert):
    with pytest.raises(
        CoraError, match=r"encoder \S+: the token 'z' has the id 89, but the model's embedding has only 80 rows"
    ):
        bert(rows=80).statistics(["z"], ["A"])


def test_an_encoder_whose_weights_are_not_finite_is_refused_by_name(bert):
    damaged = bert(change=lambda model: model.encoder.layer[0].attention.self.query.weight.data.fill_(torch.nan))
    with pytest.raises(
        CoraError, match=r"encoder \S+: encoder\.layer\.0\.attention\.self\.query\.weight holds values that are not finite"
    ):
        damaged.statistics(["a b"], ["a c"])


def test_a_model_that_bert_score_does_not_support_is_refused_by_its_type(bert, tmp_path):
    from transformers import GPT2Config, GPT2Model

    metric = bert()
    GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(
        CoraError, match=r"encoder \S+ is a gpt2 model, which bert-score does not support; use an encoder such as"
    ):
        metric.statistics(["a"], ["b"])


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
