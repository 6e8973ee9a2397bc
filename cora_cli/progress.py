"""Show the progress of long work on stderr.

On a terminal this is a bar with the rate and the time left; elsewhere it is a plain line every few seconds.
"""

import io
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from types import FrameType
from typing import Any, NoReturn

from cora_cli.environment import is_first_process
from cora_cli.terminal import folded, printable

LINE_INTERVAL_SECONDS = 10.0
NOTE = "note: "
"""How a line begins that `note` prints."""
_INTERRUPTED = threading.Event()


def say(message: str, folds: bool = True) -> None:
    """Print one status line on stderr, which leaves stdout for results; with several processes, only the first prints.

    In a terminal it `folds` at words, which a command to be copied must not.
    """
    if is_first_process():
        text = printable(message)
        folded_text = folded(text, shutil.get_terminal_size().columns) if folds and sys.stderr.isatty() else text
        print(folded_text, file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Say what a user should know of the inputs or the result. `cora ablate` shows it too, from the logs of its steps (`experiments.screen`)."""
    say(f"{NOTE}{message}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what `say` and others print on stderr."""
    with redirect_stderr(io.StringIO()):
        yield


class Progress:
    """Counts finished units of work and displays the count; created by `progress`."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label, self._total, self._unit = printable(label), total, unit
        self._done = self._start = done
        self._began = self._spoke = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and is_first_process():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=self._label, unit=unit, dynamic_ncols=True, leave=False)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` is shown after the count. Raises `KeyboardInterrupt` if one was swallowed (`interrupts_kept`)."""
        if _INTERRUPTED.is_set():
            raise KeyboardInterrupt
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._spoke >= LINE_INTERVAL_SECONDS or (count and self._done >= self._total):
            self._spoke = now
            rate = (self._done - self._start) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            tail = f", {note}" if note else ""
            say(f"{self._label}: {self._done}/{self._total} {self._unit} ({rate:.2f}/s, {left:.0f} s left{tail})")

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(label: str, total: int, unit: str = "it", done: int = 0) -> Iterator[Progress]:
    """A `Progress` over `total` units, `done` of which are already finished; closed at the end, also after an error."""
    shown = Progress(label, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Let an interrupt that a library swallows in the block end long work at its next unit, and one that it turns into an error be an interrupt.

    A bare `except` in a module that is imported at that moment, as torch imports some for the first optimizer step, is enough to lose one, and
    transformers says of such a module that it cannot be imported. Python prints a traceback of one that arrives in a finalizer, which is left out.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        with _as_interrupt():
            yield
        return
    _INTERRUPTED.clear()
    signal.signal(signal.SIGINT, _interrupt)
    shown, sys.unraisablehook = sys.unraisablehook, _without_interrupts(sys.unraisablehook)
    try:
        with _as_interrupt():
            yield
    finally:
        sys.unraisablehook = shown
        signal.signal(signal.SIGINT, before)
        _INTERRUPTED.clear()


@contextmanager
def _as_interrupt() -> Iterator[None]:
    """Make an error after an interrupt that was swallowed an interrupt; whatever follows, such as the exit code in a block around, is none."""
    try:
        yield
    except BaseException as error:
        swallowed = _INTERRUPTED.is_set()
        _INTERRUPTED.clear()
        if swallowed and isinstance(error, Exception):
            raise KeyboardInterrupt from error
        raise


def _without_interrupts(shown: Callable[["sys.UnraisableHookArgs"], Any]) -> Callable[["sys.UnraisableHookArgs"], None]:
    def hook(found: "sys.UnraisableHookArgs") -> None:
        if not isinstance(found.exc_value, KeyboardInterrupt):
            shown(found)

    return hook


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _INTERRUPTED.set()
    raise KeyboardInterrupt
