"""What `cora judge` reads and writes, what it refuses, and how its results come into a report."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cora_cli import hashing, writing
from cora_cli.cli import app
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge import rubrics
from cora_cli.evaluation.judge.judge import judge
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import Judging
from cora_cli.render.latex import latex
from cora_cli.reporting.judge_section import judge_section
from tests.evaluation.helpers import unsealed
from tests.evaluation.judge.server import Biases, judge_of, serving, write_answers
from tests.reporting.helpers import Made, make_grid, write_run


def cora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def answers(tmp_path) -> Path:
    return write_answers(tmp_path / "CoRA_yahma_TB_5", 8)


@pytest.fixture
def server():
    with serving() as running:
        yield running


def at(server, *more):
    return ("--endpoint", server.url, "--judge", "planted", "--backoff", "0.001", *more)


def test_the_command_prints_tables_with_the_papers_columns_beside_them(server, answers) -> None:
    result = cora("judge", "--from", answers, *at(server))
    assert result.exit_code == 0, result.output
    assert "60.0 – (90.39)" in result.stdout
    assert "the judge planted tells reference answers from references of other prompts" in result.stdout
    out = answers.parent / "judge"
    record = read_json(out / "judge.json")
    assert record["judgments_sha256"] == hashing.sha256_file(out / "judgments.jsonl")
    assert record["served_models"] == ["planted-1"]
    assert record["systems"][0]["predictions_sha256"] == hashing.sha256_file(answers)


def test_asked_again_it_sends_nothing_and_gives_the_same(server, answers) -> None:
    first = cora("judge", "--from", answers, *at(server))
    sent = len(server.requests)
    assert cora("judge", "--from", answers, *at(server)).stdout == first.stdout
    assert cora("judge", "--from", answers, *at(server, "--dry-run")).stdout.startswith(
        f"requests: 0 ({sent} more are answered"
    )
    assert len(server.requests) == sent


def test_the_price_says_how_often_malformed_replies_are_asked_again(server, answers) -> None:
    page = cora("judge", "--from", answers, *at(server, "--dry-run")).stdout
    assert "malformed replies are asked again: with --tries 3, up to 3 times as much in all" in page
    assert "asked again" not in cora("judge", "--from", answers, *at(server, "--dry-run", "--tries", "1")).stdout


def test_more_records_and_more_models_reuse_what_is_judged(server, answers, tmp_path) -> None:
    other = write_answers(tmp_path / "other", 8, seed=5)
    cora("judge", "--from", answers, "-o", tmp_path / "out", *at(server))
    sent = len(server.requests)
    result = cora("judge", answers.parent, other.parent, "-o", tmp_path / "out", *at(server))
    assert result.exit_code == 0, result.output
    # Two requests for each record's score and four for its pair with the reference.
    assert len(server.requests) == sent + 8 * 6
    assert list(read_json(tmp_path / "out" / "judge.json")["rubrics"]["preference"]["pairs"]["wins"]) == [
        "CoRA_yahma_TB_5 / reference",
        "other / reference",
    ]


def test_the_base_model_is_judged_and_compared(server, answers, tmp_path) -> None:
    base = write_answers(tmp_path / "b", 8, good=0.0)
    result = cora("judge", "--from", answers, "--base", base.parent, *at(server))
    assert result.exit_code == 0, result.output
    found = read_json(answers.parent / "judge" / "judge.json")
    assert [system["name"] for system in found["systems"]] == ["base", "CoRA_yahma_TB_5"]
    assert found["rubrics"]["paper"]["criteria"]["accuracy"]["scores"]["base"]["value"] == 20
    wins = found["rubrics"]["preference"]["pairs"]["wins"]
    assert {name: share["observed"]["value"] for name, share in wins.items()} == {"CoRA_yahma_TB_5 / base": 1.0}


def test_with_base_finds_the_answers_next_to_those_of_the_run(server, answers, tmp_path) -> None:
    run = tmp_path / "run"
    write_answers(run / "eval", 8)
    (run / "run.json").write_text("{}")
    missing = cora("judge", run, "--with-base", *at(server))
    assert missing.exit_code == 1
    assert "run `cora evaluate" in missing.output
    write_answers(run / "eval-base", 8, good=0.0)
    result = cora("judge", run, "--with-base", *at(server))
    assert result.exit_code == 0, result.output
    assert [system["name"] for system in read_json(run / "judge" / "judge.json")["systems"]] == ["base", "run"]


def recorded(predictions: Path, **settings) -> None:
    """The `generation.json` of answers that were generated with these settings."""
    sha256 = hashing.sha256_file(predictions)
    generation = {"name": "x", "settings": settings, "template": "plain", "prompts_cut": 0, "predictions_sha256": sha256}
    writing.write_json(predictions.parent / "generation.json", generation)


def test_with_base_refuses_runs_of_another_base_model(server, tmp_path) -> None:
    for name, model in (("one", "a"), ("other", "b")):
        recorded(write_answers(tmp_path / name / "eval", 8, seed=ord(model)), model_sha256=model, adapter_sha256=name)
        (tmp_path / name / "run.json").write_text("{}")
    recorded(write_answers(tmp_path / "one" / "eval-base", 8, good=0.0), model_sha256="a", adapter_sha256=None)
    places, out = [tmp_path / name for name in ("one", "other")], ("--with-base", "-o", tmp_path / "out")
    refused = cora("judge", *places, *out, *at(server))
    assert refused.exit_code == 1
    assert f"{places[1]} has another base model than the one whose answers are in {places[0] / 'eval-base'}" in refused.output
    assert cora("judge", places[0], *out, *at(server)).exit_code == 0


def test_with_base_judges_the_evaluation_of_a_complete_model_that_does_not_know_its_base(server, tmp_path) -> None:
    recorded(write_answers(tmp_path / "merged", 8), model_sha256="merged", adapter_sha256=None)
    recorded(write_answers(tmp_path / "base", 8, good=0.0), model_sha256="a", adapter_sha256=None)
    result = cora("judge", tmp_path / "merged", "--with-base", *at(server))
    assert result.exit_code == 0, result.output


def test_with_base_compares_the_model_behind_a_full_fine_tuning(server, tmp_path) -> None:
    run, out = tmp_path / "full", ("--with-base", "-o", tmp_path / "out")
    write_run(run, Made("full", "full"), np.random.default_rng(0))
    behind = read_json(run / "run.json")["fingerprint"]["model_sha256"]
    recorded(write_answers(run / "eval", 8), model_sha256="trained", adapter_sha256=None)
    recorded(write_answers(run / "eval-base", 8, good=0.0), model_sha256="other", adapter_sha256=None)
    refused = cora("judge", run, *out, *at(server))
    assert refused.exit_code == 1
    assert f"{run} has another base model than the one whose answers are in {run / 'eval-base'}" in refused.output
    recorded(run / "eval-base" / "predictions.jsonl", model_sha256=behind, adapter_sha256=None)
    assert cora("judge", run, *out, *at(server)).exit_code == 0


def test_unlike_settings_of_answers_and_repeated_prompts_are_said(server, answers, tmp_path) -> None:
    base = write_answers(tmp_path / "b", 8, good=0.0)
    recorded(answers, max_new_tokens=256, dtype="fp32")
    recorded(base, max_new_tokens=16, dtype="fp32")
    said = "settings, from which differences in scores may come: max_new_tokens (16, 256)"
    result = cora("judge", "--from", answers, "--base", base.parent, *at(server))
    assert said in result.stderr
    assert "prompt of an earlier one" not in result.stderr
    recorded(base, max_new_tokens=256, dtype="fp32")
    assert said not in cora("judge", "--from", answers, "--base", base.parent, *at(server)).stderr
    twice = tmp_path / "twice" / "predictions.jsonl"
    twice.parent.mkdir()
    writing.write_jsonl(twice, [{**line, "index": place} for place, line in enumerate(read_jsonl(answers) * 2)])
    assert "8 of 16 have the prompt of an earlier one" in cora("judge", "--from", twice, *at(server)).stderr


def test_another_judge_or_rubric_is_not_mixed_in_without_overwrite(server, answers) -> None:
    cora("judge", "--from", answers, "--rubric", "paper", *at(server))
    out, sent = answers.parent / "judge", len(server.requests)
    other = ("judge", "--from", answers, "--rubric", "readability", *at(server))
    refused = cora(*other)
    assert refused.exit_code == 1
    assert "other rubrics; choose another --output-dir, or replace it with --overwrite" in refused.output
    assert len(server.requests) == sent
    assert cora(*other, "--overwrite").exit_code == 0
    assert set(read_json(out / "judge.json")["rubrics"]) == {"readability"}
    # What was judged before is kept, and costs nothing again.
    sent = len(server.requests)
    assert cora("judge", "--from", answers, "--rubric", "paper", "--overwrite", *at(server)).exit_code == 0
    assert len(server.requests) == sent


@pytest.mark.parametrize("entry", ["judgment", "reply"])
def test_a_judgment_that_was_edited_is_refused(server, answers, entry) -> None:
    cora("judge", "--from", answers, *at(server))
    path = answers.parent / "judge" / "judgments.jsonl"
    lines = read_jsonl(path)
    place = next(number for number, line in enumerate(lines) if line["rubric"] == "paper")
    lines[place][entry] = {**lines[place]["judgment"], "accuracy": 99.0} if entry == "judgment" else None
    writing.write_jsonl(path, lines)
    result = cora("judge", "--from", answers, *at(server))
    assert result.exit_code == 1
    assert "judgments.jsonl was changed since" in result.output
    result = cora("judge", "--from", answers, "--overwrite", *at(server))
    assert result.exit_code == 1
    assert f"line {place + 1}: the judgment is not what its reply says" in result.output


def test_judgments_whose_requests_were_exchanged_are_not_sealed_again(server, answers) -> None:
    """Each line by itself says what it may say."""
    cora("judge", "--from", answers, *at(server))
    path = answers.parent / "judge" / "judgments.jsonl"
    lines, sealed = read_jsonl(path), (path.parent / "judge.json").read_bytes()
    lines[0]["request_sha256"], lines[1]["request_sha256"] = lines[1]["request_sha256"], lines[0]["request_sha256"]
    writing.write_jsonl(path, lines)
    result = cora("judge", "--from", answers, *at(server))
    assert result.exit_code == 1
    assert "judgments.jsonl was changed since" in result.output
    assert (path.parent / "judge.json").read_bytes() == sealed


def test_a_request_that_two_lines_judge_is_refused(server, answers) -> None:
    cora("judge", "--from", answers, *at(server))
    path = answers.parent / "judge" / "judgments.jsonl"
    lines = read_jsonl(path)
    judged = next(number for number, line in enumerate(lines, start=1) if line["outcome"] == "judged")
    writing.write_jsonl(path, [*lines, lines[judged - 1]])
    result = cora("judge", "--from", answers, *at(server))
    assert result.exit_code == 1
    assert f"judgments.jsonl: lines {judged} and {len(lines) + 1} both judge one request; remove one of them" in result.output


def test_predictions_that_were_edited_are_refused(server, answers) -> None:
    writing.write_json(answers.parent / "generation.json", {"name": "m", "settings": {}, "predictions_sha256": "0" * 64})
    result = cora("judge", "--from", answers, *at(server))
    assert result.exit_code == 1
    assert "was changed after it was generated" in result.output


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"prediction": "a", "reference": "b"}] * 3, 'line 1: expected text under "prompt"'),
        ([{"prompt": "p", "prediction": "a", "reference": "b"}], "has 1 records; judging needs at least two"),
        ([{"prompt": "p", "prediction": "a", "reference": "b"}] * 3, "no two different references"),
        (
            [{"index": 1, "prompt": "p", "prediction": "a", "reference": "b"}] * 2,
            "lines 1 and 2 both answer the record with index 1",
        ),
    ],
)
def test_predictions_that_cannot_be_judged_are_refused(server, tmp_path, lines, words) -> None:
    writing.write_jsonl(tmp_path / "own.jsonl", lines)
    result = cora("judge", "--from", tmp_path / "own.jsonl", *at(server))
    assert result.exit_code == 1
    assert words in result.output


def test_models_that_answered_other_records_are_refused(server, answers, tmp_path) -> None:
    other = write_answers(tmp_path / "other", 9)
    result = cora("judge", answers.parent, other.parent, "-o", tmp_path / "out", *at(server))
    assert result.exit_code == 1
    assert "do not hold the same records" in result.output


def test_a_directory_with_other_files_is_left_alone(server, answers, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CoraError, match="holds other files"):
        judge(judge_of(server, answers, tmp_path / "full"))


def test_a_report_of_a_judging_has_its_tables_in_every_format(server, answers) -> None:
    printed = cora("judge", "--from", answers, *at(server)).stdout
    out = answers.parent / "judge"
    result = cora("report", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Judged answers\n")
    assert printed in result.stdout
    found = json.loads(cora("report", out, "--format", "json").stdout)
    assert found["experiments"][0]["judged"] == [unsealed(out / "judge.json")]
    rows = list(csv.DictReader(io.StringIO(cora("report", out, "--format", "csv").stdout)))
    own = {row["measure"]: (row["value"], row["paper"], row["kind"]) for row in rows if row["row"] == "CoRA_yahma_TB_5"}
    assert own["paper.relevance"] == ("60.0", "83.9", "judge")
    assert [row["value"] for row in rows if row["measure"] == "preference.wins"] == ["0.5"]
    for format in ("markdown", "latex", "html"):
        assert cora("report", out, "--format", format).exit_code == 0


def test_a_report_of_a_grid_names_the_papers_rows(server, tmp_path) -> None:
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb", printed="CoRA_code_FB_5", n_models=5)], prompts=6)
    (run,) = (grid / "runs").iterdir()
    result = cora("judge", run, *at(server))
    assert result.exit_code == 0, result.output
    text = cora("report", grid).stdout
    assert "20.0 – (87.53)" in text
    assert "the judge planted is disqualified" in text


def test_a_report_of_several_groups_says_whose_answers_were_judged(server, tmp_path) -> None:
    rows = [Made("fb", "fb", group=group, printed=f"CoRA_{group}_FB_5", n_models=5) for group in ("code", "yahma")]
    grid = make_grid(tmp_path / "grid", rows, prompts=6, paper_table="gpt4_judge")
    for run in (grid / "runs").iterdir():
        assert cora("judge", run, *at(server)).exit_code == 0
    text = cora("report", grid).stdout
    for group in ("code", "yahma"):
        assert f"{group}: Rubric paper: the judge planted is disqualified." in text
        assert f"{group} – planted, which answered as planted-1, rubric preference: the judge" in text
    # The columns of the paper's table are the judge's: no other table has its title or its numbers.
    assert "GPT-4 as judge" not in text
    assert "the number published in the paper" not in text
    assert "n = 6 records; the last two rows are the anchors" in text
    rows = list(csv.DictReader(io.StringIO(cora("report", grid, "--format", "csv").stdout)))
    assert [row["group"] for row in rows if (row["row"], row["measure"]) == ("reference", "paper.accuracy")] == [
        "code",
        "yahma",
    ]


def test_a_report_of_several_judgings_by_one_judge_says_which_directory_has_which_numbers(server, answers, tmp_path) -> None:
    other = write_answers(tmp_path / "other", 9)
    places = [tmp_path / "first", tmp_path / "second"]
    for path, out in zip((answers, other), places, strict=True):
        assert cora("judge", "--from", path, "-o", out, *at(server)).exit_code == 0
    text = cora("report", *places).stdout
    rows = list(csv.DictReader(io.StringIO(cora("report", *places, "--format", "csv").stdout)))
    for out in places:
        assert f"{out} – planted, which answered as planted-1, rubric paper: scores" in text
        assert sum(row["method"] == f"planted, {out}" and row["row"] == "reference" for row in rows) == 3


def test_a_judge_without_a_single_judgment_is_disqualified_as_such(server, answers) -> None:
    server.fault = lambda n: "garbage"
    result = cora("judge", "--from", answers, *at(server, "--tries", "1", "--no-retest", "--rubric", "paper"))
    assert result.exit_code == 1, result.output
    assert "the judge planted is disqualified. It gave no judgment at all. It is not shown to tell" in " ".join(
        result.stdout.split()
    )


def test_a_report_leaves_out_judgments_that_do_not_belong_to_the_answers(server, tmp_path) -> None:
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb")], prompts=6)
    (metrics,) = grid.rglob("metrics.json")
    judge(judge_of(server, write_answers(tmp_path / "other", 8), metrics.parent / "judge"))
    text = cora("report", grid).stdout
    assert "is about other answers than" in text
    assert "rubric paper: scores" not in text


def test_a_report_leaves_out_a_judging_elsewhere_whose_answers_were_replaced(server, tmp_path) -> None:
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb")], prompts=6)
    (metrics,) = grid.rglob("metrics.json")
    predictions = metrics.parent / "predictions.jsonl"
    judge(judge_of(server, predictions, tmp_path / "judged"))
    assert "rubric paper: scores" in cora("report", grid, tmp_path / "judged").stdout
    lines = [{**line, "prediction": f"{line['prediction']} again"} for line in read_jsonl(predictions)]
    writing.write_jsonl(predictions, lines)
    writing.write_json(metrics, {**read_json(metrics), "predictions_sha256": hashing.sha256_file(predictions)})
    result = cora("report", grid, tmp_path / "judged")
    assert f"{tmp_path / 'judged'} is left out: it is about other answers than {predictions.resolve()}" in result.stderr
    assert "rubric paper: scores" not in result.stdout


@pytest.mark.parametrize("judged_first", [True, False])
def test_calibration_that_is_added_to_finished_predictions_leaves_the_answers_that_were_judged(
    judged_first, server, tmp_path
) -> None:
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb")], prompts=6)
    (metrics,) = grid.rglob("metrics.json")
    predictions = metrics.parent / "predictions.jsonl"
    tokens = {"nll": [1.0], "brier": [1.0], "confidence": [0.5], "correct": [False]}

    def calibrate() -> None:
        writing.write_jsonl(predictions, [{**line, "reference_tokens": tokens} for line in read_jsonl(predictions)])
        writing.write_json(metrics, {**read_json(metrics), "predictions_sha256": hashing.sha256_file(predictions)})

    if not judged_first:
        calibrate()
    judge(judge_of(server, predictions, metrics.parent / "judge"))
    if judged_first:
        calibrate()
    text = cora("report", grid).stdout
    assert "is about other answers than" not in text
    assert "rubric paper: scores" in text


def test_a_run_that_cannot_start_leaves_the_result_in_place(server, answers, tmp_path) -> None:
    assert cora("judge", "--from", answers, *at(server)).exit_code == 0
    result, other = answers.parent / "judge" / "judge.json", write_answers(tmp_path / "other", 8, seed=3)
    before = result.read_bytes()
    server.fault = lambda n: "401"
    assert cora("judge", answers.parent, other.parent, "-o", result.parent, *at(server)).exit_code == 1
    assert result.read_bytes() == before


def test_a_report_refuses_judgments_that_were_changed(server, answers) -> None:
    cora("judge", "--from", answers, *at(server))
    out = answers.parent / "judge"
    lines = (out / "judgments.jsonl").read_bytes().splitlines(keepends=True)
    (out / "judgments.jsonl").write_bytes(b"".join(lines[:-1]))
    result = cora("report", out)
    assert result.exit_code == 1
    assert "does not begin with the lines that judge.json describes" in result.output


def test_an_endpoint_that_is_gone_takes_no_result_with_it(server, answers) -> None:
    server.fault = lambda n: "garbage" if n % 7 == 0 else None
    assert cora("judge", "--from", answers, *at(server, "--tries", "1")).exit_code == 0
    result = answers.parent / "judge" / "judge.json"
    before = result.read_bytes()
    assert json.loads(before)["rubrics"]["paper"]["failed"]
    server.fault = lambda n: "503"
    assert cora("judge", "--from", answers, *at(server, "--retries", "0")).exit_code == 1
    assert result.read_bytes() == before
    assert cora("report", answers.parent / "judge").exit_code == 0
    server.fault = lambda n: None
    assert cora("judge", "--from", answers, *at(server)).exit_code == 0
    assert not json.loads(result.read_bytes())["rubrics"]["paper"]["failed"]


def test_a_damaged_result_is_refused_in_one_sentence(server, answers) -> None:
    """Whatever one of its values is replaced by."""
    _, out = judge(judge_of(server, answers, answers.parent / "judge", retest=False))
    complete = out.result.read_text()

    def places(value, path=()):
        yield path
        for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from places(part, (*path, key))

    messages = []
    for number, path in enumerate(places(json.loads(complete))):
        holder = {"root": json.loads(complete)}
        *way, last = ("root", *path)
        place = holder
        for key in way:
            place = place[key]
        place[last] = (None, "\x1b[2J", -1.5, [], {})[number % 5]
        out.result.write_text(json.dumps(holder["root"]))
        try:
            latex(judge_section(read_json(out.result, Judging)))
        except CoraError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all("judge.json is damaged or from another version" in message for message in messages)


def test_two_judges_of_one_model_are_told_apart(answers, tmp_path) -> None:
    """A report of both has the verdict of each."""
    for name, biases in (("fair", Biases()), ("blind", Biases(good=50, bad=50))):
        with serving(biases=biases) as server:
            judge(judge_of(server, answers, tmp_path / name, judge=name, rubric=("paper",)))
    text = cora("report", tmp_path / "fair", tmp_path / "blind").stdout
    assert "the judge fair tells" in text
    assert "the judge blind is disqualified" in text


def test_judgings_by_one_name_that_were_not_made_alike_are_said_to_be_unlike(answers, tmp_path) -> None:
    rubric = tmp_path / "mine.yaml"
    values = yaml.safe_load((Path(rubrics.__file__).parent / "rubrics" / "paper.yaml").read_text())
    places = []
    with serving(biases=Biases()) as server:
        for name, mark, parameters in (("a", 60, None), ("b", 60, None), ("c", 50, '{"temperature": 1}')):
            rubric.write_text(yaml.safe_dump({**values, "pass_mark": mark}))
            judge(judge_of(server, answers, tmp_path / name, rubric=(str(rubric),), parameters=parameters))
            places.append(tmp_path / name)
    assert "differ in" not in cora("report", *places[:2]).stdout
    said = " ".join(cora("report", *places).stdout.split())
    assert "differ in parameters, the text of rubric mine, from which differences in scores may come" in said
