"""How a command's configuration is declared: a frozen dataclass whose fields carry their help text.

The command line and the YAML files are both generated from these classes (see `cli.command`), so a setting is written down
once. It knows no command and parses nothing.
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

    `flags` replaces the flag that is derived from the field's name, `argument` makes it positional, `panel` is its heading in
    `--help`. Without a `default` the setting must be given. `repeated` allows a tuple to be given as a repeated flag rather than
    as one comma-separated value.
    """
    metadata = {"help": help, "panel": panel, "flags": flags, "argument": argument, "repeated": repeated}
    return dataclasses.field(default=default, metadata=metadata)


def comma_separated(text: str) -> tuple[str, ...]:
    """Split `"a, b"` into `("a", "b")`; empty parts vanish."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
