"""What lies below a folder: grids, runs, evaluations and bases, with the state of each, without reading weights."""

import dataclasses
import datetime
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cora_cli import hashing, records
from cora_cli.basis.choices import natural_order
from cora_cli.errors import CoraError
from cora_cli.lock import is_held
from cora_cli.methods.registry import label_of
from cora_cli.progress import say
from cora_cli.reading import parse_json
from cora_cli.rundir import EvaluationDirectory, JudgeDirectory, RunDirectory
from cora_cli.writing import holds_files

OPAQUE = frozenset({"checkpoints", "adapter", "model", "plots", "logs", "judge"})
"""Folders of an output that hold no other outputs."""
_LARGEST_HEADER = 1 << 20
_BASIS_KEY = "cora_basis"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of `cora list`: `result` is a held-out loss or a score with its name, `when` the day and time of the last change here."""

    path: Path
    kind: str
    status: str
    method: str
    result: str
    when: str


def inventory(root: Path) -> list[Entry]:
    """All runs, evaluations and bases below `root`, by path. Raises `CoraError` if it is no directory."""
    if not root.is_dir():
        raise CoraError(f"{root} is {'a file' if root.exists() else 'not there'}; name a folder with runs")
    found = []
    for folder, files in sorted(folders_below(root)):
        if (run := RunDirectory(folder)).exists() and _is_record(run.record, records.Run):
            found.append(_run(run))
        if (evaluation := EvaluationDirectory(folder)).generation.is_file() or (
            evaluation.metrics.is_file() and _is_record(evaluation.metrics, records.Metrics)
        ):
            found.append(_evaluation(evaluation))
        found += [basis for name in files if name.endswith(".safetensors") if (basis := _basis(folder / name))]
    return found


def outputs_below(root: Path) -> list[Path]:
    """The directories below `root` that `cora report` can read: grids, and runs, evaluations and judgings that are part of none of these."""
    found: list[Path] = []
    for folder, _ in sorted(folders_below(root), key=lambda folder: natural_order(str(folder[0]))):
        if any(parent in folder.parents for parent in found):
            continue
        if _is_output(folder):
            found.append(folder)
            continue
        for path in (path for path, _ in _records_in(folder) if path.is_file()):
            say(f"{path} is left out, since it is another program's")
    return found


def not_an_output(root: Path) -> CoraError:
    """The error for a place that holds nothing to report."""
    if not root.exists():
        found = "does not exist"
    elif not root.is_dir():
        found = "is a file"
    else:
        found = "holds no plan.json, run.json, metrics.json or judge.json" if holds_files(root) else "is empty"
    return CoraError(
        f"{root} {found}; name the output directory of `cora ablate`, `cora train`, `cora evaluate` or `cora judge`"
    )


def folders_below(root: Path, opaque: frozenset[str] = OPAQUE) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `root` except the `opaque` ones inside outputs, and its files, by name. A link to a folder is one of them; what
    is below it is searched if it is an output, and not further than to the next link.

    Says which folders cannot be read.
    """
    for place, files, links in _walk(root, opaque):
        yield place, files
        for link in links:
            for folder, held, _ in _walk(link, opaque, deeper=_is_output(link)):
                yield folder, held


def _walk(root: Path, opaque: frozenset[str], deeper: bool = True) -> Iterator[tuple[Path, list[str], list[Path]]]:
    """`root` and, if `deeper`, the folders below it, each with its files and its links to folders."""

    def unreadable(error: OSError) -> None:
        say(f"{error.filename} is left out, since it cannot be read: {error.strerror}")

    for name, folders, files in os.walk(root, onerror=unreadable):
        place = Path(name)
        hidden = opaque if _is_output(place) else ()
        folders[:] = (
            sorted(folder for folder in folders if folder not in hidden and not folder.startswith(".")) if deeper else []
        )
        yield place, sorted(files), [place / folder for folder in folders if (place / folder).is_symlink()]


def _is_output(folder: Path) -> bool:
    """Whether a folder is a grid, a run, an evaluation or a judging."""
    return any(path.is_file() and _is_record(path, schema) for path, schema in _records_in(folder))


def _records_in(folder: Path) -> list[tuple[Path, Any]]:
    """Where an output in `folder` keeps its record, and what is in it."""
    run = RunDirectory(folder)
    return [
        (folder / records.PLAN, records.GridPlan),
        *([(run.record, records.Run)] if run.exists() else []),
        (EvaluationDirectory(folder).metrics, records.Metrics),
        (JudgeDirectory(folder).result, records.Judging),
    ]


def _is_record(path: Path, schema: Any) -> bool:
    """Whether `cora` may have written a file, which may be damaged; other programs write a `metrics.json` or `run.json` too."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `Malformed` among them
        return True
    return not isinstance(value, dict) or len(value.keys() & schema.__annotations__.keys()) > 1


def _run(run: RunDirectory) -> Entry:
    try:
        record: Any = records.read_run(run)
        if record["status"] == "running" and not (held := is_held(run.root)):
            record = records.read_run(run)  # it may have ended meanwhile
        mode = f"laplace {record['mode']}" if "laplace" in record else record["mode"]
        method = label_of(mode, record["plan"], run.record)
    except CoraError:
        return Entry(run.root, "run", "damaged", "", "", _time(run.record))
    status = record["status"]
    if status == "running" and not held:
        status = "interrupted"  # killed before it could say so
    if status == "finished" and not all(hashing.file_state(run.result / name) for name in record.get("result_files") or ()):
        status = "incomplete"  # such as without its weights, or with a folder that cannot be searched
    heldout = record.get("heldout")
    # A Laplace approximation keeps the loss of the run that it was made of, and has none of its own.
    loss = f"loss {heldout['after']['loss']:.3f}" if heldout and "laplace" not in record else ""
    return Entry(run.root, "run", status, method, loss, _time(run.record))


def _evaluation(evaluation: EvaluationDirectory) -> Entry:
    if not evaluation.metrics.is_file():
        held = is_held(evaluation.root)
        if held or not evaluation.metrics.is_file():  # it may have ended meanwhile
            status = "running" if held else "interrupted"
            return Entry(evaluation.root, "eval", status, "", "", _time(evaluation.generation))
    try:
        record = records.read_metrics(evaluation)
    except CoraError:
        return Entry(evaluation.root, "eval", "damaged", "", "", _time(evaluation.metrics))
    name = "rougeL" if "rougeL" in record["metrics"] else next(iter(record["metrics"]), None)
    score = f"{name} {record['metrics'][name]['value']:.3f}" if name else ""
    return Entry(evaluation.root, "eval", "finished", "", score, _time(evaluation.metrics))


def _basis(path: Path) -> Entry | None:
    """A basis file, told by the first bytes of the file; None for other weights."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = parse_json(file.read(size).decode()) if size <= _LARGEST_HEADER else {}
        metadata = header.get("__metadata__", {})
        choices = parse_json(metadata[_BASIS_KEY])["choices"]
        method = f"{choices['method']} r{choices['rank']}"
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(path, "basis", "finished", method, "", _time(path))


def _time(path: Path) -> str:
    try:
        changed = path.stat().st_mtime
    except OSError:
        return ""
    return datetime.datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M")
