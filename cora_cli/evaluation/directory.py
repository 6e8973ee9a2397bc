"""The directory of an evaluation: what it holds, whether that can be continued or reused, and how a new evaluation takes its place."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli import records as shapes
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.progress import say
from cora_cli.reading import read_json
from cora_cli.rundir import EvaluationDirectory

REPLACEMENT = ".replacement"
"""The folder in an evaluation's directory where the one that is to replace it is worked on."""
BASE_ENDS = "base_generation_config_sha256"
"""The setting with the hash of the base model's generation_config.json, where the tokenizer is not the base's."""
OWN_CODE = "own_code"
"""The setting that says whether the model was that of the code in its folder; there is none for models without code."""
_UNRECORDED = {OWN_CODE: False}
"""Settings that earlier versions did not record, with what they are taken for: without the code, an evaluation is reused, with it, made again."""


def _recorded(out: EvaluationDirectory, overwrite: bool) -> dict[str, Any]:
    """The record of the answers in `out`. One that is damaged raises `CoraError`; with `overwrite`, it counts as none."""
    try:
        return shapes.read_generation(out)
    except CoraError as error:
        if overwrite:
            return {}
        raise CoraError(f"{error} (--overwrite answers again)") from error


def _differing(out: EvaluationDirectory, settings: dict[str, Any], overwrite: bool) -> list[str]:
    """The names of recorded settings that differ from `settings`. The model is compared by its hash, not by where it lies."""
    theirs = _recorded(out, overwrite).get("settings", {})
    # Evaluations from before these files were hashed do not have those settings.
    ignored = {"model", *(name for name in ("tokenizer_sha256", BASE_ENDS) if name not in theirs)}
    return sorted(
        name
        for name in {*theirs, *settings} - ignored
        if theirs.get(name, _UNRECORDED.get(name)) != settings.get(name, _UNRECORDED.get(name))
    )


def recorded_date(out: EvaluationDirectory, settings: dict[str, Any], overwrite: bool) -> str | None:
    """The date in the prompts of an evaluation in `out` that has the same other settings, to continue or to reuse; None if there is none."""
    for place in (out, EvaluationDirectory(out.root / REPLACEMENT)):
        if _differing(place, settings, overwrite) == ["template_date"]:
            date: str = _recorded(place, overwrite)["settings"]["template_date"]
            return date
    return None


def place_of_work(out: EvaluationDirectory, settings: dict[str, Any], overwrite: bool) -> EvaluationDirectory:
    """Where to work: `out`, or a folder in it if `out` holds something else, which stays untouched until its replacement is complete.

    Raises `CoraError` if the directory holds other results or files and `overwrite` is off.
    """
    differing = _differing(out, settings, overwrite)
    if not differing or not writing.holds_files(out.root):
        return out
    if overwrite:
        return EvaluationDirectory(out.root / REPLACEMENT)
    if out.generation.exists():
        raise CoraError(
            f"{out.root} holds an evaluation with other settings ({', '.join(differing)}); choose another --output-dir, "
            "or replace it with --overwrite"
        )
    raise CoraError(f"output directory {out.root} holds other files; choose a new or empty directory")


def put_in_place(out: EvaluationDirectory, new: EvaluationDirectory) -> None:
    """Replace the evaluation in `out` by `new`, once all of its files are copied."""
    with contextlib.ExitStack() as stack:
        executed = ("executions",) if new.executions.exists() else ()
        for name in ("generation", "metrics", "scores", "predictions", *executed):
            # All copies are made before the first one takes its place, at the end of this block.
            shutil.copyfile(getattr(new, name), stack.enter_context(writing.atomic_path(getattr(out, name))))
    out.partial_predictions.unlink(missing_ok=True)
    if not executed:
        out.executions.unlink(missing_ok=True)


def predictions_are_complete(out: EvaluationDirectory, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the predictions on disk are complete and belong to `settings`. Removes outdated files."""
    if not _differing(out, settings, overwrite):
        expected = _recorded(out, overwrite).get("predictions_sha256")
        if expected is None:  # interrupted: `generate` continues
            return False
        if out.predictions.exists() and hashing.sha256_file(out.predictions) == expected:
            return True
        say(f"{out.predictions} was changed or removed after it was written: generating it again")
    for path in (out.predictions, out.partial_predictions, out.metrics, out.scores, out.executions):
        path.unlink(missing_ok=True)
    return False


def _is_of_another_program(metrics: Path) -> bool:
    with contextlib.suppress(CoraError):
        return "metrics" not in read_json(metrics, dict[str, Any])
    return False


def check_nothing_is_lost(config: EvaluateConfig, path: Path, out: EvaluationDirectory) -> None:
    """Raise `CoraError` if the metrics of the predictions at `path` would replace others in `out`, unless `overwrite` is on.

    A directory that holds predictions is never given the metrics of other ones, nor do they replace another program's file without `overwrite`.
    """
    hashes = shapes.answers_hashes(path)
    recorded: dict[str, Any] = {}
    if out.metrics.exists():
        with contextlib.suppress(CoraError):  # a damaged file is replaced
            recorded = shapes.read_metrics(out)
    if path.resolve() != out.predictions.resolve():
        is_other = out.predictions.exists() and hashing.sha256_file(out.predictions) != hashes[0]
        if is_other and "copied_from" not in recorded:
            raise CoraError(f"{out.root} holds the evaluation of other predictions than {path}; choose another --output-dir")
        there = [file.name for file in (out.metrics, out.scores) if file.exists()]
        if there and recorded.get("predictions_sha256") not in hashes and not config.overwrite:
            raise CoraError(
                f"{out.root} holds {' and '.join(there)} of other predictions than {path}; choose another --output-dir, or replace them with "
                "--overwrite"
            )
    elif not config.overwrite and _is_of_another_program(out.metrics):
        raise CoraError(f"{out.metrics} is of another program; choose another --output-dir, or replace it with --overwrite")
    if config.overwrite or recorded.get("predictions_sha256") not in hashes:
        return
    if (variant := recorded.get("metric_variant", "ours")) != config.metric_variant:
        raise CoraError(
            f"{out.metrics} holds the metrics of the variant {variant}; choose another --output-dir, or replace them with --overwrite"
        )
    if lost := [name for name in recorded["metrics"] if name not in config.metric_names]:
        raise CoraError(
            f"{out.metrics} also holds {', '.join(lost)}, which --metrics {','.join(config.metrics)} leaves out; name them too, choose "
            "another --output-dir, or drop them with --overwrite"
        )
