"""`cora report`: finished directories -> tables, plots and one page."""

import dataclasses
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.settings import setting


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Every setting of `cora report`."""

    outputs: tuple[str, ...] = setting(
        "Output directories of `cora ablate`, run directories of `cora train`, or evaluation directories.", argument=True
    )
    format: Literal["terminal", "markdown", "latex", "csv", "json", "html"] = setting("What is printed.", "terminal")
    output_dir: str | None = setting(
        "Also write all formats here, and the plots as SVG and PNG.", None, flags=("--output-dir", "-o")
    )
    metrics: tuple[str, ...] | None = setting(
        "Show these only, comma-separated: rouge, meteor, bleu, bertscore, or single ones such as rougeL.", None
    )
    seed: int = setting("Seed of the resampling behind the paired tests.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "report", ReportConfig, run)


def run(config: ReportConfig) -> None:
    """Tables, plots and one page from finished directories, with intervals, paired tests and the paper's numbers beside ours."""
    from pathlib import Path

    from cora_cli.evaluation.metrics import parse_metrics
    from cora_cli.reporting.report import report

    metrics = parse_metrics(",".join(config.metrics)) if config.metrics else None
    output_dir = Path(config.output_dir) if config.output_dir else None
    print(report(config.outputs, config.format, output_dir, metrics, config.seed), end="")
