"""Decides which steps are done. A step counts as done while the hashes of its inputs and outputs match.

`OUT/steps/<step>.json` records the inputs of a step and the hashes of its output files. This module also removes outdated
results before a step runs again.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cora_cli import hashing, rundir, writing
from cora_cli.errors import CoraError
from cora_cli.experiments.steps import COMMANDS, Step, of_answers
from cora_cli.lock import own_directory
from cora_cli.models.references import resolve_model
from cora_cli.reading import checked, read_json, read_yaml
from cora_cli.records import (
    FinishedRun,
    FinishedStep,
    Judging,
    Run,
    RunStatus,
    StepRecord,
    Stop,
    missing_judgments,
    read_generation,
    read_sealed,
    write_sealed,
)
from cora_cli.rundir import EvaluationDirectory, JudgeDirectory, RunDirectory
from cora_cli.training.checkpoints import checkpoints_in, step_of
from cora_cli.training.proposal import rate_in

STARTED, FINISHED, FAILED, STOPPED = "started", "finished", "failed", "stopped"
_RUN = ("run.json", "config.yaml", "log.jsonl", "test.jsonl", "heldout.jsonl", "adapter", "model")
_RESULTS = ("adapter/", "model/", "test.jsonl", "predictions.jsonl", "judge.json")
_OUTPUTS = {
    "train": _RUN,
    "laplace": _RUN,
    "evaluate": ("predictions.jsonl", "generation.json", "metrics.json", "scores.jsonl"),
    "judge": ("judge.json", "judgments.jsonl"),
}


_OF_ONE_FILE = ("basis", "proposal")
"""The kinds of step whose output is a file and no directory."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a step is done: if so, the hash of its result and its run time in seconds; if not, the reason."""

    done: bool
    reason: str = ""
    result: str | None = None
    seconds: float | None = None


class Ledger:
    """The records of the steps in one output directory."""

    def __init__(self, out: Path, texts: Mapping[str, Any] | None = None) -> None:
        """`texts` is `Plan.texts`, to be noted with each step."""
        self._out, self._texts = out, dict(texts or {})

    def check(self, step: Step, results: Mapping[str, str]) -> Verdict:
        """Whether the files of `step` are unchanged and were created from the current results of its dependencies.

        `results` maps each dependency to the hash of its result.
        """
        record = self.record(step)
        if not record or record["key"] != step.key:
            differing = ", ".join(_differing(record["facts"], step.facts)) if record else ""
            return Verdict(False, f"created with other settings ({differing})" if record else "not started")
        if record["results_of_needs"] != {name: results.get(name) for name in step.needs}:
            return Verdict(False, "its inputs have changed since it ran")
        if step.stop_at is not None:
            digest = self._stops(step, record).get(str(step.stop_at))
            return Verdict(digest is not None, f"has not stopped at step {step.stop_at}", result=digest)
        if lacking := self._lacking(step, record):
            return Verdict(False, lacking)
        return Verdict(True, result=record["result"], seconds=record["seconds"])

    def _lacking(self, step: Step, record: dict[str, Any]) -> str:
        """What a step lacks to be done with the inputs of its record; empty if it lacks nothing."""
        if record["status"] != FINISHED:
            return record.get("error") or "not finished"
        if altered := self._altered(step, record):
            return f"{altered[0]} was changed or removed after it was written"
        lacks = step.kind == "judge" and lacks_judgments(self._out / step.output)
        return "not all judgments were obtained" if lacks else ""

    def has_started(self, step: Step) -> bool:
        """Whether this very training once got past the checks at its start, whatever became of its files."""
        record = self.record(step)
        trained = record.get("status") == FINISHED or bool(record.get("stops")) or record.get("diverged", False)
        return trained and record["key"] == step.key

    def has_finished(self, step: Step) -> bool:
        """Whether this very step, to where it stops, has once finished, whatever became of its files; `check` looks at these too."""
        record = self.record(step)
        reached = step.stop_at is not None and str(step.stop_at) in record.get("stops", {})
        return (record.get("status") == FINISHED or reached) and record["key"] == step.key

    def start_again(self, step: Step, stops: Collection[int]) -> str | None:
        """Remove the run of a training step that has gone past one of these optimizer steps without a loss there, since no run goes back, and
        one that `clear` would train again, which must stop at them.

        Returns a message, or None if there is no such run.
        """
        record, place = self.record(step), self._out / step.output
        if not record or record["key"] != step.key or place.is_symlink() or not place.exists():
            return None
        if stops and record["status"] == FINISHED and (lost := _not_in_checkpoints(self._altered(step, record, but="model/"))):
            return self._train_again(step, record, lost[0])
        known = self._stops(step, record)
        missed = [stop for stop in stops if str(stop) not in known and _has_passed(RunDirectory(place), stop)]
        if not missed:
            return None
        self._forget_stops(step, record)
        with own_directory(place):
            shutil.rmtree(place)
        return f"{place} had gone past step {missed[0]}, where the sweep needs its loss now: training the run again"

    def validation_loss(self, step: Step, stop: int | None, steps: Mapping[str, Step]) -> float | None:
        """The validation loss (nats per token) of a training step where it stopped at optimizer step `stop`, or at its end.

        Infinite if the training diverged, None if there is no loss that belongs to this step and to the results of its dependencies.
        """
        record = self.record(step)
        if not record or record["key"] != step.key:
            return None
        if any(self.record(steps[name]).get("result") != result for name, result in record["results_of_needs"].items()):
            return None
        if stop is not None and str(stop) in self._stops(step, record):
            loss: float = read_sealed(RunDirectory(self._out / step.output).stop(stop), Stop)["validation"]["loss"]
            return loss
        if record["status"] == FAILED and record.get("diverged"):
            return math.inf
        if stop is not None or record["status"] != FINISHED or self._altered(step, record, but="model/"):
            return None
        validation = read_sealed(RunDirectory(self._out / step.output).record, FinishedRun).get("validation")
        return validation["loss"] if validation else None

    def dtype(self, step: Step) -> str | None:
        """The type in which a training or an evaluation was computed, by its own files; None where these do not say."""
        place = self._out / step.output
        settings: Mapping[str, Any] = {}
        with contextlib.suppress(CoraError):
            if step.kind in ("model", "train"):
                settings = read_sealed(RunDirectory(place).record, Run)["fingerprint"]["settings"]
            elif step.kind == "evaluate":
                settings = read_generation(EvaluationDirectory(place))["settings"]
        return settings.get("dtype")

    def proposed_rate(self, step: Step, steps: Mapping[str, Step]) -> float | None:
        """The learning rate that a step of kind `proposal` measured; None while there is none of this step and of its dependencies' results."""
        record = self.record(step)
        if not record or record["key"] != step.key or record["status"] != FINISHED or self._altered(step, record):
            return None
        if any(self.record(steps[name]).get("result") != result for name, result in record["results_of_needs"].items()):
            return None
        return rate_in(self._out / step.output)

    def _stops(self, step: Step, record: Mapping[str, Any]) -> dict[str, str]:
        """The hashes of the step's intact files in `stops/`, by optimizer step."""
        run = RunDirectory(self._out / step.output)
        known: dict[str, str] = record.get("stops", {})
        return {
            stop: digest
            for stop, digest in known.items()
            if run.stop(int(stop)).is_file() and hashing.sha256_file(run.stop(int(stop))) == digest
        }

    def objection(self, step: Step, steps: Mapping[str, Step]) -> str | None:
        """Why the result of `step` cannot be reported for the plan with these `steps`; None if it can.

        Unlike `check`, this accepts a result whose inputs were deleted, and does not hash complete models again.
        """
        record = self.record(step)
        if not record:
            return f"{self._place(step)}, the record of its inputs and outputs, is missing or damaged"
        if record["key"] != step.key:
            return f"created with other settings than the plan's ({', '.join(_differing(record['facts'], step.facts))})"
        if record["status"] != FINISHED:
            return record.get("error") or "not finished"
        if any(self.record(steps[name]).get("result") != result for name, result in record["results_of_needs"].items()):
            return "its inputs have changed since it ran"
        if altered := self._altered(step, record, but="model/"):
            return f"{self._out / step.output / altered[0]} was changed or removed after it was written"
        return None

    def conflict(self, step: Step) -> str | None:
        """Settings in which an existing result in this step's place differs from the step; None if nothing would be lost."""
        record = self.record(step)
        if not record or record["key"] == step.key or record["status"] == FAILED or step.kind == "judge":
            return None  # no judgment is ever removed
        theirs, ours = record["facts"], step.facts
        names = _differing(of_answers(theirs), of_answers(ours)) if step.kind == "evaluate" else _differing(theirs, ours)
        # A run that conflicts is reported itself; its evaluation is outdated only because of it.
        return ", ".join(names) if names and names != ["run"] else None

    def clear(self, step: Step, results: Mapping[str, str]) -> str | None:
        """Remove outdated files that would stop a training step from running again.

        Returns a message, or None if nothing was removed. Raises `CoraError` where a link stands in the step's place.
        """
        record, place = self.record(step), self._out / step.output
        writing.refuse_link(place)
        if step.kind in ("laplace", "evaluate"):
            return self._clear_derived(step, record)
        if step.kind == "proposal" and place.exists():
            place.unlink()  # as for a basis, and it is written over nothing
        if not place.exists():
            self._forget_stops(step, record)
        if step.kind not in ("model", "train") or not record or not place.exists():
            return None
        other_origin = record["results_of_needs"] != {name: results.get(name) for name in step.needs}
        if record["key"] != step.key or other_origin:
            kept = ""
            with own_directory(place):
                if record["status"] == FINISHED:
                    shutil.rmtree(_aside(place), ignore_errors=True)
                    place.rename(_aside(place))
                    kept = f"; the old one is in {_aside(place)} until that is done"
                else:
                    shutil.rmtree(place)
            return f"{place} was created with other settings or inputs: training it again{kept}"
        stops = sorted(record.get("stops", {}).keys() - self._stops(step, record).keys())
        altered = [f"stops/{stop}.json" for stop in stops]
        altered += self._altered(step, record) if record["status"] == FINISHED else []
        if lost := _not_in_checkpoints(altered):
            return self._train_again(step, record, lost[0])
        if altered:
            for name in ("adapter", "model"):
                shutil.rmtree(place / name, ignore_errors=True)
            return (
                f"{place}/{altered[0]} was changed or removed after it was written: writing it again from the last checkpoint"
            )
        return None

    def _train_again(self, step: Step, record: Mapping[str, Any], lost: str) -> str:
        """Remove a run that lost a file, and its losses at stops; returns a message."""
        place = self._out / step.output
        self._forget_stops(step, record)
        with own_directory(place):
            shutil.rmtree(place)
        return f"{place}/{lost} was changed or removed after it was written: training the run again"

    def _clear_derived(self, step: Step, record: dict[str, Any]) -> str | None:
        """`clear` for what is computed from a finished run."""
        place = self._out / step.output
        if step.kind == "laplace" and place.exists():
            # What it writes is complete or absent, and it writes over nothing.
            with own_directory(place):
                shutil.rmtree(place)
            return f"{place} was created from another run or with other settings, or was changed: writing it again"
        described = EvaluationDirectory(place).generation
        if record.get("status") == FINISHED and described.is_file() and described.name in self._altered(step, record):
            # `evaluate` believes what describes the answers that are there; without it, it answers again.
            with own_directory(place):
                described.unlink()
            return f"{described} was changed after it was written: answering again"
        return None

    def _forget_stops(self, step: Step, record: Mapping[str, Any]) -> None:
        """Record that the losses at earlier stops are gone with the run, or will be."""
        if "stops" in record:
            write_sealed(self._place(step), {name: value for name, value in record.items() if name != "stops"})

    def start(self, step: Step, results: Mapping[str, str]) -> None:
        """Record that a step has started."""
        self._write(step, results, {"status": STARTED})

    def finish(self, step: Step, results: Mapping[str, str], seconds: float) -> str:
        """Record that a step has finished, with the hashes of its files; returns the hash of its result.

        Raises `CoraError` if its files are missing, if its own `run.json` does not have the status finished, or if it read other inputs than the
        plan's.
        """
        self._require_inputs_of_plan(step)
        if step.stop_at is not None:
            return self._stop(step, results, step.stop_at, seconds)
        files = self._files(step)
        if not files:
            raise CoraError(f"{step.name} exited without an error, but wrote nothing to {self._out / step.output}")
        if (
            step.kind in ("model", "train", "laplace")
            and read_json(RunDirectory(self._out / step.output).record, RunStatus)["status"] != FINISHED
        ):
            raise CoraError(
                f"{step.name} exited without an error, but the status in {self._out / step.output}/run.json is not finished"
            )
        shutil.rmtree(_aside(self._out / step.output), ignore_errors=True)
        own = {name: digest for name, digest in files.items() if name.startswith(_RESULTS) or step.kind in _OF_ONE_FILE}
        result = hashing.sha256_json(sorted(own.values()) if step.kind in _OF_ONE_FILE else own)
        self._write(step, results, {"status": FINISHED, "seconds": seconds, "files": files, "result": result})
        return result

    def _is_model_of_plan(self, step: Step, digest: str) -> bool:
        """Whether a run that an earlier version began recorded the plan's model by the hash of that version."""
        with contextlib.suppress(CoraError):
            hashes = resolve_model(
                read_yaml(RunDirectory(self._out / step.output).config, "configuration")["model"]
            ).content_hashes()
            return {digest, step.facts["model"]} <= hashes
        return False

    def _require_inputs_of_plan(self, step: Step) -> None:
        """Raise `CoraError` where a training read another model or other data than those that the plan hashed: they changed meanwhile.

        Its run is removed, since nothing can continue it, and the other rows could not be compared with it.
        """
        run = RunDirectory(self._out / step.output)
        if step.kind not in ("model", "train") or not run.exists():
            return
        read = read_json(run.record, dict[str, Any]).get("fingerprint", {})
        # The plan hashes all records, a run those that --limit leaves.
        names = {"model": "model_sha256", **({} if step.facts.get("limit") else {"dataset": "data_sha256"})}
        known = [(fact, read[name]) for fact, name in names.items() if name in read and fact in step.facts]
        if changed := [
            fact for fact, digest in known if digest != step.facts[fact] and not self._is_model_of_plan(step, digest)
        ]:
            with own_directory(run.root):
                shutil.rmtree(run.root)
            raise CoraError(
                f"the {changed[0]} was changed after the grid had been planned, so that {step.name} trained with another one than the plan's; its run "
                "is removed: restore the old one, or run the grid with the new one in another --output-dir"
            )

    def _stop(self, step: Step, results: Mapping[str, str], stop: int, seconds: float) -> str:
        """Record that a training step has stopped at optimizer step `stop`; returns the hash of its loss."""
        path = RunDirectory(self._out / step.output).stop(stop)
        if not path.is_file():
            raise CoraError(f"{step.name} exited without an error, but wrote no {path}")
        digest = hashing.sha256_file(path)
        stops = {**self.record(step).get("stops", {}), str(stop): digest}
        self._write(step, results, {"status": STOPPED, "seconds": seconds, "stops": stops})
        return digest

    def fail(self, step: Step, results: Mapping[str, str], error: str) -> None:
        """Record that a step has failed, with its error message, and whether its training diverged."""
        diverged = {"diverged": True} if step.kind == "train" and self._diverged(step) else {}
        self._write(step, results, {"status": FAILED, "error": error, **diverged})

    def _diverged(self, step: Step) -> bool:
        try:
            status = read_json(RunDirectory(self._out / step.output).record, RunStatus)
        except CoraError:
            return False
        return status["status"] == FAILED and status.get("diverged", False)

    def record(self, step: Step) -> dict[str, Any]:
        """The record of a step; empty if it is missing or damaged."""
        try:
            record = read_sealed(self._place(step))
            checked(record, StepRecord, self._place(step))
            if record["status"] == FINISHED:
                checked(record, FinishedStep, self._place(step))
        except CoraError:
            return {}
        return record

    def _place(self, step: Step) -> Path:
        return self._out / "steps" / f"{step.name}.json"

    def _write(self, step: Step, results: Mapping[str, str], more: dict[str, Any]) -> None:
        common = {"step": step.name, "kind": step.kind, "key": step.key, "facts": step.facts, "output": step.output}
        needed = {name: results.get(name) for name in step.needs}
        earlier = self.record(step)
        # The losses at earlier stops belong to the run as long as it goes on.
        same = earlier and (earlier["key"], earlier["results_of_needs"]) == (step.key, needed)
        kept = {"stops": earlier["stops"]} if same and "stops" in earlier else {}
        origin = {"results_of_needs": needed, "command": list(step.argv), "texts": self._texts}
        write_sealed(self._place(step), {**common, **origin, **kept, **more})

    def _files(self, step: Step, but: str | None = None) -> dict[str, str]:
        """SHA-256 of every output file of a step, by its path in the step's directory, without paths that begin with `but`."""
        place = self._out / step.output
        if step.kind in _OF_ONE_FILE:
            return {place.name: hashing.sha256_file(place)} if place.is_file() else {}
        found: dict[str, str] = {}
        for name in _OUTPUTS[COMMANDS[step.kind]]:
            path = place / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                inside = file.relative_to(place).as_posix()
                if file.is_file() and file.name != rundir.CARD and not (but and inside.startswith(but)):
                    found[inside] = hashing.sha256_file(file)
        return found

    def _altered(self, step: Step, record: dict[str, Any], but: str | None = None) -> list[str]:
        """Names of recorded files that have changed or are missing; names that begin with `but` are skipped."""
        files = self._files(step, but)
        known = {name: digest for name, digest in record["files"].items() if but is None or not name.startswith(but)}
        return sorted(name for name, digest in known.items() if files.get(name) != digest)


def lacks_judgments(place: Path) -> bool:
    """Whether an endpoint did not give all judgments, so that it may be asked again. A model on this machine would say the same again."""
    record = read_sealed(JudgeDirectory(place).result, Judging)
    return "endpoint" in record["judge"] and missing_judgments(record)[0] > 0


def _not_in_checkpoints(names: Iterable[str]) -> list[str]:
    """Those of a run's files that no checkpoint contains; a run without its record and log cannot be trusted."""
    return [name for name in names if name.startswith(("run.json", "log.jsonl", "stops/"))]


def _aside(place: Path) -> Path:
    """Where a run stays while the one that replaces it is trained."""
    return place.with_name(f".{place.name}.replaced")


def _has_passed(run: RunDirectory, stop: int) -> bool:
    """Whether a run has gone further than optimizer step `stop`."""
    with contextlib.suppress(CoraError):
        if read_json(run.record, RunStatus)["status"] == FINISHED:
            return True
    return any(step_of(checkpoint) > stop for checkpoint in checkpoints_in(run.checkpoints))


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    plain = hashing.sha256_json
    return sorted(name for name in {*theirs, *ours} if plain(theirs.get(name)) != plain(ours.get(name)))
