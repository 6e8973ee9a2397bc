"""Runs steps as jobs of a Slurm cluster through submitit, with the same commands as locally and files on a shared disk.

A job that is preempted or reaches its time limit is queued again and its step continues. If `ablate` is killed, its jobs go on,
and the next call finds them.
"""

import functools
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cora_cli
from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.experiments.resources import Resources
from cora_cli.experiments.spread import Spread
from cora_cli.reading import read_json
from cora_cli.records import Job

ALONE = Spread()
States = Callable[[], Mapping[str, str]]
_MOST_JOBS = 1000
_POLL_SECONDS, _GRACE_SECONDS = 5.0, 20.0
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
    """What runs on each node: one `cora` command, in the processes of `spread`, whose output is appended to `log`."""

    spread = ALONE  # of jobs that an earlier version queued

    def __init__(self, argv: Sequence[str], log: Path, spread: Spread = ALONE) -> None:
        self.argv, self.log, self.spread = tuple(argv), log, spread
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command and return its exit code. Raises `CoraError` for a failure on a node that is not the first, whose code nobody reads."""
        self._process = self.spread.start(self.argv, self.log)
        # Not `wait`: it holds a lock that `checkpoint`, called from a signal handler, also needs.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        if code < 0 or (code and self.spread != ALONE):
            # Slurm signals the command before it cancels or requeues the job. Returning now would record a result, so wait. torchrun ends alike
            # after a signal and after a failure.
            time.sleep(_KILL_SECONDS)
        if code and self.spread.node:
            log = self.spread.log_here(self.log)
            raise CoraError(f"the step ended with exit code {code} on node {self.spread.node}; see {log}")
        return code

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """Stop the command before the job is queued again. submitit calls this on preemption and at the time limit.

        A run keeps its last complete checkpoint, and its command contains `--resume`.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            until = time.monotonic() + _GRACE_SECONDS
            while self._process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
        return DelayedSubmission(StepCall(self.argv, self.log, self.spread))


class SlurmLauncher:
    """Runs steps as jobs of a cluster; see `launch.Launcher`. The cluster decides how many jobs run at a time."""

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
        self._folder, self._resources = folder, resources
        self._states = _Cached(states or squeue)
        self._job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self._new_executor = functools.partial(submitit.AutoExecutor, folder=folder / "jobs", cluster=cluster)
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise CoraError(
                "--launcher slurm needs sbatch, which is not installed here; run on a Slurm login node, or use --launcher local"
            )
        # submitit starts Python with `-m` in the working directory, whose modules must not be imported.
        self._setup = [
            "export PYTHONSAFEPATH=1",
            f"export PYTHONPATH={Path(cora_cli.__file__).parents[1]}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "SlurmJob":
        """Queue `cora ARGV`, or return the job that an earlier `ablate` queued for the same command if it is still alive.

        Raises `CoraError` if Slurm refuses the job.
        """
        record = self._folder / f"{log.stem}.json"
        if record.exists():
            earlier = read_json(record, Job)
            job = SlurmJob(self._job_class(self._folder / "jobs", earlier["job"]), record, log, self._states)
            if tuple(earlier["argv"]) == tuple(argv) and job.ended() is None:
                return job
            job.stop()
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            executor = self._new_executor()  # a new one per job, because parameters of an executor persist
            resources = self._resources[kind]
            executor.update_parameters(name=log.stem, **resources.executor_parameters(self._setup))
            # The first node's result is that of the step.
            queued = executor.submit(StepCall(argv, log.resolve(), resources.spread)).task(0)
        except Exception as error:  # submitit raises sbatch's messages in its own exception classes
            raise CoraError(f"Slurm refused the job: {' '.join(str(error).split())[-300:]}") from error
        rundir.write_json(record, {"job": queued.job_id, "argv": list(argv)})
        self._states.forget()
        return SlurmJob(queued, record, log, self._states)


class SlurmJob:
    """A job of a cluster; see `launch.Job`. It has no process on this machine."""

    pid: int | None = None

    def __init__(self, job: Any, record: Path, log: Path, states: "_Cached") -> None:
        self._job, self._record, self._log, self._states = job, record, log, states
        self._lost_since: float | None = None

    def ended(self) -> int | None:
        """See `launch.Job.ended`. If a job ended without a result, the reason is added to the log."""
        if self._job.paths.result_pickle.exists():
            self._record.unlink(missing_ok=True)
            if (error := self._job.exception()) is not None:
                return self._note(_last_line_of_trace(str(error)))
            if code := int(self._job.result()):
                self._job.cancel(check=False)  # other nodes may wait for the first one
            return code
        state = self._states().get(self._job.job_id, "")
        if state in _ALIVE:
            self._lost_since = None
            return None
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        if now - self._lost_since < (0 if state and state != "COMPLETED" else _LAG_SECONDS):
            return None
        self._record.unlink(missing_ok=True)
        return self._note(f"its state is {state}" if state else "it disappeared from the queue without a result")

    def stop(self) -> None:
        """Cancel the job, and return when the cluster reports its end."""
        self._job.cancel(check=False)
        until = time.monotonic() + _LAG_SECONDS
        while self._states(0).get(self._job.job_id, "") in _ALIVE and time.monotonic() < until:
            time.sleep(0.5)
        self._record.unlink(missing_ok=True)

    def _note(self, what: str) -> int:
        with rundir.open_to_append(self._log) as file:
            file.write(f"Slurm job {self._job.job_id} ended before its step: {what}\n".encode())
        return 1


class _Cached:
    """The states of all jobs, cached for a few seconds."""

    def __init__(self, ask: States) -> None:
        self._ask, self._known, self._asked = ask, dict[str, str](), float("-inf")

    def __call__(self, most_seconds: float = _POLL_SECONDS) -> Mapping[str, str]:
        if time.monotonic() - self._asked >= most_seconds:
            self._known, self._asked = dict(self._ask()), time.monotonic()
        return self._known

    def forget(self) -> None:
        """Invalidate the cache, because a job was just queued."""
        self._asked = float("-inf")


def squeue() -> dict[str, str]:
    """State by id of every job of this user that Slurm knows, including recently ended ones. Needs no Slurm accounting.

    Raises `CoraError` if squeue keeps failing.
    """
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i %T"]
    for attempt in range(5):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
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
