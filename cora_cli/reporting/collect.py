"""Reads and verifies the results of every row, with the per-example numbers behind them.

A row that is unfinished or damaged becomes a `Missing` with its reason, and the other rows are reported without it.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing, records, writing
from cora_cli.errors import CoraError
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import progress, say
from cora_cli.reporting.comparable import check_comparable
from cora_cli.reporting.measures import LOSS, Measure, read_counts, read_evaluation, read_log, read_loss
from cora_cli.reporting.report_rows import Experiment, Row, StepRecords, clean
from cora_cli.reporting.results import Collection, Judged, Missing, Result
from cora_cli.rundir import EvaluationDirectory, JudgeDirectory, RunDirectory


def collect(experiment: Experiment, wanted: tuple[str, ...] | None = None) -> Collection:
    """Read every row; `wanted` restricts the metrics. Raises `CoraError` if rows of one group cannot be compared."""
    results: list[Result] = []
    missing: list[Missing] = []
    rows = _each_once(experiment.rows)
    logs = [path for place in {row.logs for row in rows if row.logs is not None} for path in place.glob("*.log")]
    with progress("reading", len(rows), "rows") as shown:
        for row in rows:
            if row.run is None and row.evaluation is None and row.basis is not None:
                # The result of a row that only extracts a basis is a figure.
                if not row.basis.is_file():
                    missing.append(
                        Missing(row, "basis", _failure(row.basis, row, logs, experiment.records) or "not extracted yet")
                    )
                shown.advance()
                continue
            try:
                result, lacking = _read_row(row, wanted, experiment.records, logs)
            except CoraError as error:
                missing.append(Missing(row, "run", str(error), _has_diverged(row)))
            else:
                results.append(result)
                missing += lacking
            shown.advance()
    results = _with_base_losses(results)
    missing += [Missing(result.row, "run", "no measurements found") for result in results if _is_empty(result)]
    results = [result for result in results if not _is_empty(result)]
    for group in {result.row.group for result in results}:
        check_comparable([result for result in results if result.row.group == group])
    return Collection(experiment, results, missing, _judged(experiment, rows, missing))


_Rows = dict[str, dict[str, Row]]
"""Each row by the name of its directory, for each hash of predictions."""


def _judged(experiment: Experiment, rows: list[Row], missing: list[Missing]) -> list[Judged]:
    """The judgments inside the rows' directories, and those that were named; a row whose judgments cannot be used is added to `missing`.

    Raises `CoraError` for a named directory that cannot be used.
    """
    known: _Rows = {}
    for row in rows:
        if row.evaluation and (predictions := EvaluationDirectory(row.evaluation).predictions).is_file():
            for sha256 in records.answers_hashes(predictions):
                known.setdefault(sha256, {})[Path(row.name).name] = row
    evaluated = {EvaluationDirectory(row.evaluation).predictions.resolve() for row in rows if row.evaluation}
    found = []
    for judged in (_judged_in(JudgeDirectory(place), known) for place in experiment.judgings):
        if (answered := _answered_again(judged, evaluated)) is None:
            found.append(judged)
        else:
            say(
                f"{judged.place.root} is left out: it is about other answers than {answered}; run the same `cora judge` command again"
            )
    for row in rows:
        for folder in (row.run, row.evaluation):
            place = JudgeDirectory(folder / "judge") if folder else None
            if place is None or not place.result.is_file() or place.root in experiment.judgings:
                continue
            try:
                judged = _judged_in(place, known)
                _check_answers(judged, row, evaluated)
            except CoraError as error:
                missing.append(Missing(row, "judge", str(error)))
            else:
                found.append(judged)
    return found


def _check_answers(judged: Judged, row: Row, evaluated: Container[Path]) -> None:
    """Raise `CoraError` unless a judging inside the directories of `row` is about the answers that it and others among those `evaluated` have now."""
    own = EvaluationDirectory(row.evaluation).predictions if row.evaluation else None
    sums = {system["predictions_sha256"] for system in judged.record["systems"]}
    lost = own if own and own.is_file() and sums.isdisjoint(records.answers_hashes(own)) else _answered_again(judged, evaluated)
    if lost:
        raise CoraError(f"{judged.place.result} is about other answers than {lost}; run `cora judge` again")


def _answered_again(judged: Judged, evaluated: Container[Path]) -> Path | None:
    """The predictions of a row among those `evaluated` that were judged and have been replaced since, or None."""
    for system in judged.record["systems"]:
        path = Path(system["predictions"]).resolve()
        if path in evaluated and path.is_file() and system["predictions_sha256"] not in records.answers_hashes(path):
            return path
    return None


def _judged_in(place: JudgeDirectory, known: _Rows) -> Judged:
    record = records.read_sealed(place.result, records.Judging)
    if not place.judgments.is_file() or not hashing.begins_as(place.judgments, record["judgments_sha256"]):
        raise CoraError(
            f"{place.judgments} does not begin with the lines that {place.result.name} describes; run the same `cora judge` command again, which asks for "
            "nothing that is answered"
        )
    printed, groups = {}, set()
    for system in record["systems"]:
        rows = known.get(system["predictions_sha256"], {})
        # Two models can give the same answers; then the name of the directory tells them apart.
        row = next(iter(rows.values())) if len(rows) == 1 else rows.get(Path(system["name"]).name)
        if row is not None:
            groups.add(row.group)
            if row.printed:
                printed[system["name"]] = row.printed
    return Judged(record, printed, place, groups.pop() if len(groups) == 1 else None)


def _is_empty(result: Result) -> bool:
    return not result.measures and result.row.evaluation is None


def _each_once(rows: tuple[Row, ...]) -> list[Row]:
    """The rows to report: no runs of a sweep, and a base model once, which a grid lists once per seed although it has no seed."""
    seen = set()
    kept = []
    for row in rows:
        key = (row.group, row.label, row.evaluation, row.name if row.run is not None else None)
        if key not in seen and row.stage != "sweep":
            kept.append(row)
        seen.add(key)
    return kept


def _read_log(run: RunDirectory, record: dict[str, Any], row: Row, missing: list[Missing]) -> list[dict[str, Any]]:
    """The lines of a run's log; where they cannot be used, none, and the curve is added to `missing`."""
    try:
        return read_log(run, record)
    except CoraError as error:
        missing.append(Missing(row, "loss curve", str(error)))
        return []


def _read_row(
    row: Row, wanted: tuple[str, ...] | None, step_records: StepRecords | None, logs: Sequence[Path]
) -> tuple[Result, list[Missing]]:
    """One row and its missing parts. Raises `CoraError` with the reason if its run is unusable or differs from the `step_records`."""
    missing: list[Missing] = []
    measures: dict[str, Measure] = {}
    record, log = {}, []
    trained: int | None = 0 if row.mode == "base" else None
    adapter_bytes: int | None = trained
    members: list[dict[str, Any]] = []
    for member in map(RunDirectory, row.members):
        one = _finished_record(member, row, logs, step_records)
        members.append(one)
        if step_records:
            step_records.require(member.root)
        trained = (trained or 0) + one["parameters"]["trained"]
        adapter_bytes = (adapter_bytes or 0) + _adapter_bytes(member)
    run = RunDirectory(row.run) if row.run is not None else None
    if run is not None:
        record = _finished_record(run, row, logs, step_records)
        if step_records:
            step_records.require(run.root)
        log = _read_log(run, record, row, missing)
        trained = 0 if record["is_base_model"] else record["parameters"]["trained"]
        adapter_bytes = _adapter_bytes(run)
        if "laplace" in record:
            pass  # its held-out loss is that of the run that it was made of; the loss of the average is `nll`
        elif run.heldout.exists():
            # The steps of a grid have the hash of the record.
            measures[LOSS] = read_loss(run, record, "after", thorough=step_records is None)
        elif record["heldout"] is not None:
            missing.append(
                Missing(row, "held-out loss", f"{run.heldout} does not exist, although the run measured it; restore it")
            )
    generation: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    references = None
    if row.evaluation is None:
        return Result(row, measures, record, generation, log, references, trained, adapter_bytes), missing
    try:
        evaluation = EvaluationDirectory(row.evaluation)
        if not evaluation.metrics.exists():
            started = writing.holds_files(evaluation.root)
            lacking = "the evaluation is not finished" if started else "not evaluated yet"
            raise CoraError(_failure(evaluation.root, row, logs, step_records) or lacking)
        found, stated, evaluated = read_evaluation(evaluation, wanted)
        check_evaluated(run, record, stated, evaluation)
        if step_records:
            step_records.require(row.evaluation)
        generation, references = stated, evaluated
        measures |= found
        counts = read_counts(evaluation)
    except CoraError as error:
        if not measures:
            raise
        missing.append(Missing(row, "evaluation", str(error)))
    return Result(row, measures, record, generation, log, references, trained, adapter_bytes, counts, tuple(members)), missing


def _has_diverged(row: Row) -> bool:
    try:
        record = records.read_run(RunDirectory(row.run)) if row.run is not None else {}
    except CoraError:
        return False
    return record.get("status") == "failed" and record.get("diverged") is True


def _finished_record(run: RunDirectory, row: Row, logs: Sequence[Path], step_records: StepRecords | None) -> dict[str, Any]:
    if not run.exists():
        raise CoraError(_failure(run.root, row, logs, step_records) or "not started")
    record = records.read_run(run)
    status = record["status"]
    if status == "failed":
        raise CoraError(f"failed: {clean(str(record.get('error', 'no reason was recorded')))}")
    if status != "finished":
        raise CoraError(_failure(run.root, row, logs, step_records) or f"not finished (status {clean(str(status))})")
    return record


def check_evaluated(
    run: RunDirectory | None, record: Mapping[str, Any], generation: Mapping[str, Any], evaluation: EvaluationDirectory
) -> None:
    """Raise `CoraError` if an evaluation is of other weights than the run has now, such as those that were trained in its place, copied, or the base's."""
    if run is not None and is_of_other_weights(run, record, generation.get("settings", {})):
        raise CoraError(
            f"{evaluation.root} is an evaluation of other weights than {run.result}; run `cora evaluate {run.root} --overwrite`"
        )


def is_of_other_weights(run: RunDirectory, record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the `settings` of answers name other weights than those that the run has now.

    A full model is not read for it: its files have the hashes that the run recorded.
    """
    weights = ModelPath(str(run.result), run.result, None)
    if weights.is_adapter:
        return "adapter_sha256" in settings and settings["adapter_sha256"] not in weights.content_hashes()
    known = record.get("result_files") or {}
    is_whole = bool(known) and all((run.result / name).is_file() for name in known)
    return is_whole and "model_sha256" in settings and settings["model_sha256"] not in weights.content_hashes(known)


def _failure(place: Path, row: Row, logs: Sequence[Path], step_records: StepRecords | None) -> str | None:
    """Why nothing finished is at `place`: its step had finished, or the last line of the row's newest log file among `logs`; None without either."""
    if step_records and step_records.has_finished(place):
        return f"{place} was changed or removed after it was written; run `cora ablate` again"
    names = [row.name, *(member.name for member in row.members)]
    stems = {f"{kind}-{name}" for kind in ("train", "laplace", "evaluate") for name in names}
    its = [path for path in logs if path.stem in stems and path.parent == row.logs]
    for path in sorted(its, key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if lines:
            return f"not finished; the last line of {path.name}: {clean(lines[-1])[:300]}"
    return None


def _adapter_bytes(run: RunDirectory) -> int:
    """Size in bytes of the saved adapter, or of the model in mode `full`. Raises `CoraError` if the adapter was altered.

    The hash of a full model is not checked, since that would read all of its weights.
    """
    if not run.model.is_dir():
        run.check_result()
    return sum(path.stat().st_size for path in run.result.glob("*.safetensors"))


def _with_base_losses(results: list[Result]) -> list[Result]:
    """Give base models the held-out loss before training of a run of their group that started as the same model."""
    return [
        dataclasses.replace(result, measures={LOSS: loss, **result.measures})
        if result.row.mode == "base" and (loss := _loss_before_training(result, results))
        else result
        for result in results
    ]


def _loss_before_training(base: Result, results: list[Result]) -> Measure | None:
    # The run that the evaluation lies in comes first, then those whose prompts were cut least: they may have measured the loss of other ones.
    own = base.row.evaluation.parent if base.row.evaluation is not None else None
    for result in sorted(results, key=lambda result: (result.row.run != own, -result.held_out_tokens)):
        same = (base.row.group, base.row.model) == (result.row.group, result.row.model) and _have_equal_weights(base, result)
        same = same and _have_equal_templates(base, result)
        if same and result.starts_at_base and result.row.run is not None and LOSS in result.measures:
            return read_loss(RunDirectory(result.row.run), result.record, "before")
    return None


def _have_equal_weights(evaluated: Result, trained: Result) -> bool:
    """Whether an evaluation was of the base model of a run, by their hashes, as far as both are recorded."""
    hashes = (
        evaluated.generation.get("settings", {}).get("model_sha256"),
        trained.record.get("fingerprint", {}).get("model_sha256"),
    )
    return None in hashes or hashes[0] == hashes[1]


def _have_equal_templates(evaluated: Result, trained: Result) -> bool:
    """Whether the prompts of an evaluation and of a run's held-out loss have one template and tokenizer, as far as both are recorded."""
    data = trained.record.get("data", {})
    dates = evaluated.generation.get("settings", {}).get("template_date"), data.get("template_date")
    names = evaluated.generation.get("template"), data.get("template")
    texts = evaluated.generation.get("text_sha256"), trained.record.get("fingerprint", {}).get("tokenizer_sha256")
    return all(None in pair or pair[0] == pair[1] for pair in (names, dates, texts))
