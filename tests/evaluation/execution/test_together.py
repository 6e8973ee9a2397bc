"""Programs that run in one process with their tests, and what is said where that differs from running apart."""

from pathlib import Path
from typing import Any

import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.execution import score
from cora_cli.evaluation.execution.run import Fate
from cora_cli.reading import read_jsonl
from tests.evaluation.execution.helpers import needs_sandbox, outcome_together

PRINTS = "def f(x):\n    print(x + 1)"
CAPTURED = """import contextlib, io
text = io.StringIO()
with contextlib.redirect_stdout(text):
    f(1)
assert text.getvalue() == '2\\n'"""


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "tests", "fate", "detail"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed", ""),
        (PRINTS, CAPTURED, "passed", ""),
        ("def f(x): return input()", "import sys, io\nsys.stdin = io.StringIO('2')\nassert f(1) == '2'", "passed", ""),
        ("class A: pass", "class B(A): pass\nassert isinstance(B(), A)", "passed", ""),
        ("import math\nmath = None\ndef f(x): return x", "assert math is None", "passed", ""),
        ("def f(x): return x", "assert f(1) == 1\nassert f(1) == 2", "wrong", "assert f(1) == 2"),
        ("def f(x): assert x > 1", "assert f(1) == 1", "exception", "AssertionError"),
        ("def f(x): return g(x)", "assert f(1) == 1", "exception", "NameError: name 'g' is not defined"),
        ("def f(x): return [0] * 10**9", "assert f(1) == 1", "memory", ""),
        ("def f(x):\n    while True: pass", "assert f(1) == 1", "timeout", ""),
        ("import time\ndef f(x): time.sleep(100)", "assert f(1) == 1", "timeout", ""),
        ("def f(x): open('/usr/x', 'w')", "assert f(1) == 1", "refused", "OSError: [Errno 30] Read-only file system: '/usr/x'"),
        ("def f(x", "assert f(1) == 1", "not code", ""),
        ("import sys\ndef f(x): sys.exit()", "assert f(1) == 1", "exception", "SystemExit"),
        ("import os\nos._exit(0)", "assert f(1) == 1", "exception", "ended with exit status 0"),
        ("import os\nfor n in range(3, 64):\n    try: os.write(n, b'[\\n' * 99)\n    except OSError: pass", "assert f(1) == 1", "exception", None),
    ],
)  # fmt: skip
def test_a_program_has_the_fate_that_one_process_gives_it(source: str, tests: str, fate: Fate, detail: str | None):
    found = outcome_together(source, tests, reference="import math\ndef f(x): pass", seconds=1)
    assert found.fate == fate
    assert detail is None or found.detail == detail


@needs_sandbox
def test_tests_have_the_imports_of_the_reference():
    assert outcome_together("f = abs", "assert math.sqrt(f(-4)) == 2", reference="import math\nf = None").fate == "passed"


def lines(answers: list[str], tests: str, reference: str) -> list[dict[str, Any]]:
    problem = {"output": reference, "assertions": [tests]}
    return [{"prompt": "p", "reference": "r", "prediction": one, "problem": problem} for one in answers]


def scored(path: Path, **settings: Any) -> dict[str, Any]:
    config = EvaluateConfig(
        from_predictions=str(path), metrics=("pass@1",), execute_code=True, bootstrap=100, device="cpu", **settings
    )
    return evaluate(config)[0].record


@needs_sandbox
def test_programs_that_differ_in_one_process_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # The first answer says that it equals what is expected; the second hides a function that the tests use.
    equal = "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()"
    hiding = "def abs(x): return 7\ndef f(x): return x + 1"
    right = "def f(x): return x + 1"
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, lines([equal, hiding, right, equal], "assert f(1) == abs(2)", right))
    record = scored(path)
    assert record["fates"] == {"passed": 2, "wrong": 2}
    assert record["metrics"]["pass@1"]["value"] == 0.5
    assert record["same_process"] == {"only_apart": 1, "only_together": 2, "pass@1": 0.75}
    programs = [line["programs"][0] for line in read_jsonl(tmp_path / "executions.jsonl")]
    assert [one.get("same_process_fate") for one in programs] == ["passed", "wrong", None, "passed"]
    said = "of 4 programs, 2 pass only in one process with their tests and 1 pass only apart from them (same_process_fate names them)"
    assert said in capsys.readouterr().err


@pytest.mark.slow
@needs_sandbox
def test_what_tests_take_themselves_does_not_count_against_a_program_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(score, "LEAST_SECONDS", 1)
    path, right = tmp_path / "predictions.jsonl", "def f(x): return x"
    writing.write_jsonl(path, lines([right], "for _ in range(4 * 10**7): pass\nassert f(3) == 3", right))
    assert scored(path)["same_process"] == {"only_apart": 0, "only_together": 0, "pass@1": 1.0}


@pytest.mark.slow
@needs_sandbox
def test_a_program_that_only_waits_apart_from_its_tests_is_run_with_them(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    mocked = "from unittest import mock\nwith mock.patch('time.sleep'):\n    assert f(3) == 3"
    writing.write_jsonl(path, lines(["import time\ndef f(x):\n    time.sleep(9)\n    return x"], mocked, "def f(x): return x"))
    record = scored(path)
    assert record["fates"] == {"timeout": 1}
    assert record["same_process"] == {"only_apart": 0, "only_together": 1, "pass@1": 1.0}


@needs_sandbox
def test_tests_that_need_one_process_are_refused_with_the_option_that_serves_them(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, lines([PRINTS, "def f(x): print(x)"], CAPTURED, PRINTS))
    with pytest.raises(CoraError, match=r"passes in one process with its tests: --same-process runs all programs so"):
        scored(path)
    record = scored(path, same_process=True)
    assert record["fates"] == {"passed": 1, "wrong": 1}
    assert record["metrics"]["pass@1"]["signature"].split("|bs:")[0].endswith("|tests:same-process")
    assert "same_process" not in record


@needs_sandbox
def test_in_one_process_tests_that_an_empty_program_passes_are_refused(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    unrun = "class T:\n    def test(self):\n        assert f(1) == 2"
    writing.write_jsonl(path, lines(["def f(x): return 3"], unrun, "def f(x): return 2"))
    with pytest.raises(CoraError, match="every program would pass, since an empty program does"):
        scored(path, same_process=True)
