"""Complete checkpoints of a run: each carries the hashes of its files, and only an intact one is resumed from."""

import re
from pathlib import Path

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.progress import note
from cora_cli.reading import read_json
from cora_cli.records import read_run
from cora_cli.rundir import RunDirectory

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first; directories of other names are not ours."""
    found = [path for path in root.iterdir() if _NAME.match(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of)


def checkpoint_to_resume(run: RunDirectory) -> Path | None:
    """The checkpoint from which a run goes on; None for one that starts."""
    return newest_intact(run.checkpoints, sealed=read_run(run).get("sealed_checkpoints", False)) if run.exists() else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.partition("-")[2])


def seal(directory: Path) -> None:
    """Write the hash of every file of a checkpoint to its manifest."""
    writing.write_json(directory / MANIFEST, _hashes(directory))


def newest_intact(root: Path, sealed: bool = False) -> Path | None:
    """The newest checkpoint whose files have the hashes in its manifest; says which newer ones do not.

    Checkpoints of earlier versions have no manifest and count as intact, unless the run has `sealed` ones only.
    """
    for checkpoint in reversed(checkpoints_in(root)):
        if (problem := _problem(checkpoint, sealed)) is None:
            return checkpoint
        note(f"{checkpoint} is damaged and is not used: {problem}")
    return None


def _problem(checkpoint: Path, sealed: bool) -> str | None:
    if not (checkpoint / MANIFEST).exists():
        return f"{MANIFEST} is missing" if sealed else None
    try:
        recorded, found = read_json(checkpoint / MANIFEST), _hashes(checkpoint)
    except CoraError as error:
        return str(error)
    if not isinstance(recorded, dict):
        return f"{MANIFEST} is not a list of files"
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if recorded.get(name) != found[name]:
            return f"{name} was changed after it was written"
    return None


def _hashes(directory: Path) -> dict[str, str]:
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    files = (path for folder in folders for path in writing.own_files(folder) if path.name != MANIFEST)
    return {str(path.relative_to(directory)): hashing.sha256_file(path) for path in sorted(files)}
