"""Temporary directories: gone after use, removed by the next command after a kill, and never while their process lives."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cora_cli.lock import own_output
from cora_cli.scratch import remove_abandoned, temporary_directory

_HOLD = """
import os, signal, sys
from pathlib import Path
from cora_cli.scratch import temporary_directory
with temporary_directory("test", Path(sys.argv[1]) if sys.argv[1:] else None) as place:
    (place / "file").touch()
    print(place, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def holder(*arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a temporary directory, and kills itself as soon as its standard input ends; and that directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_nothing_is_left_after_the_block_nor_after_an_error_in_it(tmp_path: Path) -> None:
    with temporary_directory("test", tmp_path) as place:
        (place / "folder").mkdir()
        (place / "folder" / "file").touch()
    with pytest.raises(ValueError, match="in the block"), temporary_directory("test", tmp_path):
        raise ValueError("in the block")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    process, place = holder(str(tmp_path))
    (tmp_path / "cora-notes").mkdir()
    remove_abandoned(tmp_path)
    with temporary_directory("test", tmp_path):
        assert (place / "file").exists()
    kill(process)
    assert (place / "file").exists()
    with temporary_directory("test", tmp_path):
        assert not place.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cora-notes"]


def test_a_command_that_writes_removes_those_in_the_system_s_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "system"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "system").mkdir()
    process, place = holder()
    assert place.parent == tmp_path / "system"
    kill(process)
    with own_output(tmp_path / "output"):
        assert not place.exists()


def test_links_and_files_with_such_a_name_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cora-scratch-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cora-scratch-file").touch()
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cora-scratch-file", "cora-scratch-link", "elsewhere"]
