"""Declare a command's configuration as a frozen dataclass whose fields carry their help text.

The command line and the YAML files are both generated from these classes (see `cli.command`), so each setting is declared
once. Parsing happens there, not here.
"""

import dataclasses
from typing import Any, Literal

DtypeName = Literal["auto", "bf16", "fp32"]


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    panel: str | None = None,
    flags: tuple[str, ...] = (),
    argument: bool = False,
    repeated: bool = False,
) -> Any:
    """Declare one field of a command's configuration.

    `flags` replaces the flag derived from the field's name, `argument` makes the setting positional, and `panel` is its heading
    in `--help`. A setting without a `default` is required. With `repeated`, a tuple is given by repeating the flag instead of
    as one comma-separated value.
    """
    metadata = {"help": help, "panel": panel, "flags": flags, "argument": argument, "repeated": repeated}
    return dataclasses.field(default=default, metadata=metadata)


def comma_separated(text: str) -> tuple[str, ...]:
    """Split `"a, b"` into `("a", "b")`; empty parts are dropped."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
