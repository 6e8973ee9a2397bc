"""The run directory of a training: whether it is new, holds a run to continue, or another one, and the files that a run starts with."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.data.records import is_among, prompt_hashes
from cora_cli.errors import CoraError
from cora_cli.models.trained_on import known_prompts, say_unrecorded
from cora_cli.progress import note, say
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import LogLine, RunStatus, Stop, read_run, read_sealed, template_date, write_run
from cora_cli.rundir import RunDirectory
from cora_cli.training.checkpoints import checkpoints_in, step_of
from cora_cli.training.config import TrainConfig
from cora_cli.training.notices import models_behind, notices_on_records
from cora_cli.training.prepare import Prepared
from cora_cli.training.record import FAILED, INTERRUPTED

_FREE = frozenset({"peft_config", "gradient_checkpointing"})
"""Recorded settings that a resumption may change: the content behind the first is compared, and the second changes memory and time alone."""


def open_directory(run: RunDirectory, fingerprint: dict[str, Any], resume: bool, processes: int) -> bool:
    """Whether the directory holds a run with this configuration to continue. Raises `CoraError` for another run or other files.

    Each of the `processes` adds its own batch to every step, so with another number of them it would be another training.
    A run that failed before its first step holds nothing to continue and is replaced, and so is one that the user interrupted there, or that
    failed without a checkpoint, unless it is to be continued.
    """
    if run.exists() and is_replaced(run, resume):
        if not resume and _failed_for_nothing(run):
            say(f"the run in {run.root} had failed without a checkpoint: it is replaced")
        for path in _own_files(run):
            path.unlink(missing_ok=True)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    refuse_occupied(run, resume)
    if not run.exists():
        return False
    record = read_run(run)
    recorded = record["fingerprint"]
    # Earlier versions recorded neither.
    recorded.setdefault("tokenizer_sha256", fingerprint["tokenizer_sha256"])
    for name in _FREE & recorded["settings"].keys():
        recorded["settings"][name] = fingerprint["settings"].get(name)
    if "template_date" in fingerprint["settings"]:
        recorded["settings"].setdefault("template_date", template_date(record))
    recorded["processes"] = record["hardware"].get("processes", 1)
    now = {**fingerprint, "processes": processes}
    if recorded != now:
        detail = difference(recorded, now, "in the run", "now")
        raise CoraError(f"{run.root} cannot be resumed with other inputs than it was started with: {detail}")
    return True


def _own_files(run: RunDirectory) -> tuple[Path, ...]:
    """What a run writes apart from its checkpoints and its result."""
    return (run.record, run.config, run.test_records, run.trained_prompts, run.log)


def is_replaced(run: RunDirectory, resume: bool) -> bool:
    """Whether the run that is there holds nothing to continue, and gives its place to a new one."""
    return (not resume and _failed_for_nothing(run)) or _took_no_step(run, {FAILED} if resume else {FAILED, INTERRUPTED})


def refuse_occupied(run: RunDirectory, resume: bool) -> None:
    """Raise `CoraError` where a file, other files, or a run that is not to be resumed, are in the way."""
    writing.refuse_file(run.root)
    if not run.exists() and writing.holds_files(run.root):
        raise CoraError(f"output directory {run.root} contains other files; choose a new or empty directory")
    if run.exists() and not resume and not is_replaced(run, resume):
        raise CoraError(
            f"output directory {run.root} already contains a run; choose a new directory, or continue that run with --resume"
        )


def has_stopped_at(run: RunDirectory, step: int) -> bool:
    """Whether the validation loss at this step was measured. Raises `CoraError` if the run has passed the step without."""
    if run.stop(step).exists():
        return read_sealed(run.stop(step), Stop)["step"] == step
    if any(step_of(checkpoint) > step for checkpoint in checkpoints_in(run.checkpoints)):
        raise CoraError(
            f"{run.root} cannot stop at step {step}, which it has already passed; remove it to train it again, or choose a new directory"
        )
    return False


def difference(one: dict[str, Any], other: dict[str, Any], there: str, here: str) -> str:
    """The settings and inputs in which two fingerprints differ, with both values."""
    theirs, ours = ({**part.get("settings", {}), **part} for part in (one, other))
    names = sorted(name for name in {*theirs, *ours} - {"settings"} if theirs.get(name) != ours.get(name))
    return ", ".join(f"{name} ({theirs.get(name)} {there}, {ours.get(name)} {here})" for name in names)


def _took_no_step(run: RunDirectory, ended: Collection[str]) -> bool:
    """Whether a run ended, with one of these statuses, before its first step."""
    if read_json(run.record, RunStatus)["status"] not in ended or checkpoints_in(run.checkpoints):
        return False
    return not run.log.exists() or not any("loss" in line for line in read_jsonl(run.log, LogLine, drop_partial_tail=True))


def _failed_for_nothing(run: RunDirectory) -> bool:
    """Whether a run failed and left neither a checkpoint nor anything else than its own files, such as a result or an evaluation."""
    own = {run.checkpoints, *_own_files(run)}
    others = [path for path in run.root.iterdir() if path not in own and not path.name.startswith(".")]
    return read_json(run.record, RunStatus)["status"] == FAILED and not checkpoints_in(run.checkpoints) and not others


def write_start(run: RunDirectory, config: TrainConfig, prepared: Prepared, record: dict[str, Any]) -> None:
    """Write the files that a run starts with; a resumption writes the same bytes again, except for the record's history."""
    for notice in notices_on_records(config, prepared):
        note(notice)
    if run.exists():
        earlier = read_run(run)
        kept = {"started": earlier["started"], "sealed_checkpoints": earlier.get("sealed_checkpoints", False)}
        record = {**record, **kept, "resumed": earlier.get("resumed", 0) + 1}
        if others := [
            each for each in [*earlier.get("hardware_before", []), earlier["hardware"]] if each != record["hardware"]
        ]:
            record["hardware_before"] = [each for place, each in enumerate(others) if each not in others[:place]]
        before, now = {**earlier["versions"], **earlier.get("versions_before", {})}, record["versions"]
        if changed := {name: version for name, version in before.items() if now.get(name) != version}:
            record["versions_before"] = changed
            differing = ", ".join(f"{name} {version} (now {now.get(name)})" for name, version in sorted(changed.items()))
            note(f"{run.root} was begun with {differing}; the same versions would give the result of an uninterrupted run")
    behind: dict[str, None] = {}
    for model in models_behind(config, prepared):
        say_unrecorded(model)
        behind |= dict.fromkeys(sorted(known_prompts(model)))
    measured = prepared.data.test[: config.eval_limit]
    if known := sum(is_among(each, prepared.data.schema, behind) for each in measured):
        record["data"]["held_out_trained_on"] = known
    hashes = dict.fromkeys(prompt_hashes(prepared.data.train, prepared.data.schema, config.train_on == "all")) | behind
    listed = "".join(f"{digest}\n" for digest in hashes)
    record["data"]["trained_prompts_sha256"] = hashing.sha256_text(listed)
    # The record comes first: it makes the directory a run, which --resume can complete.
    write_run(run, record)
    # The file may be given to `--config` in another directory, where a relative path would begin a second run.
    settings = {**config.as_dict(), "output_dir": str(writing.absolute(run.root))}
    writing.write_yaml(run.config, settings)
    writing.write_jsonl(run.test_records, prepared.data.test)
    writing.write_text(run.trained_prompts, listed)
    parameters = record["parameters"]
    say(f"mode {config.mode}: training {parameters['trained']:,} of {parameters['total']:,} parameters")
