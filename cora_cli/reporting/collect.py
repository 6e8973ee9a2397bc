"""Rows -> results: what the finished directories of each row say, verified, with the per-example numbers behind it.

A row that is not finished or was damaged becomes a `Missing` with its reason, and the others are reported without it; nothing is
estimated here.
"""

import dataclasses
import re
from typing import Any

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import NAMES
from cora_cli.methods.registry import METHODS
from cora_cli.progress import progress
from cora_cli.reporting.measures import DAMAGE, LOSS, Measure, damaged, read_evaluation, read_loss
from cora_cli.reporting.report_rows import Experiment, Row, StepRecords, clean
from cora_cli.rundir import EvaluationDirectory, RunDirectory


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A finished row. `measures` may lack what was not measured; `record` is `run.json`, empty where nothing was trained;
    `generation` is how the answers were made; `log` the lines of `log.jsonl`; `references` identifies the records that were answered.
    """

    row: Row
    measures: dict[str, Measure]
    record: dict[str, Any]
    generation: dict[str, Any]
    log: list[dict[str, Any]]
    references: str | None
    trained: int | None
    adapter_bytes: int | None

    @property
    def validation_loss(self) -> float | None:
        """Loss on the records that were set aside to select by."""
        validation = self.record.get("validation")
        return float(validation["loss"]) if validation else None

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens, prompts included, per second."""
        speed = self.record.get("speed", {}).get("tokens_per_second")
        return None if speed is None else float(speed)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Most memory of the training process, or of its GPU."""
        return self.record.get("peak_memory_bytes")


@dataclasses.dataclass(frozen=True)
class Missing:
    """A row, or the `part` of it, that cannot be reported, and why."""

    row: Row
    part: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Collection:
    """All that was found of one experiment."""

    experiment: Experiment
    results: list[Result]
    missing: list[Missing]


def collect(experiment: Experiment, wanted: tuple[str, ...] | None = None) -> Collection:
    """Read every row; `wanted` restricts the metrics. Raises `CoraError` where rows of a group cannot be compared."""
    results: list[Result] = []
    missing: list[Missing] = []
    with progress("reading", len(experiment.rows), "rows") as shown:
        for row in _each_once(experiment.rows):
            if row.run is None and row.evaluation is None and row.basis is not None:
                # A row that only extracts a basis has its result in a figure.
                if not row.basis.is_file():
                    missing.append(Missing(row, "basis", _failure(row) or "not extracted yet"))
                shown.advance()
                continue
            try:
                result, lacking = _read_row(row, wanted, experiment.records)
            except CoraError as error:
                missing.append(Missing(row, "run", str(error)))
            else:
                results.append(result)
                missing += lacking
            shown.advance()
    results = _with_base_losses(results)
    unmeasured = [result for result in results if not result.measures and result.row.evaluation is None]
    missing += [Missing(result.row, "run", "nothing was measured of it") for result in unmeasured]
    results = [result for result in results if result not in unmeasured]
    for group in {result.row.group for result in results}:
        _check_comparable([result for result in results if result.row.group == group])
    return Collection(experiment, results, missing)


def _each_once(rows: tuple[Row, ...]) -> list[Row]:
    """The rows without repetitions of a base model, which a crossed grid lists once a seed though it has none."""
    seen = set()
    kept = []
    for row in rows:
        key = (row.group, row.label, row.evaluation, row.name if row.run is not None else None)
        if key not in seen:
            kept.append(row)
        seen.add(key)
    return kept


def _read_row(row: Row, wanted: tuple[str, ...] | None, records: StepRecords | None) -> tuple[Result, list[Missing]]:
    """One row; raises `CoraError` with the reason where its run cannot be used, or is not the one that `records` tell of."""
    missing: list[Missing] = []
    measures: dict[str, Measure] = {}
    record, log = {}, []
    trained: int | None = 0 if row.mode == "base" else None
    adapter_bytes: int | None = trained
    if row.run is not None:
        run = RunDirectory(row.run)
        record = _finished_record(run, row)
        if records:
            records.require(row.run)
        log = rundir.read_jsonl(run.log) if run.log.exists() else []
        try:
            trained = 0 if record.get("is_base_model") else int(record["parameters"]["trained"])
            adapter_bytes = _adapter_bytes(run, record)
            if record.get("validation"):
                float(record["validation"]["loss"])
            if run.heldout.exists():
                measures[LOSS] = read_loss(run, record, "after")
            for line in log:
                float(line.get("loss", 0.0)), int(line["step"])
        except DAMAGE as error:
            raise damaged(run.record.parent, error) from error
    generation: dict[str, Any] = {}
    references = None
    if row.evaluation is None:
        return Result(row, measures, record, generation, log, references, trained, adapter_bytes), missing
    try:
        evaluation = EvaluationDirectory(row.evaluation)
        if not evaluation.metrics.exists():
            started = evaluation.root.is_dir() and rundir.holds_files(evaluation.root)
            raise CoraError(_failure(row) or ("the evaluation is not finished" if started else "not evaluated yet"))
        found, generation, references = read_evaluation(evaluation, wanted)
        if records:
            records.require(row.evaluation)
        measures |= found
    except CoraError as error:
        if not measures:
            raise
        missing.append(Missing(row, "evaluation", str(error)))
    return Result(row, measures, record, generation, log, references, trained, adapter_bytes), missing


def _finished_record(run: RunDirectory, row: Row) -> dict[str, Any]:
    if not run.exists():
        raise CoraError(_failure(row) or "not started")
    record = rundir.read_json(run.record)
    if not isinstance(record, dict):
        raise CoraError(f"{run.record} is damaged: a JSON object was expected, not {type(record).__name__}")
    status = record.get("status")
    if status == "failed":
        raise CoraError(f"failed: {clean(str(record.get('error', 'no reason was recorded')))}")
    if status != "finished":
        raise CoraError(_failure(row) or f"not finished (status {clean(str(status))})")
    return record


def _failure(row: Row) -> str | None:
    """The last line of the row's newest log, where one was left."""
    if row.logs is None or not row.logs.is_dir():
        return None
    # `seed1` is not `seed10`, and `fb_r8` not `cora_fb_r8`.
    own = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(row.name)}(?![0-9])")
    logs = [path for path in row.logs.glob("*.log") if own.search(path.stem)]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if lines:
            return f"not finished; the last line of {path.name}: {clean(lines[-1])[:300]}"
    return None


def _adapter_bytes(run: RunDirectory, record: dict[str, Any]) -> int:
    """Bytes of what the run made: the adapter, or the model in mode `full`. Raises `CoraError` where it was altered.

    A whole model is not hashed again: that would read all of its weights for the sake of a table.
    """
    if run.model.is_dir():
        return sum(path.stat().st_size for path in run.model.glob("*.safetensors"))
    files = [path for path in (run.adapter.iterdir() if run.adapter.is_dir() else ()) if path.is_file()]
    if rundir.sha256_files(files) != record["result_sha256"]:
        raise CoraError(
            f"{run.adapter} was altered or removed after it was written; run `cora train --resume` to write it again"
        )
    return sum(path.stat().st_size for path in files if path.suffix == ".safetensors")


def _with_base_losses(results: list[Result]) -> list[Result]:
    """Give base models the held-out loss that a run of their group had before its first step, where it started as that model."""
    return [
        dataclasses.replace(result, measures={LOSS: loss, **result.measures})
        if result.row.mode == "base" and (loss := _loss_before_training(result.row, results))
        else result
        for result in results
    ]


def _loss_before_training(base: Row, results: list[Result]) -> Measure | None:
    for result in results:
        plan = result.record.get("plan") or {}
        starts_as_base = result.row.mode in METHODS and METHODS[result.row.mode].starts_at_base(plan)
        same = (base.group, base.model) == (result.row.group, result.row.model)
        if same and starts_as_base and result.row.run is not None and LOSS in result.measures:
            return read_loss(RunDirectory(result.row.run), result.record, "before")
    return None


def _check_comparable(results: list[Result]) -> None:
    """Raise `CoraError` where two rows of a group answered other records, or measured with other settings."""
    for what in ("references", *NAMES, LOSS):
        first: tuple[Row, Any] | None = None
        for result in results:
            measure = result.measures.get(what)
            if what == "references":
                key: Any = result.references
            elif what == LOSS:
                key = None if measure is None else measure.statistics[:, 1].tolist()
            else:
                key = None if measure is None else measure.signature
            if key is None:
                continue
            if first is None:
                first = (result.row, key)
            elif key != first[1]:
                names = f"{first[0].name} and {result.row.name}"
                if what in NAMES:
                    raise CoraError(
                        f"{names} measured {what} in two ways ({first[1]} against {key}); score both alike with "
                        "`cora evaluate --from`, or leave it out with --metrics"
                    )
                subject = "were evaluated on" if what == "references" else "measured their held-out loss on"
                raise CoraError(f"{names} {subject} different records, so they cannot be compared; report them separately")
