"""Runs steps as jobs of a Slurm cluster through submitit, with the same commands as locally and files on a shared disk.

A job that is preempted or reaches its time limit is queued again and its step continues. If `ablate` is killed, its jobs go on,
and the next call finds them.
"""

import dataclasses
import functools
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.environment import folder_to_search
from cora_cli.errors import CoraError
from cora_cli.experiments.fork_server import stop_orphan
from cora_cli.experiments.launch import LocalLauncher
from cora_cli.experiments.resources import Resources
from cora_cli.experiments.spread import Spread
from cora_cli.reading import read_json
from cora_cli.records import EndedStep, Job

ALONE = Spread()
States = Callable[[], Mapping[str, str]]
_MOST_JOBS = 1000
_POLL_SECONDS, _GRACE_SECONDS = 5.0, 20.0
# A job that may run further steps is queued when none has come for so long.
_BATCH_SECONDS = 2.0
# Longer than Slurm's default of 30 seconds between SIGTERM and SIGKILL.
_KILL_SECONDS = 60.0
# Maximum delay until the result of a finished job is visible on a shared disk.
_LAG_SECONDS = 30.0
# States of a job that can still finish: waiting, running, or queued again.
_ALIVE = frozenset(
    {
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"),
        *("PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    }
)


class StepCall:
    """What runs on each node: `cora` commands, one after the other, each with the log that its output is appended to.

    The exit code of each is written to the folder `codes` when it ends. A job that is queued again leaves out the steps with a code. Steps
    of several processes, those of `spread`, are alone in their job.
    """

    def __init__(self, steps: Sequence[tuple[Sequence[str], Path]], codes: Path, spread: Spread = ALONE) -> None:
        self.steps, self.codes, self.spread = tuple((tuple(argv), log) for argv, log in steps), codes, spread
        self._pid: int | None = None

    def __call__(self) -> dict[str, int]:
        """Run the commands and return the exit code of each by the name of its step.

        Raises `CoraError` for a failure on a node that is not the first, whose code nobody reads.
        """
        from submitit import JobEnvironment

        job_id = JobEnvironment().job_id
        if self.spread == ALONE and (cpus := os.environ.get("SLURM_CPUS_PER_TASK")):
            # By default torch uses all processors of the node, not only those of the job.
            os.environ["OMP_NUM_THREADS"] = cpus
        # With device "cpu" it leaves the GPUs as the cluster has assigned them.
        launcher = LocalLauncher(1, "cpu", forks=len(self.steps) > 1)
        codes = {}
        for argv, log in self.steps:
            code = _code(self.codes, log, job_id)
            if code is None:
                if self.spread == ALONE:
                    job = launcher.submit("", argv, log)
                    code = self._wait(job.pid, job.ended)
                else:
                    process = self.spread.start(argv, log)
                    # Not `wait`: it holds a lock that `checkpoint`, called from a signal handler, also needs.
                    code = self._wait(process.pid, process.poll)
                if code and self.spread.node:
                    here = self.spread.log_here(log)
                    raise CoraError(f"the step ended with exit code {code} on node {self.spread.node}; see {here}")
                if not self.spread.node:
                    writing.write_json(self.codes / f"{log.stem}.json", {"job": job_id, "code": code})
            codes[log.stem] = code
        return codes

    def _wait(self, pid: int | None, ended: Callable[[], int | None]) -> int:
        self._pid = pid
        while (code := ended()) is None:
            time.sleep(0.2)
        self._pid = None
        if code < 0 or (code and self.spread != ALONE):
            # Slurm signals the command before it cancels or requeues the job. Returning now would record a result, so wait. torchrun ends alike
            # after a signal and after a failure.
            time.sleep(_KILL_SECONDS)
        return code

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """Stop the command before the job is queued again. submitit calls this on preemption and at the time limit.

        A run keeps its last complete checkpoint, and its command contains `--resume`.
        """
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            # Not the job's own `stop`: this is a signal handler, which may have interrupted the job's code.
            stop_orphan(self._pid, _GRACE_SECONDS)
        return DelayedSubmission(StepCall(self.steps, self.codes, self.spread))


def _code(codes: Path, log: Path, job_id: str) -> int | None:
    """The exit code of a step that a job ran, None if it has not ended."""
    record = codes / f"{log.stem}.json"
    if not record.exists():
        return None
    ended = read_json(record, EndedStep)
    return ended["code"] if ended["job"] == job_id else None


@dataclasses.dataclass
class _Batch:
    """Steps that one job runs. `steps` has the command, log and record of each; `job` is None until the job is queued."""

    kind: str
    steps: list[tuple[tuple[str, ...], Path, Path]] = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.monotonic)
    job: Any = None
    refused: str | None = None


class SlurmLauncher:
    """Runs steps as jobs of a cluster; see `launch.Launcher`. The cluster decides how many jobs run at a time.

    A job runs up to `steps_per_job` steps of one kind, as the resources say. It is queued when it has all of them, or when no step
    has come for a while.
    """

    how = "queued"

    def __init__(
        self,
        folder: Path,
        resources: Mapping[str, Resources],
        jobs: int | None,
        cluster: str = "slurm",
        states: States | None = None,
    ) -> None:
        """`folder`, on the shared disk, is for submitit's files; `resources` has the resources of each kind of step.

        `cluster` is "slurm", or "local" for submitit processes on this machine; `states` returns the state of every known job
        by its id. Raises `CoraError` if submitit or Slurm is not installed.
        """
        try:
            import submitit
        except ImportError as error:
            raise CoraError("--launcher slurm needs the package submitit: pip install 'cora-cli[slurm]'") from error
        self.slots = jobs or _MOST_JOBS
        self._folder, self._resources = folder.resolve(), resources
        self._open: dict[str, _Batch] = {}
        self.states = _Cached(states or squeue)
        self._job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self._new_executor = functools.partial(submitit.AutoExecutor, folder=folder / "jobs", cluster=cluster)
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise CoraError(
                "--launcher slurm needs sbatch, which is not installed here; run on a Slurm login node, or use --launcher local"
            )
        # submitit starts Python with `-m` in the working directory, whose modules must not be imported.
        self._setup = ["export PYTHONSAFEPATH=1"]
        if (searched := folder_to_search()) is not None:
            self._setup.append(f"export PYTHONPATH={shlex.quote(searched)}${{PYTHONPATH:+:$PYTHONPATH}}")

    @property
    def codes(self) -> Path:
        """The folder with the exit codes of steps."""
        return self._folder / "codes"

    def spread(self, kind: str) -> Spread:
        """The processes of a step."""
        return self._resources[kind].spread

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "SlurmJob":
        """Add `cora ARGV` to a job, or return the job that an earlier `ablate` queued for the same command if it is still alive."""
        record = self._folder / f"{log.stem}.json"
        if record.exists():
            earlier = read_json(record, Job)
            queued = _Batch(kind, job=self._job_class(self._folder / "jobs", earlier["job"]))
            job = SlurmJob(self, queued, record, log)
            if tuple(earlier["argv"]) == tuple(argv) and job.ended() is None:
                return job
            job.stop()
        log.parent.mkdir(parents=True, exist_ok=True)
        batch = self._open.setdefault(kind, _Batch(kind))
        batch.steps.append((tuple(argv), log.resolve(), record))
        batch.began = time.monotonic()
        if len(batch.steps) >= self._resources[kind].steps_per_job:
            self.queue(batch)
        return SlurmJob(self, batch, record, log)

    def queue(self, batch: _Batch) -> None:
        """Queue the job of a batch. If Slurm refuses it, the batch says why."""
        self._open.pop(batch.kind, None)
        (_, first, _), *others = batch.steps
        try:
            executor = self._new_executor()  # a new one per job, because parameters of an executor persist
            name = f"{first.stem}+{len(others)}" if others else first.stem
            resources = self._resources[batch.kind]
            executor.update_parameters(name=name, **resources.executor_parameters(self._setup))
            call = StepCall([(argv, log) for argv, log, _ in batch.steps], self.codes, resources.spread)
            # The first node's result is that of the step.
            batch.job = executor.submit(call).task(0)
        except Exception as error:  # submitit raises sbatch's messages in its own exception classes
            batch.refused = f"Slurm refused the job: {' '.join(str(error).split())[-300:]}"
            return
        for argv, _, record in batch.steps:
            writing.write_json(record, {"job": batch.job.job_id, "argv": list(argv)})
        self.states.forget()

    def withdraw(self, batch: _Batch, record: Path) -> None:
        """Take a step out of a batch that is not queued."""
        batch.steps = [step for step in batch.steps if step[2] != record]
        if not batch.steps:
            self._open.pop(batch.kind, None)


class SlurmJob:
    """A step in a job of a cluster; see `launch.Job`. It has no process on this machine."""

    pid: int | None = None

    def __init__(self, launcher: SlurmLauncher, batch: _Batch, record: Path, log: Path) -> None:
        self._launcher, self._batch, self._record, self._log = launcher, batch, record, log
        self._lost_since: float | None = None

    def ended(self) -> int | None:
        """See `launch.Job.ended`. If a job was refused or ended without the step's result, the reason is added to the log."""
        batch, now = self._batch, time.monotonic()
        if batch.job is None and batch.refused is None and now - batch.began >= _BATCH_SECONDS:
            self._launcher.queue(batch)
        if batch.refused is not None:
            return self._note(batch.refused)
        if batch.job is None:
            return None
        code = _code(self._launcher.codes, self._log, batch.job.job_id)
        if code is None and batch.job.paths.result_pickle.exists():
            if (error := batch.job.exception()) is not None:
                return self._lost(_last_line_of_trace(str(error)))
            result = batch.job.result()
            # A job of an earlier version has one step, and returns its code.
            code = result.get(self._log.stem) if isinstance(result, dict) else int(result)
        if code is not None:
            self._record.unlink(missing_ok=True)
            if code and self._launcher.spread(batch.kind) != ALONE:
                batch.job.cancel(check=False)  # other nodes may wait for the first one
            return code
        return self._ended_without_code(now)

    def _ended_without_code(self, now: float) -> int | None:
        state = self._launcher.states().get(self._batch.job.job_id, "")
        if state in _ALIVE:
            self._lost_since = None
            return None
        self._lost_since = self._lost_since or now
        if now - self._lost_since < (0 if state and state != "COMPLETED" else _LAG_SECONDS):
            return None
        return self._lost(f"its state is {state}" if state else "it disappeared from the queue without a result")

    def _lost(self, why: str) -> int:
        return self._note(f"Slurm job {self._batch.job.job_id} ended before its step: {why}")

    def stop(self) -> None:
        """Cancel the job, and return when the cluster reports its end."""
        if self._batch.job is None:
            self._launcher.withdraw(self._batch, self._record)
            return
        self._batch.job.cancel(check=False)
        until = time.monotonic() + _LAG_SECONDS
        while self._launcher.states(0).get(self._batch.job.job_id, "") in _ALIVE and time.monotonic() < until:
            time.sleep(0.5)
        self._record.unlink(missing_ok=True)

    def _note(self, what: str) -> int:
        self._record.unlink(missing_ok=True)
        with writing.open_to_append(self._log) as file:
            file.write(f"{what}\n".encode())
        return 1


class _Cached:
    """The states of all jobs, cached for a few seconds."""

    def __init__(self, ask: States) -> None:
        self._ask, self._asked = ask, float("-inf")
        self._known: Mapping[str, str] = {}

    def __call__(self, most_seconds: float = _POLL_SECONDS) -> Mapping[str, str]:
        if time.monotonic() - self._asked >= most_seconds:
            self._known, self._asked = self._ask(), time.monotonic()
        return self._known

    def forget(self) -> None:
        """Invalidate the cache, because a job was just queued."""
        self._asked = float("-inf")


def squeue() -> dict[str, str]:
    """State by id of every job of this user that Slurm knows, including recently ended ones. Needs no Slurm accounting.

    The user's own filters for squeue, such as SQUEUE_PARTITION, do not count. Raises `CoraError` if squeue keeps failing.
    """
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i %T"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    for attempt in range(5):
        answer = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.strip())
        time.sleep(2**attempt)  # the controller may be restarting
    raise CoraError(f"squeue failed: {answer.stderr.strip()}; the jobs continue, and the same command finds them again")


def _last_line_of_trace(text: str) -> str:
    """The last line of the traceback in submitit's error message."""
    lines = [line for line in text.partition("You can check full logs")[0].splitlines() if line.strip(" -")]
    return lines[-1].strip() if lines else "no error message"


def left_jobs(folder: Path) -> list[str]:
    """Ids of jobs that an earlier `ablate` queued and that it did not see end."""
    return sorted(read_json(record, Job)["job"] for record in folder.glob("*.json"))
