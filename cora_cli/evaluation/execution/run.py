"""Run one program against the tests of its problem, watch it, and name its fate.

In `run`, the program is in one sandbox, the tests are in another. They exchange arguments and results (`inside.wire`), and only the tests know what is
expected and report the verdict, so that nothing that a program does makes it pass but the right results. In `run_together` both are in one process.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal, get_args

from cora_cli.errors import CoraError
from cora_cli.evaluation.execution import sandbox
from cora_cli.evaluation.execution.problems import Problem

Fate = Literal["passed", "wrong", "exception", "timeout", "memory", "refused", "not code"]
FATES: tuple[Fate, ...] = get_args(Fate)
TREE_MEMORY = sandbox.MEMORY + (256 << 20)
"""Bytes in memory of all processes of a program together."""
IDLE_SECONDS = 5.0
"""How long a program may wait. Time in which one of its threads could run does not count, so that a busy machine does not end it."""
TEST_SECONDS = 60
"""Processor seconds for the tests themselves, apart from the program."""
_TICK, _LONGEST_TICK = 0.02, 0.1
_LONGEST_REPORT = 1 << 16
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_WAITING = frozenset("STtZXIP")
"""The states (proc_pid_stat(5)) in which a thread neither runs nor could: not R, and not D, which waits for a disk."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program: its fate, a detail such as the exception or the failed assertion, and its processor seconds."""

    fate: Fate
    detail: str
    seconds: float


def run(problem: Problem, source: str, seconds: int) -> Outcome:
    """Run `source` against the tests of `problem`, with a limit in processor seconds.

    Raises `CoraError` if a sandbox fails, which says nothing about the program.
    """
    with contextlib.ExitStack() as stack:
        pipes = [os.pipe() for _ in range(3)]
        ends = stack.enter_context(_Ends([end for pipe in pipes for end in pipe]))
        (to_program, ask), (hear, answer), (result, report) = pipes
        program = stack.enter_context(
            sandbox.started(
                sandbox.script("program.py"),
                {"source.py": source},
                {"limits": sandbox.limits(seconds), "receive": to_program, "send": answer},
                (to_program, answer),
            )
        )
        tests = stack.enter_context(
            sandbox.started(
                sandbox.script("tests.py"),
                {"problem.json": json.dumps(problem.for_tests()), "remote.py": sandbox.script("remote.py")},
                {"limits": sandbox.limits(TEST_SECONDS), "receive": hear, "send": ask, "result": report},
                (hear, ask, report),
            )
        )
        ends.close(to_program, ask, hear, answer, report)  # so that each side notices the end of the other
        watch = _Watch(program, tests, seconds)
        lines = _lines(result, watch)
        if lines[:1] != [["started", ""]]:
            raise CoraError(f"the sandbox of the tests did not start, with exit status {tests.poll()}; nothing was scored")
        fate, detail = lines[1] if len(lines) > 1 else ("tests ended", "")
        if fate == "not started":
            raise CoraError(f"the sandbox of a program did not start, with exit status {program.poll()}; nothing was scored")
        if fate == "gone":
            _await_end(program, watch)
        return _outcome(fate, detail, watch, program.poll(), seconds)


def run_together(problem: Problem, source: str, seconds: int) -> Outcome:
    """Run `source` and the tests of `problem` in one process of one sandbox, where a program can pass without being right (`inside.together`).

    Raises `CoraError` as `run` does.
    """
    with contextlib.ExitStack() as stack:
        result, report = os.pipe()
        ends = stack.enter_context(_Ends([result, report]))
        files = {"source.py": source, "problem.json": json.dumps(problem.for_tests())}
        options = {"limits": sandbox.limits(seconds), "result": report}
        program = stack.enter_context(sandbox.started(sandbox.script("together.py"), files, options, (report,)))
        ends.close(report)
        watch = _Watch(program, None, seconds)
        lines = _lines(result, watch)
        if lines[:1] != [["started", ""]]:
            raise CoraError(f"the sandbox of a program did not start, with exit status {program.poll()}; nothing was scored")
        _await_end(program, watch)
        fate, detail = lines[1] if len(lines) == 2 else ("gone", "closed")
        return _outcome(fate, detail, watch, program.poll(), seconds)


def _await_end(program: "subprocess.Popen[bytes]", watch: "_Watch") -> None:
    while program.poll() is None and watch.killed is None:
        time.sleep(_TICK)
        watch.look()


class _Ends:
    """Ends of pipes, each closed once."""

    def __init__(self, ends: list[int]) -> None:
        self._open = set(ends)

    def __enter__(self) -> "_Ends":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def close(self, *ends: int) -> None:
        for end in ends:
            self._open.discard(end)
            os.close(end)


def _lines(result: int, watch: "_Watch") -> list[list[str]]:
    """What was reported, until the other end is closed or the program was killed; lines that are none of ours are left out."""
    text = b""
    poll = select.poll()
    poll.register(result, select.POLLIN)
    while True:
        ready = poll.poll(1000 * _TICK)
        watch.look()
        if ready:
            part = os.read(result, 1 << 16)
            text += part
        if (ready and not part) or (watch.killed and not ready) or len(text) > _LONGEST_REPORT:
            return [line for line in map(_line, text[:_LONGEST_REPORT].splitlines()) if line]


def _line(text: bytes) -> list[str]:
    """A fate and its detail; empty for what a program wrote that runs together with its tests."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(text):
            case [str(fate), str(detail)]:
                return [fate, detail]
    return []


class _Watch:
    """Kills a program when it has used up what the limits of its single processes do not bound: `killed` then says what."""

    def __init__(self, program: "subprocess.Popen[bytes]", tests: "subprocess.Popen[bytes] | None", seconds: int) -> None:
        self._program, self._tests, self._seconds = program, tests, seconds
        self._idle, self._last = 0.0, time.monotonic()
        self.used = 0.0
        self.killed: Fate | None = None

    def look(self) -> None:
        """Add up processor time, memory and idleness of everything in the sandboxes."""
        now = time.monotonic()
        # Not more than a tick: this process may itself have been kept waiting.
        passed, self._last = min(now - self._last, _LONGEST_TICK), now
        waiting, used, memory = _usage(self._program.pid)
        self.used = max(self.used, used)
        waiting = waiting and (self._tests is None or _usage(self._tests.pid)[0])
        self._idle += passed if waiting else 0.0
        # The kernel stops a single process at the limit; only several can exceed it.
        if self.used > self._seconds + 2 or self._idle > IDLE_SECONDS:
            self.killed = "timeout"
        elif memory > TREE_MEMORY:
            self.killed = "memory"
        if self.killed:
            self._program.kill()


def _usage(root: int) -> tuple[bool, float, int]:
    """Whether all threads of a process and its descendants wait, their processor seconds, and their bytes in memory."""
    waiting, ticks, pages = True, 0, 0
    processes = [root]
    while processes:
        process = Path("/proc", str(processes.pop()))
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = _stat(process)
            ticks += sum(map(int, fields[11:15]))  # utime, stime, and those of children that were waited for
            pages += int(fields[21])
            for thread in (process / "task").iterdir():
                waiting = waiting and _stat(thread)[0] in _WAITING
                processes += map(int, (thread / "children").read_text(encoding="ascii").split())
    return waiting, ticks / _CLOCK_TICKS, pages * _PAGE


def _stat(process: Path) -> list[str]:
    """The fields after the name, which may hold anything."""
    return (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _outcome(fate: str, detail: str, watch: _Watch, status: int | None, seconds: int) -> Outcome:
    """The fate of a program by the verdict of its tests, or by how it ended."""

    def outcome(fate: Fate, detail: str = "") -> Outcome:
        return Outcome(fate, detail, watch.used)

    known: dict[str, Fate] = {one: one for one in FATES}
    if fate in known:
        return outcome(known[fate], detail)
    if watch.killed:
        return outcome(watch.killed)
    if fate == "tests ended":
        return outcome("exception", "the tests could not go on")
    return outcome(*_ending(status or 0, detail, watch.used >= seconds))


def _ending(status: int, detail: str, at_limit: bool) -> tuple[Fate, str]:
    """The fate of a program that ended, or closed its connection, before its tests did."""
    number = status - 128  # bwrap's status for a signal
    if number == signal.SIGXCPU or (number == signal.SIGKILL and at_limit):
        return "timeout", ""
    if number == signal.SIGSYS:
        return "refused", "a system call"
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return "exception", f"ended by {name}"
    return "exception", f"ended with exit status {status}" if detail.endswith("closed") else f"broke the connection: {detail}"
