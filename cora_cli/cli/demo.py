"""`cora demo`: the whole chain on the embedded default."""

import dataclasses

import typer

from cora_cli.cli.command import command
from cora_cli.settings import DtypeName, setting


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Every setting of `cora demo`."""

    output_dir: str = setting("Where everything goes; what is whole there is used again.", "demo")
    seed: int = setting("Seed of random starts and data order.", 0)
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto")
    dtype: DtypeName = setting("auto: bf16 where the hardware multiplies it, else fp32.", "auto")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "demo", DemoConfig, run)


def run(config: DemoConfig) -> None:
    """Make five fine-tuned models, one basis of them, four adapters, and a table: about ten minutes on two cores."""
    from pathlib import Path

    from cora_cli.experiments.demo import run_demo

    print(run_demo(Path(config.output_dir), config.seed, config.device, config.dtype))
