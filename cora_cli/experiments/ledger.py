"""Whether a step is done: judged by what it left on disk, byte for byte, never by existence.

`OUT/steps/<step>.json` records what a step was made from and the hashes of all that it made. What has to be cleared before a step is
made again is decided here too; nothing is run.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.experiments.steps import SCORING, Step

STARTED, FINISHED, FAILED = "started", "finished", "failed"
_RESULTS = ("adapter/", "model/", "test.jsonl", "predictions.jsonl")
_OUTPUTS = {
    "train": ("run.json", "config.yaml", "log.jsonl", "test.jsonl", "heldout.jsonl", "adapter", "model"),
    "evaluate": ("predictions.jsonl", "generation.json", "metrics.json", "scores.jsonl"),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a step is done, why not where it is not, and the hash of its result where it is."""

    done: bool
    reason: str = ""
    result: str | None = None
    seconds: float | None = None


class Ledger:
    """The records of the steps in one output directory."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def judge(self, step: Step, results: Mapping[str, str]) -> Verdict:
        """Whether `step` is whole on disk and was made from what its needs hold now (`results`: the hash of each one's result)."""
        record = self.record(step)
        if not record:
            return Verdict(False, "not started")
        if record["key"] != step.key:
            return Verdict(False, f"made with other settings ({', '.join(_differing(record['facts'], step.facts))})")
        if record["status"] != FINISHED:
            return Verdict(False, record.get("error") or "not finished")
        if record["results_of_needs"] != {name: results.get(name) for name in step.needs}:
            return Verdict(False, "what it was made from has been made again")
        if altered := self._altered(step, record):
            return Verdict(False, f"{altered[0]} was altered or removed after it was written")
        return Verdict(True, result=record["result"], seconds=record["seconds"])

    def objection(self, step: Step, steps: Mapping[str, Step]) -> str | None:
        """Why what lies in a step's place is no evidence for the plan whose `steps` these are; None where it is.

        Unlike for `judge`, what it was made from may be gone from the disk since, and whole models are not hashed again.
        """
        record = self.record(step)
        if not record:
            return f"{self._place(step)}, which records what it was made from, is missing or damaged"
        if record["key"] != step.key:
            return f"made with other settings than the plan's ({', '.join(_differing(record['facts'], step.facts))})"
        if record["status"] != FINISHED:
            return record.get("error") or "not finished"
        if any(self.record(steps[name]).get("result") != result for name, result in record["results_of_needs"].items()):
            return "what it was made from has been made again since"
        if altered := self._altered(step, record, but="model/"):
            return f"{self._out / step.output / altered[0]} was altered or removed after it was written"
        return None

    def conflict(self, step: Step) -> str | None:
        """What a finished or interrupted result of other settings in this step's place differs in; None where none would be lost."""
        record = self.record(step)
        if not record or record["key"] == step.key or record["status"] == FAILED:
            return None
        names = [name for name in _differing(record["facts"], step.facts) if step.kind != "evaluate" or name not in SCORING]
        # A run that is made again is judged for itself; its evaluation follows it.
        return ", ".join(names) if names and names != ["run"] else None

    def clear(self, step: Step, results: Mapping[str, str]) -> str | None:
        """Remove what keeps a training step from being made or mended, and say what and why; None where nothing was."""
        record, place = self.record(step), self._out / step.output
        if step.kind not in ("model", "train") or not record or not place.exists():
            return None
        other_origin = record["results_of_needs"] != {name: results.get(name) for name in step.needs}
        if record["key"] != step.key or other_origin:
            shutil.rmtree(place)
            return f"{place} was made from other settings or another basis: it is made again"
        if record["status"] != FINISHED:
            return None
        altered = self._altered(step, record)
        if any(name in ("run.json", "log.jsonl") for name in altered):
            # No checkpoint holds them, and a run without its record and its log is no evidence.
            shutil.rmtree(place)
            return f"{place}/{altered[0]} was altered or removed after it was written: the run is made again"
        if altered:
            for name in ("adapter", "model"):
                shutil.rmtree(place / name, ignore_errors=True)
            return f"{place}/{altered[0]} was altered or removed after it was written: it is written again from the last checkpoint"
        return None

    def start(self, step: Step, results: Mapping[str, str]) -> None:
        """Record that a step begins."""
        self._write(step, results, {"status": STARTED})

    def finish(self, step: Step, results: Mapping[str, str], seconds: float) -> str:
        """Record that a step has ended well, and hash what it made; returns the hash of its result.

        Raises `CoraError` where its files are missing, or where its own record does not say that it finished.
        """
        files = self._files(step)
        if not files:
            raise CoraError(f"{step.name} ended well, but left nothing in {self._out / step.output}")
        if step.kind in ("model", "train") and rundir.read_json(self._out / step.output / "run.json").get("status") != FINISHED:
            raise CoraError(f"{step.name} ended well, but {self._out / step.output}/run.json does not say that it finished")
        own = {name: digest for name, digest in files.items() if name.startswith(_RESULTS) or step.kind == "basis"}
        result = rundir.sha256_json(sorted(own.values()) if step.kind == "basis" else own)
        self._write(step, results, {"status": FINISHED, "seconds": seconds, "files": files, "result": result})
        return result

    def fail(self, step: Step, results: Mapping[str, str], error: str) -> None:
        """Record that a step has failed, and with which last line."""
        self._write(step, results, {"status": FAILED, "error": error})

    def record(self, step: Step) -> dict[str, Any]:
        """What is recorded of a step; nothing where its record is missing or was damaged."""
        try:
            record: dict[str, Any] = rundir.read_json(self._place(step))
            whole = {"key", "facts", "status", "results_of_needs"} <= record.keys()
            return record if whole and (record["status"] != FINISHED or {"files", "result", "seconds"} <= record.keys()) else {}
        except (CoraError, AttributeError):
            return {}

    def _place(self, step: Step) -> Path:
        return self._out / "steps" / f"{step.name}.json"

    def _write(self, step: Step, results: Mapping[str, str], more: dict[str, Any]) -> None:
        common = {"step": step.name, "kind": step.kind, "key": step.key, "facts": step.facts, "output": step.output}
        origin = {"results_of_needs": {name: results.get(name) for name in step.needs}, "command": list(step.argv)}
        rundir.write_json(self._place(step), {**common, **origin, **more})

    def _files(self, step: Step, but: str | None = None) -> dict[str, str]:
        """The SHA-256 of every file that a step makes, by its name below the step's place, but for names that begin with `but`."""
        place = self._out / step.output
        if step.kind == "basis":
            return {place.name: rundir.sha256_file(place)} if place.is_file() else {}
        found: dict[str, str] = {}
        for name in _OUTPUTS["evaluate" if step.kind == "evaluate" else "train"]:
            path = place / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                inside = file.relative_to(place).as_posix()
                if file.is_file() and not (but and inside.startswith(but)):
                    found[inside] = rundir.sha256_file(file)
        return found

    def _altered(self, step: Step, record: dict[str, Any], but: str | None = None) -> list[str]:
        """Names of files that are not as they were recorded; those that begin with `but` are not read."""
        files = self._files(step, but)
        known = {name: digest for name, digest in record["files"].items() if but is None or not name.startswith(but)}
        return sorted(name for name, digest in known.items() if files.get(name) != digest)


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    plain = rundir.sha256_json
    return sorted(name for name in {*theirs, *ours} if plain(theirs.get(name)) != plain(ours.get(name)))
