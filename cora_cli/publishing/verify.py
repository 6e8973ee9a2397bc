"""Computes the hashes, losses and metrics of a run or an evaluation again and compares them with the record, without a network.

A published run lists the hash of every file in `SHA256SUMS`. A local one has its record, which names the hashes of its result and of its
held-out records; its losses follow from `heldout.jsonl` and its metrics from the predictions.
"""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_cli import embedded, hashing, records
from cora_cli.adapters.facts import SIDE_FILE, read_facts
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import MOST_RESAMPLES
from cora_cli.evaluation.metrics import GROUPS, PASS_AT, ScoreReport, score_all
from cora_cli.evaluation.metrics.bertscore import EMBEDDED_ENCODER
from cora_cli.evaluation.metrics.calibration import tokens_of
from cora_cli.evaluation.metrics.pass_at import Attempts
from cora_cli.evaluation.targets import check_test_records
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.trained_on import trained_on
from cora_cli.reading import read_jsonl, read_text, read_yaml
from cora_cli.reporting.collect import check_evaluated
from cora_cli.reporting.measures import check_losses, read_evaluation, read_log
from cora_cli.rundir import EvaluationDirectory, RunDirectory, evaluations_in

_SUM = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>.+)")
_ROUNDING = 1e-9
_ENCODER_ROUNDING = 1e-4
"""Other processors and batches move the last digits of an encoder's float32."""


def verify(directory: Path) -> list[str]:
    """What is as recorded in the directory of a run or of an evaluation, and what could not be checked, a sentence each.

    Raises `CoraError` that names the first file or value that is not as recorded.
    """
    run, evaluation = RunDirectory(directory), EvaluationDirectory(directory)
    if run.exists() or run.sums.exists():
        found = _check_sums(run) if run.sums.exists() else []
        found += check_run(run)
        return found + [sentence for own in evaluations_in(run) for sentence in _check_metrics(own)]
    if evaluation.metrics.is_file():
        return _check_metrics(evaluation)
    what = "holds neither run.json nor metrics.json" if directory.is_dir() else "is not a directory"
    raise CoraError(f"{directory} {what}; name a run of `cora train`, a published one, or an evaluation")


def check_run(run: RunDirectory) -> list[str]:
    """What is as recorded in a finished run, without computing metrics again. Raises `CoraError` as `verify` does."""
    record = records.read_run(run)
    if record["status"] != "finished":
        raise CoraError(
            f"{run.root} is not finished (status {record['status']}), so it has no result to compare; complete it with --resume"
        )
    run.check_result()
    if (mode := record["fingerprint"]["settings"].get("mode", record["mode"])) != record["mode"]:
        raise CoraError(
            f"{run.record} was changed after it was written: its mode is {record['mode']}, but the run was trained with {mode}"
        )
    found = [f"{run.result}: {len(run.result_files())} files with the recorded hash"]
    if "laplace" not in record:  # there the settings are those of the run behind it
        found.append(_check_settings(run, record))
    # Whoever publishes may leave out the records.
    if run.test_records.exists() or not run.sums.exists():
        check_test_records(run, record)
        if "test_sha256" in record["data"]:  # not in records of early versions
            found.append(f"{run.test_records.name}: the held-out records of the training")
    trained_on(ModelPath(str(run.root), run.result, None))
    if (facts := read_facts(run.result)) is not None and facts.plan.as_dict() != record["plan"]:
        raise CoraError(f"{run.record} was changed after it was written: its plan is not the one in {run.result / SIDE_FILE}")
    if record["heldout"] is not None:
        check_losses(run, record)
        found.append(f"{run.heldout.name}: gives the recorded losses before and after training")
    read_log(run, record)
    for own in evaluations_in(run):
        _check_evaluation(own)
    _check_origin(run)
    return found


def _check_settings(run: RunDirectory, record: dict[str, Any]) -> str:
    """Raise `CoraError` where the settings in `record` are not those of `config.yaml`, which holds what was asked for. Returns what was found."""
    if not run.config.is_file():
        return f"{run.config.name}: missing, so the settings in {run.record.name} were compared with nothing"
    asked = read_yaml(run.config, "configuration of the run")
    for name, value in record["fingerprint"]["settings"].items():
        # What was left to the program is settled in the record alone.
        if name in asked and asked[name] not in (None, "auto", value):
            raise CoraError(
                f"{run.record} and {run.config.name} have another {name} ({value} and {asked[name]}): one of them was changed after it was written"
            )
    return f"{run.config.name}: the recorded settings"


def _check_sums(run: RunDirectory) -> list[str]:
    listed = set()
    for number, line in enumerate(read_text(run.sums).removeprefix("\ufeff").splitlines(), start=1):
        entry = _SUM.fullmatch(line)
        if entry is None or Path(entry["name"]).is_absolute() or ".." in Path(entry["name"]).parts:
            raise CoraError(
                f"{run.sums}, line {number}: expected a SHA-256, two spaces and the name of a file, found {line[:80]!r}"
            )
        path = run.root / entry["name"]
        if not path.is_file():
            raise CoraError(f"{path} is missing, which {run.sums.name} lists; download the run again")
        # Resolved, since the name of a file in the hub's cache would stand for its content.
        if hashing.sha256_file(path.resolve()) != entry["digest"]:
            raise CoraError(
                f"{path} was changed after it was published: it does not have the hash in {run.sums.name}; download the run again"
            )
        listed.add(entry["name"])
    if run.record.name not in listed:
        raise CoraError(
            f"{run.sums} was changed after it was published: it does not list {run.record.name}; download the run again"
        )
    there = {path.relative_to(run.root).as_posix() for path in run.root.rglob("*") if path.is_file()}
    others = sorted(name for name in there - listed - {run.sums.name} if not name.startswith("."))
    unlisted = [f"not published with the run, so not checked: {', '.join(others)}"] if others else []
    return [f"{run.sums.name}: {len(listed)} files with the listed hashes", *unlisted]


def _check_origin(run: RunDirectory) -> None:
    """Raise `CoraError` if the run's own evaluation is one of other weights."""
    own = EvaluationDirectory(run.evaluation)
    generation = records.read_generation(own)
    if "members" not in generation.get("settings", {}):
        check_evaluated(run, {"result_files": run.result_files()}, generation, own)  # as recorded, by `check_result`


def _check_evaluation(evaluation: EvaluationDirectory) -> None:
    read_evaluation(evaluation, None)
    generation = records.read_generation(evaluation)
    record = records.read_metrics(evaluation)
    if generation and generation.get("predictions_sha256") != record["predictions_sha256"]:
        raise CoraError(
            f"{evaluation.generation} was changed after it was written: it describes other predictions than {evaluation.metrics.name}"
        )


def _check_metrics(evaluation: EvaluationDirectory) -> list[str]:
    """Compute every metric again from the predictions. Raises `CoraError` naming the first one that is not as recorded."""
    _check_evaluation(evaluation)
    record = records.read_metrics(evaluation)
    lines = records.read_predictions(evaluation.predictions, "prediction", "reference")
    known = {name for names in (*GROUPS.values(), tuple(PASS_AT)) for name in names}
    unknown = sorted(record["metrics"].keys() - known)
    same, notes = [], [f"{evaluation.root}: {name} is no metric of this version, so not computed again" for name in unknown]
    for names in [*GROUPS.values(), tuple(PASS_AT)]:
        wanted = [name for name in names if name in record["metrics"]]
        if not wanted:
            continue
        if lacking := _lacking(wanted[0], record):
            notes.append(
                f"{evaluation.root}: {', '.join(wanted)} not computed again, since {lacking}; the recorded scores give the value"
            )
            continue
        again = _again(wanted, record, lines, evaluation)
        for name in wanted:
            _compare(name, record["metrics"][name], again, evaluation)
            ours, theirs = again.metrics[name]["signature"], record["metrics"][name]["signature"]
            if ours != theirs:
                notes.append(
                    f"{evaluation.root}: {name} is as recorded, although it was measured with other versions ({theirs}; here {ours})"
                )
            same.append(name)
    computed = [f"{evaluation.root}: {', '.join(same)} of {len(lines)} predictions computed again, as recorded"] if same else []
    return computed + notes


def _lacking(name: str, record: dict[str, Any]) -> str | None:
    """What a metric needs and this machine does not have, so that only a download could compute it; None where it has all."""
    parts = []
    if name == "meteor":
        parts = ["WordNet 3.0", *(["Punkt (English)"] if record.get("metric_variant") == "hf-evaluate" else [])]
    elif name == "bertscore_f1":
        encoder, _ = _encoder(record)
        if encoder != EMBEDDED_ENCODER:
            try:
                resolve_model(encoder)
            except CoraError:
                return f"the encoder {encoder} is not on this disk"
            return None
        parts = ["all-MiniLM-L6-v2"]
    there = {part.name for part in embedded.status() if part.present} if parts else set()
    return next((f"{part} is not in the cache of this machine" for part in parts if part not in there), None)


def _encoder(record: dict[str, Any]) -> tuple[str, int | None]:
    found = re.search(r"\|encoder:([^|]+)\|layer:(\d+)", record["metrics"]["bertscore_f1"]["signature"])
    return (found[1], int(found[2])) if found else (EMBEDDED_ENCODER, None)


def _again(
    names: Sequence[str], record: dict[str, Any], lines: Sequence[dict[str, Any]], evaluation: EvaluationDirectory
) -> ScoreReport:
    """The metrics `names` of the predictions `lines`, with the recorded settings."""
    encoder, layer = _encoder(record) if "bertscore_f1" in names else (None, None)
    tokenize = re.search(r"\|tok:(\w+)", record["metrics"]["sacrebleu"]["signature"]) if "sacrebleu" in names else None
    bootstrap = record.get("bootstrap", {"resamples": 1000, "seed": 0})
    if not (1 <= bootstrap["resamples"] <= MOST_RESAMPLES and 0 <= bootstrap["seed"] < 2**32):
        raise CoraError(
            f"{evaluation.metrics} was changed after it was written: no intervals come from {bootstrap['resamples']} resamples and the seed "
            f"{bootstrap['seed']}"
        )
    return score_all(
        names,
        [line["prediction"] for line in lines],
        [line["reference"] for line in lines],
        bootstrap=bootstrap["resamples"],
        seed=bootstrap["seed"],
        bertscore_model=encoder,
        bertscore_layer=layer,
        bleu_tokenize=tokenize[1] if tokenize else "13a",
        variant=record.get("metric_variant", "ours"),
        attempts=_attempts(names[0], record, evaluation) if names[0] in PASS_AT else None,
        tokens=tokens_of(lines, evaluation.predictions) if names[0] in GROUPS["calibration"] else None,
    )


def _attempts(name: str, record: dict[str, Any], evaluation: EvaluationDirectory) -> Attempts:
    """What became of the programs, by the stored fates; nothing is run again."""
    executed = read_jsonl(evaluation.executions, records.Executed)
    fates = [[program["fate"] for program in one["programs"]] for one in executed]
    conditions = re.sub(r"^[^|]*\|[^|]*\||\|bs:.*$", "", record["metrics"][name]["signature"])
    return Attempts([len(one) for one in fates], [one.count("passed") for one in fates], conditions)


def _compare(name: str, recorded: dict[str, Any], again: ScoreReport, evaluation: EvaluationDirectory) -> None:
    found = again.metrics[name]
    tolerance = _ENCODER_ROUNDING if name == "bertscore_f1" else _ROUNDING
    scores = [line[name] for line in read_jsonl(evaluation.scores, records.Scores)]
    pairs = [
        (evaluation.metrics, f"the {name}", [recorded["value"]], [found["value"]]),
        # Earlier versions recorded an interval for a single record, or for records that all agree, which have none.
        (evaluation.metrics, f"the interval of {name}", (recorded["ci95"] or []) if found["ci95"] else [], found["ci95"] or []),
        (evaluation.scores, f"the scores of {name}", scores, again.per_example[name]),
    ]
    for path, what, theirs, ours in pairs:
        wrong = next(
            (
                pair
                for pair in itertools.zip_longest(theirs, ours)
                if None in pair or not math.isclose(*pair, rel_tol=tolerance, abs_tol=tolerance)
            ),
            None,
        )
        if wrong is None:
            continue
        other = ""
        if recorded["signature"] != found["signature"]:
            other = f" (measured with {recorded['signature']}; here {found['signature']})"
        raise CoraError(
            f"{path} does not hold {what} that {evaluation.predictions} gives: {wrong[0]} is recorded, {wrong[1]} is computed{other}"
        )
