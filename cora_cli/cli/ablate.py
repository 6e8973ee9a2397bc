"""`cora ablate`: plan and run every experiment of a grid file, or complete a grid that was interrupted.

It parses the flags and prints the outcome; planning and running are in `cora_cli.experiments`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.errors import CoraError, UsageError
from cora_cli.settings import DtypeName, setting
from cora_cli.terminal import columns, show

_WHAT, _RUN = "What to run", "Run"


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """Every setting of `cora ablate`."""

    grid: str | None = setting(
        "Grid file, YAML, or the name of a grid that comes with cora, such as honest or paper/table4.", None, argument=True
    )
    list: bool = setting("List the grids that come with cora, and exit.", False, panel=_WHAT)
    write_config: str | None = setting("Write the grid file to this path, to start from, and exit.", None, panel=_WHAT)
    output_dir: str | None = setting(
        "Output directory; complete results in it are kept. Default: runs/NAME, with NAME from the grid.",
        None,
        flags=("--output-dir", "-o"),
        panel=_RUN,
    )
    dry_run: bool = setting(
        "Print the plan and exit: rows, steps, parameter counts, estimated time and memory, and what is already done.",
        False,
        panel=_RUN,
    )
    measure: str | None = setting(
        "With --dry-run: number of distinct trainings whose memory is measured, those with the largest estimates first, or all. Each takes "
        "seconds. Default: as many as have 240 layers together.",
        None,
        panel=_RUN,
    )
    preset: Literal["small"] | None = setting(
        "small: run the grid at a small scale, with the embedded model, source models fine-tuned locally, built-in data and "
        "few steps.",
        None,
        panel=_WHAT,
    )
    model: str | None = setting("Base model that replaces the grid's.", None, panel=_WHAT)
    only: str | None = setting("Run only the rows whose names match this pattern, such as 'cora-fb*'.", None, panel=_WHAT)
    seed: int = setting(
        "Seed for choosing n source models at random, where the grid sets no source_seed. Training seeds come from the grid.",
        0,
        panel=_WHAT,
    )
    jobs: int | None = setting(
        "Number of steps to run at the same time. Default: one per visible GPU (see --jobs-per-gpu), or one without GPUs; with slurm, up to 1000 "
        "queued jobs.",
        None,
        panel=_RUN,
    )
    jobs_per_gpu: str | None = setting(
        "Number of steps that share each GPU, or auto: as many as fit its free memory by the estimates of the plan. Default: 1.",
        None,
        panel=_RUN,
    )
    launcher: Literal["local", "slurm"] = setting(
        "local: run each step as a process on this machine; slurm: submit each step as a Slurm job with the grid's resources "
        "(needs submitit).",
        "local",
        panel=_RUN,
    )
    overwrite: bool = setting("Replace results in --output-dir that were created with other settings.", False, panel=_RUN)
    device: str = setting("auto, cpu or cuda. Each step uses at most one GPU.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, else fp32.", "auto", panel=_RUN)
    trust_remote_code: bool = setting(
        "Run Python code that comes with the models. Use only if you trust their authors.", False, panel="Risky"
    )

    def __post_init__(self) -> None:
        """Check the numbers, and that there is something to run."""
        if self.grid is None and not self.list:
            raise UsageError("name a grid file or a grid that comes with cora; --list shows those")
        alone = "list" if self.list else "write_config" if self.write_config else None
        useless = [
            field.name
            for field in dataclasses.fields(self)
            if alone and field.name not in ("grid", alone) and getattr(self, field.name) != field.default
        ]
        if alone and useless:
            what = "lists the grids" if self.list else "writes the grid file as it is"
            flag, name = (one.replace("_", "-") for one in (alone, useless[0]))
            raise UsageError(f"--{name} has no effect with --{flag}, which {what}; leave it out")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.jobs}")
        shared = self.jobs_per_gpu
        if shared is not None and shared != "auto" and not (shared.isdecimal() and int(shared) > 0):
            raise UsageError(f"--jobs-per-gpu must be a positive number or auto, not {self.jobs_per_gpu!r}")
        if self.measure is not None and self.measure != "all" and not self.measure.isdecimal():
            raise UsageError(f"--measure must be a number or all, not {self.measure!r}")
        if self.measure is not None and not self.dry_run:
            raise UsageError("--measure has no effect without --dry-run; leave it out")
        if self.jobs_per_gpu is not None and self.launcher == "slurm":
            raise UsageError(
                "--jobs-per-gpu applies to --launcher local; a Slurm job has the GPUs that resources in the grid ask for"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"--device must be one of auto, cpu, cuda, not {self.device!r}; to select GPUs, set CUDA_VISIBLE_DEVICES"
            )


def _jobs(jobs_per_gpu: str | None) -> int | Literal["auto"] | None:
    if jobs_per_gpu == "auto":
        return "auto"
    return None if jobs_per_gpu is None else int(jobs_per_gpu)


def _count(measure: str | None) -> int | Literal["all"] | None:
    if measure == "all":
        return "all"
    return None if measure is None else int(measure)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "ablate", AblateConfig, run, what_is_saved)


def what_is_saved(config: AblateConfig) -> str:
    """What an interrupted grid leaves, and how it goes on."""
    if config.list or config.write_config or config.dry_run:
        return "nothing was written"
    return "finished steps are kept, and the same command runs the others"


def run(config: AblateConfig) -> None:
    """Run all experiments of a grid. Shared steps run once, other rows continue after a failure, and results are kept."""
    from cora_cli.experiments.shipped import find_grid, shipped_grids, write_copy

    if config.list:
        show(_listed(shipped_grids()))
        return
    assert config.grid is not None  # checked with the settings
    grid = find_grid(config.grid)
    if config.write_config:
        write_copy(grid, Path(config.write_config))
        show(f"wrote {config.write_config}; `cora ablate {config.write_config} --dry-run` shows its rows")
        return
    if config.dry_run:
        # A plan must not wait for the hub. Set before the libraries read these variables at import.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from cora_cli.experiments.ablate import Request, ablate, dry_run
    from cora_cli.reporting.confirmation import seeds_wanted

    request = Request(
        grid=grid,
        output_dir=Path(config.output_dir) if config.output_dir else None,
        preset=config.preset,
        model=config.model,
        only=config.only,
        source_seed=config.seed,
        jobs=config.jobs,
        jobs_per_gpu=_jobs(config.jobs_per_gpu),
        launcher=config.launcher,
        overwrite=config.overwrite,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        measure=_count(config.measure),
    )
    if config.dry_run:
        show(dry_run(request, columns()))
        return
    outcome = ablate(request, seeds_wanted)
    if outcome.failed or outcome.blocked:
        missing = len(outcome.failed) + len(outcome.blocked)
        raise CoraError(
            f"{missing} of {missing + len(outcome.completed) + len(outcome.up_to_date)} steps are not done; resolve the "
            "errors above, and run the same command again"
        )
    place = request.place(request.load())
    say_next(f"{place} is written", "report", place, "-o", "report")


def _listed(grids: Mapping[str, Path]) -> str:
    from cora_cli.experiments.values import read_yaml

    width = max(map(len, grids))
    return "\n".join(f"{name:{width}}  {read_yaml(path).get('title', '')}" for name, path in grids.items())
