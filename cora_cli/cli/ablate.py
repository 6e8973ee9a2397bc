"""`cora ablate`: a grid file -> every run of it, planned, carried out, completed."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.errors import CoraError, UsageError
from cora_cli.settings import DtypeName, setting

_WHAT, _RUN = "What to run", "Run"


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """Every setting of `cora ablate`."""

    grid: str = setting("Grid file, YAML.", argument=True)
    output_dir: str | None = setting(
        "Where everything goes; what is whole there is kept. Default: runs/NAME.",
        None,
        flags=("--output-dir", "-o"),
        panel=_RUN,
    )
    dry_run: bool = setting("Print rows, steps, sizes, estimates and what is done, and stop.", False, panel=_RUN)
    preset: Literal["small"] | None = setting(
        "small: the embedded model, five fine-tunes made here, built-in data and few steps, instead of the grid's scale.",
        None,
        panel=_WHAT,
    )
    model: str | None = setting("Base model instead of the grid's.", None, panel=_WHAT)
    only: str | None = setting("Run only the rows whose names match, such as 'cora-fb*'.", None, panel=_WHAT)
    seed: int = setting(
        "Seed of the random choice of n source models, where the grid has none; the seeds of runs are the grid's.",
        0,
        panel=_WHAT,
    )
    jobs: int | None = setting(
        "Steps at a time. Default: one per visible GPU, else one; with slurm as many as the cluster takes.", None, panel=_RUN
    )
    launcher: Literal["local", "slurm"] = setting(
        "local: processes of this machine; slurm: jobs of a cluster through submitit, with the grid's resources.",
        "local",
        panel=_RUN,
    )
    overwrite: bool = setting("Replace results in --output-dir that were made with other settings.", False, panel=_RUN)
    device: str = setting("auto, cpu or cuda; with several GPUs each step gets one.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware multiplies it, else fp32.", "auto", panel=_RUN)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.jobs}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"--device {self.device!r} is unknown here; use auto, cpu or cuda (CUDA_VISIBLE_DEVICES selects GPUs)"
            )


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "ablate", AblateConfig, run)


def run(config: AblateConfig) -> None:
    """Run a whole grid of experiments: shared steps once, failures passed by, and what is whole on disk kept."""
    if config.dry_run:
        # A plan is a matter of seconds, whatever the hub does; set before anything reads it.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from cora_cli.experiments.ablate import Request, ablate, dry_run

    request = Request(
        grid=Path(config.grid),
        output_dir=Path(config.output_dir) if config.output_dir else None,
        preset=config.preset,
        model=config.model,
        only=config.only,
        source_seed=config.seed,
        jobs=config.jobs,
        launcher=config.launcher,
        overwrite=config.overwrite,
        device=config.device,
        dtype=config.dtype,
    )
    if config.dry_run:
        print(dry_run(request))
        return
    outcome = ablate(request)
    if outcome.failed or outcome.blocked:
        missing = len(outcome.failed) + len(outcome.blocked)
        raise CoraError(
            f"{missing} of {missing + len(outcome.made) + len(outcome.kept)} steps are missing; the same command tries them again"
        )
