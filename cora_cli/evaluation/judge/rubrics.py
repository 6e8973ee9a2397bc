"""What a judge is asked: criteria with scores, or which of two answers is better; each rubric is one YAML file.

Those shipped are in `rubrics/`; a user's own has the same keys.
"""

import dataclasses
import importlib.resources
import re
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cora_cli import hashing
from cora_cli.errors import UsageError
from cora_cli.reading import fault_of, number, read_yaml

SHIPPED = ("paper", "readability", "preference")
LOWEST, HIGHEST = 0.0, 100.0
"""The scale of every score."""
TIE, FIRST, SECOND = "tie", "first", "second"
PREFERENCE_KEY = "better"


class _CriterionFile(TypedDict):
    text: str
    anchored: NotRequired[bool]


class _RubricFile(TypedDict):
    kind: Literal["scores", "preference"]
    instructions: str
    show_reference: NotRequired[bool]
    pass_mark: NotRequired[float]
    criteria: NotRequired[dict[str, _CriterionFile]]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One score. Where it is `anchored`, the reference of another prompt deserves less than the prompt's own."""

    name: str
    text: str
    anchored: bool


@dataclasses.dataclass(frozen=True)
class Rubric:
    """A rubric; without `criteria` it asks for a preference between two answers. A score of `pass_mark` accepts an answer."""

    name: str
    instructions: str
    show_reference: bool
    pass_mark: float
    criteria: tuple[Criterion, ...]
    sha256: str

    @property
    def keys(self) -> set[str]:
        """The keys of a judgment."""
        return {PREFERENCE_KEY} if self.is_preference else {criterion.name for criterion in self.criteria}

    @property
    def is_preference(self) -> bool:
        """Whether it compares two answers."""
        return not self.criteria


def load_rubric(reference: str) -> Rubric:
    """A shipped rubric by its name, or that in a YAML file. Raises `UsageError` naming the file and the fault."""
    shipped = importlib.resources.files("cora_cli.evaluation.judge").joinpath("rubrics", f"{reference}.yaml")
    if reference in SHIPPED:
        with importlib.resources.as_file(shipped) as path:
            return _read(path, reference)
    path = Path(reference)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise UsageError(f"--rubric must be {', '.join(SHIPPED)} or a YAML file, and {reference!r} {found}")
    return _read(path, path.stem)


def _read(path: Path, name: str) -> Rubric:
    values = read_yaml(path, "rubric")
    if (mark := number(values.get("pass_mark"))) is not None and isinstance(values["pass_mark"], str):
        values["pass_mark"] = mark
    if fault := fault_of(values, _RubricFile) or _fault(values):
        raise UsageError(f"rubric {path}: {fault}")
    criteria = tuple(
        Criterion(str(key), entry["text"].strip(), entry.get("anchored", True))
        for key, entry in values.get("criteria", {}).items()
    )
    return Rubric(
        name,
        values["instructions"].strip(),
        values.get("show_reference", False),
        float(values.get("pass_mark", 60)),
        criteria,
        hashing.sha256_json(values),
    )


def _fault(values: dict[str, Any]) -> str | None:
    """What is wrong with a rubric whose values have the right types."""
    criteria = values.get("criteria", {})
    faults = [_unknown("it", values, _RubricFile), *(_fault_of_criterion(*entry) for entry in criteria.items())]
    if not values["instructions"].strip():
        faults.append("instructions are empty; say what the judge is to assess")
    if values["kind"] == "preference":
        faults.append(
            "a preference has no criteria and no pass_mark; leave them out" if criteria or "pass_mark" in values else None
        )
    elif not criteria:
        faults.append("scores need at least one entry in criteria")
    elif not any(entry.get("anchored", True) for entry in criteria.values()):
        faults.append("at least one criterion must be anchored, or nothing shows whether the judge can judge")
    elif not LOWEST < values.get("pass_mark", 60) <= HIGHEST:
        faults.append(f"pass_mark must be above {LOWEST:g} and at most {HIGHEST:g}, not {values['pass_mark']:g}")
    return next(filter(None, faults), None)


def _fault_of_criterion(name: Any, entry: dict[str, Any]) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name == "reason":
        return f"a criterion needs a name of letters, digits and underscores other than reason, not {name!r}"
    if not entry["text"].strip():
        return f"criteria.{name}.text is empty; say what the criterion means"
    return _unknown(f"criteria.{name}", entry, _CriterionFile)


def _unknown(place: str, values: dict[str, Any], shape: Any) -> str | None:
    known = shape.__annotations__.keys()
    unknown = sorted(map(str, values.keys() - known))
    return f"{place} has unknown keys: {', '.join(unknown)}; known keys: {', '.join(sorted(known))}" if unknown else None
