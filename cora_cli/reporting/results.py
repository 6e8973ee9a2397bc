"""What a report has read: results, what is missing, and judgings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli.methods.registry import METHODS, method_of
from cora_cli.reporting.measures import Measure
from cora_cli.reporting.report_rows import Experiment, Row
from cora_cli.rundir import JudgeDirectory


def asked_otherwise(record: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    """In what the prompts of an evaluation differ from those of the training with this `run.json`, and so from those of its held-out loss."""
    trained, asked = record.get("data", {}), {**generation.get("settings", {}), **generation}
    pairs = {name: (asked.get(name), trained.get(name)) for name in ("template", "template_date")}
    found = [
        f"{name.replace('_', ' ')} {one}, trained with {other}"
        for name, (one, other) in pairs.items()
        if one not in (None, "auto", other) and other
    ]
    # The result of a complete training has a tokenizer of its own.
    now, then = asked.get("text_sha256"), record.get("fingerprint", {}).get("tokenizer_sha256")
    if now and then not in (None, now) and method_of(record["mode"]).is_adapter:
        found.append("a tokenizer or chat template that was changed since")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A finished row.

    `measures` holds only what was measured. `record` is `run.json`, empty if nothing was trained. `generation` holds the settings of
    generation, `log` the lines of `log.jsonl`. `references` is a hash of the evaluated records, None without an evaluation. `trained` is
    the number of trained parameters, `adapter_bytes` the size of the weights on disk. `counts` holds what was counted in programs, `members` the `run.json` of each run behind an average.
    """

    row: Row
    measures: dict[str, Measure]
    record: dict[str, Any]
    generation: dict[str, Any]
    log: list[dict[str, Any]]
    references: str | None
    trained: int | None
    adapter_bytes: int | None
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    members: tuple[dict[str, Any], ...] = ()

    @property
    def starts_at_base(self) -> bool:
        """Whether the held-out loss before training is the base model's; a base in 4 bits is another model."""
        settings = self.record.get("fingerprint", {}).get("settings", {})
        known = self.row.mode in METHODS and METHODS[self.row.mode].starts_at_base(self.record.get("plan") or {})
        return known and not settings.get("load_in_4bit")

    @property
    def asked_otherwise(self) -> list[str]:
        """As `asked_otherwise` of its run."""
        return asked_otherwise(self.record, self.generation)

    @property
    def held_out_tokens(self) -> int:
        """The tokens of the held-out records, of which a maximum length leaves out some."""
        return int(self.record["data"]["test"]["tokens"]) if self.record else 0

    @property
    def untrained(self) -> bool:
        """Whether the row's run took no step, so that no seed changes its model."""
        return bool(self.record) and (self.record.get("is_base_model") or self.record.get("speed", {}).get("steps") == 0)

    @property
    def validation_loss(self) -> float | None:
        """Loss on the validation records (nats per response token), which are set aside for choosing settings."""
        validation = self.record.get("validation")
        return float(validation["loss"]) if validation else None

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second, including prompt tokens."""
        speed = self.record.get("speed", {}).get("tokens_per_second")
        return None if speed is None else float(speed)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory of the training process, or of its GPU, in bytes."""
        return self.record.get("peak_memory_bytes")


@dataclasses.dataclass(frozen=True)
class Missing:
    """A row that cannot be reported, or only the `part` of it that cannot, with the reason, and whether it is that the training diverged."""

    row: Row
    part: str
    reason: str
    diverged: bool = False


@dataclasses.dataclass(frozen=True)
class Judged:
    """A `judge.json`, its directory, the paper's names of the systems that it judged, as far as they are rows with one, and the group of all
    of them that are rows, None without any or with several.
    """

    record: dict[str, Any]
    printed: dict[str, str]
    place: JudgeDirectory
    group: str | None = None


def places_apart(judged: Sequence[Judged]) -> list[str]:
    """The directory of each judging whose judge and group are those of another one, whose numbers it would have the names of; else nothing."""
    names = [(one.record["judge"]["model"], one.group) for one in judged]
    return [str(one.place.root) if names.count(name) > 1 else "" for one, name in zip(judged, names, strict=True)]


@dataclasses.dataclass(frozen=True)
class Collection:
    """The results, the missing rows and the judgments of one experiment."""

    experiment: Experiment
    results: list[Result]
    missing: list[Missing]
    judged: list[Judged] = dataclasses.field(default_factory=list)

    @property
    def diverged(self) -> tuple[Row, ...]:
        """The rows whose training diverged, which says something about their learning rate."""
        return tuple(entry.row for entry in self.missing if entry.diverged)
