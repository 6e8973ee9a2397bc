"""`cora report`: summarize finished runs and grids in tables, plots and one HTML page."""

import contextlib
import dataclasses
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next, say_where_to_look
from cora_cli.errors import UsageError
from cora_cli.settings import setting
from cora_cli.terminal import columns, show


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Every setting of `cora report`."""

    outputs: tuple[str, ...] = setting(
        "Output directories of `cora ablate`, run directories of `cora train`, evaluation directories, directories of `cora judge`, or folders of these.",
        argument=True,
        names="output",
    )
    format: Literal["terminal", "markdown", "latex", "csv", "json", "html"] = setting("Output format on stdout.", "terminal")
    output_dir: str | None = setting(
        "Directory for a copy of the report in all formats, with plots as SVG and PNG.", None, flags=("--output-dir", "-o")
    )
    metrics: tuple[str, ...] | None = setting(
        "Metrics to show, comma-separated: rouge, meteor, bleu, bertscore, calibration, or single metrics such as rougeL. Default: all.",
        None,
    )
    watch: bool = setting(
        "Write the report again after each change, until the grid is finished or Ctrl-C ends it; needs --output-dir.", False
    )
    every: float | None = setting("Seconds between two looks of --watch. Default: 10.", None)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)

    def __post_init__(self) -> None:
        """Check what needs no file to check."""
        if self.watch and self.output_dir is None:
            raise UsageError("--watch writes the report into a directory; name one with --output-dir")
        if self.watch and self.format != "terminal":
            raise UsageError(f"--watch writes all formats and prints none; leave out --format {self.format}")
        if self.every is not None and not self.watch:
            raise UsageError(f"--every {self.every:g} has no effect without --watch")
        if self.every is not None and not self.every > 0:
            raise UsageError(f"--every must be positive, not {self.every:g}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "report", ReportConfig, run, what_is_saved)


def what_is_saved(config: ReportConfig) -> str:
    """What an interrupted report leaves."""
    if config.watch:
        return f"{config.output_dir} holds the report as of its last line"
    return (
        "nothing was written" if config.output_dir is None else f"{config.output_dir} may hold the formats that were complete"
    )


def run(config: ReportConfig) -> None:
    """Write tables, plots and a verdict on finished runs.

    Intervals and tests are over seeds and records; the paper's numbers stand next to ours.
    """
    from pathlib import Path

    from cora_cli.evaluation.metrics import parse_metrics
    from cora_cli.lock import own_directory
    from cora_cli.reporting.report import FILES, report
    from cora_cli.reporting.watch import watch

    metrics = parse_metrics(",".join(config.metrics)) if config.metrics else None
    output_dir = Path(config.output_dir) if config.output_dir else None
    with own_directory(output_dir, "plots") if output_dir else contextlib.nullcontext():
        if config.watch:
            assert output_dir is not None  # checked with the settings
            watch(config.outputs, output_dir, metrics, config.every or 10)
            return
        text = report(config.outputs, config.format, output_dir, metrics, columns())
    show(text, end="")
    if output_dir is None:
        say_next(None, "report", *config.outputs, "-o", "report")
    else:
        say_where_to_look(output_dir / FILES["html"])
