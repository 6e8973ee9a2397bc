"""The scores of one file of predictions, with what they were computed from, and the paired differences of two such evaluations.

`metrics` computes the scores, and `execution` runs answers that are programs.
"""

import dataclasses
import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli import records as shapes
from cora_cli.data.records import repeated_notice
from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.directory import check_nothing_is_lost
from cora_cli.evaluation.execution.problems import Problem, programs_of
from cora_cli.evaluation.execution.score import Executor, execute
from cora_cli.evaluation.metrics import build_metrics, comparable_signature, score_all
from cora_cli.evaluation.metrics.calibration import tokens_of
from cora_cli.evaluation.readability import readability
from cora_cli.evaluation.shortcomings import count_shortcomings
from cora_cli.intervals import PairedDifference, paired_difference
from cora_cli.progress import note, say
from cora_cli.rundir import EvaluationDirectory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its name, the contents of `metrics.json`, (n, k) statistics for each metric, and hashes of what was asked and expected.

    `of_base` tells that of the base model of runs, with which theirs are compared.
    """

    name: str
    record: dict[str, Any]
    statistics: dict[str, Any]
    references_sha256: str
    prompts_sha256: str
    of_base: bool = False

    def signature(self, name: str) -> str:
        """The signature of the metric `name`, with everything that moves its value apart from the answers."""
        return str(self.record["metrics"][name]["signature"])

    def is_measured_as(self, other: "Evaluation", name: str) -> bool:
        """Whether values of the metric `name` of both can be compared."""
        return comparable_signature(self.signature(name)) == comparable_signature(other.signature(name))


def fetch_metrics(config: EvaluateConfig) -> None:
    """Fetch what the metrics of `config` read, so that a missing encoder ends the evaluation before answers are generated.

    Raises `CoraError` if something cannot be found or downloaded.
    """
    metrics = build_metrics(
        config.metric_names,
        bertscore_model=config.bertscore_model,
        bertscore_layer=config.bertscore_layer,
        variant=config.metric_variant,
    )
    for metric in metrics.values():
        metric.fetch()


def score(
    config: EvaluateConfig,
    name: str,
    path: Path,
    out: EvaluationDirectory,
    hardware: Hardware,
    generation: dict[str, Any],
    executor: Executor | None,
    problems: list[Problem] | None = None,
) -> Evaluation:
    """Score the predictions at `path` and write the results to `out`, with a copy of predictions from elsewhere, by which the results can be checked;
    with an `executor`, run them as the answers to the `problems`.

    Raises `CoraError` if the file is damaged, or is not the one that `generation` describes.
    """
    with hashing.unchanged(path):
        check_nothing_is_lost(config, path, out)
        lines = shapes.read_predictions(path, "prediction", "reference")
        predictions_sha256 = hashing.sha256_file(path)
    if generation.get("predictions_sha256", predictions_sha256) != predictions_sha256:
        raise hashing.changed_meanwhile(path)
    predictions, references = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    say(f"{name}: scoring {len(lines)} predictions")
    if config.from_predictions and (unread := shapes.unread_entries(lines)):
        note(f"{path}: entries that are not used: {', '.join(unread)}")
    prompts = [line.get("prompt") for line in lines]
    # Of records, `evaluate` has said so; another program's answers may have no prompts.
    if config.from_predictions and None not in prompts and (repeated := len(prompts) - len({*map(repr, prompts)})):
        note(f"{path}: {repeated_notice(repeated, len(prompts))}")
    largest = config.most_samples
    fewest = min((len(line.get("samples") or [line]) for line in lines), default=largest)
    if fewest < largest:
        raise CoraError(
            f"pass@{largest} needs {largest} answers to each record, but {path} has {fewest} to one; ask for pass@{fewest}"
        )
    executions = execute(executor, problems, lines, path, out, config.metric_names) if executor is not None else None
    report = score_all(
        config.metric_names,
        predictions,
        references,
        bootstrap=config.bootstrap,
        seed=config.seed,
        bertscore_model=config.bertscore_model,
        bertscore_layer=config.bertscore_layer,
        bleu_tokenize=config.bleu_tokenize,
        device=str(hardware.device),
        variant=config.metric_variant,
        attempts=executions.attempts if executions else None,
        tokens=tokens_of(lines, path) if config.measures_calibration else None,
    )
    proxies = readability(list(map(programs_of, lines)), config.bootstrap, config.seed) if config.readability else None
    is_copied = path.resolve() != out.predictions.resolve()
    if is_copied:
        with writing.atomic_path(out.predictions) as copy:
            shutil.copyfile(path, copy)
    writing.write_jsonl(
        out.scores, [{key: values[index] for key, values in report.per_example.items()} for index in range(len(lines))]
    )
    record = {
        "format": 1,
        "name": name,
        "metric_variant": config.metric_variant,
        "metrics": report.metrics,
        "predictions_sha256": predictions_sha256,
        **({"copied_from": str(writing.absolute(path))} if is_copied else {}),
        "scores_sha256": hashing.sha256_file(out.scores),
        "generation": generation,
        **({"fates": executions.fates} if executions else {}),
        **({"same_process": executions.same_process} if executions and executions.same_process else {}),
        **({"readability_proxies": proxies} if config.readability else {}),
        "shortcomings": count_shortcomings(lines),
        "bootstrap": {"resamples": config.bootstrap, "seed": config.seed},
        "versions": {name: importlib.metadata.version(name) for name in ("cora-cli", "torch", "transformers")},
    }
    shapes.write_sealed(out.metrics, record)
    return Evaluation(name, record, report.statistics, hashing.sha256_json(references), hashing.sha256_json(prompts))


def paired_differences(one: Evaluation, other: Evaluation) -> dict[str, PairedDifference]:
    """`one` minus `other` for each metric that both measured with equal signatures, with a paired test over records (`intervals.paired_difference`).

    Raises `CoraError` if they did not answer the same records.
    """
    if one.references_sha256 != other.references_sha256:
        raise CoraError(
            f"{one.name} and {other.name} did not answer the same records, so a paired comparison is impossible; evaluate both "
            "on one --dataset"
        )
    shared = [name for name in one.statistics if name in other.statistics]
    metrics = build_metrics(name for name in shared if one.is_measured_as(other, name))
    return {
        name: paired_difference(one.statistics[name], other.statistics[name], metric.value) for name, metric in metrics.items()
    }
