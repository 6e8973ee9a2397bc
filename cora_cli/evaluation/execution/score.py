"""Run the samples of every problem, each within a time limit that its reference solution sets.

Tests that use a program from a process of their own cannot be told what is not so, but some things are not the same there. Programs are therefore run a
second time, together with their tests, and it is said how many differ.
"""

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.problems import Problem, problem_of, say_what_is_not_run
from cora_cli.evaluation.execution.run import FATES, TEST_SECONDS, Outcome, run, run_together
from cora_cli.evaluation.metrics import PASS_AT
from cora_cli.evaluation.metrics.pass_at import Attempts, PassAt
from cora_cli.progress import note, progress
from cora_cli.rundir import EvaluationDirectory

LEAST_SECONDS, TIMES_REFERENCE = 4, 10
"""A program may take this many times the processor seconds of the reference solution, rounded up, and no less than the first number."""
REFERENCE_SECONDS = 60
MOST_AT_ONCE = 16
CONDITIONS = f"answer:python-block|limit:max({LEAST_SECONDS}s,{TIMES_REFERENCE}xreference)|sandbox:bubblewrap|python:{'.'.join(platform.python_version_tuple()[:2])}"
"""What moves pass@k apart from the programs, for its signature."""
TOGETHER = "tests:same-process"
"""What a signature also has where programs run together with their tests."""


@dataclasses.dataclass(frozen=True)
class Executions:
    """What pass@k counts, the number of programs of each fate, and how many differ in one process with their tests, with the scores there (None where
    all ran so)."""

    attempts: Attempts
    fates: dict[str, int]
    same_process: dict[str, float] | None


class Executor:
    """Runs programs, several at a time, apart from their tests or in the same process, and remembers the time limit of each problem."""

    def __init__(self, same_process: bool = False) -> None:
        self.same_process = same_process
        self._run = run_together if same_process else run
        self._limits: dict[Problem, int] = {}
        """Processor seconds for a program."""

    def calibrate(self, problems: Sequence[Problem]) -> None:
        """Run the reference solution of each problem that is new.

        Raises `CoraError` naming the first one that does not pass, or whose tests every program would pass: its tests could not tell a right program
        from a wrong one.
        """
        new = list(dict.fromkeys(problem for problem in problems if problem not in self._limits))
        if not new:
            return
        outcomes = _in_parallel(
            self._run, "reference solutions", [(problem, problem.reference, REFERENCE_SECONDS) for problem in new]
        )
        for problem, outcome in zip(new, outcomes, strict=True):
            if outcome.fate != "passed":
                raise CoraError(self._not_passing(problem, outcome))
            if said := self._any_passes(problem, outcome):
                raise CoraError(
                    f"{problem.where}: every program would pass, since {said}; assert results in statements that are run, such as "
                    "`assert f(1) == 2` (functions and classes of tests are not called by themselves), or remove the record"
                )
            self._limits[problem] = _limit(outcome.seconds)

    def _not_passing(self, problem: Problem, outcome: Outcome) -> str:
        said = f" ({outcome.detail})" if outcome.detail else ""
        remedy = "Programs have Python's standard library only"
        if not self.same_process and run_together(problem, problem.reference, REFERENCE_SECONDS).fate == "passed":
            remedy = "It passes in one process with its tests: --same-process runs all programs so, where one can pass without being right"
        return f"{problem.where}: the reference solution does not pass its own tests here: {outcome.fate}{said}; correct or remove the record. {remedy}"

    def _any_passes(self, problem: Problem, reference: Outcome) -> str:
        """Why every program would pass, if that is so."""
        if reference.detail:
            return reference.detail
        if not problem.asserts():
            return "the tests hold no assertion"
        if self.same_process and run_together(problem, "pass", LEAST_SECONDS).fate == "passed":
            return "an empty program does"
        return ""

    def run(self, problems: Sequence[Problem], answers: Sequence[Sequence[str]]) -> list[list[Outcome]]:
        """The outcome of every answer to every problem. Raises `CoraError` as `calibrate` does."""
        self.calibrate(problems)
        programs = [
            (problem, problem.program(answer), self._limits[problem])
            for problem, samples in zip(problems, answers, strict=True)
            for answer in samples
        ]
        # The same program twice has the same fate.
        different = list(dict.fromkeys(programs))
        outcomes = dict(zip(different, _in_parallel(self._run, "programs", different), strict=True))
        each = iter(programs)
        return [[outcomes[next(each)] for _ in samples] for samples in answers]

    def run_again(
        self, problems: Sequence[Problem], answers: Sequence[Sequence[str]], outcomes: Sequence[Sequence[Outcome]]
    ) -> list[list[Outcome]]:
        """The outcomes in one process with the tests, of which `outcomes` has those apart from them; what is no code is not run again.

        A limit is set as by `calibrate`, but by the reference solution with its tests, which may take longer than a program.
        """
        seconds = REFERENCE_SECONDS + TEST_SECONDS
        references = [(problem, problem.reference, seconds) for problem in dict.fromkeys(problems)]
        found = _in_parallel(run_together, "reference solutions with their tests", references)
        limits = {problem: _limit(outcome.seconds) for (problem, *_), outcome in zip(references, found, strict=True)}
        programs = [
            ((problem, problem.program(answer), limits[problem]), outcome)
            for problem, samples, apart in zip(problems, answers, outcomes, strict=True)
            for answer, outcome in zip(samples, apart, strict=True)
        ]
        different = list(dict.fromkeys(one for one, outcome in programs if outcome.fate != "not code"))
        again = dict(zip(different, _in_parallel(run_together, "programs with their tests", different), strict=True))
        each = iter(programs)
        return [[again.get(*next(each)) for _ in samples] for samples in answers]

    def limit(self, problem: Problem) -> int:
        """The time limit of a problem that was calibrated, in processor seconds."""
        return self._limits[problem]


def execute(
    executor: Executor,
    problems: Sequence[Problem] | None,
    lines: Sequence[dict[str, Any]],
    path: Path,
    out: EvaluationDirectory,
    metrics: Sequence[str],
) -> Executions:
    """Run the programs in the predictions at `path`, of which `lines` has one per record, and write what became of each.

    Without `problems`, the tests are those that were kept with the predictions. `metrics` has the names of the scores; those of pass@k are computed
    for one process as well.
    """
    say_what_is_not_run([line.get("problem") for line in lines], str(path))
    if problems is None:
        problems = [problem_of(line.get("problem"), f"{path}, record {number}") for number, line in enumerate(lines, start=1)]
    answers = [[sample["prediction"] for sample in line.get("samples") or [line]] for line in lines]
    outcomes = executor.run(problems, answers)
    together = None if executor.same_process else executor.run_again(problems, answers, outcomes)
    written = [
        {
            "limit_seconds": executor.limit(problem),
            "programs": [
                {"fate": apart.fate, "detail": apart.detail, **_other_fate(apart, other)}
                for apart, other in zip(samples, others, strict=True)
            ],
        }
        for problem, samples, others in zip(problems, outcomes, together or outcomes, strict=True)
    ]
    writing.write_jsonl(out.executions, written)
    conditions = f"{CONDITIONS}|{TOGETHER}" if executor.same_process else CONDITIONS
    attempts = _attempts(outcomes, conditions)
    compared = None if together is None else _compared(outcomes, together, [name for name in metrics if name in PASS_AT])
    if compared is not None:
        _say_what_differs(compared, sum(attempts.samples), out)
    return Executions(attempts, count_fates(outcomes), compared)


def _other_fate(apart: Outcome, together: Outcome) -> dict[str, str]:
    """The fate and the detail in one process with the tests, where a program passes either only there or only apart from them."""
    if (apart.fate == "passed") == (together.fate == "passed"):
        return {}
    return {"same_process_fate": together.fate, "same_process_detail": together.detail}


def _attempts(outcomes: Sequence[Sequence[Outcome]], conditions: str) -> Attempts:
    passed = [sum(outcome.fate == "passed" for outcome in samples) for samples in outcomes]
    return Attempts([len(samples) for samples in outcomes], passed, conditions)


def _compared(
    apart: Sequence[Sequence[Outcome]], together: Sequence[Sequence[Outcome]], names: Sequence[str]
) -> dict[str, float]:
    """How many programs pass only apart from their tests or only with them, and the scores by the latter."""
    pairs = [
        (one.fate == "passed", other.fate == "passed")
        for samples, others in zip(apart, together, strict=True)
        for one, other in zip(samples, others, strict=True)
    ]
    attempts = _attempts(together, "")
    blank = [""] * len(attempts.samples)
    scores = {name: float(PassAt(PASS_AT[name], attempts).statistics(blank, blank).mean()) for name in names}
    return {"only_apart": pairs.count((True, False)), "only_together": pairs.count((False, True)), **scores}


def _say_what_differs(compared: Mapping[str, float], programs: int, out: EvaluationDirectory) -> None:
    kinds = {"only_together": "pass only in one process with their tests", "only_apart": "pass only apart from them"}
    counted = " and ".join(f"{compared[name]:.0f} {said}" for name, said in kinds.items() if compared[name])
    if counted:
        scores = ", ".join(f"{name} {compared[name]:.4f}" for name in compared if name in PASS_AT)
        note(
            f"{out.executions}: of {programs} programs, {counted} (same_process_fate names them); in one process, as in the script of HumanEval: {scores}"
        )


def _limit(seconds: float) -> int:
    """The processor seconds of a program whose reference solution took so many."""
    return max(LEAST_SECONDS, math.ceil(TIMES_REFERENCE * seconds))


def count_fates(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, int]:
    """How many programs had each fate; fates that none had are left out."""
    found = [outcome.fate for samples in outcomes for outcome in samples]
    return {fate: found.count(fate) for fate in FATES if fate in found}


def _in_parallel(
    run_one: Callable[[Problem, str, int], Outcome], what: str, programs: Sequence[tuple[Problem, str, int]]
) -> list[Outcome]:
    outcomes = []
    with (
        progress(what, len(programs), "programs") as shown,
        ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)) as pool,
    ):
        try:
            for outcome in pool.map(lambda one: run_one(*one), programs):
                outcomes.append(outcome)
                shown.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes
