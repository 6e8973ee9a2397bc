import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.execution import sandbox
from cora_cli.evaluation.execution.score import count_fates
from cora_cli.evaluation.metrics import score_all
from cora_cli.evaluation.metrics.pass_at import Attempts, PassAt
from cora_cli.reading import read_jsonl
from cora_cli.reporting.measures import read_evaluation
from cora_cli.rundir import EvaluationDirectory
from tests.evaluation.execution.helpers import needs_sandbox
from tests.evaluation.helpers import evaluate_model

RECORDS = [
    {"instruction": f"add {n}", "input": "", "output": f"def f(x): return x + {n}", "assertions": [f"assert f(1) == {1 + n}"]}
    for n in range(3)
]
ANSWERS = [["def f(x): return x", "def f(x): return 2"], ["def f(x): return x", "f(", "import os\nos._exit(0)"], ["x"]]


def predictions(path: Path, answers: list[list[str]] = ANSWERS) -> Path:
    lines = [
        {
            "prompt": record["instruction"],
            "reference": record["output"],
            "prediction": own[0],
            "finish_reason": "stop",
            "samples": [{"prediction": one} for one in own],
            "problem": {"output": record["output"], "assertions": record["assertions"]},
        }
        for record, own in zip(RECORDS, answers, strict=True)
    ]
    writing.write_jsonl(path, lines)
    return path


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_programs_passes(n: int, k: int):
    for passed in range(n + 1):
        draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        metric = PassAt(k, Attempts([n], [passed], ""))
        assert metric.statistics(["x"], ["x"])[0, 0] == pytest.approx(np.mean([any(draw) for draw in draws]), abs=1e-12)


def test_pass_at_k_needs_k_programs_of_each_problem():
    with pytest.raises(CoraError, match=r"pass@3 needs at least 3 samples of every problem, but there are 2; use --samples 3"):
        score_all(["pass@3"], ["a", "b"], ["a", "b"], attempts=Attempts([3, 2], [1, 1], ""))
    with pytest.raises(CoraError, match="pass@1 needs the results of running the programs"):
        score_all(["pass@1"], ["a"], ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("pass@1",)}, "runs the programs that the model writes; allow it with --execute-code"),
        ({"metrics": ("rouge",), "execute_code": True}, "--execute-code has no effect without pass@1"),
        ({"metrics": ("pass@10",), "execute_code": True}, "use --samples 10 --temperature"),
        ({"samples": 3}, "--samples 3 needs --temperature"),
        ({"samples": 0}, "--samples must be at least 1, not 0"),
        ({"temperature": -1.0}, "--temperature must be at least 0"),
        ({"metrics": ("pass@0",)}, "unknown metric 'pass@0'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(runs=("run",), **settings)


def test_without_a_sandbox_nothing_runs_and_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sandbox.require_sandbox.cache_clear()
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    path = predictions(tmp_path / "predictions.jsonl")
    with pytest.raises(CoraError, match="bwrap is not installed; --execute-code needs bubblewrap on Linux: install it"):
        evaluate(EvaluateConfig(from_predictions=str(path), metrics=("pass@1",), execute_code=True, device="cpu"))
    sandbox.require_sandbox.cache_clear()


@needs_sandbox
def test_more_answers_than_there_are_are_asked_for_before_a_program_runs(tmp_path: Path):
    path = predictions(tmp_path / "predictions.jsonl")
    config = EvaluateConfig(from_predictions=str(path), metrics=("pass@2",), execute_code=True, device="cpu")
    with pytest.raises(CoraError, match=r"pass@2 needs 2 answers to each record, but .* has 1 to one; ask for pass@1"):
        evaluate(config)
    assert not (tmp_path / "executions.jsonl").exists()


@needs_sandbox
def test_predictions_are_executed_and_the_fate_of_each_program_is_kept(tmp_path: Path):
    path = predictions(tmp_path / "predictions.jsonl")
    config = EvaluateConfig(
        from_predictions=str(path), metrics=("pass@1", "rouge1"), execute_code=True, bootstrap=100, device="cpu"
    )
    record = evaluate(config)[0].record
    assert record["metrics"]["pass@1"]["value"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert record["fates"] == {"passed": 1, "wrong": 2, "exception": 2, "not code": 1}
    out = EvaluationDirectory(tmp_path)
    lines = read_jsonl(out.executions)
    assert [[one["fate"] for one in line["programs"]] for line in lines] == [
        ["passed", "wrong"],
        ["wrong", "not code", "exception"],
        ["exception"],
    ]
    assert [line["limit_seconds"] for line in lines] == [4, 4, 4]
    measures, _, _ = read_evaluation(out, None)  # as `cora report` does
    assert measures["pass@1"].value == record["metrics"]["pass@1"]["value"]
    assert measures["pass@1"].statistics[:, 0].tolist() == [0.5, 0.0, 0.0]


@needs_sandbox
@pytest.mark.parametrize(("column", "value"), [("challenge_test_list", ["assert f(0) == 7"]), ("test", "assert f(0) == 7")])
def test_further_tests_of_mbpp_and_mbpp_plus_are_not_run_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, value: Any
):
    tests = {"test_list": ["assert f(1) == 2"], column: value}
    line = {"reference": "x", "prediction": "def f(x): return x + 1", "problem": {"output": "def f(x): return 2", **tests}}
    writing.write_jsonl(tmp_path / "p.jsonl", [line, {**line, "problem": {**line["problem"], column: []}}])
    config = EvaluateConfig(from_predictions=str(tmp_path / "p.jsonl"), metrics=("pass@1",), execute_code=True, bootstrap=100)
    metric = evaluate(config)[0].record["metrics"]["pass@1"]
    assert (metric["value"], metric["ci95"]) == (1.0, None)  # both pass, which says nothing about the spread
    assert f"p.jsonl: 1 records also have a {column}, which is not run" in capsys.readouterr().err


@needs_sandbox
def test_predictions_without_tests_are_refused(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, [{"prompt": "x", "reference": "y", "prediction": "z"}])
    with pytest.raises(CoraError, match=r"predictions.jsonl, record 1 carries no tests, which pass@k needs: assertions"):
        evaluate(EvaluateConfig(from_predictions=str(path), metrics=("pass@1",), execute_code=True, device="cpu"))


def test_the_problem_of_another_program_does_not_keep_its_answers_from_being_counted(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, [{"reference": "y = 1", "prediction": "y = 1", "problem": {"id": 3}}])
    [found] = evaluate(EvaluateConfig(from_predictions=str(path), metrics=("rouge1",), readability=True, device="cpu"))
    assert found.record["readability_proxies"]["parses"]["value"] == 1


@pytest.mark.parametrize("damage", [{"problem": "assert f()"}, {"samples": [3]}])
def test_damaged_predictions_are_refused(tmp_path: Path, damage: dict):
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, [{"reference": "y", "prediction": "z", **damage}])
    with pytest.raises(
        CoraError,
        match=f"predictions.jsonl, line 1: {next(iter(damage))}.* must be .*, as `cora evaluate` writes it; rename or remove that entry",
    ):
        evaluate(EvaluateConfig(from_predictions=str(path), metrics=("rouge1",), readability=True, device="cpu"))


@needs_sandbox
def test_a_model_s_samples_are_run_and_a_second_evaluation_draws_the_same(tiny_model: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    writing.write_jsonl(data, RECORDS)
    settings = {"samples": 2, "temperature": 0.9, "metrics": ("pass@1", "pass@2"), "execute_code": True}
    one = evaluate_model(tiny_model, data, tmp_path / "one", **settings)
    other = evaluate_model(tiny_model, data, tmp_path / "other", **settings, batch_size=1, overwrite=True)
    assert set(one.record["metrics"]) == {"pass@1", "pass@2"}
    assert sum(one.record["fates"].values()) == 6
    texts = [
        [[sample["prediction"] for sample in line["samples"]] for line in read_jsonl(tmp_path / name / "predictions.jsonl")]
        for name in ("one", "other")
    ]
    assert texts[0] == texts[1]  # a draw does not depend on the batch
    assert all(first != second for first, second in texts[0])
    assert other.record["generation"]["settings"]["decoding"] == "sampled at temperature 0.9, 2 per record, seed 0"


@needs_sandbox
def test_records_without_tests_are_refused_before_a_model_is_loaded(
    tiny_model: Path, records: Path, tmp_path: Path, no_model: None
):
    with pytest.raises(CoraError, match=r"records.jsonl, line 1 carries no tests"):
        evaluate_model(tiny_model, records, tmp_path / "out", metrics=("pass@1",), execute_code=True)


def test_fates_are_counted_in_one_order():
    assert count_fates([]) == {}
