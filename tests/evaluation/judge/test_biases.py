"""Planted biases of a judge are recovered within the intervals of `judge.json`, and a judge without judgment is disqualified."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from cora_cli import writing
from cora_cli.evaluation.judge.answers import REFERENCE, SHUFFLED, load_answers, shuffled
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.judge import judge
from cora_cli.evaluation.judge.measures import corrected_share, measure_rubric
from cora_cli.evaluation.judge.questions import all_questions
from cora_cli.evaluation.judge.rubrics import load_rubric
from cora_cli.reading import read_jsonl
from cora_cli.render.text import terminal
from cora_cli.reporting.judge_section import judge_section
from tests.evaluation.judge.server import Biases, judge_of, serving, write_answers


def judged(tmp_path, biases, rubric, count=40, good=0.7, **settings):
    with serving(biases=biases) as server:
        path = write_answers(tmp_path / "answers", count, good)
        record, out = judge(judge_of(server, path, tmp_path / "out", rubric=(rubric,), **settings))
    return record["rubrics"][rubric], read_jsonl(out.judgments), record


def holds(found, truth):
    if found["ci95"] is None:  # all records agree
        return abs(found["value"] - truth) < 1e-9
    return found["ci95"][0] - 1e-9 <= truth <= found["ci95"][1] + 1e-9


def test_a_judge_that_gives_one_score_to_everything_shows_no_slope(tmp_path) -> None:
    found, _, _ = judged(tmp_path, Biases(good=20, bad=20), "paper")
    assert {criterion["length_slope"] and criterion["length_slope"]["value"] for criterion in found["criteria"].values()} == {
        None
    }


@pytest.mark.parametrize("slope", [pytest.param(0.0, marks=pytest.mark.slow), 4.0, pytest.param(-6.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_the_length_slope_and_the_noise_are_recovered(tmp_path, slope, noise) -> None:
    found, _, _ = judged(tmp_path, Biases(slope=slope, noise=noise, good=65, bad=35), "paper")
    for criterion in found["criteria"].values():
        assert holds(criterion["length_slope"], slope)
        assert holds(criterion["retest"]["noise"], noise)
        assert not slope or noise > 2 or not holds(criterion["length_slope"], 0.0)
        assert holds(criterion["gold_minus_shuffled"], 30)
    assert found["disqualified"] == []


@pytest.mark.slow
def test_the_intervals_cover_what_is_planted_in_about_95_of_100_judgings(tmp_path) -> None:
    """The server's judge without the server, many times: noise of scores, slope, difference of the anchors, and both biases of pairs."""
    path = write_answers(tmp_path / "answers", 30)
    answers = load_answers(JudgeConfig(from_predictions=str(path), endpoint="http://x/v1", judge="j"))
    rubrics = [load_rubric("paper"), load_rubric("preference")]
    questions = {rubric.name: all_questions([rubric], answers, True, 0, {}) for rubric in rubrics}
    covered: dict[str, list[bool]] = {}
    for seed in range(100):
        draw = random.Random(seed)

        def score(question):
            level = 65 if question.names != (SHUFFLED,) else 35
            return level + 4 * len(question.answers[0]) / 100 + draw.gauss(0, 5)  # noqa: B023

        def choice(question):
            if draw.random() < 0.2:  # noqa: B023
                return "first"
            if draw.random() < 0.3 and len(question.answers[0]) != len(question.answers[1]):  # noqa: B023
                return "first" if len(question.answers[0]) > len(question.answers[1]) else "second"
            bad = [name == SHUFFLED for name in question.names]
            return "tie" if bad[0] == bad[1] else "second" if bad[0] else "first"

        scores = [(one, dict.fromkeys(("fluency", "relevance", "accuracy"), score(one))) for one in questions["paper"]]
        found = measure_rubric(rubrics[0], answers, scores)["criteria"]["accuracy"]
        pairs = measure_rubric(rubrics[1], answers, [(one, {"better": choice(one)}) for one in questions["preference"]])[
            "pairs"
        ]
        for name, estimate, truth in (
            ("slope", found["length_slope"], 4),
            ("noise", found["retest"]["noise"], 5),
            ("anchors", found["gold_minus_shuffled"], 30),
            ("order", pairs["order_bias"], 0.2),
            ("length", pairs["length_bias"], 0.8 * 0.3),
        ):
            covered.setdefault(name, []).append(holds(estimate, truth))
    shares = {name: float(np.mean(held)) for name, held in covered.items()}
    assert all(0.89 <= share <= 1 for share in shares.values()), shares


@pytest.mark.parametrize(
    ("first", "longer"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3))), (0.25, 0.4)],
)
def test_order_bias_and_length_bias_of_pairs_are_recovered(tmp_path, first, longer) -> None:
    found, _, _ = judged(tmp_path, Biases(first=first, longer=longer), "preference", count=60)
    pairs = found["pairs"]
    assert holds(pairs["order_bias"], first)
    assert holds(pairs["length_bias"], (1 - first) * longer)
    assert first == 0 or not holds(pairs["order_bias"], 0.0)
    assert longer == 0 or not holds(pairs["length_bias"], 0.0)


def test_errors_of_the_judge_are_corrected(tmp_path) -> None:
    """A judge that errs on every fourth answer sees too few good ones; the corrected interval holds the true share."""
    found, _, _ = judged(tmp_path, Biases(misjudged=0.25), "paper", count=120, good=0.9)
    lines = read_jsonl(tmp_path / "answers" / "predictions.jsonl")
    true = sum(line["prediction"].split(":")[0] == line["reference"].split(":")[0] for line in lines) / len(lines)
    share = found["criteria"]["accuracy"]["accepted"]["answers"]
    assert not holds(share["observed"], true)
    assert holds(share["corrected"], true)
    assert found["criteria"]["fluency"]["accepted"] is None


def test_the_corrected_interval_covers_the_true_share() -> None:
    """Simulated as in arXiv 2511.21140, with few anchors."""
    draw = np.random.default_rng(0)
    for true, sensitivity, specificity, n, anchors in [
        (0.3, 0.9, 0.7, 200, 50),
        (0.8, 0.95, 0.9, 40, 40),
        (0.5, 0.7, 0.7, 100, 100),
    ]:
        seen = true * sensitivity + (1 - true) * (1 - specificity)
        covered = []
        for _ in range(1000):
            counts = draw.binomial(n, seen), draw.binomial(anchors, sensitivity), draw.binomial(anchors, specificity)
            found = corrected_share(counts[0] / n, n, counts[1] / anchors, anchors, counts[2] / anchors, anchors)
            covered.append(found is not None and holds(found, true))
        assert 0.93 <= np.mean(covered) <= 0.99


def test_a_judge_no_better_than_chance_cannot_be_corrected() -> None:
    assert corrected_share(0.5, 10, 0.4, 10, 0.6, 10) is None
    perfect = corrected_share(0.5, 100, 1.0, 100, 1.0, 100)
    assert perfect["value"] == 0.5
    assert holds(perfect, 0.42)
    assert holds(perfect, 0.58)


@pytest.mark.parametrize(
    "biases",
    [Biases(good=50, bad=50, noise=10), Biases(good=50, bad=50), Biases(good=20, bad=60)],
    ids=["noise", "constant", "inverted"],
)
def test_a_judge_that_cannot_tell_the_anchors_apart_is_disqualified_in_words(tmp_path, biases) -> None:
    found, _, record = judged(tmp_path, biases, "paper", count=12)
    assert found["disqualified"] == ["relevance", "accuracy"]
    text = terminal(judge_section(record))
    assert "Rubric paper: the judge planted is disqualified. It is not shown to tell reference answers" in text
    if biases.noise == 0 and biases.good == biases.bad:
        retest = found["criteria"]["accuracy"]["retest"]
        assert (retest["kappa"], retest["agreement"]["value"], retest["noise"]["value"]) == (None, 1.0, 0.0)


def test_a_judge_that_always_takes_the_first_answer_is_disqualified(tmp_path) -> None:
    found, _, _ = judged(tmp_path, Biases(first=1.0), "preference", count=12)
    assert found["disqualified"] == ["preference"]
    assert found["pairs"]["order_bias"]["value"] == found["pairs"]["order_flips"]["value"] == 1.0
    assert found["pairs"]["retest"]["kappa"] is None


def test_five_records_show_nothing(tmp_path) -> None:
    assert judged(tmp_path / "5", Biases(), "paper", count=5)[0]["disqualified"] == ["relevance", "accuracy"]
    assert judged(tmp_path / "6", Biases(), "paper", count=6)[0]["disqualified"] == []


def test_kappa_is_that_of_the_definition(tmp_path) -> None:
    """Quadratic weights for scores and none for choices, from the tables of both judgments (Cohen 1960, 1968)."""

    def kappa(pairs, weight):
        values = sorted({value for pair in pairs for value in pair})
        index = {value: place for place, value in enumerate(values)}
        table = np.zeros((len(values), len(values)))
        for one, other in pairs:
            table[index[one], index[other]] += 1 / len(pairs)
        cost = np.array([[weight(a, b) for b in values] for a in values])
        return 1 - (cost * table).sum() / (cost * np.outer(table.sum(1), table.sum(0))).sum()

    for rubric, key, biases, weight in (
        ("paper", "accuracy", Biases(noise=12), lambda a, b: (a - b) ** 2),
        ("preference", "better", Biases(first=0.5), lambda a, b: float(a != b)),
    ):
        found, lines, _ = judged(tmp_path / rubric, biases, rubric, count=12)
        said = {(tuple(line["names"]), line["record"], line["repeat"]): line["judgment"][key] for line in lines}
        pairs = [(value, said[names, record, 1]) for (names, record, repeat), value in said.items() if repeat == 0]
        retest = found["pairs"]["retest"] if rubric == "preference" else found["criteria"][key]["retest"]
        assert math.isclose(retest["kappa"]["value"], kappa(pairs, weight), abs_tol=1e-9)
        assert math.isclose(retest["agreement"]["value"], sum(a == b for a, b in pairs) / len(pairs), abs_tol=1e-12)


def test_means_are_over_both_judgments_of_each_record(tmp_path) -> None:
    found, lines, _ = judged(tmp_path, Biases(noise=5), "paper", count=8)
    for name in ("answers", REFERENCE, SHUFFLED):
        own = [line["judgment"]["fluency"] for line in lines if line["names"] == [name]]
        assert len(own) == 16
        assert math.isclose(found["criteria"]["fluency"]["scores"][name]["value"], np.mean(own))


@pytest.mark.parametrize("references", [list("abcdefgh"), list("aabbccdd"), list("aaab"), list("aaaa"), ["a", "b"]])
def test_shuffled_references_are_other_references(references) -> None:
    for seed in range(20):
        found = shuffled(references, seed)
        assert all(place is None or references[place] != references[index] for index, place in enumerate(found))
        largest = max(map(references.count, references))
        assert sum(place is None for place in found) == max(2 * largest - len(references), 0)


def test_no_interval_leaves_the_range_of_its_quantity(tmp_path) -> None:
    """With two records and a judge that throws a coin, the t-distribution alone would give shares above 1."""
    calls = itertools.count()

    def say(message):
        n = next(calls)
        scores = dict.fromkeys(("fluency", "relevance", "accuracy"), 100 * (n % 3 == 0))
        return json.dumps({"better": ("first", "second")[n % 2]} if '"better"' in message else scores)

    with serving(say=say) as server:
        record, _ = judge(judge_of(server, write_answers(tmp_path / "answers", 2), tmp_path / "out", concurrency=1))
    ranges = {"scores": (0, 100), "gold_minus_shuffled": (-100, 100), "kappa": (-1, 1), "agreement": (0, 1), "observed": (0, 1)}
    ranges |= dict.fromkeys(("order_bias", "gold_over_shuffled", "length_bias", "length_correlation"), (-1, 1))
    ranges |= {"order_flips": (0, 1)}
    checked = set()

    def check(value: object, allowed: tuple[float, float] | None) -> None:
        if isinstance(value, dict):
            if allowed and value.get("ci95"):
                low, high = value["ci95"]
                assert allowed[0] <= low <= value["value"] <= high <= allowed[1]
                checked.add(allowed)
            for key, part in value.items():
                check(part, ranges.get(key, allowed))

    check(record["rubrics"]["preference"]["pairs"], None)
    for entry in record["rubrics"]["paper"]["criteria"].values():
        check({key: entry[key] for key in ("scores", "gold_minus_shuffled", "retest")}, None)
    assert checked == {(0, 100), (-100, 100), (0, 1), (-1, 1)}


def test_references_that_cannot_be_shuffled_are_not_called_missing_judgments(tmp_path) -> None:
    lines = [{"prompt": f"Is {n} good?", "reference": "yes" if n < 7 else "no", "prediction": "yes"} for n in range(10)]
    path = tmp_path / "answers" / "predictions.jsonl"
    writing.write_jsonl(path, lines)
    with serving() as server:
        record, _ = judge(judge_of(server, path, tmp_path / "out", rubric=("paper", "preference")))
    assert record["rubrics"]["paper"]["criteria"]["accuracy"]["scores"][SHUFFLED]["n"] == 6
    text = terminal(judge_section(record))
    assert "n = 6 to 10 of 10 records; the last two rows are the anchors" in text
    assert "6 of 10 records have a shuffled reference: more than half of all references are one text" in text
    assert "missing" not in text


def test_failures_count_as_missing_and_never_as_scores(tmp_path) -> None:
    """A judge that never answers on one topic leaves that record out of every number."""

    def say(message):
        return "no" if "topic 3." in message else json.dumps({"fluency": 50, "relevance": 50, "accuracy": 50})

    with serving(say=say) as server:
        path = write_answers(tmp_path / "answers", 8)
        record, out = judge(judge_of(server, path, tmp_path / "out", rubric=("paper",)))
    found = record["rubrics"]["paper"]
    assert found["failed"] == {"answers": 2, REFERENCE: 2, SHUFFLED: 2}
    assert {(entry["n"], entry["value"]) for entry in found["criteria"]["fluency"]["scores"].values()} == {(7, 50.0)}
    text = terminal(judge_section(record))
    assert "6 of 48 judgments were not obtained" in text
    assert "n = 7 of 8 records, since judgments are missing" in text
    failed = [line for line in read_jsonl(out.judgments) if line["outcome"] == "failed"]
    assert len(failed) == 6
    assert {line["judgment"] for line in failed} == {None}
