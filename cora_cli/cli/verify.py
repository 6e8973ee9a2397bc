"""`cora verify`: compare a run or an evaluation with what it records."""

import dataclasses

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import setting
from cora_cli.terminal import show


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Every setting of `cora verify`."""

    directory: str = setting("Run directory, download of a published run, or directory of an evaluation.", argument=True)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "verify", VerifyConfig, run)


def run(config: VerifyConfig) -> None:
    """Compute hashes, losses and metrics of a run again, offline.

    Where something is not as recorded, it names the file and exits with 1.
    """
    import os
    from pathlib import Path

    # Before the hub's library is imported, which reads it then.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from cora_cli.publishing.verify import verify

    for sentence in verify(Path(config.directory)):
        show(sentence)
    show(f"{config.directory} is as recorded")
    say_next(None, "report", config.directory, "-o", "report")
