"""`cora demo`: the complete pipeline on the embedded model, from fine-tuning to a table of metrics."""

import dataclasses

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import DtypeName, setting
from cora_cli.terminal import columns, show


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Every setting of `cora demo`."""

    output_dir: str = setting("Output directory; complete results in it are reused.", "demo")
    seed: int = setting("Seed for initialization and data order.", 0)
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto")
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, else fp32.", "auto")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "demo", DemoConfig, run, what_is_saved)


def what_is_saved(config: DemoConfig) -> str:
    """What an interrupted demo leaves, and how it goes on."""
    return f"what is complete in {config.output_dir} is kept, and the same command goes on"


def run(config: DemoConfig) -> None:
    """Run the complete pipeline on the embedded model.

    Fine-tunes five models, extracts their basis, trains four adapters and prints a table: six to nine minutes on two CPU cores with bfloat16,
    half an hour on two without.
    """
    from pathlib import Path

    from cora_cli.device import select_hardware
    from cora_cli.experiments.demo import run_demo

    select_hardware(config.device, config.dtype)  # a wrong flag is refused before the first line is shown
    show(run_demo(Path(config.output_dir), config.seed, config.device, config.dtype, columns()))
    say_next(f"{config.output_dir} is written", "list", config.output_dir)
