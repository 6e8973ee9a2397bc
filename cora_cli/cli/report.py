"""`cora report`: summarize finished runs and grids in tables, plots and one HTML page."""

import contextlib
import dataclasses
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import setting
from cora_cli.terminal import show


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
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "report", ReportConfig, run)


def run(config: ReportConfig) -> None:
    """Write tables, plots and a verdict on finished runs.

    Intervals and tests are over seeds and records; the paper's numbers stand next to ours.
    """
    from pathlib import Path

    from cora_cli.evaluation.metrics import parse_metrics
    from cora_cli.lock import own_directory
    from cora_cli.reporting.report import report

    metrics = parse_metrics(",".join(config.metrics)) if config.metrics else None
    output_dir = Path(config.output_dir) if config.output_dir else None
    with own_directory(output_dir, "plots") if output_dir else contextlib.nullcontext():
        text = report(config.outputs, config.format, output_dir, metrics)
    show(text, end="")
    if output_dir is None:
        say_next(None, "report", *config.outputs, "-o", "report")
