"""What a command shows on a terminal: at 80 and 200 columns, on Ctrl-C, into a closed pipe, in ASCII, and with hostile names."""

import fcntl
import io
import json
import multiprocessing
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cora_cli.cli import app
from tests.cli.fuzzing import EVALUATE, SCORE, TRAIN, make_workspace

ROOT = Path(__file__).parents[2]
# The server imports everything once and computes nothing, so that its forks start at once and are safe.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["cora_cli.training.run", "cora_cli.evaluation.evaluate", "transformers.models.llama.modeling_llama"]
)
CORA = [sys.executable, "-P", "-m", "cora_cli"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, place = Path.cwd(), tmp_path_factory.mktemp("screen")
    os.chdir(place)
    make_workspace(place)
    yield place
    os.chdir(before)


def _run_on(terminal: str, words: list[str], encoding: str, place: str) -> None:
    """The command in the process of its own: `terminal` becomes its three streams."""
    os.setsid()
    side = os.open(terminal, os.O_RDWR)
    for stream in range(3):
        os.dup2(side, stream)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(stream, "w", closefd=False), encoding, write_through=True) for stream in (1, 2)
    )
    os.chdir(place)
    typer.main.get_command(app)(words, prog_name="cora")


def on_terminal(words: list[str], columns: int, interrupt_at: bytes | None = None, encoding: str = "utf-8") -> tuple[int, str]:
    """The exit code of `cora WORDS` on a pseudo-terminal, and what it showed; Ctrl-C once `interrupt_at` has appeared."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = _PROCESSES.Process(target=_run_on, args=(os.ttyname(side), words, encoding, str(Path.cwd())))
    process.start()
    shown = b""
    while True:
        ready, _, _ = select.select([main, process.sentinel], [], [], 120)
        assert ready, f"nothing happened for two minutes; shown so far: {shown[-500:]!r}"
        if main not in ready:  # it has ended, and everything is read
            break
        shown += os.read(main, 65536)
        if interrupt_at is not None and interrupt_at in shown:
            os.kill(process.pid, signal.SIGINT)
            interrupt_at = None
    process.join()
    os.close(side)
    os.close(main)
    return process.exitcode, shown.decode(errors="replace")


def assert_clean(screen: str) -> None:
    for sign in ("Traceback", "unexpected ", "ZeroDivisionError", "Exception ignored"):
        assert sign not in screen, screen[-2000:]


@pytest.mark.parametrize("columns", [80, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["doctor", "--device", "cpu"], marks=pytest.mark.slow, id="doctor"),
        ["extract-basis", "base", "--rank", "2", "-o", "screen.safetensors", "--overwrite"],
        ["inspect", "basis.safetensors"],
        ["train", *TRAIN, "--model", "base", "--dataset", "pairs.jsonl", "--output-dir", "trained-{columns}"],
        ["evaluate", "run", *EVALUATE, "-o", "evaluated-{columns}"],
        ["report", "run"],
        ["merge", "run", "-o", "merged-{columns}"],
        ["export", "run", "-o", "exported-{columns}"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_ends_well_on_a_terminal(workspace: Path, words: list[str], columns: int) -> None:
    code, screen = on_terminal([word.format(columns=columns) for word in words], columns)
    assert code == 0, screen[-2000:]
    assert_clean(screen)
    assert not [line for line in screen.splitlines() if line.startswith("|") and len(line) > columns]


@pytest.mark.slow
def test_ablate_draws_its_status_to_the_end_and_takes_control_c(workspace: Path) -> None:
    grid = "name: screen\nmodel: base\ndatasets: {pairs: pairs.jsonl}\ndefaults: {train: {max_steps: 1, rank: 2, test_size: 2}, evaluate: false}\ngrid: [{mode: lora, seed: [0]}]\n"
    Path("screen.yaml").write_text(grid)
    words = ["ablate", "screen.yaml", "-o", "ablated", "--device", "cpu", "--dtype", "fp32"]
    code, screen = on_terminal(words, 80, interrupt_at=b"0 of 1 steps")
    assert code == 130, screen[-2000:]
    assert_clean(screen)
    code, screen = on_terminal(words, 80)
    assert code == 0, screen[-2000:]
    assert "1 step completed" in screen
    assert_clean(screen)


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (["train", *TRAIN, "--max-steps", "100000", "--model", "base", "--dataset", "pairs.jsonl", "--output-dir", "stopped"], b"training: "),
        (["evaluate", "--from", "long.jsonl", *SCORE, "-o", "stopped-too"], b"scoring"),
    ],
    ids=["train", "evaluate"],
)  # fmt: skip
def test_control_c_ends_long_work_with_one_line(workspace: Path, words: list[str], sign: bytes) -> None:
    line = json.dumps({"prediction": "a b c " * 100, "reference": "c b a " * 100})
    Path("long.jsonl").write_text(f"{line}\n" * 20_000)
    code, screen = on_terminal(words, 80, interrupt_at=sign)
    assert code == 130, screen[-2000:]
    assert "cora: interrupted" in screen
    assert_clean(screen)


@pytest.mark.parametrize("words", ["train --help", pytest.param("report run", marks=pytest.mark.slow), "frobnicate"])
def test_a_closed_pipe_ends_a_command_quietly(workspace: Path, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CORA, *words.split()], stdout=writer, stderr=subprocess.PIPE, env=ENV, check=False)
    os.close(writer)
    assert b"Broken" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "merge --help", "list"])
def test_output_that_finds_no_room_is_one_sentence(workspace: Path, words: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*CORA, *words.split()], stdout=full, stderr=subprocess.PIPE, env=ENV, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"cora: error: ")
    assert done.stderr.endswith(b"No space left on device\n")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_terminal_of_another_encoding_shows_replacements(workspace: Path, encoding: str) -> None:
    code, screen = on_terminal(["report", "run"], 80, encoding=encoding)
    assert code == 0, screen[-2000:]
    assert_clean(screen)


def test_an_escape_sequence_in_a_name_does_not_reach_the_terminal(workspace: Path) -> None:
    hostile = "gone\x1b[2J\x9b2J\r.jsonl"
    for words in (
        ["evaluate", "--from", hostile],
        ["report", hostile],
        ["merge", hostile, "-o", "x"],
        ["train", "--model", hostile, "--dataset", hostile, "--output-dir", "x"],
        ["report", "run", "--format", hostile],
        [hostile],
        [f"--{hostile}"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code in (1, 2)
        assert not set("\x1b\x9b\r") & set(done.output)
