"""`cora inspect`: models, adapters and bases -> whether they share a subspace, in numbers, plots and words."""

import dataclasses
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.errors import UsageError
from cora_cli.settings import setting


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Every setting of `cora inspect`."""

    inputs: tuple[str, ...] = setting(
        "Models as for extract-basis (hub ids, directories, adapters, runs), and basis files.", argument=True
    )
    base: str | None = setting(
        "The model that the others were fine-tuned from; by default the one that all of them, as adapters, name.", None
    )
    rank: int | None = setting("Directions r that are compared; by default that of the basis file, else 48.", None)
    side: Literal["output", "input"] | None = setting(
        "The side of the weights whose directions are compared; by default that of the basis file, else output.", None
    )
    target_modules: tuple[str, ...] | None = setting(
        "Weights to read, comma-separated; by default those of the basis file, else q_proj,k_proj,v_proj.", None
    )
    runs: tuple[str, ...] = setting(
        "A finished run of `cora train` or output of `cora ablate`, to see whether capture foretells its held-out loss; may be repeated.",
        (),
        repeated=True,
    )
    format: Literal["terminal", "markdown", "json", "html"] = setting("What is printed.", "terminal")
    output_dir: str | None = setting(
        "Also write all formats here, and the plots as SVG and PNG.", None, flags=("--output-dir", "-o")
    )
    device: str = setting("auto, cpu, cuda or cuda:<index>: where matrices are decomposed.", "auto")
    seed: int = setting("Has no effect on exact decompositions; accepted so that every command takes one.", 0)

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is not a whole number of at least 1")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "inspect", InspectConfig, run)


def run(config: InspectConfig) -> None:
    """Overlaps, sizes of change, leave-one-out capture and spectra of models and bases beside chance, with a verdict in words."""
    from pathlib import Path

    from cora_cli.device import select_hardware
    from cora_cli.inspection.inspect import inspect
    from cora_cli.inspection.output import check_output, report

    output_dir = Path(config.output_dir) if config.output_dir else None
    check_output(output_dir)
    device = select_hardware(config.device, "auto").device
    found = inspect(config.inputs, config.base, config.rank, config.side, config.target_modules, config.runs, device)
    print(report(found, config.format, output_dir), end="")
