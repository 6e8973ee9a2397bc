import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cora_cli import writing
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation import backend
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.decode import PooledDecoder
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.targets import find_targets
from cora_cli.models.references import resolve_model
from cora_cli.publishing.verify import verify
from cora_cli.reading import read_json, read_jsonl
from cora_cli.reporting.report import report
from cora_cli.rundir import EvaluationDirectory

from .helpers import FAST, SCORING, answers, evaluate_model, evaluate_run, make_run, unsealed

KILLED = """
import sys, time
from cora_cli.cli import main
from cora_cli.evaluation.decode import PooledDecoder
real, waves = PooledDecoder.answer, 0
def answer(*arguments):
    global waves
    waves += 1
    if waves == 2:
        time.sleep(3600)
    return real(*arguments)
PooledDecoder.answer = answer
main()
"""


@pytest.mark.slow
def test_an_evaluation_killed_by_the_system_continues_to_the_same_bytes(
    tiny_model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = EvaluationDirectory(tmp_path / "out")
    arguments = ["--model", tiny_model, "--dataset", records, "-o", out.root, "--batch-size", 1, "--max-new-tokens", 6]
    more = ["--dtype", "fp32", "--device", "cpu", "--metrics", "rouge1,sacrebleu", "--bootstrap", 100]
    command = [sys.executable, "-c", KILLED, "evaluate", *map(str, [*arguments, *more])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        # It writes the first wave of four prompts and then waits to be killed.
        while process.poll() is None and (
            not out.partial_predictions.exists() or out.partial_predictions.read_bytes().count(b"\n") < 4
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not out.predictions.exists()
    assert not out.metrics.exists()

    waves: list[int] = []
    real = PooledDecoder.answer

    def counted(self: PooledDecoder, wave: Any, finished: Any) -> Any:
        waves.append(len(wave))
        return real(self, wave, finished)

    monkeypatch.setattr(PooledDecoder, "answer", counted)
    continued = evaluate_model(tiny_model, records, out.root, batch_size=1)
    assert waves == [3]
    whole = evaluate_model(tiny_model, records, tmp_path / "whole", batch_size=1)
    assert out.predictions.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert continued.record["metrics"] == whole.record["metrics"]
    assert continued.record["predictions_sha256"] == whole.record["predictions_sha256"]


def test_other_settings_are_refused_by_name_and_replaced_on_request(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    evaluate_model(tiny_model, records, tmp_path / "out")
    before = answers(tmp_path / "out")
    with pytest.raises(CoraError, match=r"other settings \(batch_size, max_new_tokens\).*--overwrite"):
        evaluate_model(tiny_model, records, tmp_path / "out", batch_size=3, max_new_tokens=4)
    with pytest.raises(CoraError, match=r"other settings \(records_sha256\)"):
        evaluate_model(tiny_model, records, tmp_path / "out", limit=3)
    assert answers(tmp_path / "out") == before
    replaced = evaluate_model(tiny_model, records, tmp_path / "out", limit=3, max_new_tokens=4, overwrite=True)
    assert replaced.record["metrics"]["rouge1"]["n"] == 3
    new = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [line["new_tokens"] for line in new] == [4, 4, 4]


def test_an_unfinished_evaluation_with_other_settings_is_not_continued(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    out = EvaluationDirectory(tmp_path / "out")
    evaluate_model(tiny_model, records, out.root)
    lines = read_jsonl(out.predictions)
    settings = read_json(out.generation)["settings"]
    for recorded in ({"name": "x", "settings": {**settings, "max_new_tokens": 1}}, None):
        out.predictions.unlink()
        writing.write_jsonl(out.partial_predictions, [{**line, "prediction": "of another time"} for line in lines])
        out.generation.unlink()
        if recorded:
            writing.write_json(out.generation, recorded)
        with pytest.raises(CoraError, match="other settings" if recorded else "other files"):
            evaluate_model(tiny_model, records, out.root)
        evaluate_model(tiny_model, records, out.root, overwrite=True)
        assert read_jsonl(out.predictions) == lines


def test_a_finished_evaluation_is_scored_again_without_its_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_run(run)
    monkeypatch.setattr(backend, "load_model", lambda *_: pytest.fail("a model was loaded"))
    again = evaluate_run(run)
    assert again.record == first.record
    more = evaluate_run(run, metrics=("rouge1", "rougeL", "sacrebleu"), bootstrap=200)
    assert list(more.record["metrics"]) == ["rouge1", "rougeL", "sacrebleu"]


def test_repeated_prompts_are_said_whenever_intervals_are_computed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice, said = tmp_path / "twice.jsonl", "1 of 3 have the prompt of an earlier one"
    writing.write_jsonl(twice, [{"instruction": f"Count to {n}.", "output": "1"} for n in (1, 2, 2)])
    for _ in range(2):
        evaluate_model(tiny_model, twice, tmp_path / "out")
        assert capsys.readouterr().err.count(said) == 1
    predictions = tmp_path / "out" / "predictions.jsonl"
    talks = tmp_path / "of another program.jsonl"
    writing.write_jsonl(
        talks, [{**line, "prompt": [{"role": "user", "content": line["prompt"]}]} for line in read_jsonl(predictions)]
    )
    for answers_of_one, place in ((predictions, "again"), (talks, "talks")):
        evaluate(EvaluateConfig(from_predictions=str(answers_of_one), output_dir=str(tmp_path / place), **SCORING))
        assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("damage", ["edited", "removed"])
def test_predictions_that_were_changed_afterwards_are_generated_again(
    tiny_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = evaluate_model(tiny_model, records, tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    if damage == "edited":
        lines = read_jsonl(path)
        writing.write_jsonl(path, [{**line, "prediction": line["reference"]} for line in lines])
    else:
        path.unlink()
    again = evaluate_model(tiny_model, records, tmp_path / "out")
    assert path.read_bytes() == whole
    assert again.record["metrics"] == first.record["metrics"]
    assert "was changed or removed after it was written" in capsys.readouterr().err


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("stage", ["generation", "scoring"])
def test_an_evaluation_stays_whole_until_its_replacement_is_complete(
    stage: str, tiny_model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    evaluate_model(tiny_model, records, out)
    before = contents(out)
    waves = 0
    real = PooledDecoder.answer

    def interrupted(self: PooledDecoder, wave: Any, finished: Any) -> Any:
        nonlocal waves
        waves += 1
        if waves == 2:
            raise KeyboardInterrupt
        return real(self, wave, finished)

    def unscored(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if stage == "generation":
        monkeypatch.setattr(PooledDecoder, "answer", interrupted)
    else:
        monkeypatch.setattr("cora_cli.evaluation.scoring.score_all", unscored)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(tiny_model, records, out, max_new_tokens=4, batch_size=1, overwrite=True)
    assert contents(out) == before
    monkeypatch.undo()

    evaluate_model(tiny_model, records, out, max_new_tokens=4, batch_size=1, overwrite=True)
    evaluate_model(tiny_model, records, tmp_path / "whole", max_new_tokens=4, batch_size=1)
    for name in ("predictions.jsonl", "scores.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(before)
    assert read_json(out / "metrics.json")["generation"] == unsealed(out / "generation.json")


def test_an_old_evaluation_that_names_its_model_by_a_relative_path_is_reused(
    tiny_model: Path, records: Path, tmp_path: Path
) -> None:
    evaluate_model(tiny_model, records, tmp_path / "out")
    out = EvaluationDirectory(tmp_path / "out")
    recorded = unsealed(out.generation)
    assert recorded["settings"]["model"] == str(tiny_model)
    writing.write_json(out.generation, {**recorded, "settings": {**recorded["settings"], "model": "models/tiny"}})
    before = out.predictions.stat().st_mtime_ns
    evaluate_model(tiny_model, records, tmp_path / "out")
    assert out.predictions.stat().st_mtime_ns == before


def test_runs_are_written_below_the_output_directory_by_their_real_names(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "runs" / "lora" / "inner").mkdir(parents=True)
    shutil.copytree(trained["lora"], tmp_path / "runs" / "lora", dirs_exist_ok=True)
    names = (str(tmp_path / "runs" / "lora" / "inner" / ".."), str(trained["fb"]))
    evaluate(EvaluateConfig(runs=names, output_dir=str(tmp_path / "out"), **FAST))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fb", "lora"]


def prompts(directory: Path) -> list[str]:
    return [line["prompt"] for line in read_jsonl(directory / "predictions.jsonl")]


def test_a_run_and_its_base_answer_prompts_with_the_date_of_the_training(
    dated_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-01")
    run = make_run(dated_model, tiny_data, tmp_path / "run", mode="lora", rank=8)
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-02")
    evaluate(EvaluateConfig(runs=(str(run),), with_base=True, **FAST))
    evaluate_model(run / "adapter", run / "test.jsonl", tmp_path / "adapter")
    for place in (run / "eval", run / "eval-base", tmp_path / "adapter"):
        assert all("Today: 01 Jan 2030\n" in prompt for prompt in prompts(place))
        assert read_json(place / "generation.json")["settings"]["template_date"] == "2030-01-01"


def test_a_model_answers_prompts_with_the_date_on_which_its_evaluation_began(
    dated_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.jsonl"
    writing.write_jsonl(records, [{"instruction": f"say {n}", "output": "it"} for n in range(3)])
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-01")
    evaluate_model(dated_model, records, tmp_path / "out")
    assert "the chat template writes the date into its prompts: 2030-01-01" in capsys.readouterr().err
    first = prompts(tmp_path / "out")
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2030-01-02")
    with monkeypatch.context() as later:
        later.setattr(backend, "load_model", lambda *_: pytest.fail("a model was loaded"))
        evaluate_model(dated_model, records, tmp_path / "out")
    (tmp_path / "out" / "predictions.jsonl").unlink()
    evaluate_model(dated_model, records, tmp_path / "out")
    assert prompts(tmp_path / "out") == first
    evaluate_model(dated_model, records, tmp_path / "same", template_date="2030-01-01")
    evaluate_model(dated_model, records, tmp_path / "later")
    assert prompts(tmp_path / "same") == first != prompts(tmp_path / "later")
    with pytest.raises(CoraError, match=r"other settings \(template_date\)"):
        evaluate_model(dated_model, records, tmp_path / "out", template_date="2030-01-03")


def test_a_date_for_a_template_without_one_is_refused(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match="--template-date has no effect"):
        evaluate_model(tiny_model, records, tmp_path / "out", template_date="2030-01-01")
    with pytest.raises(UsageError, match=r"--template-date must be a date such as 20.*, not 'tomorrow'"):
        evaluate_model(tiny_model, records, tmp_path / "out", template_date="tomorrow")


def test_metrics_of_these_predictions_are_not_dropped_unasked(run: Path) -> None:
    evaluate_run(run)
    before = contents(run / "eval")
    with pytest.raises(CoraError, match=r"metrics.json also holds sacrebleu, which --metrics rouge1 leaves out; .*--overwrite"):
        evaluate_run(run, metrics=("rouge1",))
    with pytest.raises(CoraError, match=r"metrics.json holds the metrics of the variant ours; .*--overwrite"):
        evaluate_run(run, metric_variant="hf-evaluate")
    assert contents(run / "eval") == before
    assert list(evaluate_run(run, metrics=("rouge1",), overwrite=True).record["metrics"]) == ["rouge1"]


def test_the_metrics_of_other_predictions_are_not_replaced_unasked(tmp_path: Path) -> None:
    def scored(name: str, output: str, **settings: Any) -> None:
        writing.write_jsonl(tmp_path / name / "predictions.jsonl", [{"prediction": name, "reference": "one"}])
        path = str(tmp_path / name / "predictions.jsonl")
        evaluate(EvaluateConfig(from_predictions=path, output_dir=str(tmp_path / output), **{**SCORING, **settings}))

    scored("one", "out")
    scored("one", "two")
    before = contents(tmp_path / "out")
    with pytest.raises(CoraError, match=r"out holds metrics.json and scores.jsonl of other predictions than .*--overwrite"):
        scored("two", "out")
    assert contents(tmp_path / "out") == before
    scored("three", "three")
    for overwrite in (False, True):
        with pytest.raises(CoraError, match=r"three holds the evaluation of other predictions than .*another --output-dir"):
            scored("one", "three", overwrite=overwrite)
    scored("two", "out", overwrite=True)
    assert contents(tmp_path / "out") != before


def test_what_was_scored_from_another_folder_can_be_verified_and_scored_again(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    for text, settings in (("one", {}), ("two", {"overwrite": True})):
        writing.write_jsonl(answers, [{"prediction": text, "reference": "one"}])
        evaluate(EvaluateConfig(from_predictions=str(answers), output_dir=str(tmp_path / "out"), **{**SCORING, **settings}))
        assert any("computed again, as recorded" in sentence for sentence in verify(tmp_path / "out"))
        assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == answers.read_bytes()


def test_neither_two_files_of_answers_in_one_folder_nor_another_program_lose_their_metrics_unasked(tmp_path: Path) -> None:
    def scored(name: str, **settings: Any) -> None:
        writing.write_jsonl(tmp_path / f"{name}.jsonl", [{"prediction": name, "reference": "one"}])
        evaluate(EvaluateConfig(from_predictions=str(tmp_path / f"{name}.jsonl"), **{**SCORING, **settings}))

    scored("one")
    with pytest.raises(
        CoraError, match=r"holds metrics.json and scores.jsonl of other predictions than .*two.jsonl; .*--overwrite"
    ):
        scored("two")
    scored("two", output_dir=str(tmp_path / "two"))
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(CoraError, match=r"metrics.json is of another program; .*--overwrite"):
        scored("predictions")
    scored("predictions", overwrite=True)
    scored("predictions")


def test_a_chat_template_that_changed_after_the_training_is_said(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = make_run(model, tiny_data, tmp_path / "run", mode="lora", rank=8)
    said = f"the tokenizer of {model}, or its chat template, is not the one that {{}} was trained with"
    evaluate_run(run, **SCORING)
    assert said.format(run) not in capsys.readouterr().err
    assert "Asked otherwise" not in report([str(run)])
    template = model / "chat_template.jinja"
    template.write_text("Answer. " + template.read_text())
    evaluate_run(run, overwrite=True, **SCORING)
    assert said.format(run) in capsys.readouterr().err
    assert f"{run.name} (a tokenizer or chat template that was changed since)" in " ".join(report([str(run)]).split())
    adapter = str(run / "adapter")
    find_targets(EvaluateConfig(model=adapter, dataset=str(tiny_data), output_dir=str(tmp_path / "out")))
    assert said.format(adapter) in capsys.readouterr().err
    merge_adapter(resolve_model(str(run)), tmp_path / "merged")
    assert said.format(run) in capsys.readouterr().err
