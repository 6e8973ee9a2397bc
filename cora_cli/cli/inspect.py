"""`cora inspect`: measure whether models, adapters and bases share a subspace, and report numbers, plots and a verdict."""

import contextlib
import dataclasses
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.errors import UsageError
from cora_cli.settings import LARGEST_RANK, MOST, DtypeName, setting
from cora_cli.terminal import columns, show


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Every setting of `cora inspect`."""

    inputs: tuple[str, ...] = setting(
        "Models (hub ids, model directories, adapters or cora runs) and basis files.", argument=True, names="model or basis"
    )
    base: str | None = setting(
        "Model that the others were fine-tuned from. Default: the base model recorded in the adapters, if all inputs are "
        "adapters of one.",
        None,
        names="model",
    )
    rank: int | None = setting(
        "Number of directions r to compare. Default: the rank of the basis file, else 48.", None, most=LARGEST_RANK
    )
    side: Literal["output", "input"] | None = setting(
        "Side of the weights whose directions are compared. Default: the side of the basis file, else output.", None
    )
    target_modules: tuple[str, ...] | None = setting(
        "Names of the weights to read, comma-separated. Default: those of the basis file, else q_proj,k_proj,v_proj.", None
    )
    runs: tuple[str, ...] = setting(
        "Finished run of `cora train`, or output directory of `cora ablate`, to test whether capture predicts held-out loss; "
        "can be repeated.",
        (),
        repeated=True,
    )
    data: tuple[str, ...] = setting(
        "NAME=DATASET: also replace the change of the model NAME by what the others have of it, and measure the loss on DATASET; can be "
        "repeated. A run of `cora train` has its held-out records; own stands for those alone.",
        (),
        repeated=True,
    )
    limit: int | None = setting("Use the first N records of each model's --data.", None, most=MOST)
    dtype: DtypeName = setting(
        "Precision of the losses on --data: auto (bf16 where the hardware multiplies it natively), bf16 or fp32.", "auto"
    )
    format: Literal["terminal", "markdown", "json", "html"] = setting("Output format on stdout.", "terminal")
    output_dir: str | None = setting(
        "Directory for a copy of the report in all formats, with plots as SVG and PNG.", None, flags=("--output-dir", "-o")
    )
    dry_run: bool = setting(
        "Print what would be read and written and the peak memory by part, then exit. Needs no weights; without --device cpu, it plans for a GPU.",
        False,
    )
    device: str = setting("Device for the decompositions: auto, cpu, cuda or cuda:<index>.", "auto")
    seed: int = setting("Seed of the random directions that --data compares with.", 0)

    def __post_init__(self) -> None:
        """Check the values that need no file to check."""
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank must be at least 1, not {self.rank}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, not {self.limit}")
        if self.dry_run and self.data:
            raise UsageError("--dry-run plans the decompositions, not the losses on --data; leave --data out")
        if not self.data and (self.limit is not None or self.dtype != "auto"):
            flag = "--dtype" if self.limit is None else "--limit"
            raise UsageError(f"{flag} applies to the losses on --data; name data with --data, or leave {flag} out")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "inspect", InspectConfig, run)


def run(config: InspectConfig) -> None:
    """Measure whether models share a subspace.

    Overlaps, leave-one-out capture and spectra are compared with chance, and a verdict follows from a printed rule. With --data, it also
    says how much of what each model does for its own records lies in what the others share.
    """
    from pathlib import Path

    from cora_cli.device import planned_hardware, select_hardware
    from cora_cli.inspection.inspect import inspect
    from cora_cli.inspection.output import FILES, report
    from cora_cli.lock import own_directory
    from cora_cli.writing import refuse_file, refuse_foreign

    asked = (config.inputs, config.base, config.rank, config.side, config.target_modules, config.runs)
    if config.dry_run:
        from cora_cli.inspection.preflight import preflight

        if config.output_dir is not None:
            refuse_file(Path(config.output_dir))
        show(preflight(*asked, planned_hardware(config.device, "auto").device, config.output_dir))
        return
    output_dir = Path(config.output_dir) if config.output_dir else None
    with own_directory(output_dir, "plots") if output_dir else contextlib.nullcontext():
        if output_dir:
            refuse_foreign(output_dir, FILES.values(), FILES["json"])
        hardware = select_hardware(config.device, config.dtype)
        found = inspect(*asked, config.data, config.limit, config.seed, hardware)
        text = report(found, config.format, output_dir, columns())
    show(text, end="")
    if output_dir is None:
        base = ("--base", config.base) if config.base else ()
        data = [word for one in config.data for word in ("--data", one)]
        say_next(None, "inspect", *config.inputs, *base, *data, "-o", "inspection")
    elif not any(name.endswith(".safetensors") for name in config.inputs):
        say_next(f"{config.output_dir} is written", "extract-basis", *config.inputs, "-o", "basis.safetensors")
