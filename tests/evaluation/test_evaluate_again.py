import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.evaluation import backend
from cora_cli.evaluation.decode import PooledDecoder
from cora_cli.rundir import EvaluationDirectory

from .helpers import answers, evaluate_model, evaluate_run

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
    new = rundir.read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [line["new_tokens"] for line in new] == [4, 4, 4]


def test_an_unfinished_evaluation_with_other_settings_is_not_continued(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    out = EvaluationDirectory(tmp_path / "out")
    evaluate_model(tiny_model, records, out.root)
    lines = rundir.read_jsonl(out.predictions)
    settings = rundir.read_json(out.generation)["settings"]
    for recorded in ({"settings": {**settings, "max_new_tokens": 1}}, None):
        out.predictions.unlink()
        rundir.write_jsonl(out.partial_predictions, [{**line, "prediction": "of another time"} for line in lines])
        out.generation.unlink()
        if recorded:
            rundir.write_json(out.generation, recorded)
        with pytest.raises(CoraError, match="other settings" if recorded else "other files"):
            evaluate_model(tiny_model, records, out.root)
        evaluate_model(tiny_model, records, out.root, overwrite=True)
        assert rundir.read_jsonl(out.predictions) == lines


def test_a_finished_evaluation_is_scored_again_without_its_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_run(run)
    monkeypatch.setattr(backend, "load_model", lambda *_: pytest.fail("a model was loaded"))
    again = evaluate_run(run)
    assert again.record == first.record
    more = evaluate_run(run, metrics=("rouge1", "rougeL"), bootstrap=200)
    assert list(more.record["metrics"]) == ["rouge1", "rougeL"]


@pytest.mark.parametrize("damage", ["edited", "removed"])
def test_predictions_that_were_changed_afterwards_are_generated_again(
    tiny_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = evaluate_model(tiny_model, records, tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    if damage == "edited":
        lines = rundir.read_jsonl(path)
        rundir.write_jsonl(path, [{**line, "prediction": line["reference"]} for line in lines])
    else:
        path.unlink()
    again = evaluate_model(tiny_model, records, tmp_path / "out")
    assert path.read_bytes() == whole
    assert again.record["metrics"] == first.record["metrics"]
    assert "was changed or removed after it was written" in capsys.readouterr().err
