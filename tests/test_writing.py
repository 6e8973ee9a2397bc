import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.reading import read_json, read_jsonl, read_yaml
from cora_cli.writing import atomic_path

repeatable = settings(derandomize=True, deadline=None, max_examples=50)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_written_file_appears_whole_with_its_parents_and_nothing_beside_it(tmp_path):
    target = tmp_path / "new" / "deep" / "file.txt"
    writing.write_text(target, "ünï\n")
    assert target.read_bytes() == "ünï\n".encode()
    writing.write_text(target, "again")
    assert target.read_text() == "again"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_other(error, tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old", "readers see the old file until the end"
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_directory_replaces_another_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"

    def write(name, fail):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
            if fail:
                raise RuntimeError

    write("first", fail=False)
    with pytest.raises(RuntimeError):
        write("second", fail=True)
    assert names(target) == ["first"]
    write("third", fail=False)
    assert names(target) == ["third"]
    assert names(tmp_path) == ["adapter"]


TOO_LARGE = "a file would be larger than `ulimit -f` or the file system allows"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "refused"), "the disk is full"),
        (OSError(errno.EDQUOT, "refused"), "the disk quota is used up"),
        (OSError(errno.EFBIG, "refused"), TOO_LARGE),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "the disk quota is used up"),
        (SafetensorError("I/O error: File too large (os error 27)"), TOO_LARGE),
        (RuntimeError("PytorchStreamWriter failed writing file"), "the disk is full"),
    ],
    ids=lambda value: f"{type(value).__name__} {value}" if isinstance(value, Exception) else "",
)
def test_what_leaves_no_room_for_a_file_is_called_by_its_name(error, said, tmp_path):
    def write():
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(CoraError) as raised:
        write()
    detail = getattr(error, "strerror", None) or error
    assert str(raised.value) == f"{said}: {tmp_path}/file could not be written ({detail}); no partial file was left behind"
    assert names(tmp_path) == []


def test_names_whose_bytes_the_locale_gave_as_surrogates_are_the_characters_that_they_were_typed_as(tmp_path):
    typed = "données/日本".encode().decode("ascii", "surrogateescape")
    writing.write_yaml(tmp_path / "a.yaml", {"dataset": typed, "models": (typed,), typed: 1})
    assert read_yaml(tmp_path / "a.yaml", "settings") == {
        "dataset": "données/日本",
        "models": ["données/日本"],
        "données/日本": 1,
    }


def test_where_torch_cannot_tell_a_full_disk_from_a_limit_on_files_both_are_named(monkeypatch):
    monkeypatch.setattr(writing.resource, "getrlimit", lambda _: (4096, 4096))
    assert writing.what_is_full(RuntimeError("PytorchStreamWriter failed")) == f"the disk is full, or {TOO_LARGE}"
    assert writing.what_is_full(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"


def test_another_refusal_of_the_system_names_the_file(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CoraError, match=r"file/below cannot be written: (File exists|Not a directory)"):
        writing.write_text(tmp_path / "file" / "below", "text")
    assert not writing.is_disk_full(PermissionError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize(
    "words", ["No space left on device", "File too large (os error 27)", "PytorchStreamWriter failed writing"]
)
def test_a_full_disk_is_known_by_the_words_of_the_libraries(words):
    assert writing.is_disk_full(RuntimeError(f"Error: {words}"))
    assert not writing.is_disk_full(RuntimeError("something else"))


# A limit on the size of files stands in for a full disk: the system refuses in the middle of a write. It holds for a complete
# process, hence the subprocess.
FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from cora_cli import writing
    from cora_cli.errors import CoraError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        writing.{call}
    except CoraError as error:
        print(error)
    """


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_copy_that_fills_the_disk_is_about_what_it_writes_not_about_what_it_reads(code, tmp_path):
    def copy():
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            raise OSError(code, "No space left on device", "/source/config.json", None, str(temporary / "config.json"))

    with pytest.raises(CoraError, match=r": \S+/folder could not be written"):
        copy()
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["write_text({path}, 'x' * 100_000)", "write_jsonl({path}, ['x' * 90] * 1000)"])
def test_a_file_that_cannot_be_completed_gives_one_sentence_and_keeps_the_old_file(call, tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    script = textwrap.dedent(FULL_DISK).format(call=call.format(path=f"Path({str(target)!r})"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{TOO_LARGE}: {target} could not be written (File too large); no partial file was left behind\n"
    assert names(tmp_path) == ["file"]
    assert target.read_text() == "old"


@pytest.mark.parametrize("large", ["first", "last"])
def test_of_files_that_belong_together_all_are_new_or_none(large, tmp_path):
    for name in ("first", "last"):
        (tmp_path / name).write_text("old")
    contents = {name: b"x" * 100_000 if name == large else "new" for name in ("first", "last")}
    call = f"write_together({{Path({str(tmp_path)!r}) / name: content for name, content in {contents!r}.items()}})"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK).format(call=call)], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout
        == f"{TOO_LARGE}: {tmp_path / large} could not be written (File too large); no partial file was left behind\n"
    )
    assert names(tmp_path) == ["first", "last"]
    assert [(tmp_path / name).read_text() for name in ("first", "last")] == ["old", "old"]
    writing.write_together({tmp_path / name: content for name, content in contents.items()})
    assert [len((tmp_path / name).read_bytes()) for name in ("first", "last")] == [
        100_000 if name == large else 3 for name in ("first", "last")
    ]


@given(value=values)
@repeatable
def test_json_and_its_lines_come_back(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    writing.write_json(path, value)
    assert read_json(path) == value
    writing.write_jsonl(path, [value, value])
    assert read_jsonl(path) == [value, value]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("write", [writing.write_json, lambda path, value: writing.write_jsonl(path, [value])])
def test_nan_is_refused_and_nothing_is_written(write, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == []


def test_a_json_file_that_cannot_be_read_is_refused_by_its_name(tmp_path):
    with pytest.raises(CoraError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(CoraError, match=r"gone.json does not exist"):
        read(tmp_path / "gone.json")


def test_malformed_json_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1,\n "b": }')
    with pytest.raises(CoraError, match=r"a.json is not valid JSON: ") as caught:
        read_json(tmp_path / "a.json")
    assert "line 2" in str(caught.value)


def test_a_malformed_line_is_named_by_its_number_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n{"a": 3}\n')
    for drop in (False, True):
        with pytest.raises(CoraError, match=r"a.jsonl, line 3: not valid JSON \(.*\): '\{\"a\":'"):
            read_jsonl(tmp_path / "a.jsonl", drop_partial_tail=drop)
    (tmp_path / "b.jsonl").write_bytes(b'"\xff"\n')
    with pytest.raises(CoraError, match=r"b.jsonl is not UTF-8 text"):
        read_jsonl(tmp_path / "b.jsonl")


@given(records=st.lists(values, max_size=4), data=st.data())
@repeatable
def test_a_file_cut_anywhere_gives_back_its_whole_lines(records, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    writing.write_jsonl(path, records)
    content = path.read_bytes()
    kept = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(kept)
    assert read_jsonl(path, drop_partial_tail=True) == records[: kept.count(b"\n")]


def test_what_killed_writers_and_file_managers_left_does_not_count_as_files(tmp_path):
    assert not writing.holds_files(tmp_path)
    (tmp_path / ".run.json.1a2b3c4d.tmp").touch()
    (tmp_path / ".adapter.1a2b3c4d.tmp").mkdir()
    assert not writing.holds_files(tmp_path)
    for name in (".DS_Store", ".lock", "Thumbs.db"):
        (tmp_path / name).touch()
    assert not writing.holds_files(tmp_path)
    (tmp_path / ".git").mkdir()
    assert writing.holds_files(tmp_path)
    (tmp_path / ".git").rmdir()
    (tmp_path / "notes.tmp").touch()
    assert writing.holds_files(tmp_path)


def test_the_files_of_a_folder_are_those_that_no_system_left(tmp_path):
    for name in ("adapter.json", ".DS_Store", "._adapter.json", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert writing.own_files(tmp_path) == [tmp_path / "adapter.json"]
    assert writing.own_files(tmp_path / "gone") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 24704 vs 24592"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_recognised_in_each_librarys_words(error: Exception) -> None:
    assert writing.is_disk_full(error)
    assert not writing.is_disk_full(type(error)("something else"))


def test_a_log_on_a_full_disk_is_named_also_when_its_buffer_cannot_be_written_on_closing(monkeypatch) -> None:
    monkeypatch.setattr(writing, "refuse_special", lambda path: None)
    with (
        pytest.raises(CoraError, match=r"^the disk is full: /dev/full could not be written .*; the lines before are kept$"),
        writing.open_to_append(Path("/dev/full")) as file,
    ):
        file.write(b"line")


def test_a_file_that_cannot_be_read_is_not_taken_for_the_one_that_is_written(tmp_path: Path) -> None:
    def write(source: Path) -> None:
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "file").write_bytes(source.read_bytes())

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").touch()
    write(tmp_path / "elsewhere")
    with pytest.raises(CoraError, match="below cannot be written: Not a directory"):
        writing.write_text(tmp_path / "folder" / "file" / "below", "text")


def test_a_pipe_is_neither_replaced_nor_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused = "pipe is a device, a pipe or a socket, which cora does not replace"
    with pytest.raises(CoraError, match=refused):
        writing.write_text(tmp_path / "pipe", "text")
    with pytest.raises(CoraError, match=refused), writing.open_to_append(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
