"""Processes that answer together give what one process gives, to the last byte; the first of them alone writes."""

from pathlib import Path
from typing import Any

import pytest

from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.processes import Processes
from cora_cli.reading import read_json
from tests.training.helpers import run_together

from .helpers import FAST

# Waves are of four prompts: two in the greedy case, the second one smaller, and four in the sampled one.
CASES: list[dict[str, Any]] = [{}, {"temperature": 0.8, "samples": 2}]


@pytest.mark.parametrize("settings", [pytest.param(CASES[0], marks=pytest.mark.slow), CASES[1]])
def test_two_processes_answer_as_one(settings: dict[str, Any], trained: dict[str, Path], records: Path, tmp_path: Path) -> None:
    runs = (str(trained["lora"]),)
    one, two = (
        EvaluateConfig(
            runs=runs, dataset=str(records), output_dir=str(tmp_path / name), **{**FAST, "batch_size": 1, **settings}
        )
        for name in ("one", "two")
    )
    evaluate(one)
    assert run_together(two) == [(0, ""), (0, "")]

    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for name in ("predictions.jsonl", "scores.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    ours, theirs = (read_json(tmp_path / name / "metrics.json") for name in ("two", "one"))
    assert ours["metrics"] == theirs["metrics"]
    generations = [read_json(tmp_path / name / "generation.json") for name in ("two", "one")]
    assert [generation.get("processes") for generation in generations] == [2, None]
    same = ("settings", "engine", "new_tokens", "predictions_sha256")
    assert [generations[0][key] for key in same] == [generations[1][key] for key in same]


def test_an_error_in_another_process_ends_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(answers: list[Any], mine: Any) -> None:
        answers[:] = [mine, (None, CoraError("the other GPU is full"))]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(CoraError, match="the other GPU is full"):
        Processes(0, 2).answer_round(["first", "second"], 0, str.upper)


def test_what_fails_before_the_prompts_are_dealt_ends_both(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    ends = run_together(EvaluateConfig(runs=(str(trained["lora"]),), output_dir=str(tmp_path), **FAST))
    assert ends[0][0] == 1
    assert "holds other files" in ends[0][1]
    assert ends[1] == (0, "")
