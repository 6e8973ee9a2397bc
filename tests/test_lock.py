"""The lock of an output: one holder, released by its death, no trace of it afterwards; what killed commands left is removed."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cora_cli.errors import CoraError
from cora_cli.lock import own_directory, own_output
from cora_cli.writing import atomic_path, holds_files, open_to_append


def killed(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that ends by killing itself."""
    words = [
        "import os, signal, subprocess, sys",
        "from pathlib import Path",
        "from cora_cli.lock import *",
        textwrap.dedent(code),
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(words)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done


@pytest.mark.parametrize("own", [own_directory, own_output])
def test_the_second_caller_is_refused_with_the_holder_s_process(own, tmp_path: Path) -> None:
    with (
        own(tmp_path / "out"),
        pytest.raises(CoraError, match=rf"out is in use by another cora command \(process {os.getpid()}\); wait"),
        own(tmp_path / "out"),
    ):
        pass
    with own(tmp_path / "out"):
        pass


def test_a_directory_that_is_about_to_appear_all_at_once_is_held_too(tmp_path: Path) -> None:
    # The other way round needs no lock: `cora merge` and its kin refuse an output that exists.
    with (
        own_output(tmp_path / "out"),
        pytest.raises(CoraError, match=f"process {os.getpid()}"),
        own_directory(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_root_of_the_file_system_is_no_output_directory() -> None:
    with pytest.raises(CoraError, match=r"^/ cannot be an output directory"), own_directory(Path("/")):
        pass


@pytest.mark.parametrize("own", [own_directory, own_output])
def test_a_place_whose_name_no_record_can_hold_is_no_output(own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(folder)
    with (
        pytest.raises(CoraError, match=r"caf\\xe9/out cannot be an output, since the bytes of its name are no UTF-8"),
        own(Path("out")),
    ):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("own", [own_directory, own_output])
def test_a_directory_in_which_nothing_can_be_created_ends_in_an_error(own) -> None:
    with pytest.raises(CoraError, match=r"^/proc/self/new cannot be written: "), own(Path("/proc/self/new")):
        pass


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with own_directory(tmp_path / "new" / "out"):
        assert (tmp_path / "new" / "out").is_dir()
    with own_output(tmp_path / "new" / "file"):
        pass
    assert list(tmp_path.iterdir()) == []
    with own_directory(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["result"]


def test_a_killed_holder_releases_its_lock_and_its_directory_counts_as_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(f"with own_directory(Path({str(out)!r})): os.kill(os.getpid(), signal.SIGKILL)")
    assert (out / ".lock").exists()
    assert not holds_files(out)
    with own_directory(out):
        pass
    assert list(out.iterdir()) == []


def test_a_process_that_inherited_the_lock_of_a_killed_one_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = killed(f"""
        with own_directory(Path({str(out)!r})) as lock:
            pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=(lock,), **pipes)
            note_holders(lock, [child.pid])
            print(child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    pid = int(step.stdout)
    try:
        with pytest.raises(CoraError, match=rf"processes \d+, {pid}\)"), own_directory(out):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)


def test_temporary_files_of_killed_commands_are_removed_by_the_next(tmp_path: Path) -> None:
    for name in ("run.json", "plots/curve.svg", "basis.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        killed(f"""
            from cora_cli.writing import atomic_path
            with atomic_path(Path({str(tmp_path / name)!r})) as temporary:
                temporary.mkdir()
                (temporary / "part").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    assert len(list(tmp_path.rglob(".*.tmp"))) == 3
    with own_output(tmp_path / "other.safetensors"):
        assert len(list(tmp_path.rglob(".*.tmp"))) == 3
    with own_output(tmp_path / "basis.safetensors"), own_directory(tmp_path, "plots"):
        assert list(tmp_path.rglob(".*.tmp")) == []


def test_the_temporary_file_of_a_command_at_work_is_kept(tmp_path: Path) -> None:
    with own_output(tmp_path / "basis.safetensors"), atomic_path(tmp_path / "basis.safetensors") as temporary:
        temporary.write_text("almost")
        with own_directory(tmp_path):
            assert temporary.exists()
    assert (tmp_path / "basis.safetensors").read_text() == "almost"


def test_a_link_is_refused_as_output_as_a_part_of_it_and_as_lock(tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    (out / "plots").symlink_to(elsewhere)
    for own in (own_directory, own_output):
        with pytest.raises(CoraError, match=r"link is a symbolic link to .*elsewhere"), own(tmp_path / "link"):
            pass
    with pytest.raises(CoraError, match="plots is a symbolic link"), own_directory(out, "plots"):
        pass
    (out / ".lock").symlink_to(elsewhere / "written")
    with pytest.raises(CoraError, match=r"\.lock is a symbolic link"), own_directory(out):
        pass
    assert list(elsewhere.iterdir()) == []


def test_a_log_or_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(CoraError, match="does not write through links"), open_to_append(tmp_path / "log.jsonl"):
        pass
    with pytest.raises(CoraError, match="does not write through links"), atomic_path(tmp_path / "log.jsonl") as temporary:
        temporary.touch()
    assert not (tmp_path / "other").exists()


def test_what_another_program_created_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "m", replace=False) as temporary:
            temporary.mkdir()
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "work").touch()

    with pytest.raises(CoraError, match="created by another program"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "work"]


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "weights") as temporary:
            temporary.mkdir()
            os.close(os.open(temporary / "model.safetensors", os.O_CREAT, 0o600))
    finally:
        os.umask(previous)
    assert (tmp_path / "weights" / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("own", [own_directory, own_output])
@pytest.mark.parametrize("inside", ["model", "adapter", "adapter/basis.safetensors"])
def test_nothing_is_written_into_the_result_of_a_run(own, inside, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with (
        pytest.raises(CoraError, match=r"where the run \S+run keeps its result; choose another place"),
        own(tmp_path / "run" / inside),
    ):
        pass
    with own(tmp_path / "run" / "merged"), own(tmp_path / "model"):
        pass


def test_the_place_of_the_result_is_kept_for_a_training_that_has_no_record_yet(tmp_path: Path) -> None:
    with (
        own_directory(tmp_path / "run"),
        pytest.raises(CoraError, match=rf"run is in use by another cora command \(process {os.getpid()}\)"),
        own_output(tmp_path / "run" / "adapter"),
    ):
        pass
    with own_output(tmp_path / "run" / "adapter"):
        pass


def test_a_disk_without_room_for_the_lock_is_called_full_with_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CoraError, match=r"the disk is full: \S+/out could not be written"), own_directory(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
