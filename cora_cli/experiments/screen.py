"""Progress display of `cora ablate`: one line per finished step and, on a terminal, a live status of the running steps.

It reads the metrics and logs of steps and writes only to stderr.
"""

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cora_cli.errors import CoraError
from cora_cli.experiments.launch import PROMPT
from cora_cli.experiments.ledger import lacks_judgments
from cora_cli.experiments.steps import Plan, Step
from cora_cli.progress import NOTE, say
from cora_cli.reading import read_json
from cora_cli.records import Metrics, read_run
from cora_cli.rundir import RunDirectory
from cora_cli.terminal import fitted, printable
from cora_cli.training.proposal import rate_in

_REDRAW_SECONDS = 0.5


class Screen:
    """Progress of the `wanted` steps of a plan, of which `slots` run at a time; `expected` has estimated seconds by step.

    `noted` collects what was shown of the notes in logs, for the screens of later rounds.
    """

    def __init__(
        self, plan: Plan, wanted: set[str], slots: int, expected: Mapping[str, float], noted: set[str] | None = None
    ) -> None:
        self._plan, self._slots, self._expected = plan, slots, expected
        self._left = {name: plan.steps[name] for name in plan.steps if name in wanted}
        self._total, self._failed = len(self._left), 0
        self._measured: dict[str, tuple[float, int]] = {}
        self._began: dict[str, float] = {}
        # Of the steps that have not begun: their number, and how many have no estimate and the sum of the others', by kind.
        self._ahead: Counter[str] = Counter(step.kind for step in self._left.values())
        self._unknown: Counter[str] = Counter(step.kind for name, step in self._left.items() if name not in expected)
        self._estimated: dict[str, float] = dict.fromkeys(self._ahead, 0.0)
        for name, step in self._left.items():
            self._estimated[step.kind] += expected.get(name, 0.0)
        self._noted = set[str]() if noted is None else noted
        self._of_runs = re.compile(rf"{re.escape(str(plan.out))}/(runs|models|evaluations)/[^\s:,;]+")
        # Steps that all rows share, such as those of source models, note the same of each data set.
        several = plan.grid.rows if len(plan.grid.datasets) > 1 else ()
        self._data = {name: row.dataset for row in several for name in plan.steps_of[row.name]}
        self._live, self._drawn, self._drew = sys.stderr.isatty(), 0, 0.0

    def up_to_date(self, step: Step) -> None:
        """Report that a step was already complete."""
        self._forget(step)
        if step.kind == "evaluate":
            self._line(f"{self._count()} {step.name}: up to date{_metrics(self._plan, step)}")

    def submitted(self, step: Step, how: str) -> None:
        """Report that a step was started or queued; `how` says which."""
        self._leave(step)
        self._began[step.name] = time.monotonic()
        if not self._live:
            self._line(f"{self._count()} {step.name}: {how}{self._time_left()}")

    def completed(self, step: Step, seconds: float, log: Path) -> None:
        """Report that a step has finished, with its metrics or held-out loss, and what its log notes that no earlier step's with the same data set did."""
        self._forget(step)
        total, count = self._measured.get(step.kind, (0.0, 0))
        self._measured[step.kind] = (total + seconds, count + 1)
        note = "".join(of(self._plan, step) for of in (_metrics, _rate, _loss, _judgments))
        self._line(f"{self._count()} {step.name}: done in {duration(seconds)}{note}")
        for text in _notes(log):
            # Runs of one method note the same under their own names.
            kind = f"{self._data.get(step.name)} {self._of_runs.sub('', text)}"
            if kind not in self._noted:
                self._noted.add(kind)
                self._line(f"    {text}")

    def failed(self, step: Step, reason: str) -> None:
        """Report that a step failed or was skipped, with the reason."""
        self._forget(step)
        self._failed += 1
        self._line(f"{self._count()} {step.name}: {reason}")

    def note(self, text: str) -> None:
        """Print a line that does not end a step."""
        self._line(text)

    def show(self, logs: Mapping[str, Path]) -> None:
        """On a terminal, redraw the live status: a summary line, and for each running step the last line of its log."""
        now = time.monotonic()
        if not self._live or now - self._drew < _REDRAW_SECONDS:
            return
        self._drew = now
        width = shutil.get_terminal_size().columns - 1
        failed = f", {self._failed} failed or skipped" if self._failed else ""
        lines = [f"{self._total - len(self._left)} of {self._total} steps{failed}{self._time_left()}"]
        for name, log in logs.items():
            lines.append(f"  {name} {duration(now - self._began[name])}  {_last_line(log)}")
        self._wipe()
        sys.stderr.write("".join(fitted(printable(line), width) + "\n" for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Remove the live status from the screen."""
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

    def _forget(self, step: Step) -> None:
        """Count a step that needs no more time."""
        del self._left[step.name]
        if self._began.pop(step.name, None) is None:
            self._leave(step)

    def _leave(self, step: Step) -> None:
        """Count a step that is no longer ahead."""
        self._ahead[step.kind] -= 1
        self._unknown[step.kind] -= step.name not in self._expected
        self._estimated[step.kind] -= self._expected.get(step.name, 0.0)

    def _time_left(self) -> str:
        """Time left, from measured steps of the same kind if there are any, else from the estimates.

        It costs as much with ten thousand steps as with ten, since it is shown for every one of them.
        """
        means = {kind: total / count for kind, (total, count) in self._measured.items()}
        left, now = 0.0, time.monotonic()
        for kind, count in self._ahead.items():
            if not count:
                continue
            if kind in means:
                left += count * means[kind]
            elif self._unknown[kind]:
                return ""
            else:
                left += self._estimated[kind]
        for name, began in self._began.items():
            expected = means.get(self._left[name].kind, self._expected.get(name))
            if expected is None:
                return ""
            left += max(expected - (now - began), 0.0)
        return f", about {duration(left / min(self._slots, len(self._left)))} left" if self._left else ""


def duration(seconds: float) -> str:
    """Format seconds as `41 s`, `7 min`, `3.5 h` or `12 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def _metrics(plan: Plan, step: Step) -> str:
    if step.kind != "evaluate":
        return ""
    try:
        metrics = read_json(plan.out / step.output / "metrics.json", Metrics)["metrics"]
    except CoraError:
        return ""
    return "; " + ", ".join(f"{name} {value['value']:.{2 if name == 'sacrebleu' else 3}f}" for name, value in metrics.items())


def _rate(plan: Plan, step: Step) -> str:
    if step.kind != "proposal":
        return ""
    try:
        return f"; learning rate {rate_in(plan.out / step.output):g} proposed"
    except CoraError:
        return ""


def _loss(plan: Plan, step: Step) -> str:
    if step.kind not in ("model", "train"):
        return ""
    try:
        heldout = read_run(RunDirectory(plan.out / step.output)).get("heldout")
    except CoraError:
        return ""
    return f"; held-out loss {heldout['before']['loss']:.3f} -> {heldout['after']['loss']:.3f}" if heldout else ""


def _judgments(plan: Plan, step: Step) -> str:
    lacks = step.kind == "judge" and lacks_judgments(plan.out / step.output)
    return "; not all judgments were obtained, and the same command asks for the others" if lacks else ""


def _notes(log: Path) -> list[str]:
    """What the last part of a step's log notes (`progress.note`); earlier parts are of earlier calls."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    begins = max((place for place, line in enumerate(lines) if line.startswith(PROMPT)), default=0)
    return [line.rstrip() for line in lines[begins:] if line.startswith(NOTE)]


def _last_line(log: Path) -> str:
    try:
        text = log.read_bytes()[-2_000:].decode("utf-8", errors="replace")
    except OSError:
        return ""
    return ([line for line in text.replace("\r", "\n").splitlines() if line.strip()] or [""])[-1]
