"""Progress of long work, and interrupts that a library swallows."""

import contextlib
import os
import signal
import sys

import pytest
import typer

from cora_cli.cli.command import clean_errors
from cora_cli.progress import interrupts_kept, progress


def swallow_an_interrupt() -> None:
    with contextlib.suppress(BaseException):  # as a bare `except` in an imported module does
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 5)


def import_a_module_while_interrupted(swallowed: bool) -> None:
    if swallowed:
        swallow_an_interrupt()
        raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'")
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 5)


def test_the_last_count_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 2) as shown:
        shown.advance(2)
        shown.advance(0)
    assert capsys.readouterr().err.count("work: 2/2") == 1


def test_a_swallowed_interrupt_ends_the_work_at_its_next_unit() -> None:
    with interrupts_kept(), progress("work", 3) as shown:
        shown.advance()
        swallow_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            shown.advance()


def test_an_error_that_a_library_makes_of_an_interrupt_is_an_interrupt() -> None:
    @interrupts_kept()
    def import_a_module() -> None:
        import_a_module_while_interrupted(swallowed=True)

    with pytest.raises(KeyboardInterrupt):
        import_a_module()


@pytest.mark.parametrize("swallowed", [True, False])
def test_an_interrupt_in_a_block_within_another_is_said_once(swallowed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, clean_errors(debug=False), clean_errors(debug=False):
        import_a_module_while_interrupted(swallowed)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "cora: interrupted\n"


def test_an_error_without_an_interrupt_stays_one() -> None:
    with pytest.raises(ModuleNotFoundError), interrupts_kept():
        raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'")


def test_an_interrupt_in_a_finalizer_ends_the_work_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    class Closed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)

    shown, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__  # instead of pytest's
    try:
        with interrupts_kept(), progress("work", 3) as counted:
            Closed()
            with pytest.raises(KeyboardInterrupt):
                counted.advance()
    finally:
        sys.unraisablehook = shown
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_of_earlier_work_does_not_end_the_next() -> None:
    for _ in range(2):
        with interrupts_kept(), progress("work", 3) as shown:
            shown.advance()
            swallow_an_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_another_program_stays() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_kept():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
