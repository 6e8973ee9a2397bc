"""Runs a complete grid: reads the file, plans the steps, runs them, and summarizes the outcome.

This is the entry point of `cora ablate`; `cora report` reads the results.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cora_cli import writing
from cora_cli.device import planned_hardware, select_hardware
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.execution.sandbox import require_sandbox
from cora_cli.experiments.bases import check_bases
from cora_cli.experiments.estimate import (
    estimate_steps,
    matmul_rate,
    planned_rate,
    steps_that_fit,
)
from cora_cli.experiments.execute import (
    Execution,
    Outcome,
    done_steps,
    refuse_conflicts,
    refuse_other_grid,
    write_plan,
)
from cora_cli.experiments.grid import Grid, load_grid
from cora_cli.experiments.inputs import Inputs, find_inputs, require_on_hub
from cora_cli.experiments.launch import Launcher, LocalLauncher, free_gpu_bytes, visible_gpus
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.plan_text import render_plan, summary
from cora_cli.experiments.screen import Screen
from cora_cli.experiments.shapes import check_shapes
from cora_cli.experiments.slurm import SlurmLauncher, left_jobs
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.experiments.stage_work import stage_lines
from cora_cli.experiments.stages import SeedsWanted, Stages, news, stage_record, to_run
from cora_cli.experiments.steps import FOLDERS, Plan, StepFlags, make_plan
from cora_cli.experiments.trainings import (
    GridMemory,
    check_trainings,
    distinct_trainings,
    measure_memory,
)
from cora_cli.lock import own_directory
from cora_cli.progress import say
from cora_cli.settings import DtypeName

_HASHES = "hashes.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """The settings of one call of `cora ablate`."""

    grid: Path
    output_dir: Path | None = None
    preset: str | None = None
    model: str | None = None
    only: str | None = None
    source_seed: int = 0
    jobs: int | None = None
    jobs_per_gpu: int | Literal["auto"] | None = None
    launcher: str = "local"
    overwrite: bool = False
    device: str = "auto"
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False
    measure: int | Literal["all"] | None = None

    @property
    def flags(self) -> StepFlags:
        """What the steps take over."""
        return StepFlags(self.device, self.dtype, self.trust_remote_code)

    def load(self) -> Grid:
        """Read and check the grid file. Raises `UsageError` if it is invalid."""
        return load_grid(self.grid, self.preset, self.model, self.source_seed)

    def place(self, grid: Grid) -> Path:
        """The output directory."""
        return self.output_dir or Path("runs") / (f"{grid.name}-{self.preset}" if self.preset else grid.name)


def dry_run(request: Request, width: int | None = None) -> str:
    """The plan as text: rows, steps, parameter counts, estimates, what is done, and unresolved inputs. Writes nothing.

    Its table has lines of at most `width` characters.

    Raises `CoraError` if a rank or the setting `share` does not fit the weights, if a training would be refused at its start, and if the output
    directory holds results with other settings.
    """
    grid = request.load()
    out = request.place(grid)
    writing.refuse_file(out)
    refuse_other_grid(out)
    # Without earlier steps nothing is done yet, so there is no need to hash weights.
    inputs = find_inputs(grid, out / _HASHES if (out / "steps").is_dir() else None, request.trust_remote_code, weights=False)
    check_shapes(grid, inputs)
    check_bases(grid, inputs, planned=True)
    rate, machine = planned_rate(request.device)
    if grid.has_stages:
        return _dryrun_stages(request, grid, out, inputs, rate, machine, width)
    plan = make_plan(grid, out, inputs, request.flags)
    chosen = _chosen(request, plan)
    _refuse_known_conflicts(request, plan, chosen, inputs)
    estimates = estimate_steps(plan, inputs, rate)
    memory = _memory(request, plan, chosen, inputs)
    return render_plan(plan, inputs, done_steps(plan), estimates, chosen, machine, memory, width)


def _refuse_known_conflicts(request: Request, plan: Plan, rows: list[str], inputs: Inputs) -> None:
    """Refuse results with other settings as `ablate` would, where all inputs are here to be compared; the type is that of the machine that runs it."""
    if not inputs.unresolved and all(model.sha256 for model in inputs.models.values()):
        refuse_conflicts(plan, plan.needed_for(rows), request.overwrite)


def _memory(request: Request, plan: Plan, chosen: list[str], inputs: Inputs) -> GridMemory:
    """Check the trainings of all rows, and measure the memory of the chosen ones."""
    hardware = planned_hardware(request.device, request.dtype)
    trainings = distinct_trainings(plan.grid, request.flags)
    checked = check_trainings(trainings, plan.grid, inputs, hardware)
    return measure_memory(plan, chosen, checked, request.measure, hardware)


def _dryrun_stages(
    request: Request, grid: Grid, out: Path, inputs: Inputs, rate: float | None, machine: str, width: int | None
) -> str:
    """The plan of what is known so far, and the most and the likely work of all stages."""
    stages = Stages(grid, out, inputs, request.flags)
    methods = stages.methods()
    rows = stages.rows(methods, {method.key: MIN_SEEDS for method in methods})
    plan = stages.plan(rows)
    names = [row.name for row in rows]
    _refuse_known_conflicts(request, plan, names, inputs)
    estimates = estimate_steps(plan, inputs, rate)
    memory = _memory(request, plan, names, inputs)
    shown = render_plan(plan, inputs, done_steps(plan), estimates, names, machine, memory, width)
    complete = stages.plan([row for row in grid.rows if row.train is None] + [method.rows[0] for method in methods])
    return "\n".join(
        [
            shown,
            "",
            "The steps above are those that are certain so far. All rounds of the grid together:",
            *stage_lines(grid, methods, complete, estimate_steps(complete, inputs, rate)),
        ]
    )


def ablate(request: Request, seeds_wanted: SeedsWanted) -> Outcome:
    """Run the grid, or complete it. `seeds_wanted` tells which methods of a grid with `confirm` are still undecided.

    Raises `CoraError` before anything runs if a model or data set cannot be found, a rank does not fit the weights, a training would be
    refused at its start, or the output directory holds results with other settings.
    """
    grid = request.load()
    out = request.place(grid)
    with own_directory(out, *FOLDERS) as held:
        refuse_other_grid(out)
        say(f"{grid.title}: checking models and data")
        require_on_hub(grid)
        inputs = find_inputs(grid, out / _HASHES, request.trust_remote_code)
        inputs.require_all()
        check_shapes(grid, inputs)
        check_bases(grid, inputs)
        launcher = _launcher(request, grid, out, inputs, held)
        if grid.has_stages:
            untried = Stages(grid, out, inputs, request.flags).untried()
            _check_trainings(request, dataclasses.replace(grid, rows=tuple(untried)), inputs)
            return run_stages(request, grid, out, inputs, launcher, held, seeds_wanted)
        plan = make_plan(grid, out, inputs, request.flags)
        chosen = _chosen(request, plan)
        wanted = plan.needed_for(chosen)
        refuse_conflicts(plan, wanted, request.overwrite, _dtype_here(request))
        done = done_steps(plan)
        ahead = {name for name in plan.steps if plan.steps[name].kind == "train" and not done[name]}
        rows = [row for row in grid.rows if row.name in chosen and not ahead.isdisjoint(plan.steps_of[row.name])]
        _check_trainings(request, dataclasses.replace(grid, rows=tuple(rows)), inputs)
        write_plan(plan)
        is_done = all(done[name] for name in wanted)
        rate = None if is_done else rate_of_steps(request)
        outcome = _execute(plan, wanted, inputs, launcher, held, rate)
        say(summary(plan, outcome))
    return outcome


def _check_trainings(request: Request, grid: Grid, inputs: Inputs) -> None:
    """Check the trainings of a grid as each of them would at its start, without weights, and that what they give can be evaluated here.

    Raises `CoraError`, which names the rows where it is about them.
    """
    if grid.rows and grid.evaluate and grid.evaluate.get("execute_code") and request.launcher == "local":
        require_sandbox()
    # A cluster may have GPUs that this machine lacks.
    hardware = (planned_hardware if request.launcher == "slurm" else select_hardware)(request.device, request.dtype)
    check_trainings(distinct_trainings(grid, request.flags), grid, inputs, hardware)


def _dtype_here(request: Request) -> str | None:
    """The type in which the steps compute; None where they run on other machines."""
    return None if request.launcher == "slurm" else select_hardware(request.device, request.dtype).dtype_name


def rate_of_steps(request: Request) -> float | None:
    """The rate of the machine that runs the steps, None for a cluster of GPUs while this machine has none.

    Raises `CoraError` for a device that the steps would not find here.
    """
    return planned_rate(request.device)[0] if request.launcher == "slurm" else matmul_rate(request.device)[0]


def _execute(
    plan: Plan,
    wanted: set[str],
    inputs: Inputs,
    launcher: Launcher,
    held: int,
    rate: float | None,
    noted: set[str] | None = None,
) -> Outcome:
    """Run the wanted steps; `rate` is the machine's in FLOPs per second, None where nothing is left to estimate or it is not known. `noted`: see `Screen`."""
    estimates = estimate_steps(plan, inputs, rate) if rate is not None else {}
    expected = {name: seconds for name, one in estimates.items() if (seconds := one.seconds) is not None}
    screen = Screen(plan, wanted, launcher.slots, expected, noted)
    return Execution(plan, wanted, launcher, screen, held).run()


def run_stages(
    request: Request, grid: Grid, out: Path, inputs: Inputs, launcher: Launcher, held: int, seeds_wanted: SeedsWanted
) -> Outcome:
    """Run a grid with stages, round by round, until nothing more is to be done or what is left has failed."""
    if request.only:
        raise UsageError("--only does not apply to a grid with sweep or confirm, whose rows depend on each other's results")
    confirm = grid.confirm
    assert confirm is not None
    stages = Stages(grid, out, inputs, request.flags)
    for sentence in stages.start_again():
        say(sentence)
    methods = stages.methods()
    seeds = {method.key: MIN_SEEDS for method in methods}
    done: set[str] = set()
    noted: set[str] = set()
    outcomes: list[Outcome] = []
    rate: float | None = None
    while True:
        rows = stages.rows(methods, seeds)
        plan = stages.plan(rows)
        chosen = to_run(rows, methods)
        wanted = plan.needed_for(chosen)
        if rate is None and not all(Ledger(out).has_finished(plan.steps[name]) for name in wanted):
            rate = rate_of_steps(request)
        refuse_conflicts(plan, wanted, request.overwrite, _dtype_here(request))
        write_plan(plan, stage_record(methods, grid))
        # A training that stopped goes on under the same name.
        fresh = {f"{name}@{plan.steps[name].stop_at}" for name in wanted}
        if not fresh <= done:
            done |= fresh
            outcomes.append(_execute(plan, wanted, inputs, launcher, held, rate, noted))
            before, methods = methods, stages.methods()
            for sentence in news(methods, before):
                say(sentence)
            continue
        asked = seeds_wanted(out, confirm.measures) if any(row.stage == "confirm" for row in rows) else seeds
        more = {key: max(count, min(asked.get(key, count + 1), count + 1, len(confirm.seeds))) for key, count in seeds.items()}
        if more == seeds:
            break
        seeds = more
    lost = {name for row in rows if row.name not in chosen for name in plan.steps_of[row.name]}
    outcome = _joined(outcomes, lost)
    say(summary(plan, outcome))
    pending = [(method.rows[0].label, *method.sweep.pending[0]) for method in methods if method.sweep and method.sweep.pending]
    if pending and not outcome.failed:
        label, learning_rate, step = pending[0]
        raise CoraError(
            f"{out}: the sweep of {label} has no loss at step {step} for the learning rate {learning_rate:g}, although no step failed; run the "
            "same command again"
        )
    return outcome


def _joined(outcomes: Sequence[Outcome], lost: set[str]) -> Outcome:
    """The outcome of all rounds together. The steps `lost` have diverged in a sweep, which is a result and no failure."""
    completed = tuple(dict.fromkeys(name for outcome in outcomes for name in outcome.completed))
    failed: dict[str, str] = {}
    blocked: dict[str, str] = {}
    for outcome in outcomes:
        # A later round tries a failed step again, and a step that it completes has not failed.
        for name in (*outcome.completed, *outcome.up_to_date):
            failed.pop(name, None)
            blocked.pop(name, None)
        failed |= {name: error for name, error in outcome.failed.items() if name not in lost}
        blocked |= outcome.blocked
    up_to_date = dict.fromkeys(name for outcome in outcomes for name in outcome.up_to_date if name not in completed)
    return Outcome(tuple(up_to_date), completed, failed, blocked)


def _launcher(request: Request, grid: Grid, out: Path, inputs: Inputs, held: int) -> Launcher:
    """The launcher for the steps.

    Raises `UsageError` where the local one does not start as many processes as the grid asks for, and `CoraError` if jobs of a cluster may
    still write to the output directory, or if steps should share a GPU and none is visible.
    """
    folder = out / "slurm"
    if request.launcher == "slurm":
        return SlurmLauncher(folder, grid.resources, request.jobs)
    for kind, resources in grid.resources.items():
        if resources.processes > 1:
            raise UsageError(
                f"resources: {kind} asks for {resources.processes} processes, and --launcher local runs each step in one; use --launcher "
                "slurm, or leave out nodes and gpus"
            )
    if jobs := left_jobs(folder):
        raise CoraError(
            f"Slurm jobs {', '.join(jobs)} were queued for {out} and may still run; continue with --launcher slurm, or stop "
            f"them with scancel and remove {folder}"
        )
    per_gpu = request.jobs_per_gpu or 1
    if request.jobs_per_gpu is not None and (request.device == "cpu" or not visible_gpus()):
        raise CoraError(
            f"--jobs-per-gpu {request.jobs_per_gpu} needs a GPU, and none is visible; use --jobs to run several steps on the processor"
        )
    if per_gpu == "auto":
        every = dataclasses.replace(grid, rows=(*grid.rows, *(row.proposing(row.seed) for row in grid.rows if row.is_auto)))
        # The memory does not depend on the rate.
        estimates = estimate_steps(make_plan(every, out, inputs, request.flags), inputs, rate=1.0)
        free = free_gpu_bytes()
        per_gpu = steps_that_fit(estimates.values(), free)
        largest = max(estimate.bytes for estimate in estimates.values())
        say(
            f"--jobs-per-gpu auto: {per_gpu}, since the largest step needs about {largest / 2**30:.1f} GiB and each GPU has at least "
            f"{free / 2**30:.1f} GiB free, half of which the estimates may fill"
        )
    return LocalLauncher(request.jobs, request.device, keep_open=(held,), per_gpu=per_gpu)


def _chosen(request: Request, plan: Plan) -> list[str]:
    """The rows that `--only` selects. Raises `UsageError` if there are none."""
    names = [row.name for row in plan.grid.rows]
    chosen = fnmatch.filter(names, request.only) if request.only else names
    if not chosen:
        raise UsageError(
            f"--only {request.only!r} matches none of the {len(names)} rows, such as {names[0]}; use * as a wildcard"
        )
    return chosen
