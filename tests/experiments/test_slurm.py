"""The Slurm launcher, with submitit's local processes as nodes and a dictionary as the queue."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.ablate import Request, ablate
from cora_cli.experiments.resources import KINDS, Resources, read_resources
from cora_cli.experiments.slurm import SlurmJob, SlurmLauncher, StepCall, left_jobs, squeue
from cora_cli.experiments.spread import Spread
from tests.evaluation.helpers import unsealed
from tests.experiments.helpers import grid_of, plan_of


def launcher(folder: Path, states: dict[str, str], steps_per_job: int = 1) -> SlurmLauncher:
    resources = dict.fromkeys(KINDS, Resources(steps_per_job=steps_per_job))
    return SlurmLauncher(folder, resources, None, cluster="local", states=lambda: states)


def ended(job: SlurmJob) -> int:
    while (code := job.ended()) is None:
        time.sleep(0.05)
    return code


class Alive(dict[str, str]):
    """A queue in which every job runs."""

    def get(self, key: str, default: object = None) -> str:
        return "RUNNING"


def test_a_step_runs_as_a_job_with_its_log_and_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "step.log"
    job = launcher(tmp_path / "slurm", Alive()).submit("train", ["no-such-command"], log)
    assert len(left_jobs(tmp_path / "slurm")) == 1
    assert ended(job) == 2
    assert left_jobs(tmp_path / "slurm") == []
    text = log.read_text()
    assert text.startswith("$ cora no-such-command\n")
    assert "there is no command" in text


@pytest.mark.slow
def test_one_job_runs_several_steps_of_a_kind(tmp_path: Path) -> None:
    several = launcher(tmp_path / "slurm", Alive(), steps_per_job=2)
    commands = {"first": ["no-such-command"], "second": ["--version"], "third": ["--help"]}
    jobs = [several.submit("train", argv, tmp_path / f"{name}.log") for name, argv in commands.items()]
    first, second, third = jobs
    assert third.ended() is None
    assert third._batch.job is None
    assert [ended(job) for job in jobs] == [2, 0, 0]
    assert first._batch.job.job_id == second._batch.job.job_id != third._batch.job.job_id
    assert left_jobs(tmp_path / "slurm") == []
    assert "there is no command" in (tmp_path / "first.log").read_text()
    assert (tmp_path / "second.log").read_text().startswith("$ cora --version\n")


def test_a_step_that_waits_for_others_of_its_job_can_be_withdrawn(tmp_path: Path) -> None:
    several = launcher(tmp_path / "slurm", Alive(), steps_per_job=2)
    job = several.submit("train", ["--version"], tmp_path / "step.log")
    job.stop()
    assert several._open == {}
    assert not (tmp_path / "slurm" / "jobs").exists()


def test_a_refused_job_is_the_error_of_each_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = launcher(tmp_path / "slurm", Alive(), steps_per_job=2)

    def refuse() -> None:
        raise OSError("Invalid account")

    monkeypatch.setattr(several, "_new_executor", refuse)
    jobs = [several.submit("train", ["--version"], tmp_path / f"{name}.log") for name in ("a", "b")]
    assert [job.ended() for job in jobs] == [1, 1]
    assert (tmp_path / "b.log").read_text() == "Slurm refused the job: Invalid account\n"


class Left:
    """What submitit knows of a job that left no result."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self.job_id, self.paths, self.cancelled = job_id, self, False
        self.result_pickle = folder / "result.pkl"

    def cancel(self, check: bool) -> None:
        self.cancelled = True


def left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: dict[str, str], argv: list[str]
) -> tuple[SlurmLauncher, Left]:
    """A launcher that finds a job of `train` that an earlier one queued."""
    waiting = launcher(tmp_path / "slurm", states)
    job = Left(tmp_path, "12")
    monkeypatch.setattr(waiting, "_job_class", lambda folder, job_id: job)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "step.json").write_text(json.dumps({"job": "12", "argv": argv}))
    return waiting, job


def test_a_job_that_outlived_its_ablation_is_reused_and_not_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, earlier = left(tmp_path, monkeypatch, {"12": "PENDING"}, ["train"])
    job = waiting.submit("train", ["train"], tmp_path / "step.log")
    assert job._batch.job is earlier
    assert job.ended() is None
    assert left_jobs(tmp_path / "slurm") == ["12"]


def test_a_job_with_another_command_is_cancelled_before_the_step_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"12": "RUNNING"}
    waiting, earlier = left(tmp_path, monkeypatch, states, ["train", "--rank", "8"])
    # The queue of this test knows only the earlier job.
    monkeypatch.setattr("cora_cli.experiments.slurm._LAG_SECONDS", float("inf"))
    monkeypatch.setattr(earlier, "cancel", lambda check: states.clear() or setattr(earlier, "cancelled", True))
    job = waiting.submit("train", ["no-such-command"], tmp_path / "step.log")
    assert earlier.cancelled
    assert job._batch.job is not earlier
    assert ended(job) == 2


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"])
def test_a_job_that_the_cluster_ended_logs_its_state(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"12": "RUNNING"}
    waiting, _ = left(tmp_path, monkeypatch, states, ["train"])
    job = waiting.submit("train", ["train"], tmp_path / "step.log")
    waiting.states.forget()
    states["12"] = state
    assert job.ended() == 1
    assert (tmp_path / "step.log").read_text().endswith(f"Slurm job 12 ended before its step: its state is {state}\n")
    assert left_jobs(tmp_path / "slurm") == []


def test_a_job_that_left_the_queue_is_given_time_for_its_result_to_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"12": "RUNNING"}
    waiting, _ = left(tmp_path, monkeypatch, states, ["train"])
    job = waiting.submit("train", ["train"], tmp_path / "step.log")
    states.clear()
    waiting.states.forget()
    assert job.ended() is None
    monkeypatch.setattr("cora_cli.experiments.slurm._LAG_SECONDS", 0.0)
    assert job.ended() == 1
    assert "disappeared from the queue" in (tmp_path / "step.log").read_text()


def test_a_command_ended_by_a_signal_waits_for_the_cluster_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, waited = StepCall([(["evaluate"], tmp_path / "step.log")], tmp_path / "codes"), list[float]()

    def end_it(seconds: float) -> None:
        waited.append(seconds)
        if call._pid is not None:
            os.kill(call._pid, signal.SIGKILL)

    monkeypatch.setattr("cora_cli.experiments.slurm.time.sleep", end_it)
    assert call() == {"step": -9}
    assert waited[-1] >= 60


def test_a_preempted_job_is_queued_again_without_the_steps_that_ended(tmp_path: Path) -> None:
    call = StepCall([(["no-such-command"], tmp_path / "step.log")], tmp_path / "codes")
    assert call() == {"step": 2}
    again = call.checkpoint().function
    assert (again.steps, again.codes) == (call.steps, call.codes)
    assert again() == {"step": 2}
    assert (tmp_path / "step.log").read_text().count("$ cora") == 1


def test_the_exit_code_that_another_job_left_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = StepCall([(["no-such-command"], tmp_path / "step.log")], tmp_path / "codes")
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "step.json").write_text('{"job": "11", "code": 0}')
    assert call() == {"step": 2}


@pytest.fixture(autouse=True)
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """What submitit sets for a job."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "12")


@pytest.fixture
def fake_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.touch()
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return script


def test_the_queue_is_read_for_all_jobs_at_once(fake_squeue: Path) -> None:
    fake_squeue.write_text("#!/bin/sh\nprintf '7 RUNNING\\n12 CANCELLED\\n'\n")
    assert squeue() == {"7": "RUNNING", "12": "CANCELLED"}


def test_filters_of_the_user_hide_no_job(fake_squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    fake_squeue.write_text("#!/bin/sh\n[ -z \"$SQUEUE_PARTITION\" ] && printf '7 RUNNING\\n' || true\n")
    assert squeue() == {"7": "RUNNING"}


def test_a_failing_squeue_is_an_error_that_says_the_jobs_continue(fake_squeue: Path) -> None:
    fake_squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(CoraError, match="Unable to contact slurm controller; the jobs continue"):
        squeue()


def test_without_sbatch_the_error_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CoraError, match="needs sbatch, which is not installed here"):
        SlurmLauncher(tmp_path / "slurm", dict.fromkeys(KINDS, Resources()), None)


def test_resources_of_a_kind_override_those_of_all(tmp_path: Path) -> None:
    asked = {"all": {"cpus": 4, "mem_gb": 16}, "train": {"gpus": 1, "mem_gb": 80, "sbatch": {"mail-type": "END"}}}
    grid = grid_of({"mode": "lora"}, resources=asked)
    assert grid.resources["train"] == Resources(cpus=4, mem_gb=80.0, gpus=1, sbatch={"mail-type": "END"})
    assert grid.resources["basis"] == Resources(cpus=4, mem_gb=16.0)
    assert grid.resources["train"].executor_parameters(["x"]) == {
        "timeout_min": 1440,
        "cpus_per_task": 4,
        "mem_gb": 80.0,
        "gpus_per_node": 1,
        "slurm_setup": ["x"],
        "slurm_additional_parameters": {"mail-type": "END"},
    }


def test_several_nodes_have_one_task_each_that_starts_a_process_per_gpu() -> None:
    asked = {"all": {"cpus": 8}, "train": {"nodes": 2, "gpus": 4}, "evaluate": {"gpus": 2}}
    resources = grid_of({"mode": "lora"}, resources=asked).resources
    assert [resources[kind].processes for kind in ("train", "evaluate", "basis")] == [8, 2, 1]
    parameters = resources["train"].executor_parameters([])
    assert (parameters["nodes"], parameters["tasks_per_node"], parameters["gpus_per_node"]) == (2, 1, 4)
    assert parameters["slurm_srun_args"] == ["--kill-on-bad-exit=1"]
    assert not {"nodes", "tasks_per_node", "slurm_srun_args"} & resources["evaluate"].executor_parameters([]).keys()


def test_processes_are_a_fact_of_a_training_and_not_of_its_evaluation(tmp_path: Path) -> None:
    alone, several = (
        plan_of(grid_of({"mode": "lora"}, resources={"train": {"gpus": gpus}, "evaluate": {"gpus": gpus}})) for gpus in (1, 4)
    )
    train, evaluate = (next(step for step in several.steps.values() if step.kind == kind) for kind in ("train", "evaluate"))
    assert train.facts == {**alone.steps[train.name].facts, "processes": 4}
    assert evaluate.facts.keys() == alone.steps[evaluate.name].facts.keys()


def on_node(monkeypatch: pytest.MonkeyPatch, node: int) -> None:
    """Let this process be the task of a job of two nodes."""
    task = {
        "SLURM_NODEID": node,
        "SLURM_PROCID": node,
        "SLURM_LOCALID": 0,
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NTASKS": 2,
    }
    for name, value in {**task, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 40001, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, str(value))


class Started:
    """In place of a process: what it was started with."""

    code, pid = 0, None

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        Started.last = self
        self.command, self.environment = command, env

    def poll(self) -> int:
        return self.code


@pytest.mark.parametrize("node", [0, 1])
def test_each_node_starts_its_processes_which_meet_on_the_first(
    node: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node(monkeypatch, node)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    monkeypatch.setattr("cora_cli.experiments.spread.subprocess.Popen", Started)
    assert StepCall([(["train", "-m", "x"], tmp_path / "step.log")], tmp_path / "codes", Spread(2, 4))() == {"step": 0}
    _, *command = Started.last.command
    assert command == [
        *(
            "-P",
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=4",
            "--nnodes=2",
            f"--node-rank={node}",
            "--master-addr=gpu07",
        ),
        *(f"--master-port={15000 + 40001 % 17000}", "-m", "cora_cli", "train", "-m", "x"),
    ]
    assert (Started.last.environment["OMP_NUM_THREADS"], Started.last.environment["PYTHONSAFEPATH"]) == ("3", "1")
    assert [path.name for path in tmp_path.glob("*.log")] == [("step.log", "step.node1.log")[node]]


def test_several_gpus_of_one_node_need_no_other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cora_cli.experiments.spread.subprocess.Popen", Started)
    assert StepCall([(["train"], tmp_path / "step.log")], tmp_path / "codes", Spread(per_node=2))() == {"step": 0}
    assert Started.last.command[3:] == [
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "cora_cli",
        "train",
    ]


def test_a_failure_on_another_node_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cora_cli.experiments.spread.subprocess.Popen", Started)
    monkeypatch.setattr("cora_cli.experiments.slurm._KILL_SECONDS", 0.0)
    monkeypatch.setattr(Started, "code", 1)
    call = StepCall([(["train"], tmp_path / "step.log")], tmp_path / "codes", Spread(2))
    on_node(monkeypatch, 0)
    assert call() == {"step": 1}
    shutil.rmtree(tmp_path / "codes")
    on_node(monkeypatch, 1)
    with pytest.raises(CoraError, match=r"exit code 1 on node 1; see .*step\.node1\.log"):
        call()


def test_the_local_launcher_refuses_steps_of_several_processes(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "model: builtin:smollm2\ndatasets: {a: builtin:instruct}\nresources: {train: {gpus: 2}}\ngrid: [{mode: lora}]\n"
        "defaults: {train: {max_steps: 1}, evaluate: false}\n"
    )
    with pytest.raises(UsageError, match="train asks for 2 processes, and --launcher local runs each step in one"):
        ablate(Request(grid, tmp_path / "out"), lambda *_: {})


@pytest.mark.slow
def test_two_nodes_train_together(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = ["train", "--model", str(tiny_model), "--dataset", str(tiny_data), "--output-dir", str(output), "--device", "cpu"]
    argv += ["--mode", "lora", "--max-steps", "2", "--batch-size", "4", "--rank", "4", "--test-size", "4"]
    log = tmp_path / "step.log"
    begin = (
        "import sys; from pathlib import Path; from cora_cli.experiments.slurm import StepCall; from cora_cli.experiments.spread import Spread; "
        f"sys.exit(sum(StepCall([({argv!r}, Path({str(log)!r}))], Path({str(tmp_path)!r}), Spread(2))().values()))"
    )
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SUBMITIT_EXECUTOR": "slurm"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", begin],
            env={**os.environ, **job, "SLURM_JOB_ID": str(os.getpid()), "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
        )
        for node in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0], log.read_text()
    record = unsealed(output / "run.json")
    assert (record["status"], record["hardware"]["processes"]) == ("finished", 2)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("much", "resources must hold all, model, basis, proposal, train, laplace, evaluate"),
        ({"trian": {}}, "did you mean train?"),
        ({"train": {"gpu": 1}}, "did you mean gpus?"),
        ({"train": {"steps_per_job": 0}}, "steps_per_job must be at least 1"),
        (
            {"train": {"steps_per_job": 4, "gpus": 2}},
            "train: steps_per_job must be 1 where a step has several processes, not 4",
        ),
        ({"train": {"gpus": -1}}, "gpus must be at least 0"),
        ({"evaluate": {"nodes": 0}}, "nodes must be at least 1"),
        (
            {"basis": {"gpus": 2}},
            "gpus must be at most 1 here, because only the steps model, train, evaluate run in several processes, not 2",
        ),
        ({"all": {"nodes": 2}}, "nodes must be at most 1 here"),
        ({"all": {"cpus": 0}}, "cpus must be at least 1"),
        ({"all": {"mem_gb": -1}}, "mem_gb must be positive"),
        ({"all": {"timeout_min": "long"}}, "timeout_min must be an integer"),
        ({"all": {"sbatch": "x"}}, "sbatch must be `name: value` lines"),
    ],
)
def test_invalid_resources_are_reported(values: object, complaint: str) -> None:
    problems: list[str] = []
    read_resources(values, problems)
    assert len(problems) == 1
    assert complaint in problems[0]
