"""Proxies of a program's readability: what can be counted in its text without running it. None of them is readability.

Each is a ratio of sums over answers, with a bootstrap interval over records: longer programs weigh more.
"""

import ast
import importlib.util
import io
import json
import os
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cora_cli import intervals
from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.problems import syntax_tree
from cora_cli.progress import note
from cora_cli.scratch import temporary_directory

RULES = "E,F,W,N,B,SIM"
"""The rules of ruff that are counted: errors, unused and undefined names, whitespace, naming, likely bugs and needless detours."""
PROXIES = {
    "parses": "share of answers that parse",
    "ruff_findings": f"findings of ruff ({RULES}) per 100 lines",
    "docstrings": "share of functions and classes with a docstring",
    "comments": "share of lines with a comment",
    "complexity": "mean cyclomatic complexity of a function",
    "names": "share of names with three letters or more",
}
"""What each number is; all but the first are over the answers that parse, and over lines that are not blank."""
_BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.Assert,
    ast.match_case,
    ast.comprehension,
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Counts = dict[str, tuple[float, float]]
"""Per proxy what was found and out of how many."""


def readability(programs: Sequence[Sequence[str]], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """The proxies of the programs of each record: `value`, `ci95`, `n` (records that have anything to count) and `what` it is.

    A proxy without anything to count is left out, and so are ruff's findings where ruff is not installed.
    """
    flat = [program for own in programs for program in own]
    counts = [_counts(program) for program in flat]
    parsed = [place for place, one in enumerate(counts) if "docstrings" in one]
    for place, findings in zip(parsed, _ruff([flat[place] for place in parsed]), strict=False):
        counts[place]["ruff_findings"] = (100.0 * findings, counts[place]["comments"][1])
    found: dict[str, dict[str, Any]] = {}
    for name, what in PROXIES.items():
        each = iter(counts)
        sums = np.array([np.sum([next(each).get(name, (0.0, 0.0)) for _ in own], axis=0) for own in programs])
        counted = sums[sums[:, 1] > 0]
        if len(counted):
            interval = intervals.bootstrap_interval(counted, _ratio, resamples, seed)
            value = float(_ratio(counted.sum(axis=0), len(counted)))
            found[name] = {"value": value, "ci95": interval and list(interval), "n": len(counted), "what": what}
    return found


def _ratio(sums: Any, n: int) -> Any:
    return sums[..., 0] / sums[..., 1]


def _counts(program: str) -> Counts:
    """Everything but ruff's findings, for one program."""
    try:
        tree = syntax_tree(program)
        comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(program, newline=None).readline)
            if token.type == tokenize.COMMENT
        }
    except (SyntaxError, ValueError, MemoryError, RecursionError, tokenize.TokenError):
        return {"parses": (0.0, 1.0)}
    if not tree.body:
        return {"parses": (0.0, 1.0)}
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, _FUNCTIONS)]
    documented = [*functions, *(node for node in nodes if isinstance(node, ast.ClassDef))]
    names = _names(nodes)
    return {
        "parses": (1.0, 1.0),
        "docstrings": (float(sum(ast.get_docstring(node) is not None for node in documented)), float(len(documented))),
        "comments": (float(len(comments)), float(sum(bool(line.strip()) for line in io.StringIO(program, newline=None)))),
        "complexity": (float(sum(map(complexity, functions))), float(len(functions))),
        "names": (float(sum(len(name.strip("_")) >= 3 for name in names)), float(len(names))),
    }


def complexity(function: ast.AST) -> int:
    """McCabe's cyclomatic complexity: 1 and the number of branches, without those of functions inside."""
    total, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            continue
        total += isinstance(node, _BRANCHES) + (len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0)
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        waiting += ast.iter_child_nodes(node)
    return total


def _names(nodes: Sequence[ast.AST]) -> set[str]:
    """The names that a program gives to functions, classes, arguments and variables."""
    found = {node.name for node in nodes if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)} - {"self", "cls"}
    return found | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} - {"_"}


def _ruff(programs: Sequence[str]) -> list[int]:
    """The number of findings in each program; empty if ruff is not installed. Raises `CoraError` if it fails."""
    if importlib.util.find_spec("ruff") is None:
        note("ruff is not installed, so its findings are not among the readability proxies; `pip install ruff` adds them")
        return []
    with temporary_directory("ruff") as folder:
        names = [f"program_{place}.py" for place in range(len(programs))]
        for name, program in zip(names, programs, strict=True):
            (folder / name).write_text(program, encoding="utf-8", errors="replace")
        # Each file by name, since ruff passes over those that a .gitignore above the folder covers; in a file, since a command line has an end.
        (folder / "names").write_text("\n".join(names), encoding="ascii")
        command = [
            sys.executable,
            "-P",
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--no-cache",
            "--ignore-noqa",
            "--exit-zero",
            "--quiet",
        ]
        command += ["--select", RULES, "--output-format", "json", "@names"]
        # Variables such as RUFF_OUTPUT_FILE stand for options.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RUFF_")}
        ended = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if ended.returncode:
            raise CoraError(f"ruff failed: {ended.stderr.strip()[:200]}")
        found = Counter(Path(finding["filename"]).name for finding in json.loads(ended.stdout))
    return [found[name] for name in names]
