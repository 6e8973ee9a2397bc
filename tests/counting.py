"""Counts what work costs without a clock, for tests that it grows in proportion to its input."""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], Any]) -> int:
    """The number of functions, of Python and of C, that `work` calls."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def assert_linear(work: Callable[[int], Callable[[], Any]], sizes: Sequence[int] = (20, 40, 80)) -> None:
    """Assert that twice as much input costs twice as many further calls. `work(n)` prepares the work on an input of size n."""
    work(sizes[0] // 2)()  # what is imported or cached once
    small, middle, large = (calls_of(work(size)) for size in sizes)
    assert large - middle <= 2.1 * (middle - small), (small, middle, large)
