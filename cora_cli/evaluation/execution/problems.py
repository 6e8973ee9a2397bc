"""Read the tests of a record, and turn an answer into a program: HumanEval's shape, MBPP's, and the assertions of `builtin:code`."""

import ast
import contextlib
import dataclasses
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cora_cli.data.records import TEST_COLUMNS
from cora_cli.errors import CoraError
from cora_cli.evaluation.thoughts import without_thoughts
from cora_cli.progress import note

SHAPES = "assertions (as in builtin:code), test and entry_point (HumanEval), or test_list (MBPP)"
_STOPS = re.compile(r"\n(?:class|def|#|if|print)")
"""Where an answer that continues a function ends (Chen et al. 2021, 2107.03374)."""
_OPENING = re.compile(r"(?P<indent>^[ \t]*)?(?P<marks>`{3,}|~{3,})[ \t]*(?P<info>[^`\r\n]*)\r?\n", re.MULTILINE)
_CHECK = re.compile(r"^(?:def[ \t]+check[ \t]*\(|check[ \t]*=)", re.MULTILINE)
"""How the tests of HumanEval's shape define the function that is called with `entry_point`."""
_PYTHON = re.compile(r"(?:\{?[ \t]*\.?(?:python|py)[\d.]*\b.*)?", re.IGNORECASE | re.DOTALL)
"""What stands after the marks of a block of Python, if anything does, such as `python`, `Python 3` or `{.python}`."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tests of one record.

    `reference` is a program that should pass, `given` what precedes an answer that continues a function (HumanEval's prompt), and `entry_point` the function that it is about.
    """

    where: str
    reference: str
    tests: str
    given: str = ""
    entry_point: str | None = None

    def program(self, answer: str) -> str:
        """The program in an answer: its first fenced block of Python if it has one, after the prompt if it continues the prompt's function."""
        answer = without_thoughts(answer)
        fenced = _python_block(answer)
        code = answer if fenced is None else fenced
        if self.entry_point is None:
            return code
        definition = re.compile(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(self.entry_point)}\b", re.MULTILINE)
        if definition.search(code):
            own = definition.search(self.given)
            return (self.given[: own.start()] if own else "") + code
        return self.given + (_STOPS.split(code)[0] if fenced is None else code)

    def asserts(self) -> bool:
        """Whether the tests hold anything that could fail a program for its results; not so, for example, a comparison without `assert`, or
        `assert (f(1) == 2, "wrong")`, whose pair is always true.
        """
        for node in ast.walk(syntax_tree(self.tests)):
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and not isinstance(node.test, ast.Tuple)):
                return True
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if "assert" in name.lower() or name in ("fail", "exit", "_exit"):
                return True
        return False

    def for_tests(self) -> dict[str, Any]:
        """What the sandbox of the tests needs (`inside.tests`)."""
        return {
            "reference": self.reference,
            "tests": self.tests,
            "entry_point": self.entry_point,
            # As Python counts them: `str.splitlines` also ends one at a form feed, or at what Unicode has for it.
            "given_lines": sum(1 for _ in io.StringIO(self.given, newline=None)),
        }


def problem_columns(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The columns that `problem_of` needs, to be kept with an answer; None if the record carries no tests."""
    if not any(record.get(name) for name in ("test", "test_list", "assertions")):
        return None
    kept = {name: record[name] for name in TEST_COLUMNS if record.get(name)}
    texts = ("prompt",) if continues_function(kept) else ()
    return kept | {name: record[name] for name in (*texts, "completion", "output") if name in record}


def continues_function(columns: Mapping[str, Any] | None) -> bool:
    """Whether the answer to a record with these `problem_columns` goes on with the text of its prompt, as in HumanEval's shape."""
    return bool(columns and columns.get("test") and not columns.get("test_list"))


def problem_of(columns: Mapping[str, Any] | None, where: str) -> Problem:
    """The problem of a record, by its `problem_columns`. Raises `CoraError` naming the place if it carries no tests, or malformed ones."""
    columns = columns or {}
    reference = _text(columns, "completion" if "completion" in columns else "output", where) if columns else ""
    if continues_function(columns):
        given, test, entry = (_text(columns, name, where) for name in ("prompt", "test", "entry_point"))
        if not entry.isidentifier():
            raise CoraError(f"{where}: entry_point must be the name of a function, not {entry!r}")
        call = f"\n\ncheck({entry})\n" if _CHECK.search(test) else ""
        return Problem(where, given + reference, test + call, given, entry)
    if columns.get("test_list"):
        before = [*_texts(columns, "test_imports", where), _text(columns, "test_setup_code", where)]
        return Problem(where, reference, "\n".join([*before, *_texts(columns, "test_list", where)]))
    if columns.get("assertions"):
        return Problem(where, reference, "\n".join(_texts(columns, "assertions", where)))
    raise CoraError(f"{where} carries no tests, which pass@k needs: {SHAPES}")


def say_what_is_not_run(columns: Iterable[Mapping[str, Any] | None], where: str) -> None:
    """Say that the challenge tests of MBPP and the further ones of MBPP+ are left out: published scores of MBPP are those of `test_list` (Austin et al.
    2021, 2108.07732)."""
    others = [(own or {}, name) for own in columns for name in ("challenge_test_list", "test")]
    left = Counter(name for own, name in others if own.get(name) and own.get("test_list"))
    for name, count in left.items():
        note(f"{where}: {count} records also have a {name}, which is not run: the benchmark MBPP scores programs by test_list")


def programs_of(line: Mapping[str, Any]) -> list[str]:
    """The programs in a line of `predictions.jsonl`, whose record may carry no tests."""
    problem = Problem("", "", "")
    if line.get("problem"):
        with contextlib.suppress(CoraError):  # another program's, of another shape
            problem = problem_of(line["problem"], "a prediction")
    return [problem.program(sample["prediction"]) for sample in line.get("samples") or [line]]


def _python_block(answer: str) -> str | None:
    """The first fenced block that is marked as Python, or as nothing, without its indentation; None without one.

    A block ends, as in CommonMark, at a line of as many marks that is hardly indented, so that the example in a docstring does not end it.
    """
    position = 0
    while opening := _OPENING.search(answer, position):
        indent, marks, start = len(opening["indent"] or ""), opening["marks"], opening.end()
        closings = (
            re.compile(rf"^[ \t]{{0,{most}}}{re.escape(marks)}.*$", re.MULTILINE).search(answer, start)
            for most in (indent + 3, "")
        )
        closing = next(filter(None, closings), None)
        inside = answer[start : closing.start()] if closing else answer[start:]
        if _PYTHON.fullmatch(opening["info"].strip()):
            code = re.sub(rf"^[ \t]{{1,{indent}}}", "", inside, flags=re.MULTILINE) if indent else inside
            return code.removesuffix("\n") if closing else code
        if closing is None:
            break
        position = closing.end()
    return None


def _text(columns: Mapping[str, Any], name: str, where: str) -> str:
    value = columns.get(name, "")
    if not isinstance(value, str):
        raise CoraError(f"{where}: {name} must be text, not {str(value)[:60]}")
    return value


def _texts(columns: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = columns.get(name, [])
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise CoraError(f"{where}: {name} must be a list of texts, not {str(values)[:60]}")
    return values


def syntax_tree(program: str) -> ast.Module:
    """The tree of a program. Its warnings, such as of an escape in a text that is none, are no errors, whatever PYTHONWARNINGS says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(program)
