"""`cora laplace`: give a finished run a distribution over its weights."""

import shlex
from pathlib import Path

import typer

from cora_cli.cli.command import all_or_nothing, command
from cora_cli.errors import UsageError
from cora_cli.terminal import show
from cora_cli.training.laplace_config import LaplaceConfig


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "laplace", LaplaceConfig, run, lambda config: all_or_nothing(config.output_dir))


def run(config: LaplaceConfig) -> None:
    """Fit a Gaussian around the LoRA of a finished run.

    This is Laplace-LoRA; `cora evaluate` averages the probabilities of its draws.
    """
    from cora_cli.lock import own_output
    from cora_cli.training.laplace import laplace

    output = Path(config.output_dir)
    if output.exists():
        raise UsageError(f"{output} exists already; choose a new directory")
    with own_output(output):
        found = laplace(
            config.run,
            output,
            prior_precision=config.prior_precision,
            directions=config.directions,
            limit=config.limit,
            seed=config.seed,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    show(
        f"{output}: prior precision {found['prior_precision']:.4g} ({found['chosen_by']}); the data decide {found['decided_directions']:,.0f} of "
        f"{found['parameters']:,} directions\nevaluate it: cora evaluate {shlex.quote(str(output))} --metrics calibration"
    )
