"""The metrics of `cora evaluate` with their bootstrap of 1,000 resamples, compared with the libraries called as the `evaluate` package does.

The peer is one process with the loops of `evaluate`'s own metric scripts. `rouge_score` and `nltk` get one example at a time; `bert_score`
and `sacrebleu` get the complete list in one call, so that the encoder works in bert-score's own batches of 64 distinct, sorted texts. Both sides
use the same tokens, stemmer, WordNet, encoder, float32 and threads. The peer's intervals come from what the libraries offer:
`BootstrapAggregator` (which `evaluate` calls for ROUGE anyway), `corpus_score(n_bootstrap=...)`, and `scipy.stats.bootstrap` for the two
metrics whose libraries have none. Both sides load WordNet and the encoder inside the measured time and import libraries before it.
"""

import argparse
import importlib
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import OURS, Agreement, Stage, matmul_rate, peak_bytes, run

PEER = "libraries"
PARTS = ("rouge", "meteor", "bleu", "bertscore", "bootstrap")
BOOTSTRAP = 1000
# The environment variable with the directory where the measured processes store their values for the comparison.
VALUES = "CORA_BENCHMARK_VALUES"
# How often a word of the response is dropped, swapped with the next one, or replaced by a word of another response.
DROPPED, SWAPPED, REPLACED = 0.10, 0.05, 0.12

Texts = list[str]

STAGE = Stage(
    name="metrics",
    script=__file__,
    sides={OURS: "cora evaluate", PEER: "the libraries, as `evaluate` calls them"},
    unit="pairs/s",
    targets={PEER: 4.0},
    rounds=2,  # the peer takes two minutes
)


def make_pairs(count: int) -> tuple[Texts, Texts]:
    """References, responses of builtin:instruct and builtin:code that are distinct as far as possible; predictions, seeded changes of them."""
    from cora_cli.data.builtin import load_builtin

    sets = [load_builtin(name) for name in ("instruct", "code")]
    responses = [record["output"] for split in sets for record in (*split.train, *split.test)]
    distinct = list(dict.fromkeys(responses))
    generator = random.Random(0)
    vocabulary = [word for text in distinct for word in re.findall(r"\S+", text)]
    references = generator.sample(distinct, min(count, len(distinct)))
    references += generator.choices(distinct, k=count - len(references))
    return [_changed(text, vocabulary, generator) for text in references], references


def _changed(text: str, vocabulary: Sequence[str], generator: random.Random) -> str:
    """`text` with some words dropped, swapped or replaced. White space stays, and with it the layout of code."""
    pieces = re.findall(r"(\S+)(\s*)", text)
    words, spaces = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
    for index in range(len(words)):
        if index + 1 < len(words) and generator.random() < SWAPPED:
            words[index], words[index + 1] = words[index + 1], words[index]
        if generator.random() < REPLACED:
            words[index] = generator.choice(vocabulary)
    kept = [word + space for word, space in zip(words, spaces, strict=True) if generator.random() >= DROPPED]
    return "".join(kept).strip() or text  # bert-score cannot take an empty text


def ours(predictions: Texts, references: Texts, clock: "Clock") -> dict[str, Any]:
    """What `cora evaluate` does with finished predictions. A clock around the called functions times each part."""
    from cora_cli import intervals
    from cora_cli.evaluation.metrics import TEXT_NAMES, reference_cache, score_all
    from cora_cli.evaluation.metrics.bertscore import BertScore
    from cora_cli.evaluation.metrics.bleu import SacreBleu
    from cora_cli.evaluation.metrics.meteor import Meteor
    from cora_cli.evaluation.metrics.rouge import Rouge

    for part, owner, method in (
        ("rouge", Rouge, "statistics"),
        ("meteor", Meteor, "statistics"),
        ("bleu", SacreBleu, "statistics"),
        ("bootstrap", intervals, "bootstrap_sums"),
        ("bootstrap", intervals, "interval_of_sums"),
    ):
        setattr(owner, method, clock.timed(part, getattr(owner, method)))
    kept = "directory"  # no reference embeddings that an earlier round kept
    setattr(reference_cache, kept, lambda: Path(os.environ[VALUES]) / f"references-{os.getpid()}")
    stream = "stream"
    setattr(BertScore, stream, clock.timed_stream("bertscore", BertScore.stream))
    report = score_all(TEXT_NAMES, predictions, references, bootstrap=BOOTSTRAP)
    values: dict[str, Any] = {**report.per_example, "sacrebleu": report.metrics["sacrebleu"]["value"]}
    return values


def libraries(predictions: Texts, references: Texts, clock: "Clock") -> dict[str, Any]:
    """The same numbers from the libraries."""
    import numpy as np
    import scipy.stats
    from bert_score import BERTScorer
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score import rouge_scorer, scoring
    from sacrebleu.metrics.bleu import BLEU

    from cora_cli import embedded
    from cora_cli.evaluation.metrics.bertscore import EMBEDDED_LAYER
    from cora_cli.evaluation.metrics.meteor import wordnet_reader

    found: dict[str, Any] = {}
    pairs = list(zip(predictions, references, strict=True))
    with clock.part("rouge"):
        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        aggregator = scoring.BootstrapAggregator(n_samples=BOOTSTRAP)
        rouge = [scorer.score(reference, prediction) for prediction, reference in pairs]
        for name in ("rouge1", "rouge2", "rougeL"):
            found[name] = [scores[name].fmeasure for scores in rouge]
    with clock.part("meteor"):
        wordnet, tokenizer = wordnet_reader(embedded.wordnet_directory()), NLTKWordTokenizer()
        found["meteor"] = [
            single_meteor_score(tokenizer.tokenize(reference), tokenizer.tokenize(prediction), wordnet=wordnet)
            for prediction, reference in pairs
        ]
    with clock.part("bertscore"):
        encoder = BERTScorer(model_type=str(embedded.encoder_directory()), num_layers=EMBEDDED_LAYER, device="cpu")
        found["bertscore_f1"] = encoder.score(predictions, references)[2].tolist()
    with clock.part("bleu"):  # includes the intervals: sacrebleu computes both in one call
        found["sacrebleu"] = BLEU().corpus_score(predictions, [references], n_bootstrap=BOOTSTRAP).score
    with clock.part("bootstrap"):
        for scores in rouge:
            aggregator.add_scores(scores)
        aggregator.aggregate()
        for name in ("meteor", "bertscore_f1"):
            scipy.stats.bootstrap((np.array(found[name]),), np.mean, n_resamples=BOOTSTRAP, method="percentile", rng=0)
    return found


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the time of its calls counted under `name`."""

        def counted(*arguments: Any) -> Any:
            with self.part(name):
                return function(*arguments)

        return counted

    def timed_stream(self, name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """`function`, a generator, with the time from its first to its last item counted under `name`."""

        def counted(*arguments: Any) -> Iterator[Any]:
            with self.part(name):
                yield from function(*arguments)

        return counted


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Score all pairs once with one side."""
    for name in (
        "bert_score",
        "nltk",
        "rouge_score.rouge_scorer",
        "sacrebleu",
        "scipy.stats",
        "cora_cli.evaluation.metrics.bertscore",
    ):
        importlib.import_module(name)  # before the clock starts, on both sides

    predictions, references = make_pairs(options.pairs)
    clock = Clock()
    began = time.perf_counter()
    values = (ours if side == OURS else libraries)(predictions, references, clock)
    seconds = time.perf_counter() - began
    (Path(os.environ[VALUES]) / f"{side}.json").write_text(json.dumps(values))
    return {"rate": options.pairs / seconds, "peak_bytes": peak_bytes(), "seconds": seconds, "parts": clock.seconds}


def agreement(options: argparse.Namespace) -> list[Agreement]:
    """Compare the values of the last round: one per example, and for SacreBLEU the corpus value.

    `bert_score` gives padding a similarity of 0, which is larger than a negative similarity. Its value for such an example depends on the other
    examples in the batch. Examples that differ are therefore counted, and compared with `bert_score` on that pair alone.
    """
    mine, theirs = (json.loads((Path(os.environ[VALUES]) / f"{side}.json").read_text()) for side in (OURS, PEER))
    checks = [Agreement("sacrebleu", abs(mine.pop("sacrebleu") - theirs.pop("sacrebleu")), 1e-9)]
    for name, expected in theirs.items():
        allowed, what = 1e-9, name
        if name == "bertscore_f1":
            allowed = 1e-5
            moved = [i for i, (a, b) in enumerate(zip(mine[name], expected, strict=True)) if abs(a - b) > allowed]
            what += (
                f" ({len(moved)} of {len(expected)} compared with bert-score on the pair alone, since its padding changed them)"
                if moved
                else ""
            )
            _score_alone(moved, expected, options.pairs)
        checks.append(Agreement(what, max(abs(a - b) for a, b in zip(mine[name], expected, strict=True)), allowed))
    return checks


def _score_alone(examples: list[int], values: list[float], count: int) -> None:
    """Replace the BERTScore of some examples with the value that `bert_score` gives without padding."""
    from bert_score import BERTScorer

    from cora_cli import embedded
    from cora_cli.evaluation.metrics.bertscore import EMBEDDED_LAYER

    predictions, references = make_pairs(count)
    encoder = BERTScorer(model_type=str(embedded.encoder_directory()), num_layers=EMBEDDED_LAYER, device="cpu")
    for i in examples:
        values[i] = encoder.score([predictions[i]], [references[i]])[2].item()


def notes(rounds: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """What was scored, and where the time of each side goes."""
    predictions, references = make_pairs(options.pairs)
    texts = predictions + references
    lines = [
        f"{options.pairs} pairs, {sum(len(text.split()) for text in texts) / len(texts):.0f} words per text, "
        f"{len(set(texts)) / len(texts):.0%} of the texts are distinct; the time includes loading WordNet and the encoder, but not imports."
    ]
    for side, results in rounds.items():
        parts = {part: statistics.median(result["parts"][part] for result in results) for part in PARTS}
        shown = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
        total = statistics.median(result["seconds"] for result in results)
        lines.append(f"{STAGE.sides[side]}: {total:.1f} s; {shown}.")
    needed, rate = encoder_operations(texts)
    peer = statistics.median(result["seconds"] for result in rounds[PEER])
    lines.append(
        f"Arithmetic floor of BERTScore: {needed / 1e12:.1f} TFLOP in float32 for the distinct texts without padding, {needed / rate:.1f} s at "
        f"this machine's {rate / 1e9:.0f} GFLOP/s. If everything else took no time, ours could be {peer * rate / needed:.1f} times as fast."
    )
    return lines


def encoder_operations(texts: Texts) -> tuple[float, float]:
    """The operations of the encoder's matrix products on every distinct text once, without padding, and the machine's rate for them."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from cora_cli import embedded

    path = embedded.encoder_directory()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    weights = sum(parameter.numel() for parameter in model.encoder.parameters() if parameter.ndim == 2)
    tokens = sum(len(ids) for ids in tokenizer(sorted(set(texts)), truncation=True)["input_ids"])
    return 2.0 * weights * tokens, matmul_rate(torch.float32, 512, 384, 1536)


def main() -> None:
    """Measure both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5000, help="how many predictions are scored")
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault(VALUES, directory)
        run(STAGE, measure, agreement, parser, notes)


if __name__ == "__main__":
    main()
