"""The variant `hf-evaluate` against the computation of Hugging Face's metric scripts, which `evaluate.load` would download.

The references follow metrics/{rouge,meteor,sacrebleu,bertscore} of huggingface/evaluate at a7dd338, with their default arguments. The package
`evaluate` does not carry these scripts: `evaluate.load` fetches them, and runs them, from the hub, which tests must do without. They hand everything to
`rouge_score`, `nltk`, `sacrebleu` and `bert_score`, which the tests call as the scripts do. Run by hand on the texts below, the real classes gave
equal numbers: ROUGE (`evaluate.load("rouge.py", seed=5)`, per text and printed), METEOR and SacreBLEU.
"""

import json
import random
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
import sacrebleu
from bert_score import BERTScorer
from nltk.corpus.reader import WordNetCorpusReader
from nltk.translate import meteor_score
from rouge_score import rouge_scorer, scoring

from cora_cli import embedded
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.metrics import GROUPS, build_metrics, score_all
from cora_cli.evaluation.metrics import TEXT_NAMES as NAMES
from cora_cli.evaluation.metrics.huggingface import Meteor as HubMeteor
from cora_cli.experiments.steps import SCORING
from tests.evaluation.helpers import UNRELATED

"""The metrics that compare texts."""
PREDICTIONS = [
    "The cats were running. They sat on the mats, e.g. at 5 p.m. sharp.",
    "Dr. Smith returned it. Everything works.",
    "def f(x):\n    return x + 1",
    "42",
    "Paris is the capital of France",
    "banana",
    "",
]
REFERENCES = [
    "A cat runs. It sits on a mat, e.g. at 5 p.m.",
    "Mr. Smith returns them. All works",
    "def f(y): return y + 1",
    "photosynthesis",
    "The capital of France is Paris.",
    "apple pie",
    "hello",
]


def variant(name: str) -> Any:
    return build_metrics([name], variant="hf-evaluate")[name]


def value(metric: Any, predictions: list[str], references: list[str]) -> float:
    statistics = metric.statistics(predictions, references)
    return float(metric.value(statistics.sum(axis=0), len(statistics)))


def test_rouge_is_that_of_evaluate_without_stemming_and_its_median_is_recorded() -> None:
    scorer = rouge_scorer.RougeScorer(
        rouge_types=["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=False, tokenizer=None
    )
    aggregator = scoring.BootstrapAggregator()
    scores = [scorer.score(reference, prediction) for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True)]
    for score in scores:
        aggregator.add_scores(score)
    np.random.seed(5)
    printed = aggregator.aggregate()
    report = score_all(GROUPS["rouge"], PREDICTIONS, REFERENCES, bootstrap=20, seed=5, variant="hf-evaluate")
    for name, metric in report.metrics.items():
        each = [score[name].fmeasure for score in scores]
        assert report.per_example[name] == each
        assert metric["value"] == pytest.approx(np.mean(each), abs=1e-12)
        assert metric["evaluate_prints"] == pytest.approx(printed[name].mid.fmeasure, abs=1e-12)
        assert metric["signature"].startswith(f"{name}|variant:hf-evaluate|score:f1|aggregate:mean|")
        assert "|stemmer:none|" in metric["signature"]
    ours = score_all(GROUPS["rouge"], PREDICTIONS, REFERENCES, bootstrap=20, seed=5).metrics
    assert ours["rouge1"]["value"] > report.metrics["rouge1"]["value"], "runs and running are one stem"
    assert "evaluate_prints" not in ours["rouge1"]


@pytest.mark.filterwarnings("ignore:The multilingual functions")
def test_meteor_is_that_of_evaluate_with_word_tokenize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(embedded.punkt_directory()), str(embedded.wordnet_directory())])
    wordnet = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
    expected = [
        meteor_score.single_meteor_score(
            nltk.word_tokenize(reference), nltk.word_tokenize(prediction), wordnet=wordnet, alpha=0.9, beta=3, gamma=0.5
        )
        for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    monkeypatch.undo()
    found = variant("meteor")
    assert found.statistics(PREDICTIONS, REFERENCES)[:, 0].tolist() == expected
    assert found.signature().startswith("meteor|variant:hf-evaluate|aggregate:mean|tok:word_tokenize-punkt_tab-english|")
    ours = build_metrics(["meteor"])["meteor"].statistics(PREDICTIONS, REFERENCES)[:, 0]
    assert ours[1] != expected[1], "ours leaves the period at the end of the first sentence with its word"


def test_meteor_without_the_sentence_splitter_fails_instead_of_tokenizing_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LAYOUT", "empty")
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CoraError, match=r"Punkt .* could not be downloaded"):
        variant("meteor")._tokens("a")


def test_sacrebleu_is_that_of_evaluate() -> None:
    output = sacrebleu.corpus_bleu(
        PREDICTIONS,
        [REFERENCES],
        smooth_method="exp",
        smooth_value=None,
        force=False,
        lowercase=False,
        use_effective_order=False,
    )
    metric = variant("sacrebleu")
    assert value(metric, PREDICTIONS, REFERENCES) == pytest.approx(output.score, abs=1e-9)
    assert metric.signature() == (
        f"sacrebleu|variant:hf-evaluate|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )


def test_bertscore_is_that_of_evaluate_with_its_batches_of_64_padded() -> None:
    # Unrelated words have negative similarities; bert-score gives padding 0, which is more.
    generator = random.Random(0)
    pairs = [[" ".join(generator.choices(UNRELATED, k=generator.randint(1, 4))) for _ in range(2)] for _ in range(70)]
    pairs[3][1] = "a longer text than all others of its batch " * 3
    predictions, references = map(list, zip(*pairs, strict=True))
    scorer = BERTScorer(model_type=str(embedded.encoder_directory()), num_layers=6, batch_size=64, idf=False, device="cpu")
    expected = scorer.score(cands=predictions, refs=references, batch_size=64)[2].numpy()
    metric = variant("bertscore_f1")
    found = metric.statistics(predictions, references)[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ours = build_metrics(["bertscore_f1"])["bertscore_f1"].statistics(predictions, references)[:, 0]
    assert np.abs(ours - expected).max() > 1e-3
    assert "|variant:hf-evaluate|encoder:builtin:all-MiniLM-L6-v2|layer:6|" in metric.signature()
    assert "|idf:no|rescale:no|padding:0-in-batches-of-64|" in metric.signature()
    # bert-score cannot encode an empty text under transformers 5. It counts as 0, and its partner as a text of the batch.
    with_empty = metric.statistics([*predictions[:9], ""], [*references[:9], "many words " * 40])[:, 0]
    assert with_empty[9] == 0
    assert (with_empty[:9] >= ours[:9] - 1e-5).all()


def test_the_evaluate_classes_take_the_variant(tmp_path: Path) -> None:
    module = HubMeteor(cache_dir=str(tmp_path))
    found = module.compute(predictions=PREDICTIONS, references=REFERENCES, variant="hf-evaluate")
    assert found == {"meteor": value(variant("meteor"), PREDICTIONS, REFERENCES)}


def test_saved_predictions_are_scored_in_either_variant_which_is_recorded(tmp_path: Path) -> None:
    lines = [{"prediction": one, "reference": other} for one, other in zip(PREDICTIONS, REFERENCES, strict=True)]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {"from_predictions": str(file), "metrics": ("rouge", "meteor", "bleu"), "bootstrap": 100}
    found = {}
    for name in ("ours", "hf-evaluate"):
        settings = EvaluateConfig(**common, output_dir=str(tmp_path / name), metric_variant=name, device="cpu")
        (evaluation,) = evaluate(settings)
        assert json.loads((tmp_path / name / "metrics.json").read_text())["metric_variant"] == name
        found[name] = evaluation.record["metrics"]
    for name in NAMES[:-1]:
        signatures = [found[which][name]["signature"] for which in found]
        assert ["variant:hf-evaluate" in signature for signature in signatures] == [False, True]
    assert found["ours"]["sacrebleu"]["value"] == found["hf-evaluate"]["sacrebleu"]["value"]


def test_a_change_of_the_variant_generates_nothing_again() -> None:
    assert "metric_variant" in SCORING


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_variant": "hf-evaluate", "bleu_tokenize": "zh"}, "contradicts --metric-variant hf-evaluate"),
        ({"metric_variant": "theirs"}, "--metric-variant must be one of ours, hf-evaluate, not 'theirs'"),
    ],
)
def test_a_variant_that_cannot_be_computed_is_a_usage_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(from_predictions="p", **settings)


@pytest.mark.filterwarnings("ignore:The multilingual functions")
def test_meteor_gives_an_equal_text_of_few_words_less_than_one_as_nltk_and_evaluate_do() -> None:
    texts = ["yes", "blue sky", "a very blue sky"]
    for which in ("ours", "hf-evaluate"):
        found = build_metrics(["meteor"], variant=which)["meteor"].statistics(texts, texts)[:, 0]
        assert found.tolist() == pytest.approx([1 - 0.5 / words**3 for words in (1, 2, 4)])
