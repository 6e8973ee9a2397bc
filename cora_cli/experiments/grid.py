"""Grid files: one YAML format -> the rows of an experiment, every one of them checked before anything is made.

It knows settings and names only: which model exists, what is on disk and in which order things run is `inputs`, `ledger` and
`plan`.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.experiments.paper import paper_tables
from cora_cli.experiments.preset import small
from cora_cli.experiments.resources import Resources, read_resources
from cora_cli.experiments.rows import BASIS_KEYS, ROW_KEYS, TRAIN_KEYS, Row, Scope, build_row
from cora_cli.experiments.values import Values, fields_of, read_yaml, typed, unknown_key
from cora_cli.methods.registry import BASELINE, method_of
from cora_cli.models.references import EMBEDDED_MODEL

EVALUATE_KEYS = fields_of(
    EvaluateConfig,
    leave_out=(
        *("runs", "model", "from_predictions", "dataset", "output_dir", "basis"),  # each step's own
        *("device", "dtype", "overwrite"),  # said to `ablate` itself
    ),
)
_TOP_KEYS = ("name", "title", "paper_table", "conditions", "model", "models", "datasets", "defaults", "resources", "grid")
# Settings whose one value is a list: only a list of lists is an axis.
_LIST_SETTINGS = frozenset({"target_modules", "sources"})
_NAME = re.compile(r"^[A-Za-z0-9][\w.+=-]*$")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A whole grid file, resolved.

    `models` maps the name of a source model to its reference, or to the training settings of a fine-tune that is made for
    this grid; `datasets` maps names to references; `basis_rank` is R where the file fixes it; `evaluate` is None where
    nothing is to be generated, so that rows have their losses alone; `resources` are what each kind of step asks of a cluster.
    """

    name: str
    title: str
    paper_table: str | None
    preset: str | None
    conditions: tuple[str, ...]
    model: str
    models: dict[str, str | Values]
    datasets: dict[str, str]
    train: Values
    evaluate: Values | None
    basis_rank: int | None
    resources: dict[str, Resources]
    rows: tuple[Row, ...]

    def resolved(self) -> Values:
        """Plain values of everything, for the copy that is kept beside the results."""
        values = dataclasses.asdict(self)
        return {**values, "conditions": list(self.conditions), "rows": [row.as_dict() for row in self.rows]}


def load_grid(path: Path, preset: str | None = None, model: str | None = None, source_seed: int = 0) -> Grid:
    """Read and check a grid file. Raises `UsageError` that names every problem of the file at once.

    `preset` names a mapping to a smaller scale, `model` replaces the file's base model, and `source_seed` seeds the random choice
    of source models where a row has no seed of its own for that.
    """
    values = read_yaml(path)
    if preset == "small":
        # Built as it is first: what is wrong with it is told in the file's own words.
        rows = build_grid(values, str(path), None, source_seed).rows
        values = small(values, model or EMBEDDED_MODEL, any(row.basis is not None for row in rows))
    elif model is not None:
        values = {**values, "model": model}
    return build_grid(values, str(path), preset, source_seed)


def build_grid(values: Mapping[str, Any], where: str, preset: str | None = None, source_seed: int = 0) -> Grid:
    """Check the values of a grid file and cross its blocks; `where` is the file that messages name."""
    problems: list[str] = [unknown_key(key, _TOP_KEYS, "top level") for key in values if key not in _TOP_KEYS]
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UsageError(f"grid file {where}: defaults must hold train, basis and evaluate, not {defaults!r}")
    problems += [unknown_key(key, ("train", "basis", "evaluate"), "defaults") for key in defaults.keys() - _SECTIONS]
    train = typed(defaults.get("train"), TRAIN_KEYS, "defaults: train", problems)
    basis = typed(defaults.get("basis"), {**BASIS_KEYS, "rank": int}, "defaults: basis", problems)
    basis_rank = basis.pop("rank", None)
    # `evaluate: false` leaves generation out.
    generates = defaults.get("evaluate") is not False
    evaluate = typed(defaults.get("evaluate") if generates else None, EVALUATE_KEYS, "defaults: evaluate", problems)
    models, datasets = _models(values.get("models"), problems), _named(values.get("datasets"), "datasets", problems)
    _collect(problems, "defaults: basis", lambda: BasisChoices(**basis))
    _collect(problems, "defaults: evaluate", lambda: EvaluateConfig(model="m", dataset="d", output_dir="o", **evaluate))
    scope = Scope(tuple(models), tuple(datasets), train, basis, basis_rank, source_seed)
    rows = list(_rows(values.get("grid"), scope, problems))
    problems += [
        f"two rows have the name {name}: rows that differ in a setting are told apart where one block has it as a list, or in its rows"
        for name, count in Counter(row.name for row in rows).items()
        if count > 1
    ]
    resources = read_resources(values.get("resources"), problems)
    table = _text(values, "paper_table", problems, None)
    problems += _check_printed(table, rows)
    grid = Grid(
        name=_text(values, "name", problems, Path(where).stem) or "",
        title=_text(values, "title", problems, values.get("name") or Path(where).stem) or "",
        paper_table=table,
        preset=preset,
        conditions=_sentences(values.get("conditions"), problems),
        model=_text(values, "model", problems, None) or "",
        models=models,
        datasets=datasets,
        train=train,
        evaluate=evaluate if generates else None,
        basis_rank=basis_rank,
        resources=resources,
        rows=tuple(rows),
    )
    _is_name(grid.name, "name", problems)
    if not grid.model:
        problems.append("model is missing: the base model that every row trains or evaluates")
    if problems:
        raise UsageError(f"grid file {where}: {'; '.join(dict.fromkeys(problems))}")
    return grid


_SECTIONS = {"train", "basis", "evaluate"}


def _collect(problems: list[str], where: str, make: Any) -> None:
    try:
        make()
    except UsageError as error:
        problems.append(f"{where}: {error}")


def _text(values: Mapping[str, Any], key: str, problems: list[str], default: Any) -> str | None:
    value = values.get(key, default)
    if value is not None and not isinstance(value, str):
        problems.append(f"{key} must be text, not {value!r}")
        return None
    return value


def _named(values: object, what: str, problems: list[str]) -> dict[str, str]:
    """A `name: reference` mapping."""
    if not isinstance(values, dict | None):
        problems.append(f"{what} must hold `name: reference` lines, not {values!r}")
        return {}
    found = {}
    for name, reference in (values or {}).items():
        if not isinstance(reference, str) or not reference.strip():
            problems.append(f"{what}: {name} must name a reference, not {reference!r}")
        elif _is_name(name, what, problems):
            found[name] = reference
    return found


def _is_name(name: object, what: str, problems: list[str]) -> bool:
    if isinstance(name, str) and _NAME.match(name):
        return True
    problems.append(
        f"{what}: {name!r} is no name: letters, digits, and . _ + = - after the first, in quotes where YAML sees no text"
    )
    return False


def _sentences(values: object, problems: list[str]) -> tuple[str, ...]:
    if isinstance(values, list | None) and all(isinstance(value, str) for value in values or ()):
        return tuple(values or ())
    problems.append(f"conditions must be a list of sentences, not {values!r}")
    return ()


def _models(values: object, problems: list[str]) -> dict[str, str | Values]:
    """The pool of source models: references, and mappings with the training settings of fine-tunes to be made."""
    if not isinstance(values, dict):
        return dict(_named(values, "models", problems))
    made = {name: settings for name, settings in values.items() if isinstance(settings, dict)}
    named = _named({name: reference for name, reference in values.items() if name not in made}, "models", problems)
    hints = {**TRAIN_KEYS, "dataset": str, "mode": ROW_KEYS["mode"]}
    pool: dict[str, str | Values] = {}
    for name in values:
        if name in made:
            settings = {"mode": BASELINE, **typed(made[name], hints, f"models: {name}", problems)}
            if "dataset" not in settings:
                problems.append(f"models: {name} is to be fine-tuned, but names no dataset")
            elif settings["mode"] != BASELINE and method_of(settings["mode"]).is_adapter:
                problems.append(f"models: {name} must be made with mode lora or full, not {settings['mode']}")
            if _is_name(name, "models", problems):
                pool[name] = settings
        elif name in named:
            pool[name] = named[name]
    return pool


def _rows(blocks: object, scope: Scope, problems: list[str]) -> Iterator[Row]:
    if not isinstance(blocks, list) or not blocks:
        problems.append("grid is empty: it must be a list of blocks, each with a mode")
        return
    for number, block in enumerate(blocks, start=1):
        where = f"grid, block {number}"
        if not isinstance(block, dict):
            problems.append(f"{where} must hold `name: value` lines, not {block!r}")
            continue
        for axes, settings in _crossed(block, where, problems):
            if row := build_row(settings, axes, scope, where, problems):
                yield row


def _crossed(block: Mapping[str, Any], where: str, problems: list[str]) -> Iterator[tuple[set[str], Values]]:
    """Every combination of a block's lists, once for each of its explicit rows, with the names of what it varies."""
    lists = dict(block)
    explicit = lists.pop("rows", [{}])
    if not isinstance(explicit, list) or not explicit or not all(isinstance(row, dict) for row in explicit):
        problems.append(f"{where}: rows must be a list of rows with at least one, not {explicit!r}")
        return
    axes = {key for key, value in lists.items() if _is_axis(key, value)}
    if empty := sorted(key for key in axes if not lists[key]):
        problems.append(f"{where}: {', '.join(empty)} is an empty list, so that nothing would be crossed")
        return
    choices: Sequence[list[Any]] = [lists[key] if key in axes else [lists[key]] for key in lists]
    for row in explicit:
        for values in itertools.product(*choices):
            yield axes | row.keys(), {**dict(zip(lists, values, strict=True)), **row}


def _is_axis(key: str, value: Any) -> bool:
    return isinstance(value, list) and (key not in _LIST_SETTINGS or not value or isinstance(value[0], list))


def _check_printed(table: str | None, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the paper's table and the printed names that the grid refers to."""
    tables = paper_tables()
    if table is None:
        return (
            ["rows with a printed name need paper_table, which says where it is printed"]
            if any(r.printed for r in rows)
            else []
        )
    if table not in tables:
        return [f"paper_table {table!r} is none of {', '.join(tables)}"]
    printed = tables[table]["rows"]
    return [unknown_key(row.printed, printed, f"table {table}") for row in rows if row.printed and row.printed not in printed]
