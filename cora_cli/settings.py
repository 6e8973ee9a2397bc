"""Declare a command's configuration as a frozen dataclass whose fields carry their help text.

The command line and the YAML files are both generated from these classes (see `cli.command`), so each setting is declared
once. Parsing happens there, not here.
"""

import contextlib
import dataclasses
import datetime
import functools
import math
import re
from collections.abc import Collection
from typing import Any, Literal

from cora_cli.errors import UsageError

DtypeName = Literal["auto", "bf16", "fp32"]
TemplateName = Literal["auto", "alpaca", "chat", "plain"]
ATTENTIONS = ("auto", "varlen", "flex", "flash-attn", "sdpa")
"""What `--attention` takes, or else a repository of kernels on the hub."""
LARGEST_RANK = 65_536
"""Above the width of any model."""
Named = Literal["model", "model or basis", "dataset", "basis", "run", "predictions", "output"]
"""What the value of a setting may have to name (see `cli.inputs`)."""
_LARGEST = 2**63 - 1
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1.2e-38, 3.4e38  # in float32, in which results are computed
MOST = 10**9
"""For numbers that nothing else bounds: larger counts overflow in libraries, and larger scalings in what they multiply."""


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    panel: str | None = None,
    flags: tuple[str, ...] = (),
    argument: bool = False,
    repeated: bool = False,
    most: int | None = None,
    names: Named | None = None,
) -> Any:
    """Declare one field of a command's configuration.

    `flags` replaces the flag derived from the field's name, `argument` makes the setting positional, and `panel` is its heading
    in `--help`. A setting without a `default` is required. With `repeated`, a tuple is given by repeating the flag instead of
    as one comma-separated value. A number above `most` is refused (see `range_problems`): no machine could work with it. A value that
    `names` something that cannot exist is refused before anything heavy is imported (see `cli.inputs`).
    """
    metadata = {
        **{"help": help, "panel": panel, "flags": flags, "argument": argument, "repeated": repeated},
        **{"most": most, "names": names},
    }
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def _bounds(configuration: type) -> dict[str, float | None]:
    """The `most` of each field. Cached, since a grid of thousands of rows creates as many configurations with a hundred fields."""
    return {field.name: field.metadata["most"] for field in dataclasses.fields(configuration)}


def range_problems(config: Any) -> list[str]:
    """Sentences on numbers of a configuration that are not finite, above the `most` of their field, 0 in float32, or no seeds, and on its device."""
    problems = []
    bounds = _bounds(config.__class__)
    numbers = {name: value for name, value in vars(config).items() if type(value) in (int, float) and name in bounds}
    for name, value in numbers.items():
        most = bounds[name]
        need = ""
        if isinstance(value, float) and not math.isfinite(value):
            need = f"a finite number, not {value}"
        elif name == "seed" and not 0 <= value < 2**32:
            need = f"at least 0 and below 2^32, not {value}"
        elif name == "split_seed" and value < 0:  # Python's generator takes the absolute value
            need = f"at least 0, not {value}"
        elif type(value) is int and abs(value) > (most or _LARGEST):
            need = f"at most {most or _LARGEST:,}, not {value:,}"
        elif type(value) is float and abs(value) > (most or _LARGEST_FLOAT):
            need = f"at most {most or _LARGEST_FLOAT:,}, not {value:,}"
        elif type(value) is float and 0 < abs(value) < _SMALLEST_FLOAT:
            need = f"at least {_SMALLEST_FLOAT}, not {value}"
        if need:
            problems.append(f"--{name.replace('_', '-')} must be {need}")
    if problem := device_problem(getattr(config, "device", "auto")):
        problems.append(problem)
    return problems


def given(config: Any, names: Collection[str]) -> list[str]:
    """Those of the settings `names` that are not at their defaults, as they are written on the command line."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            flag = f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
            found.append(f"{flag} {value}" if isinstance(value, str) and field.default is not None else flag)
    return found


def refuse_useless(config: Any, names: Collection[str], where: str) -> None:
    """Raise `UsageError` for the first of the settings `names` that was given although it has no effect `where`."""
    if useless := given(config, names):
        raise UsageError(f"{useless[0]} has no effect {where}; leave it out")


def device_problem(device: str) -> str | None:
    """Why `device` is no value of `--device`; None if it is one, whether or not this machine has it."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        return None
    return f"--device must be auto, cpu, cuda or cuda:<index>, not {device!r}"


def comma_separated(text: str) -> tuple[str, ...]:
    """Split `"a, b"` into `("a", "b")`; empty parts are dropped."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def today() -> str:
    """The date of this day here, as YYYY-MM-DD."""
    return datetime.datetime.now().date().isoformat()


def check_date(text: str | None) -> str | None:
    """What is wrong with a date for a template; None if nothing is."""
    with contextlib.suppress(ValueError):
        if text is None or datetime.date.fromisoformat(text).isoformat() == text:
            return None
    return f"--template-date must be a date such as {today()}, not {text!r}"
