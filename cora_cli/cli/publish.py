"""`cora publish`: upload a finished run to the Hugging Face hub."""

import dataclasses
import re
from typing import TYPE_CHECKING

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.errors import UsageError
from cora_cli.settings import setting
from cora_cli.terminal import show

if TYPE_CHECKING:
    from cora_cli.publishing.publish import Files

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Every setting of `cora publish`."""

    run: str = setting("Run directory of `cora train`.", argument=True)
    to: str = setting("Name on the hub, as org/name; created if need be.")
    private: bool = setting("Create it as a private repository.", False)
    records: bool = setting("Also upload the held-out records and the evaluations in the run, which quote the data.", True)
    report: str | None = setting(
        "report.json of `cora report -o DIR`, whose verdict on the run goes into the model card.", None
    )
    overwrite: bool = setting("Replace all files of a repository that holds some already.", False)
    dry_run: bool = setting("List the files with their sizes; nothing is uploaded, and no network is needed.", False)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)

    def __post_init__(self) -> None:
        """Check the name, which needs no file."""
        if not _NAME.fullmatch(self.to) or ".." in self.to or "--" in self.to or self.to.endswith(".git") or len(self.to) > 96:
            raise UsageError(f"--to must be a name on the hub such as org/name, not {self.to!r}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "publish", PublishConfig, run, what_is_saved)


def what_is_saved(config: PublishConfig) -> str:
    """What an interrupted upload leaves."""
    return f"the files appear on {config.to} all at once or not at all; the same command uploads what is missing"


def run(config: PublishConfig) -> None:
    """Upload a finished run to the Hugging Face hub.

    The adapter lies at the top, where other programs look for it. `cora verify` checks a download.
    """
    from pathlib import Path

    from cora_cli.publishing.publish import files_of, upload
    from cora_cli.rundir import RunDirectory

    files = files_of(RunDirectory(Path(config.run)), config.to, config.records, Path(config.report) if config.report else None)
    if config.dry_run:
        show(listing(files))
        show(f"{len(files)} files would go to {config.to}{' (private)' if config.private else ''}; nothing was uploaded")
        return
    show(f"{len(files)} files are at {upload(config.to, files, config.private, config.overwrite)}")
    say_next(None, "evaluate", "--model", config.to, "--dataset", "DATA", "-o", "EVALUATION")


def listing(files: "Files") -> str:
    """The files by their path in the repository, with their sizes in bytes and where they come from."""
    from cora_cli.publishing.publish import size_of

    sizes = {path: size_of(content) for path, content in files.items()}
    widths = max(map(len, files)), len(f"{max(sizes.values()):,}")
    return "\n".join(
        f"{path.ljust(widths[0])} {f'{sizes[path]:,}'.rjust(widths[1])}  {'written for it' if isinstance(content, bytes) else content}"
        for path, content in sorted(files.items())
    )
