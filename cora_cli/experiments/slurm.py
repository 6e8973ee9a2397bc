"""Steps as jobs of a Slurm cluster, through submitit: the same commands, the same files on a shared disk, the cluster's own queue.

A job that is preempted or reaches its time limit is queued again, and its step continues where it was; a job that outlives a killed
`ablate` is found again by the next one.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cora_cli
from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.experiments.resources import Resources

States = Callable[[], Mapping[str, str]]
_MOST_JOBS = 1000
_POLL_SECONDS, _PATIENCE_SECONDS = 5.0, 20.0
# Slurm's own patience between SIGTERM and SIGKILL is 30 seconds where nobody has changed it.
_KILL_SECONDS = 60.0
# Between the end of a job and the moment at which a shared disk shows its result everywhere.
_LAG_SECONDS = 30.0
# What a job may be called while it can still go on: waiting, running, or queued again.
_ALIVE = frozenset(
    {
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"),
        *("PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    }
)


class StepCall:
    """What runs on the node: one `cora` command, everything that it says going to the end of `log`."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self.argv, self.log = tuple(argv), log
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run it and return its exit code."""
        environment = dict(os.environ)
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            # torch would count the node's processors, not the job's.
            environment["OMP_NUM_THREADS"] = cpus
        with self.log.open("ab") as file:
            file.write(f"$ cora {' '.join(self.argv)}\n".encode())
            file.flush()
            command = [sys.executable, "-m", "cora_cli", *self.argv]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        # Not `wait`: `checkpoint` comes in a signal handler, and would find its lock taken.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        if code < 0:
            # Slurm signals the command before it takes the job away or queues it again: then this must not look like a result.
            time.sleep(_KILL_SECONDS)
        return code

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """End the command before the job is queued again: submitit calls this on preemption and at the time limit.

        A run keeps its last whole checkpoint, and its words contain `--resume`.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            until = time.monotonic() + _PATIENCE_SECONDS
            while self._process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
        return DelayedSubmission(StepCall(self.argv, self.log))


class SlurmLauncher:
    """Jobs of a cluster; see `launch.Launcher`. The cluster decides how many run at a time."""

    how = "queued"

    def __init__(
        self,
        folder: Path,
        resources: Mapping[str, Resources],
        jobs: int | None,
        cluster: str = "slurm",
        states: States | None = None,
    ) -> None:
        """`folder` is on the shared disk and holds what submitit writes; `resources` are those of each kind of step.

        `cluster` is "slurm", or "local" for submitit's processes on this machine; `states` tells the state of every job that the cluster
        knows, by its id. Raises `CoraError` where submitit or Slurm is not there.
        """
        try:
            import submitit
        except ImportError as error:
            raise CoraError("--launcher slurm needs the package submitit: pip install 'cora[slurm]'") from error
        self.slots = jobs or _MOST_JOBS
        self._folder, self._resources = folder, resources
        self._states = _Cached(states or squeue)
        self._job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self._new_executor = functools.partial(submitit.AutoExecutor, folder=folder / "jobs", cluster=cluster)
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise CoraError("--launcher slurm was asked for, but there is no sbatch here: this is no machine of a cluster")
        self._setup = [f"export PYTHONPATH={Path(cora_cli.__file__).parents[1]}${{PYTHONPATH:+:$PYTHONPATH}}"]

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "SlurmJob":
        """Queue `cora ARGV`, or take up the job that an earlier `ablate` queued for the same words and that is still alive."""
        record = self._folder / f"{log.stem}.json"
        if record.exists():
            earlier = rundir.read_json(record)
            job = SlurmJob(self._job_class(self._folder / "jobs", earlier["job"]), record, log, self._states)
            if tuple(earlier["argv"]) == tuple(argv) and job.ended() is None:
                return job
            job.stop()
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            executor = self._new_executor()  # anew, since its parameters would outlive the job
            executor.update_parameters(name=log.stem, **self._resources[kind].executor_parameters(self._setup))
            queued = executor.submit(StepCall(argv, log.resolve()))
        except Exception as error:  # submitit raises the words of sbatch in classes of its own
            raise CoraError(f"the cluster refused the job: {' '.join(str(error).split())[-300:]}") from error
        rundir.write_json(record, {"job": queued.job_id, "argv": list(argv)})
        self._states.forget()
        return SlurmJob(queued, record, log, self._states)


class SlurmJob:
    """A job; see `launch.Job`. It has no process here."""

    pid: int | None = None

    def __init__(self, job: Any, record: Path, log: Path, states: "_Cached") -> None:
        self._job, self._record, self._log, self._states = job, record, log, states
        self._lost_since: float | None = None

    def ended(self) -> int | None:
        """See `launch.Job.ended`; a job that ended without a result adds what became of it to the log."""
        if self._job.paths.result_pickle.exists():
            self._record.unlink(missing_ok=True)
            if (error := self._job.exception()) is not None:
                return self._note(_last_line_of_trace(str(error)))
            return int(self._job.result())
        state = self._states().get(self._job.job_id, "")
        if state in _ALIVE:
            self._lost_since = None
            return None
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        if now - self._lost_since < (0 if state and state != "COMPLETED" else _LAG_SECONDS):
            return None
        self._record.unlink(missing_ok=True)
        return self._note(f"it is {state}" if state else "it is gone from the queue, and left no result")

    def stop(self) -> None:
        """Cancel it, and return when the cluster has let go of it."""
        self._job.cancel(check=False)
        until = time.monotonic() + _LAG_SECONDS
        while self._states(0).get(self._job.job_id, "") in _ALIVE and time.monotonic() < until:
            time.sleep(0.5)
        self._record.unlink(missing_ok=True)

    def _note(self, what: str) -> int:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"Slurm job {self._job.job_id} ended before its step: {what}\n")
        return 1


class _Cached:
    """The states of all jobs, asked for once in a while for all of them."""

    def __init__(self, ask: States) -> None:
        self._ask, self._known, self._asked = ask, dict[str, str](), float("-inf")

    def __call__(self, most_seconds: float = _POLL_SECONDS) -> Mapping[str, str]:
        if time.monotonic() - self._asked >= most_seconds:
            self._known, self._asked = dict(self._ask()), time.monotonic()
        return self._known

    def forget(self) -> None:
        """Ask again next time: a job was just queued."""
        self._asked = float("-inf")


def squeue() -> dict[str, str]:
    """State by id of every job of this user that Slurm still knows, ended ones among them for some minutes; needs no accounting."""
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i %T"]
    for attempt in range(5):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.strip())
        time.sleep(2**attempt)  # a controller that restarts
    raise CoraError(f"squeue does not answer: {answer.stderr.strip()}; the jobs go on, the same command finds them again")


def _last_line_of_trace(text: str) -> str:
    """Of submitit's report of an exception."""
    lines = [line for line in text.partition("You can check full logs")[0].splitlines() if line.strip(" -")]
    return lines[-1].strip() if lines else "without a word"


def left_jobs(folder: Path) -> list[str]:
    """Ids of jobs that an earlier `ablate` queued and did not see the end of."""
    return sorted(str(rundir.read_json(record).get("job")) for record in folder.glob("*.json"))
