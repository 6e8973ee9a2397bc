"""What the runs and evaluations outside a grid were made of, and the one name that a report has for each of it.

The same model and the same data lie at several paths, and what lies at one path changes from day to day. So contents decide, by the hashes in
records: one content has one name, and one name has one content.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli import hashing, records
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import comparable_signature
from cora_cli.experiments.rows import SPLIT_KEYS
from cora_cli.reporting.report_rows import Row
from cora_cli.rundir import EvaluationDirectory, RunDirectory


@dataclasses.dataclass(frozen=True)
class Plain:
    """A row outside a grid with what its directories record: `run.json` and `metrics.json`, each empty without one."""

    row: Row
    run: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings by which the answers were generated, as far as they are recorded."""
        settings: Mapping[str, Any] = self.evaluation.get("generation", {}).get("settings", {})
        return settings

    @property
    def answered(self) -> str | None:
        """The hash of the records that were answered, None where it is not recorded, as of another program's answers."""
        return self.settings.get("records_sha256")

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for the evaluations of two models to be compared: the records, the decoding and the metrics."""
        names = ("records_sha256", "template", "max_new_tokens", "decoding", "dtype", "own_code")
        signatures = {name: comparable_signature(metric["signature"]) for name, metric in self.evaluation["metrics"].items()}
        return {**{name: self.settings.get(name) for name in names}, "metrics": signatures}


def read_plain(row: Row) -> Plain:
    """The row with its records. Raises `CoraError` if one is damaged, but not for the evaluation of a run, which lacks then."""
    run = records.read_run(RunDirectory(row.run)) if row.run is not None else {}
    evaluation = EvaluationDirectory(row.evaluation) if row.evaluation is not None else None
    try:
        metrics = records.read_metrics(evaluation) if evaluation is not None and evaluation.metrics.is_file() else {}
    except CoraError:
        if not run:
            raise
        metrics = {}
    return Plain(row, run, metrics)


def named_by_contents(found: Sequence[Plain]) -> list[Plain]:
    """The rows, whose `model`, `dataset` and, for runs, `group` are equal where what they were made of is, and only there. The first name of a
    content is kept; a name for several contents gets their hashes. What was not hashed goes by its path."""
    prints = [plain.run.get("fingerprint", {}) for plain in found]
    # A run's model may have been altered since, so its own record counts, not that of its evaluation.
    weights = [
        of_run.get("model_sha256", plain.settings.get("model_sha256")) for plain, of_run in zip(found, prints, strict=True)
    ]
    models = _names("weights", _first_names([("", plain.row.model) for plain in found], weights), weights)
    # The hash is of the records as they are divided, so only that of an equal division can be compared.
    data = [of_run.get("data_sha256") for of_run in prints]
    splits = _hashes_of_settings(prints, SPLIT_KEYS)
    scopes = _hashes_of_settings(prints, (*SPLIT_KEYS, *_OF_TRAINING_RECORDS))
    divided = [(scope, plain.row.dataset) for scope, plain in zip(scopes, found, strict=True)]
    named = _names("data", _first_names(divided, data), data)
    # Runs on fewer records of a file have the same held-out ones, or the file is another one by now.
    held_out = [plain.run.get("data", {}).get("test_sha256") for plain in found]
    datasets = _names("held-out", list(zip(splits, named, strict=True)), held_out)
    groups = [("", f"{model} on {dataset}") for model, dataset in zip(models, datasets, strict=True)]
    groups_by_tokenizer = _names("tokenizer", groups, [of_run.get("tokenizer_sha256") for of_run in prints])
    return [
        dataclasses.replace(
            plain,
            row=dataclasses.replace(plain.row, model=model, dataset=dataset, group=group if plain.run else plain.row.group),
        )
        for plain, model, dataset, group in zip(found, models, datasets, groups_by_tokenizer, strict=True)
    ]


_OF_TRAINING_RECORDS = ("limit", "train_on")
"""Settings by which a run trains on fewer of the records that were divided for training."""


def _hashes_of_settings(prints: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    return [hashing.sha256_json([of_run.get("settings", {}).get(name) for name in names]) for of_run in prints]


_Named = tuple[str, str]
"""A name, behind what else must be equal for contents of that name to be compared."""


def _first_names(named: Sequence[_Named], digests: Sequence[str | None]) -> list[_Named]:
    """Each name replaced by the first one of its content, as far as that was hashed."""
    first: dict[_Named, str] = {}
    return [
        (scope, name if digest is None else first.setdefault((scope, digest), name))
        for (scope, name), digest in zip(named, digests, strict=True)
    ]


def _names(kind: str, named: Sequence[_Named], digests: Sequence[str | None]) -> list[str]:
    """Each name, with the hash of its content where the name has several."""
    contents: dict[_Named, set[str]] = {}
    for name, digest in zip(named, digests, strict=True):
        contents.setdefault(name, set()).update([digest] if digest is not None else [])
    return [
        f"{name[1]}, {kind} sha256 {digest[:12]}" if digest is not None and len(contents[name]) > 1 else name[1]
        for name, digest in zip(named, digests, strict=True)
    ]
