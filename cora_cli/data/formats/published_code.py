"""HumanEval and MBPP: tasks for programs, with tests, in the columns of their publications."""

import json

from cora_cli.data.formats.shape import Raw, Shape, renamed
from cora_cli.errors import CoraError


def _read_humaneval(record: Raw, where: str) -> Raw:
    return renamed(record, {"canonical_solution": "completion"})


def _read_mbpp(record: Raw, where: str) -> Raw:
    """MBPP's prompt is its text and its tests, without which no model could know the function's name (Austin et al. 2021, 2108.07732)."""
    text, tests = record.get("text") or record.get("prompt"), record["test_list"]
    if not isinstance(text, str) or not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise CoraError(
            f"{where}: a record of MBPP needs a text and test_list, a list of assertions, not {json.dumps(tests, default=str)[:60]}"
        )
    rest = {name: value for name, value in record.items() if name not in ("text", "prompt", "code")}
    prompt = f"{text} Your code should pass these tests:\n\n" + "\n".join(tests)
    return {"instruction": prompt, "input": "", "output": record["code"], **rest}


_OTHERS = frozenset({"instruction", "completion"})
HUMANEVAL = Shape("HumanEval", "prompt", ("prompt", "canonical_solution", "test"), _read_humaneval, _OTHERS)
MBPP = Shape("MBPP", "alpaca", ("code", "test_list", "text"), _read_mbpp, _OTHERS)
MBPP_SANITIZED = Shape("MBPP", "alpaca", ("code", "test_list", "prompt"), _read_mbpp, _OTHERS)
