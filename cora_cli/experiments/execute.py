"""Runs the steps of a plan in order of their dependencies, several at a time, and continues after failures.

It can be interrupted at any time: finished steps stay finished, and the next call runs the rest. `launch` starts processes,
`ledger` decides which steps are done, and `screen` shows progress.
"""

import contextlib
import dataclasses
import heapq
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from cora_cli import lock, writing
from cora_cli.errors import CoraError
from cora_cli.experiments.later_seeds import seeds_before
from cora_cli.experiments.launch import Job, Launcher
from cora_cli.experiments.ledger import FINISHED, Ledger
from cora_cli.experiments.plan_record import plan_record
from cora_cli.experiments.screen import Screen
from cora_cli.experiments.steps import BASES, COMMANDS, Plan, Step
from cora_cli.records import PLAN, read_sealed, write_sealed

_POLL_SECONDS = 0.1
_LAST_LINES = 6
_RESOLVED = "grid.yaml"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of running a plan: names of steps that were up to date, completed, failed, or were blocked by a failure.

    `failed` maps a name to its error, `blocked` to the failed step that it depends on.
    """

    up_to_date: tuple[str, ...]
    completed: tuple[str, ...]
    failed: dict[str, str]
    blocked: dict[str, str]


def refuse_other_grid(out: Path) -> None:
    """Raise `CoraError` for a file where the resolved grid is written, next to the plan, that no plan came with: such as the grid file of a user who has the
    results next to it."""
    if (out / _RESOLVED).exists() and not (out / PLAN).exists():
        raise CoraError(
            f"{out / _RESOLVED} would be replaced by the resolved grid, which has another form; choose another --output-dir, or rename the file"
        )


def write_plan(plan: Plan, stages: Mapping[str, Any] | None = None) -> None:
    """Write `plan.json`, `grid.yaml` (the resolved grid), and the held-out records for evaluating the base model.

    `stages` is what `stage_record` adds for a grid with stages.
    """
    record = {**plan_record(plan), **(stages or {})}
    before = seeds_before(plan.out, record)
    write_sealed(plan.out / PLAN, {**record, **({"seeds_before": before} if before else {})})
    writing.write_yaml(plan.out / _RESOLVED, plan.grid.resolved())
    for name, records in plan.records.items():
        writing.write_jsonl(plan.out / name, records)


@dataclasses.dataclass
class _Running:
    job: Job
    log: Path
    began: float


class Execution:
    """One run of a plan."""

    def __init__(self, plan: Plan, wanted: set[str], launcher: Launcher, screen: Screen, held: int) -> None:
        """`wanted` names the steps to complete; `held` is the descriptor of the lock on the output directory."""
        self._plan, self._launcher, self._screen, self._held = plan, launcher, screen, held
        self._ledger = Ledger(plan.out, plan.texts)
        # A plan lists each step after its dependencies. A step enters `_unchecked` with its last dependency's result, and `_startable`
        # once it is known not to be done; both are heaps, so that steps run in the order of the plan.
        chosen = [step for step in plan.steps.values() if step.name in wanted]
        self._places = {step.name: place for place, step in enumerate(chosen)}
        self._lacking = {step.name: len(set(step.needs)) for step in chosen}
        self._dependents: dict[str, list[Step]] = {}
        for step in chosen:
            for need in dict.fromkeys(step.needs):
                self._dependents.setdefault(need, []).append(step)
        self._unchecked = [(self._places[step.name], step) for step in chosen if not step.needs]
        self._startable: list[tuple[int, Step]] = []
        self._running: dict[str, _Running] = {}
        self._results: dict[str, str] = {}
        self._up_to_date: list[str] = []
        self._completed: list[str] = []
        self._failed: dict[str, str] = {}
        self._blocked: dict[str, str] = {}

    def run(self) -> Outcome:
        """Run the steps that are not done.

        On an interruption (Ctrl-C, SIGTERM) running steps are stopped; a later call continues them.
        """
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while self._unchecked or self._startable or self._running:
                self._advance()
                self._reap()
                self._screen.show({name: running.log for name, running in self._running.items()})
                if self._running and not self._unchecked:
                    time.sleep(_POLL_SECONDS)
        finally:
            signal.signal(signal.SIGTERM, previous)
            for running in self._running.values():
                running.job.stop()
            self._screen.close()
        return Outcome(tuple(self._up_to_date), tuple(self._completed), self._failed, self._blocked)

    def _advance(self) -> None:
        """Start steps while there are free slots, and meanwhile check which steps are up to date, until it is time to poll."""
        until = time.monotonic() + _POLL_SECONDS
        while True:
            free = len(self._running) < self._launcher.slots
            if free and self._startable and (not self._unchecked or self._startable[0] < self._unchecked[0]):
                self._start(heapq.heappop(self._startable)[1])
            elif self._unchecked and (free or time.monotonic() < until):
                self._check(*heapq.heappop(self._unchecked))
            else:
                return

    def _check(self, place: int, step: Step) -> None:
        verdict = self._ledger.check(step, self._results)
        if verdict.done and verdict.result is not None:
            self._up_to_date.append(step.name)
            self._screen.up_to_date(step)
            self._settle(step, verdict.result)
        else:
            heapq.heappush(self._startable, (place, step))

    def _settle(self, step: Step, result: str) -> None:
        """Note the result of a step; steps for which it was the last missing one become ready."""
        self._results[step.name] = result
        for dependent in self._dependents.get(step.name, ()):
            self._lacking[dependent.name] -= 1
            if not self._lacking[dependent.name]:
                heapq.heappush(self._unchecked, (self._places[dependent.name], dependent))

    def _start(self, step: Step) -> None:
        log = log_of(self._plan, step)
        try:
            if cleared := self._ledger.clear(step, self._results):
                self._screen.note(cleared)
            self._ledger.start(step, self._results)
            job = self._launcher.submit(step.kind, step.argv, log)
        except CoraError as error:
            self._fail(step, str(error))
            return
        self._running[step.name] = _Running(job, log, time.monotonic())
        self._note()
        self._screen.submitted(step, self._launcher.how)

    def _reap(self) -> None:
        for name, running in list(self._running.items()):
            code = running.job.ended()
            if code is None:
                continue
            del self._running[name]
            self._note()
            step, seconds = self._plan.steps[name], time.monotonic() - running.began
            try:
                if code != 0:
                    raise CoraError(_error_in(running.log, code))
                result = self._ledger.finish(step, self._results, seconds)
            except CoraError as error:
                self._fail(step, str(error))
            else:
                self._completed.append(name)
                self._screen.completed(step, seconds, running.log)
                self._settle(step, result)

    def _fail(self, step: Step, error: str) -> None:
        self._failed[step.name] = error
        self._ledger.fail(step, self._results, error)
        self._screen.failed(step, f"failed: {error}")
        for blocked in self._depending_on(step):
            if blocked.name not in self._blocked:
                self._blocked[blocked.name] = step.name
                self._screen.failed(blocked, f"skipped, because {step.name} failed")

    def _depending_on(self, step: Step) -> list[Step]:
        """All steps that need `step`, directly or not, in the order of the plan."""
        found, new = dict[str, Step](), [step]
        while new:
            nearest = {other.name: other for one in new for other in self._dependents.get(one.name, ())}
            new = [other for name, other in nearest.items() if name not in found]
            found |= nearest
        return sorted(found.values(), key=lambda other: self._places[other.name])

    def _note(self) -> None:
        lock.note_holders(self._held, [pid for running in self._running.values() if (pid := running.job.pid) is not None])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def log_of(plan: Plan, step: Step) -> Path:
    """The log file of a step."""
    return plan.out / "logs" / f"{step.name}.log"


def last_lines(log: Path, count: int = _LAST_LINES) -> list[str]:
    """The last lines of a log that are not blank."""
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-count:]


def _error_in(log: Path, code: int) -> str:
    line = (last_lines(log, 1) or ["no output"])[0].removeprefix("cora: error: ")
    return f"killed by signal {-code}" if code < 0 else line


_TEXTS = {
    "tokenizer_sha256": (COMMANDS.keys() - {"basis"}, "the tokenizer of {}, or its chat template,"),
    "end_tokens": (frozenset({"evaluate", "judge"}), "the eos_token_id in generation_config.json of {}"),
    BASES: (frozenset({"basis"}), "the base model of an adapter among the source models"),
}
"""For each of `Plan.texts` the kinds of step that depend on it, and what it is."""


def refuse_conflicts(plan: Plan, wanted: set[str], overwrite: bool, dtype: str | None = None) -> None:
    """Raise `CoraError` that lists results of `wanted` steps created with other settings, unless `overwrite` is set.

    Also raises it where the tokenizer, or what ends an answer, has changed since other rows were finished, which then could not be compared,
    and where these were computed in another type than `dtype`, that of the steps to come on this machine.
    """
    ledger = Ledger(plan.out)
    recorded = _recorded_plan(plan.out)
    is_done = all(ledger.has_finished(step) for name, step in plan.steps.items() if name in wanted)
    for step in plan.steps.values():
        record = ledger.record(step)
        if record.get("status") != FINISHED or record["key"] != step.key:
            continue
        computed_in = None if dtype is None or is_done else ledger.dtype(step)
        if computed_in not in (None, dtype):
            raise CoraError(
                f"{step.output} was computed in {computed_in}, and this machine would compute the further rows in {dtype}, so they could not be "
                "compared; continue on a machine like the earlier one, or choose another --output-dir"
            )
        theirs = record.get("texts", recorded)  # earlier versions noted them in the plan alone
        for key, ours in plan.texts.items():
            kinds, what = _TEXTS[key]
            if step.kind in kinds and _has_changed(key, theirs.get(key), ours, step):
                raise CoraError(
                    f"{what.format(plan.grid.model)} has changed since {step.output} was finished, so further rows could not be compared with it; "
                    "restore it, or choose another --output-dir"
                )
    found = [(step, differing) for name, step in plan.steps.items() if name in wanted and (differing := ledger.conflict(step))]
    if found and not overwrite:
        shown = "; ".join(f"{step.output} ({differing})" for step, differing in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CoraError(
            f"{plan.out} holds results that were created with other settings: {shown}{more}; choose another --output-dir, or "
            "replace them with --overwrite"
        )


def _has_changed(key: str, theirs: Any, ours: Any, step: Step) -> bool:
    if key != BASES or theirs is None:
        return theirs not in (None, ours)
    # Of other sources than this basis has, there may be more or fewer; a change of weights is that of the adapter alone.
    own = set(step.facts["sources"]) if step.facts["source"] != "delta" else set()
    return any(theirs.get(source, base) != base for source, base in ours.items() if source in own)


def _recorded_plan(out: Path) -> Mapping[str, Any]:
    with contextlib.suppress(CoraError):  # a damaged plan is written again
        return read_sealed(out / PLAN)
    return {}


def done_steps(plan: Plan) -> Mapping[str, bool]:
    """Whether each step is done, by name. A step is not done while one of its dependencies is not."""
    ledger = Ledger(plan.out)
    results: dict[str, str] = {}
    found = {}
    for name, step in plan.steps.items():
        verdict = ledger.check(step, results) if all(need in results for need in step.needs) else None
        found[name] = verdict is not None and verdict.done
        if verdict is not None and verdict.result is not None:
            results[name] = verdict.result
    return found
