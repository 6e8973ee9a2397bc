"""The lines in which a dry run says what a command would read and write, its peak memory by part, and the GPUs that it fits."""

from collections.abc import Mapping
from typing import Any

CARDS = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs, in GB as their makers write it."""
USABLE = 0.92
"""The part of a card that tensors get: the CUDA context takes 0.3 to 0.6 GB, and the allocator cannot use every gap."""


def fits(total: float, capacity: float) -> bool:
    """Whether a peak of so many bytes fits a card of `capacity` bytes."""
    return total <= USABLE * capacity


def size_text(size: float) -> str:
    """A number of bytes as people read it."""
    if size < 2**10:
        return f"{size:.0f} B"
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """A time to two places: `95 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def memory_lines(parts: Mapping[Any, float], on_gpu: bool) -> list[str]:
    """The bytes of each part that takes some, and which cards hold all of them together. Marks are plain ASCII."""
    width = max(map(len, parts)) + 1
    lines = [f"  {part:<{width}}{size_text(size):>10}" for part, size in parts.items() if size]
    if not on_gpu:
        return [*lines, "(tensors only: Python and its libraries take about 0.6 GiB more)"]
    total = sum(parts.values())
    cards = (f"{card} GB: {'yes' if fits(total, card * 2**30) else 'no'}" for card in CARDS)
    return [
        *lines,
        "  ".join(["fits a card of", *cards]),
        f"(a card counts as full at {100 * USABLE:.0f} %: the CUDA context and gaps between tensors take the rest)",
    ]


def file_lines(verb: str, files: Mapping[str, float | None]) -> list[str]:
    """What would be read or written, with its bytes where they are known."""
    sizes = {name: "" if size is None else f": {size_text(size)}" for name, size in files.items()}
    return [f"{verb} {name}{size}" for name, size in sizes.items()]
