"""Templates and patterns from elsewhere end, in time and within memory."""

import re
import signal

import pytest

from cora_cli.errors import CoraError
from cora_cli.limits import bounded


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with pytest.raises(CoraError, match=r"the pattern took more than 0.2 s"), bounded("the pattern", seconds=0.2):
        re.match("(a+)+$", "a" * 60 + "b")


def test_a_text_that_fits_no_memory_is_refused() -> None:
    with pytest.raises(CoraError, match="needs more than 1 GiB of memory"), bounded("the template", extra_bytes=1 << 30):
        "a" * (1 << 40)


def test_endless_recursion_is_refused() -> None:
    def again() -> None:
        again()

    with pytest.raises(CoraError, match="calls itself without end"), bounded("the template"):
        again()


def test_what_ends_in_time_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with bounded("nothing", seconds=5):
        pass
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
