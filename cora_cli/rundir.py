"""The names of the files in the directories that `cora` writes, and whether their contents are those that were recorded."""

import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.reading import read_json

COMPACT_ADAPTER = "adapter_a_only.safetensors"
"""The weights of an adapter in compact form: only A, because B can be recomputed from a basis file or a seed."""
POSTERIOR = "posterior.safetensors"
"""The file of an adapter that says how far its weights can be from those that it stores; see `adapters.posterior`."""
MODEL_FILES = ("config.json", "adapter_config.json")
"""The files of which a directory with a model has one."""
CARD = "README.md"
"""The model card next to weights. No recorded hash covers it, since people edit it."""
SUMS = "SHA256SUMS"


def require_basis(path: Path) -> None:
    """Raise `CoraError` if there is no basis file at `path`."""
    if path.is_dir():
        raise CoraError(f"basis {path} is a directory; name the file that `cora extract-basis` wrote")
    if not path.is_file():
        raise CoraError(f"basis {path} does not exist; create one with `cora extract-basis`")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The path of each file of a training run. Constructing one does not touch the disk."""

    root: Path

    @cached_property
    def config(self) -> Path:
        """The resolved configuration, YAML, readable by `cora train --config`."""
        return self.root / "config.yaml"

    @cached_property
    def record(self) -> Path:
        """`run.json`: versions, seeds, hashes, counts, speed, status."""
        return self.root / "run.json"

    @cached_property
    def log(self) -> Path:
        """`log.jsonl`: one line per optimizer step."""
        return self.root / "log.jsonl"

    @cached_property
    def adapter(self) -> Path:
        """A standard PEFT adapter directory (mode `full`: absent, see `model`)."""
        return self.root / "adapter"

    @cached_property
    def model(self) -> Path:
        """The complete model, written by mode `full` only."""
        return self.root / "model"

    @cached_property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints; each is renamed into place once it is complete."""
        return self.root / "checkpoints"

    @cached_property
    def test_records(self) -> Path:
        """`test.jsonl`: the held-out records, never trained on."""
        return self.root / "test.jsonl"

    @cached_property
    def trained_prompts(self) -> Path:
        """`trained_prompts.txt`: a hash of each prompt that was trained on, one per line."""
        return self.root / "trained_prompts.txt"

    @cached_property
    def heldout(self) -> Path:
        """`heldout.jsonl`: the token count of each held-out record and its negative log-likelihood before and after training."""
        return self.root / "heldout.jsonl"

    def stop(self, step: int) -> Path:
        """`stops/<step>.json`: the validation loss at which `--stop-at` left the run."""
        return self.root / "stops" / f"{step}.json"

    @cached_property
    def evaluation(self) -> Path:
        """Default output directory of `cora evaluate RUN`."""
        return self.root / "eval"

    @property
    def base_evaluation(self) -> Path:
        """Where `cora evaluate RUN --with-base` evaluates the base model."""
        return self.root / "eval-base"

    def evaluations_at_ranks(self) -> list[Path]:
        """The scored evaluations of `cora evaluate RUN --ranks …`, eval-rank-1, eval-rank-2, …, by rank."""
        start = f"{self.evaluation.name}-rank-"
        found = {int(rank): path for path in self.root.glob(f"{start}*") if (rank := path.name.removeprefix(start)).isdecimal()}
        return [found[rank] for rank in sorted(found) if EvaluationDirectory(found[rank]).metrics.is_file()]

    @cached_property
    def sums(self) -> Path:
        """`SHA256SUMS`: the hash of every file of a run that `cora publish` uploaded, in the format of `sha256sum`."""
        return self.root / SUMS

    def exists(self) -> bool:
        """Whether this directory holds a run, complete or not, and not a model next to another program's `run.json`."""
        return self.record.exists() and (self.result.exists() or not any((self.root / name).exists() for name in MODEL_FILES))

    @property
    def result(self) -> Path:
        """What the run trained: `model/` in mode `full`, else `adapter/`; of a published run, the directory itself holds its files."""
        if self.model.exists():
            return self.model
        return self.root if self.sums.exists() and not self.adapter.exists() else self.adapter

    def result_files(self) -> dict[str, str]:
        """SHA-256 of each file of the result except its card, by name; of none where there is no result."""
        result = self.result
        if result == self.root:  # next to other files
            paths = [result / name for name in read_json(self.record, dict[str, Any]).get("result_files", {})]
        else:
            paths = sorted(writing.own_files(result))
        return {path.name: hashing.sha256_file(path) for path in paths if path.is_file() and path.name != CARD}

    def result_hash(self) -> str:
        """SHA-256 over the files of the result except its card; of no files where there is none."""
        return hashing.sha256_json(self.result_files())

    def check_result(self) -> None:
        """Raise `CoraError`, with the file where that is known, unless the run is finished and the result is the one whose hash it recorded.

        The result of a run that is being completed again is the damaged one until the end.
        """
        record = read_json(self.record, dict[str, Any])
        if (status := record.get("status", "finished")) != "finished":
            raise CoraError(
                f"{self.root} is not finished (status {status}); complete it with the same `cora train` command and --resume"
            )
        expected, found = record.get("result_sha256"), self.result_files()
        if expected is None:
            return
        if expected == hashing.sha256_json(found):
            self._check_seed(record)
            return
        known = record.get("result_files") or found
        if "result_files" in record and (added := sorted(found.keys() - known)) and known.items() <= found.items():
            raise CoraError(
                f"{self.result / added[0]} was put next to the result of a finished run and is no part of it; move it out of {self.result}"
            )
        changed = [name for name in sorted({*known, *found}) if known.get(name) != found.get(name)]
        path = self.result / changed[0] if changed else self.result
        fault = unlike_record(path, self.record, "after its training had finished")
        again = (
            "with `cora laplace` into another directory"
            if "laplace" in record
            else "with the same `cora train` command and --resume"
        )
        raise CoraError(f"{fault}; restore it, or write it again {again}")

    def _check_seed(self, record: Mapping[str, Any]) -> None:
        """Raise `CoraError` if the record states another seed than the adapter, whose files it has the hashes of: it would feign a second seed."""
        details = self.result / "cora.json"
        if "laplace" in record or not details.is_file():
            return
        plan = read_json(details, dict[str, Any]).get("plan")
        stated, trained = (each.get("seed") if isinstance(each, dict) else None for each in (record.get("seeds"), plan))
        if None not in (stated, trained) and stated != trained:
            raise CoraError(
                f"{self.record} was changed after its training had finished: it states the seed {stated}, but {details} the seed {trained}; restore it"
            )


def run_of_result(path: Path) -> RunDirectory | None:
    """The run whose directory, or whose result, is at `path` or where it links to; None without one."""
    for place in (writing.absolute(path), path.resolve()):
        for root in (place, *((place.parent,) if place.name in ("adapter", "model") else ())):
            if (run := RunDirectory(root)).exists():
                return run
    return None


def unlike_record(path: Path, record: Path, when: str = "after it was written") -> str:
    """Says that a file is not the one whose hash `record` has."""
    return (
        f"{path} was changed {when}: it does not have the hash in {record}"
        if path.exists()
        else f"{path} is missing; {record} has its hash"
    )


@dataclasses.dataclass(frozen=True)
class EvaluationDirectory:
    """The path of each file of an evaluation."""

    root: Path

    @cached_property
    def predictions(self) -> Path:
        """One line per example in dataset order: index, prompt, reference, prediction, finish_reason, new_tokens."""
        return self.root / "predictions.jsonl"

    @cached_property
    def partial_predictions(self) -> Path:
        """The same lines in the order of generation, present while generation is running."""
        return self.root / "predictions.partial.jsonl"

    @cached_property
    def generation(self) -> Path:
        """`generation.json`: the settings and inputs of the predictions, and their hash once they are complete."""
        return self.root / "generation.json"

    @cached_property
    def metrics(self) -> Path:
        """`metrics.json`: under `metrics`, the `value`, `ci95`, `n` and `signature` of each metric."""
        return self.root / "metrics.json"

    @cached_property
    def scores(self) -> Path:
        """`scores.jsonl`: per-example score of each metric, in dataset order."""
        return self.root / "scores.jsonl"

    @cached_property
    def executions(self) -> Path:
        """`executions.jsonl`: per record the time limit and the fate of each of its programs, where generated code was run."""
        return self.root / "executions.jsonl"


def evaluations_in(run: RunDirectory) -> list[EvaluationDirectory]:
    """The finished evaluations in the directory of a run, by name."""
    places = [EvaluationDirectory(path) for path in sorted(run.root.iterdir()) if path.is_dir() and os.access(path, os.X_OK)]
    return [place for place in places if place.metrics.is_file()]


@dataclasses.dataclass(frozen=True)
class JudgeDirectory:
    """The path of each file of a judging."""

    root: Path

    @cached_property
    def judgments(self) -> Path:
        """`judgments.jsonl`: one line for each outcome of a request, appended as it comes; never rewritten, since it may have been paid for."""
        return self.root / "judgments.jsonl"

    @cached_property
    def result(self) -> Path:
        """`judge.json`: scores, preferences and what the anchors say about the judge."""
        return self.root / "judge.json"
