import ast
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest

from cora_cli import writing
from cora_cli.evaluation import readability
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate

GOOD = '''def mean(numbers):
    """The mean of numbers, or None."""
    # An empty list has none.
    if not numbers:
        return None
    return sum(numbers) / len(numbers)
'''
POOR = "import os\ndef F(x):\n    for i in x:\n        if i and x or i:\n            return i\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", 1),
        ("if a:\n        pass\n    elif b:\n        pass", 3),
        ("for a in b:\n        while c and d or e:\n            pass", 5),
        ("return [x for x in y if x if y]", 4),
        ("try:\n        pass\n    except ValueError:\n        pass", 2),
        ("def g():\n        if a: pass", 1),
    ],
)
def test_complexity_counts_branches(body: str, expected: int):
    assert readability.complexity(ast.parse(f"def f():\n    {body}").body[0]) == expected


@pytest.mark.parametrize("inside", ["\u2028", "\x0c", "\x85"])
def test_lines_are_counted_as_python_counts_them(inside: str):
    program = f'text = "a{inside}b"  # a comment\r\nlength = len(text)\r\n'
    assert readability.readability([[program]], 100, 0)["comments"]["value"] == 1 / 2


def test_a_warning_of_the_parser_is_no_error():
    warnings.simplefilter("error")  # as PYTHONWARNINGS=error; pytest restores the filters
    assert readability.readability([["import re\nre.match('\\d+', '1')\n"]], 100, 0)["parses"]["value"] == 1


def test_proxies_are_ratios_of_sums_over_answers_that_parse():
    found = readability.readability([[GOOD], [POOR], ["def f("]], 100, 0)
    values = {name: proxy["value"] for name, proxy in found.items()}
    assert values["parses"] == pytest.approx(2 / 3)
    assert values["docstrings"] == 1 / 2
    assert values["comments"] == 1 / 11
    assert values["complexity"] == (2 + 5) / 2
    assert values["names"] == 2 / 5  # mean, numbers; F, x, i
    assert values["ruff_findings"] == pytest.approx(100 * 2 / 11)  # an unused import, and a name in capitals
    assert {name: proxy["n"] for name, proxy in found.items()} == dict.fromkeys(found, 2) | {"parses": 3}


def test_ruff_counts_whatever_lies_around_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RUFF_OUTPUT_FILE", str(tmp_path / "elsewhere.json"))
    assert readability.readability([[POOR]], 100, 0)["ruff_findings"]["value"] == pytest.approx(100 * 2 / 5)


def test_many_programs_need_no_long_command_line(monkeypatch: pytest.MonkeyPatch):
    """Linux takes 2 MB, which 100,000 names exceed."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options))
    assert sum(readability._ruff(["x = 1\n"] * 1000 + [POOR])) == 2
    assert [len(" ".join(command)) < 1000 for command in commands] == [True]


def test_without_ruff_its_findings_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(readability.importlib.util, "find_spec", lambda name: None)
    assert "ruff_findings" not in readability.readability([[GOOD]], 100, 0)
    assert "`pip install ruff`" in capsys.readouterr().err


def test_text_that_breaks_the_parser_does_not_parse():
    texts = ["(" * 20000, "-" * 200000 + "1", "x = \0", "", "'''"]
    assert set(readability.readability([texts], 100, 0)) == {"parses"}


def test_an_evaluation_has_the_proxies_of_its_answers(tmp_path: Path):
    path = tmp_path / "predictions.jsonl"
    writing.write_jsonl(path, [{"prompt": "x", "reference": "y", "prediction": f"Here:\n```python\n{GOOD}```"}] * 2)
    config = EvaluateConfig(from_predictions=str(path), metrics=("rouge1",), readability=True, bootstrap=100, device="cpu")
    found = evaluate(config)[0].record["readability_proxies"]
    assert found["docstrings"] == {
        "value": 1.0,
        "ci95": None,
        "n": 2,
        "what": "share of functions and classes with a docstring",
    }
