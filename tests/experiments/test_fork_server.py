"""Steps that are forks: they behave like processes of their own, whatever happens to them, to the server and to its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cora_cli import hashing
from cora_cli.experiments import launch
from cora_cli.experiments.fork_server import ForkServer, is_running
from cora_cli.experiments.launch import ForkedJob, LocalJob, LocalLauncher
from cora_cli.reading import read_json, read_jsonl

pytestmark = pytest.mark.skipif(not ForkServer.exists_here(), reason="steps are forks on Linux only")
# The server as it is, except that a step runs Python code instead of a command of `cora`.
RUNS_CODE = "import sys\nfrom cora_cli.experiments.fork_server import _serve\nif _serve(int(sys.argv[1])): exec(sys.argv[1])"

# Where the other libraries do not matter, the server need not import them; torch is needed by every step.
RUNS_CODE_SOON = (
    f"from cora_cli.experiments import fork_server\nfork_server._import_libraries = lambda: __import__('torch')\n{RUNS_CODE}"
)
SETTINGS = (
    *("--mode", "lora", "--rank", "4", "--dropout", "0.1", "--max-steps", "2", "--batch-size", "2", "--test-size", "4"),
    *("--device", "cpu"),
)


@pytest.fixture(scope="module", params=[RUNS_CODE_SOON, pytest.param(RUNS_CODE, marks=pytest.mark.slow)], ids=["torch", "all"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLauncher]:
    """A launcher whose steps are Python code. Its server was started in a directory with a `random.py`."""
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "random.py").write_text("raise RuntimeError('imported from the working directory')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cora_cli.experiments.fork_server._PROGRAM", ("-P", "-c", request.param))
        patch.chdir(directory)
        made = LocalLauncher(1, "cpu")
        run(made, "pass", tmp_path_factory.mktemp("first"))
    return made


def wait_for(found: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (answer := found()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return answer


def start(launcher: LocalLauncher, code: str, place: Path) -> tuple[ForkedJob, Path]:
    log = place / "step.log"
    job = launcher.submit("train", [code], log)
    assert isinstance(job, ForkedJob)
    return job, log


def run(launcher: LocalLauncher, code: str, place: Path) -> tuple[int, str]:
    """Exit code and output of a step."""
    job, log = start(launcher, code, place)
    wait_for(lambda: job.ended() is not None)
    code_of_step = job.ended()
    assert code_of_step is not None
    return code_of_step, log.read_text().split("\n", code.count("\n") + 1)[-1]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        pytest.param("raise ValueError('wrong')", 1, marks=pytest.mark.slow),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        pytest.param("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, marks=pytest.mark.slow),
    ],
)
def test_a_step_ends_with_its_own_exit_code_and_harms_no_other(
    launcher: LocalLauncher, code: str, expected: int, tmp_path: Path
) -> None:
    assert run(launcher, code, tmp_path)[0] == expected
    assert run(launcher, "print('fine')", tmp_path / "next") == (0, "fine\n")


def test_what_ends_with_the_process_runs_at_its_end(launcher: LocalLauncher, tmp_path: Path) -> None:
    code = "import atexit, threading, time; atexit.register(print, 'last')\nthreading.Timer(0.1, print, ['thread']).start()"
    assert run(launcher, code, tmp_path) == (0, "thread\nlast\n")


def test_a_step_has_the_environment_and_the_directory_of_its_start(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET_LATER", "yes")
    monkeypatch.delenv("HOME")
    monkeypatch.chdir(tmp_path)
    code = (
        "import os, subprocess; print(os.environ['SET_LATER'], 'HOME' in os.environ, os.getcwd(), sys.stdin.read(), flush=True)"
    )
    code += "\nsubprocess.run(['sh', '-c', 'echo $SET_LATER ${HOME-none}'])"
    assert run(launcher, code, tmp_path) == (0, f"yes False {tmp_path} \nyes none\n")


def test_a_step_imports_nothing_from_the_working_directory(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("print('imported')")
    (tmp_path / "wave.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    assert run(launcher, "import random, wave; print(sys.flags.safe_path)", tmp_path) == (0, "True\n")


def test_a_step_holds_the_lock_that_it_was_given(tmp_path: Path, launcher: LocalLauncher) -> None:
    read, write = os.pipe()
    launcher._keep_open = (write,)
    job, _ = start(launcher, "import time; time.sleep(60)", tmp_path)
    launcher._keep_open = ()
    os.close(write)
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):  # the step has the only other end
        os.read(read, 1)
    job.stop()
    assert os.read(read, 1) == b""
    os.close(read)


@pytest.mark.slow
def test_a_step_starts_from_chance_like_a_new_process_and_from_a_seed_exactly_like_one(
    launcher: LocalLauncher, tmp_path: Path
) -> None:
    draw = "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1, dtype=torch.float64).item())"
    first, second = (run(launcher, draw, tmp_path / name)[1].split() for name in ("a", "b"))
    assert len({*first, *second}) == 6
    seeded = "from transformers import set_seed; set_seed(3)\n" + draw
    seeded += "\na = torch.randn(300, 300)\nprint((a @ a).sum().item(), torch.get_num_threads(), threading.active_count())"
    seeded = "import threading\n" + seeded
    fresh = subprocess.run(
        [sys.executable, "-P", "-c", seeded], env=launcher._environment(0), capture_output=True, text=True, check=True
    )
    assert run(launcher, seeded, tmp_path) == (0, fresh.stdout)


def test_a_step_is_terminated_and_after_a_grace_period_killed(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obeys = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('on', flush=True)\ntime.sleep(60)"
    )
    job, log = start(launcher, obeys, tmp_path / "obeys")
    wait_for(lambda: log.read_text().endswith("on\n"))
    job.stop()
    assert job.ended() == 5
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    job, log = start(launcher, obeys.replace("sys.exit(5)", "None").replace("sleep(60)", "sleep(60); time.sleep(60)"), tmp_path)
    wait_for(lambda: log.read_text().endswith("on\n"))
    job.stop()
    assert job.ended() == -signal.SIGKILL
    assert launcher._free == [0]


def test_ctrl_c_reaches_steps_and_not_the_server(launcher: LocalLauncher, tmp_path: Path) -> None:
    assert launcher._server is not None
    server = launcher._server._process.pid
    job, log = start(launcher, "import time; print('on', flush=True); time.sleep(60)", tmp_path)
    wait_for(lambda: log.read_text().endswith("on\n"))
    for pid in (server, job._pid):
        os.kill(pid, signal.SIGINT)
    wait_for(lambda: job.ended() is not None)
    assert "KeyboardInterrupt" in log.read_text()
    assert run(launcher, "print('fine')", tmp_path / "next") == (0, "fine\n")


def test_a_step_whose_server_was_killed_is_stopped_and_the_next_one_starts(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cora_cli.experiments.fork_server._PROGRAM", ("-P", "-c", RUNS_CODE_SOON))
        launcher = LocalLauncher(1, "cpu")
        job, log = start(launcher, "import time; time.sleep(60)", tmp_path)
        assert launcher._server is not None
        launcher._server._process.kill()
        wait_for(lambda: job.ended() is not None)
        assert (job.ended(), is_running(job._pid)) == (1, False)
        assert log.read_text().endswith("cora: error: the process that had started this step was killed\n")
        assert run(launcher, "print('fine')", tmp_path / "next") == (0, "fine\n")


def test_a_step_goes_on_if_cora_ablate_is_killed(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"import time, pathlib; time.sleep(1); pathlib.Path({str(done)!r}).write_text('done')"
    parent = (
        "import os, pathlib\nfrom cora_cli.experiments import fork_server\nfrom cora_cli.experiments.launch import LocalLauncher\n"
        f"fork_server._PROGRAM = ('-P', '-c', {RUNS_CODE_SOON!r})\nlauncher = LocalLauncher(1, 'cpu')\n"
        f"launcher.submit('train', [{code!r}], pathlib.Path({str(tmp_path / 'step.log')!r}))\n"
        "print(launcher._server._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-P", "-c", parent], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for(done.exists)
    wait_for(lambda: not is_running(int(killed.stdout)))  # the server has nobody to work for


def test_a_server_that_cannot_import_the_libraries_leaves_steps_to_new_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "import sys\nfrom cora_cli.experiments import fork_server\nfork_server._MODULES = ('no_such_module',)\n"
    monkeypatch.setattr(
        "cora_cli.experiments.fork_server._PROGRAM", ("-P", "-c", f"{broken}fork_server._serve(int(sys.argv[1]))")
    )
    launcher = LocalLauncher(1, "cpu")
    job = launcher.submit("train", ["no-such-command"], tmp_path / "step.log")
    assert isinstance(job, LocalJob)
    wait_for(lambda: job.ended() is not None)
    text = (tmp_path / "step.log").read_text()
    assert (job.ended(), "no_such_module" in text, "there is no command" in text) == (2, True, True)


@pytest.mark.slow
def test_forks_and_new_processes_write_the_same_bytes(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    launcher = LocalLauncher(1, "cpu")
    kinds: dict[type, dict[str, Any]] = {}
    for forks in (True, False):
        launcher._forks = forks
        out = tmp_path / str(forks)
        argv = ["train", "--model", str(tiny_model), "--dataset", str(tiny_data), "--output-dir", str(out), *SETTINGS]
        for command in (argv, ["evaluate", str(out), "--metrics", "rouge", "--max-new-tokens", "4", "--device", "cpu"]):
            job = launcher.submit("train", command, tmp_path / f"{forks}.log")
            wait_for(lambda job=job: job.ended() is not None)
            assert job.ended() == 0, (tmp_path / f"{forks}.log").read_text()
        files = [*out.rglob("*.safetensors"), *out.rglob("heldout.jsonl"), *out.rglob("*s.jsonl")]
        kinds[type(job)] = {
            file.relative_to(out).as_posix(): hashing.sha256_file(file) for file in files if "checkpoints" not in str(file)
        }
        assert {line["loss"] for line in read_jsonl(out / "log.jsonl") if "loss" in line}
        assert read_json(out / "run.json")["status"] == "finished"
    assert kinds.keys() == {ForkedJob, LocalJob}
    assert kinds[ForkedJob] == kinds[LocalJob]
    assert len(kinds[ForkedJob]) >= 4
