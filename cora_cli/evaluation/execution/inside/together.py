"""Run a program and its tests in this one process, as the script of HumanEval does (Chen et al. 2021, 2107.03374).

Whatever tests do works here as its authors expect. The program can do what it likes with its tests, and with the verdict.
"""

import ast
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from confine import confine
from judging import fate_of, load, raised_by_program, run_tests


def _with_imports(reference: str, namespace: dict[str, Any]) -> None:
    """Give the tests what the reference solution imports, unless the program has something under that name."""
    imported: dict[str, Any] = {}
    for statement in ast.parse(reference).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([statement], []), "given.py", "exec", dont_inherit=True), imported)
    for name, value in imported.items():
        namespace.setdefault(name, value)


def _verdict(source: str, problem: dict[str, Any]) -> tuple[str, str]:
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        if load(source, module) is not None:
            return "not code", ""
        _with_imports(problem["reference"], module.__dict__)
        run_tests(problem["tests"], module)
    except BaseException as error:
        return fate_of(error, problem["tests"], of_tests=not raised_by_program(error))
    return "passed", ""


def main() -> None:
    """Write that this started, and the verdict, as lines of JSON."""
    options = json.loads(sys.argv[1])
    problem = json.loads(Path("/cora/problem.json").read_text(encoding="utf-8"))
    source = Path("/cora/source.py").read_text(encoding="utf-8")
    confine((options["result"],), **options["limits"])
    sys.set_int_max_str_digits(0)
    os.write(options["result"], json.dumps(["started", ""]).encode() + b"\n")
    verdict = _verdict(source, problem)
    os.write(options["result"], json.dumps(verdict).encode() + b"\n")
    os._exit(0)


main()
