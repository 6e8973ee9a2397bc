"""A mark for tests that need the sandbox, and a problem of one function."""

import pytest

from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.problems import Problem
from cora_cli.evaluation.execution.run import Outcome, run, run_together
from cora_cli.evaluation.execution.sandbox import require_sandbox


def _missing() -> str:
    try:
        require_sandbox()
    except CoraError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(_missing()), reason=_missing() or "there is a sandbox")


def outcome(source: str, *tests: str, reference: str = "", seconds: int = 4) -> Outcome:
    """Run `source` against `tests`, which use the names that `reference` (by default: `source`) defines."""
    return run(Problem("a problem", reference or source, "\n".join(tests)), source, seconds)


def outcome_together(source: str, *tests: str, reference: str = "", seconds: int = 4) -> Outcome:
    """As `outcome`, in one process."""
    return run_together(Problem("a problem", reference or source, "\n".join(tests)), source, seconds)
