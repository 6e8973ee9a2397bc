"""The answers to judge: those of runs, of the base model, and the anchors, which are the references in their places and shuffled."""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli import records as shapes
from cora_cli.data.records import repeated_notice
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.progress import note
from cora_cli.rundir import EvaluationDirectory, RunDirectory

REFERENCE, SHUFFLED, BASE = "reference", "shuffled reference", "base"
KEYS = ("prompt", "reference", "prediction")
_OF_ANSWERS = ("decoding", "max_new_tokens", "end_tokens", "dtype", "own_code")
"""The settings of an evaluation by which the answers of one model to one prompt differ beyond rounding."""


@dataclasses.dataclass(frozen=True)
class System:
    """One model's answers. `sha256` is that of their file, without what calibration adds to it."""

    name: str
    predictions: Path
    sha256: str
    lines: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """The prompts and references of the records, and under each name its answers; a shuffled reference is None where all are alike.

    `shuffle` is the index of the record from which each shuffled reference comes.
    """

    prompts: tuple[str, ...]
    references: tuple[str, ...]
    systems: tuple[System, ...]
    has_base: bool
    shuffle: tuple[int | None, ...]

    def of(self, name: str) -> list[str | None]:
        """The answers under a name, one per record."""
        if name == REFERENCE:
            return list(self.references)
        if name == SHUFFLED:
            return [None if place is None else self.references[place] for place in self.shuffle]
        system = next(system for system in self.systems if system.name == name)
        return [line["prediction"] for line in system.lines]

    @property
    def names(self) -> tuple[str, ...]:
        """The systems, the base model first where there is one, then the two anchors."""
        return (*(system.name for system in self.systems), REFERENCE, SHUFFLED)

    def pairs(self) -> list[tuple[str, str]]:
        """Which answers are compared: each system with the base model, or with the reference without one; then the two anchors."""
        names = [system.name for system in self.systems]
        others = [(name, names[0]) for name in names[1:]] if self.has_base else [(name, REFERENCE) for name in names]
        return [*others, (REFERENCE, SHUFFLED)]


def load_answers(config: JudgeConfig) -> Answers:
    """Read all predictions. Raises `CoraError` if they are not of the same records, or too few to shuffle their references."""
    places = (
        [Path(config.from_predictions)] if config.from_predictions else [_predictions_of(name) for name in config.runs or ()]
    )
    base = Path(config.base) if config.base else None
    if base is not None and base.is_dir():
        base = EvaluationDirectory(base).predictions
    if config.with_base:
        base = _answers_of_base(config.runs or ())
    named = [(BASE, base)] if base is not None else []
    names = [_name_of(place) for place in places]
    unclear = Counter([*names, REFERENCE, SHUFFLED, *(BASE for _ in named)])
    named += [(name if unclear[name] == 1 else str(place.parent), place) for name, place in zip(names, places, strict=True)]
    if len({name for name, _ in named}) < len(named):
        raise CoraError(f"{', '.join(str(place) for _, place in named)}: the same answers are named twice; name them once")
    systems = tuple(_read(name, place, config.limit) for name, place in named)
    first = systems[0]
    for other in systems[1:]:
        for key in ("prompt", "reference"):
            if [line[key] for line in other.lines] != [line[key] for line in first.lines]:
                raise CoraError(
                    f"{first.predictions} and {other.predictions} do not hold the same records (their {key}s differ), so they cannot be "
                    "judged together; evaluate both on one --dataset with one --template"
                )
    _say_unlike(systems)
    references = [line["reference"] for line in first.lines]
    shuffle = shuffled(references, config.seed)
    if all(place is None for place in shuffle):
        raise CoraError(
            f"{first.predictions} has no two different references, so none can be shuffled to test the judge with; judge more records"
        )
    prompts = tuple(line["prompt"] for line in first.lines)
    if repeated := len(prompts) - len({*prompts}):
        note(f"{first.predictions}: {repeated_notice(repeated, len(prompts))}")
    return Answers(prompts, tuple(references), systems, base is not None, tuple(shuffle))


def _say_unlike(systems: Sequence[System]) -> None:
    """Say by which settings the answers were generated differently, as far as these are recorded."""
    places = [EvaluationDirectory(system.predictions.parent) for system in systems if _is_recorded(system.predictions)]
    recorded = [shapes.read_generation(place) for place in places]
    known = [{**one.get("settings", {}), **one} for one in recorded]
    values = {name: dict.fromkeys(str(one[name]) for one in known if one.get(name) is not None) for name in _OF_ANSWERS}
    if differing := "; ".join(f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1):
        note(f"the answers were generated with different settings, from which differences in scores may come: {differing}")


def shuffled(references: Sequence[str], seed: int) -> list[int | None]:
    """For each record, another one with a different reference, by a random permutation; None where most references are that one."""
    draw = random.Random(seed)
    places = {text: draw.random() for text in dict.fromkeys(references)}
    order = sorted(range(len(references)), key=lambda index: (places[references[index]], index))
    # Equal texts lie together, so a shift by the largest number of them leads to another text, if any shift can.
    step = max(Counter(references).values(), default=0)
    found: list[int | None] = [None] * len(references)
    for place, index in enumerate(order):
        other = order[(place + step) % len(order)]
        found[index] = other if references[other] != references[index] else None
    return found


def _predictions_of(name: str) -> Path:
    """The predictions of a run, of `cora train` or of a grid, or of an evaluation directory."""
    run = RunDirectory(Path(name))
    places = [run.evaluation, run.root / "evaluation"] if run.exists() else [Path(name)]
    paths = [EvaluationDirectory(place).predictions for place in places]
    if (path := next((path for path in paths if path.is_file()), None)) is not None:
        return path
    what = "is not evaluated" if run.exists() else "is neither a run of cora nor an evaluation"
    raise CoraError(f"{name} {what} (no {paths[0]}); run `cora evaluate` first, or judge a file with --from")


def _answers_of_base(runs: Sequence[str]) -> Path:
    """The base model's answers, where `cora evaluate --with-base` puts them: next to those of a run."""
    tried = [path for run in runs for path in (RunDirectory(Path(run)).base_evaluation, Path(run).parent / "base")]
    for folder in tried:
        if (path := EvaluationDirectory(folder).predictions).is_file():
            _check_base(runs, folder)
            return path
    raise CoraError(
        f"the base model is not evaluated (no predictions in {' or '.join(dict.fromkeys(map(str, tried)))}); run `cora evaluate "
        f"{runs[0]} --with-base`, or name its evaluation with --base"
    )


def _check_base(runs: Sequence[str], folder: Path) -> None:
    """Raise `CoraError` if the base model that answered in `folder` is not that of every run, as far as their records know it."""
    base = _settings_of(EvaluationDirectory(folder)).get("model_sha256")
    for name in runs:
        evaluation = _predictions_of(name).parent
        settings, run = _settings_of(EvaluationDirectory(evaluation)), RunDirectory(evaluation.parent)
        own = settings.get("model_sha256")
        # A complete model was evaluated itself; what it was trained from, its run alone knows.
        if own is not None and not settings.get("adapter_sha256"):
            own = shapes.read_run(run)["fingerprint"]["model_sha256"] if run.exists() else None
        if None not in (own, base) and own != base:
            raise CoraError(
                f"{name} has another base model than the one whose answers are in {folder}; judge the runs of each base model by themselves"
            )


def _settings_of(evaluation: EvaluationDirectory) -> dict[str, Any]:
    settings: dict[str, Any] = shapes.read_generation(evaluation).get("settings", {})
    return settings


def _name_of(path: Path) -> str:
    """The name of the run that an evaluation belongs to, else that of the evaluation's directory."""
    folder = writing.absolute(path).parent
    return folder.parent.name if RunDirectory(folder.parent).exists() else folder.name


def _is_recorded(path: Path) -> bool:
    """Whether these are the predictions that a `generation.json` next to them would be about."""
    return path.name == EvaluationDirectory(path.parent).predictions.name


def _read(name: str, path: Path, limit: int | None) -> System:
    if not path.is_file():
        raise CoraError(f"{path} is not a file; judging needs the predictions.jsonl of an evaluation")
    with hashing.unchanged(path):
        sha256 = hashing.sha256_file(path)
        recorded = shapes.read_generation(EvaluationDirectory(path.parent)) if _is_recorded(path) else {}
        if recorded.get("predictions_sha256", sha256) != sha256:
            raise CoraError(
                f"{path} is not the file that generation.json describes: it was changed after it was generated; restore it, run `cora evaluate` "
                "again, or judge a copy in another directory with --from"
            )
        lines = shapes.read_predictions(path, *KEYS)[:limit]
        answers_sha256 = shapes.answers_hashes(path)[-1]
    if unread := shapes.unread_entries(lines):
        note(f"{path}: entries that are not used: {', '.join(unread)}")
    if len(lines) < 2:
        raise CoraError(f"{path} has {len(lines)} records; judging needs at least two, since anchors are shuffled references")
    return System(name, path, answers_sha256, tuple({key: line[key] for key in KEYS} for line in lines))
