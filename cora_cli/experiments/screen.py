"""What `cora ablate` shows while it works: lines for what has ended, and on a terminal a rewritten foot for what runs.

It reads metrics and logs of steps to show them, and changes nothing.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.experiments.steps import Plan, Step
from cora_cli.progress import say

_REDRAW_SECONDS = 0.5


class Screen:
    """Progress over the `wanted` steps of a plan, `slots` at a time; `expected` holds estimated seconds by step."""

    def __init__(self, plan: Plan, wanted: set[str], slots: int, expected: Mapping[str, float]) -> None:
        self._plan, self._slots, self._expected = plan, slots, expected
        self._left = {name: plan.steps[name] for name in plan.steps if name in wanted}
        self._total, self._failed = len(self._left), 0
        self._measured: dict[str, list[float]] = {}
        self._began: dict[str, float] = {}
        self._live, self._drawn, self._drew = sys.stderr.isatty(), 0, 0.0

    def kept(self, step: Step) -> None:
        """A step was whole already."""
        del self._left[step.name]
        if step.kind == "evaluate":
            self._line(f"{self._count()} {step.name}: whole already{_metrics(self._plan, step)}")

    def submitted(self, step: Step, how: str) -> None:
        """A step was started or queued."""
        self._began[step.name] = time.monotonic()
        if not self._live:
            self._line(f"{self._count()} {step.name}: {how}{self._time_left()}")

    def made(self, step: Step, seconds: float) -> None:
        """A step ended well."""
        del self._left[step.name]
        self._measured.setdefault(step.kind, []).append(seconds)
        note = _metrics(self._plan, step) if step.kind == "evaluate" else _loss(self._plan, step)
        self._line(f"{self._count()} {step.name}: done in {duration(seconds)}{note}")

    def ended(self, step: Step, reason: str) -> None:
        """A step failed, or cannot be run."""
        del self._left[step.name]
        self._failed += 1
        self._line(f"{self._count()} {step.name}: {reason}")

    def note(self, text: str) -> None:
        """Say something that is no step's end."""
        self._line(text)

    def show(self, logs: Mapping[str, Path]) -> None:
        """Draw the foot again where there is a terminal: one line in all, and one for each running step with its log's last words."""
        now = time.monotonic()
        if not self._live or now - self._drew < _REDRAW_SECONDS:
            return
        self._drew = now
        width = shutil.get_terminal_size().columns - 1
        failed = f", {self._failed} not made" if self._failed else ""
        lines = [f"{self._total - len(self._left)} of {self._total} steps{failed}{self._time_left()}"]
        for name, log in logs.items():
            lines.append(f"  {name} {duration(now - self._began[name])}  {_last_words(log)}")
        self._wipe()
        sys.stderr.write("".join(line[:width] + "\n" for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Take the foot off the screen."""
        self._wipe()

    def _line(self, text: str) -> None:
        self._wipe()
        say(text)

    def _wipe(self) -> None:
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _count(self) -> str:
        return f"[{self._total - len(self._left)}/{self._total}]"

    def _time_left(self) -> str:
        """From measured steps of the same kind where there are any, else from the estimate."""
        left, now = 0.0, time.monotonic()
        for name, step in self._left.items():
            measured = self._measured.get(step.kind)
            expected = sum(measured) / len(measured) if measured else self._expected.get(name)
            if expected is None:
                return ""
            left += max(expected - (now - self._began[name]), 0.0) if name in self._began else expected
        return f", about {duration(left / min(self._slots, len(self._left)))} left"


def duration(seconds: float) -> str:
    """`41 s`, `7 min`, `3.5 h`, `12 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def _metrics(plan: Plan, step: Step) -> str:
    try:
        metrics = rundir.read_json(plan.out / step.output / "metrics.json")["metrics"]
    except (CoraError, KeyError, TypeError):
        return ""
    return "; " + ", ".join(f"{name} {value['value']:.{2 if name == 'sacrebleu' else 3}f}" for name, value in metrics.items())


def _loss(plan: Plan, step: Step) -> str:
    if step.kind not in ("model", "train"):
        return ""
    try:
        heldout = rundir.read_json(plan.out / step.output / "run.json")["heldout"]
        return f"; held-out loss {heldout['before']['loss']:.3f} -> {heldout['after']['loss']:.3f}"
    except (CoraError, KeyError, TypeError):
        return ""


def _last_words(log: Path) -> str:
    try:
        text = log.read_bytes()[-2_000:].decode("utf-8", errors="replace")
    except OSError:
        return ""
    return ([line for line in text.replace("\r", "\n").splitlines() if line.strip()] or [""])[-1]
