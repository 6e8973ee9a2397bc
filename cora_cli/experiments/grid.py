"""Reads grid files (YAML) and expands them to the rows of an experiment; checks every row before anything runs.

It checks settings and names only. `inputs` finds models and data sets, `steps` plans the commands, `ledger` tells which steps are complete.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import reading
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.rubrics import load_rubric
from cora_cli.evaluation.metrics import HIGHEST, NAMES
from cora_cli.experiments.paper import paper_tables
from cora_cli.experiments.preset import small, tuned_here
from cora_cli.experiments.resources import Resources, read_resources
from cora_cli.experiments.rows import BASIS_KEYS, ROW_KEYS, SEEDS_APART, TRAIN_KEYS, Row, Scope, build_row
from cora_cli.experiments.stage_rules import ConfirmRule, read_confirm, read_sweep, stage_problems
from cora_cli.experiments.sweep import SweepRule
from cora_cli.experiments.values import Values, fields_of, read_yaml, typed, unknown_key
from cora_cli.methods.registry import BASELINE, method_of
from cora_cli.models.references import EMBEDDED_MODEL
from cora_cli.training.proposal import AUTO

EVALUATE_KEYS = fields_of(
    EvaluateConfig,
    leave_out=(
        *("runs", "model", "from_predictions", "dataset", "output_dir", "base", "basis"),  # set for each step
        *("columns", "subset", "split"),  # the grid writes the records to answer itself
        *("ensemble", "with_base", "ranks"),  # which answer with other models than the row's
        *("device", "dtype", "overwrite"),  # flags of `ablate` itself
    ),
)
JUDGE_KEYS = fields_of(
    JudgeConfig,
    leave_out=(
        *("runs", "from_predictions", "base", "with_base", "output_dir", "dry_run", "rate_from"),  # set for each step
        *("device", "dtype", "overwrite"),  # flags of `ablate` itself
    ),
)
MEASURES = ("heldout_loss", *NAMES)
"""The measures of a report, which `margin` can name."""
_TOP_KEYS = (
    "name",
    "title",
    "paper_table",
    "conditions",
    "margin",
    "sweep",
    "confirm",
    "model",
    "models",
    "datasets",
    "defaults",
    "resources",
    "grid",
)
# Settings whose single value is a list: they vary only with a list of lists.
_LIST_SETTINGS = frozenset({"target_modules", "sources"})
_MOST_ROWS = 10_000
_LONGEST_NAME = 220
"""In bytes. Names of files have at most 255; that of a step's record has up to 28 more than its row, and a stage may lengthen rates and seeds."""
_NAME = re.compile(r"^[A-Za-z0-9][\w.+=-]*$")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A complete grid file, resolved.

    `models` maps the name of a source model to its reference, or to the training settings of a model that this grid fine-tunes.
    `datasets` maps names to references. `basis_rank` is R if the file sets it. `evaluate` is None if nothing is generated, so
    that rows have only their losses. `judge` has the settings of a judge of all answers to a data set, None for no judge. `margin` is the largest difference that counts as none: a share of what training gains, or a value
    for each measure, None for the report's default. With `sweep` or `confirm`, `rows` has one row per method and learning rate, from which
    `stages` makes those that run. `resources` has the cluster resources for each kind of step.
    """

    name: str
    title: str
    paper_table: str | None
    preset: str | None
    conditions: tuple[str, ...]
    margin: float | dict[str, float] | None
    model: str
    models: dict[str, str | Values]
    datasets: dict[str, str]
    train: Values
    evaluate: Values | None
    judge: Values | None
    basis_rank: int | None
    resources: dict[str, Resources]
    rows: tuple[Row, ...]
    sweep: SweepRule | None = None
    confirm: ConfirmRule | None = None

    @property
    def has_stages(self) -> bool:
        """Whether rows depend on the results of others."""
        return self.sweep is not None or self.confirm is not None

    def resolved(self) -> Values:
        """Everything as plain values, for the copy that is saved with the results."""
        values = dataclasses.asdict(self)
        return {**values, "conditions": list(self.conditions), "rows": [row.as_dict() for row in self.rows]}


def load_grid(path: Path, preset: str | None = None, model: str | None = None, source_seed: int = 0) -> Grid:
    """Read and check a grid file. Raises `UsageError` that lists all problems of the file at once.

    `preset` is None or "small", which reduces the scale; `model` replaces the file's base model; `source_seed` seeds the random
    choice of source models for rows that do not set one.
    """
    values = read_yaml(path)
    if preset == "small":
        # First check the file as written, so that errors refer to its own settings.
        rows = build_grid(values, str(path), None, source_seed).rows
        values = small(values, model or EMBEDDED_MODEL, any(row.basis is not None or row.sources for row in rows))
    elif model is not None:
        values = {**values, "model": model}
    grid = build_grid(values, str(path), preset, source_seed)
    if preset is None:
        return grid
    used = {name for row in grid.rows for name in row.sources}
    tuned = tuned_here([name for name in grid.models if name in used])
    return dataclasses.replace(grid, conditions=(*grid.conditions, *tuned))


def build_grid(values: Mapping[str, Any], where: str, preset: str | None = None, source_seed: int = 0) -> Grid:
    """Check the values of a grid file and expand its blocks to rows; messages name the file `where`.

    Raises `UsageError` that lists all problems at once.
    """
    problems: list[str] = [unknown_key(key, _TOP_KEYS, "top level") for key in values if key not in _TOP_KEYS]
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UsageError(f"grid file {where}: defaults must hold train, basis, evaluate and judge, not {defaults!r}")
    problems += [unknown_key(key, _SECTIONS, "defaults") for key in defaults if key not in _SECTIONS]
    train = typed(defaults.get("train"), TRAIN_KEYS, "defaults: train", problems)
    basis = typed(defaults.get("basis"), {**BASIS_KEYS, "rank": int}, "defaults: basis", problems)
    basis_rank = basis.pop("rank", None)
    # `evaluate: false` turns generation off.
    generates = defaults.get("evaluate") is not False
    evaluate = typed(defaults.get("evaluate") if generates else None, EVALUATE_KEYS, "defaults: evaluate", problems)
    models, datasets = _models(values.get("models"), problems), _named(values.get("datasets"), "datasets", problems)
    _check(problems, "defaults: basis", lambda: BasisChoices(**basis))
    _check(problems, "defaults: evaluate", lambda: EvaluateConfig(model="m", dataset="d", output_dir="o", **evaluate))
    judge = typed(defaults["judge"], JUDGE_KEYS, "defaults: judge", problems) if defaults.get("judge") is not None else None
    if judge is not None:
        _check(problems, "defaults: judge", lambda: _check_judge(judge, generates, "sweep" in values or "confirm" in values))
    scope = Scope(tuple(models), tuple(datasets), train, basis, basis_rank, source_seed)
    rows = list(_rows(values.get("grid"), scope, problems))
    problems += [
        f"several rows have the name {name}: settings are part of a name only if one block varies them, in a list or in its "
        "rows"
        for name, count in Counter(row.name for row in rows).items()
        if count > 1
    ]
    problems += [
        f"the row {row.name!r} cannot name a folder; the values that tell rows apart must consist of letters, digits and . _ + = -"
        for row in rows
        if not _NAME.fullmatch(row.name)
    ]
    problems += [
        f"the name of the row {row.name[:60]}… is {len(row.name.encode())} bytes long, and its files could not be named; use shorter names"
        for row in rows
        if len(row.name.encode()) > _LONGEST_NAME
    ]
    problems += _check_methods(rows)
    resources = read_resources(values.get("resources"), problems)
    table = _text(values, "paper_table", problems, None)
    problems += _check_printed(table, rows)
    problems += _check_shards(rows, models, resources) + _check_proposals(models, resources)
    problems += _check_averages(rows, evaluate if generates else None, judge is not None, values)
    grid = Grid(
        name=_text(values, "name", problems, Path(where).stem) or "",
        title=_text(values, "title", problems, values.get("name") or Path(where).stem) or "",
        paper_table=table,
        preset=preset,
        conditions=_sentences(values.get("conditions"), problems),
        margin=_margin(values.get("margin"), problems),
        model=_text(values, "model", problems, None) or "",
        models=models,
        datasets=datasets,
        train=train,
        evaluate=evaluate if generates else None,
        judge=judge,
        basis_rank=basis_rank,
        resources=resources,
        rows=tuple(rows),
        sweep=read_sweep(values.get("sweep"), problems),
        confirm=read_confirm(values.get("confirm"), MEASURES, problems),
    )
    problems += stage_problems(grid.rows, grid.sweep, grid.confirm, grid.train, generates, values.get("grid"))
    _is_name(grid.name, "name", problems)
    if not grid.model:
        problems.append("model is missing; set it to the base model that every row trains or evaluates")
    if not values.get("datasets"):
        problems.append("datasets is missing; write a line `name: reference` for each data set below it")
    if problems:
        raise UsageError(f"grid file {where}: {'; '.join(dict.fromkeys(problems))}")
    return grid


def _check_proposals(models: Mapping[str, str | Values], resources: Mapping[str, Resources]) -> list[str]:
    """A sentence for each fine-tune of several processes whose learning rate is to be proposed, which one process measures."""
    return [
        f"models: {name}: learning_rate auto is measured in one process; give a number, or one GPU and one node in resources: model"
        for name, settings in models.items()
        if isinstance(settings, dict) and settings.get("learning_rate") == AUTO and resources["model"].processes > 1
    ]


_SECTIONS = ("train", "basis", "evaluate", "judge")


def _check_shards(rows: Sequence[Row], models: Mapping[str, str | Values], resources: Mapping[str, Resources]) -> list[str]:
    """A sentence for each training of one process that is to divide its model among several."""
    trained = [("train", row.label, row.train or {}) for row in rows]
    trained += [("model", f"models: {name}", settings) for name, settings in models.items() if isinstance(settings, dict)]
    return [
        f"{what}: shard {settings['shard']} needs several processes; set nodes or gpus in resources: {kind}"
        for kind, what, settings in trained
        if settings.get("shard", "none") != "none" and resources[kind].processes == 1
    ]


def _check_methods(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row that a report would take for another seed of a method although more than its seed differs, or nothing."""
    found = []
    known: dict[tuple[object, ...], Row] = {}
    trained: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.train is None:
            continue
        other = trained.setdefault((row.dataset, row.settings_text, row.learning_rate, row.seed), row)
        if other.method != row.method:
            drawn = "; both draw the same source models" if other.source_seed != row.source_seed else ""
            found.append(f"{other.name} and {row.name} are one training under two names{drawn}; leave one of them out")
            continue
        first = known.setdefault(row.method, row)
        same = known.setdefault((*row.method, row.learning_rate, row.seed), row)
        differing = first.differences(row)
        if differing:
            found.append(
                f"{first.name} and {row.name} have one label, {row.label!r}, but differ in {', '.join(differing)}, and would count as seeds of "
                "one method; give them different labels"
            )
        elif same.name != row.name:
            found.append(f"{same.name} and {row.name} are one training, which would count as two seeds; leave one of them out")
    return found


def _check_averages(rows: Sequence[Row], evaluate: Values | None, judged: bool, values: Mapping[str, Any]) -> list[str]:
    """Sentences on rows whose runs are to be averaged but cannot be."""
    averaged = next((row for row in rows if row.ensemble or row.laplace is not None), None)
    if averaged is None:
        return []
    found = []
    if evaluate is None:
        found.append(f"{averaged.label}: there are no predictions to average, since evaluate is false")
    elif evaluate.get("backend", "transformers") != "transformers":
        found.append(f"{averaged.label}: averages need backend transformers in defaults: evaluate")
    if judged and any(row.ensemble for row in rows):
        found.append("an ensemble cannot be judged in a grid; leave out judge or the ensemble")
    rates: dict[tuple[object, ...], set[float | None]] = {}
    for row in rows:
        if row.ensemble or row.laplace is not None:
            rates.setdefault(row.method, set()).add(row.learning_rate)
    if not values.get("sweep") and any(len(each) > 1 for each in rates.values()):
        found.append(
            f"{averaged.label}: an average has no validation loss to choose a learning rate by; add a section sweep, or choose one"
        )
    stages = [values[name].get("seeds") for name in ("sweep", "confirm") if isinstance(values.get(name), dict)]
    seeds = [seed for part in stages if isinstance(part, list) for seed in part] or [row.seed for row in rows]
    numbers = [seed for seed in seeds if type(seed) is int]
    if numbers and max(numbers) - min(numbers) >= SEEDS_APART and any(row.ensemble for row in rows):
        found.append(
            f"the seeds of ensembles must lie within {SEEDS_APART} of each other, since their further members have the seeds {SEEDS_APART} apart"
        )
    for row in rows:
        if numbers and row.ensemble and (last := max(numbers) + SEEDS_APART * (row.ensemble - 1)) >= 2**32:
            found.append(
                f"{row.label}: the last of its {row.ensemble} members would have the seed {last}, but seeds are below 2^32"
            )
    return found


def _check_judge(judge: Values, generates: bool, has_stages: bool) -> None:
    """Raise `UsageError` for settings of a judge that has nothing to judge, is no judge, or has no such rubric."""
    if not generates:
        raise UsageError("there are no answers to judge, since evaluate is false")
    if has_stages:
        raise UsageError("a grid with sweep and confirm cannot judge; run `cora judge` on its confirmed runs")
    for rubric in JudgeConfig(runs=("r",), output_dir="o", **judge).rubric:
        load_rubric(rubric)


def _check(problems: list[str], where: str, make: Any) -> None:
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
    """Check a `name: reference` mapping."""
    if not isinstance(values, dict | None):
        problems.append(f"{what} must hold `name: reference` lines, not {values!r}")
        return {}
    found = {}
    for name, reference in (values or {}).items():
        if not isinstance(reference, str) or not reference.strip():
            problems.append(f"{what}: {name} must be a hub id, path or builtin name, not {reference!r}")
        elif _is_name(name, what, problems):
            found[name] = reference
    return found


def _is_name(name: object, what: str, problems: list[str]) -> bool:
    if isinstance(name, str) and len(name.encode()) > _LONGEST_NAME:
        problems.append(
            f"{what}: {name[:60]}… is {len(name.encode())} bytes long, and its files could not be named; use a shorter name"
        )
        return False
    if isinstance(name, str) and _NAME.fullmatch(name):
        return True
    problems.append(
        f"{what}: {name!r} is not a valid name; use letters and digits, then also . _ + = -, and quote names that YAML does "
        "not read as text"
    )
    return False


def _sentences(values: object, problems: list[str]) -> tuple[str, ...]:
    if isinstance(values, list | None) and all(isinstance(value, str) for value in values or ()):
        return tuple(values or ())
    problems.append(f"conditions must be a list of sentences, not {values!r}")
    return ()


def _margin(values: object, problems: list[str]) -> float | dict[str, float] | None:
    """The margin of equivalence: one share of what training gains, or a value for each measure in its own unit."""
    if values is None:
        return None
    share = reading.number(values)
    if share is not None and 0 < share <= 1:
        return share
    if not isinstance(values, dict) or not values:
        problems.append(
            f"margin must be a share of what training gains, above 0 and at most 1, or `measure: value` lines, not {values!r}"
        )
        return None
    problems += [unknown_key(str(name), MEASURES, "margin") for name in values if name not in MEASURES]
    highest = {name: HIGHEST.get(str(name), math.inf) for name in values}
    found = {
        str(name): value
        for name, given in values.items()
        if (value := reading.number(given)) is not None and 0 < value < highest[name]
    }
    problems += [
        f"margin: {name} must be a number above 0{f' and below {end:g}, the end of its scale' if end < math.inf else ''}, not {values[name]!r}"
        for name, end in highest.items()
        if str(name) not in found
    ]
    return found


def _models(values: object, problems: list[str]) -> dict[str, str | Values]:
    """The pool of source models: references, or training settings of models to fine-tune."""
    if not isinstance(values, dict):
        return dict(_named(values, "models", problems))
    tuned = {name: settings for name, settings in values.items() if isinstance(settings, dict)}
    named = _named({name: reference for name, reference in values.items() if name not in tuned}, "models", problems)
    hints = {**TRAIN_KEYS, "dataset": str, "mode": ROW_KEYS["mode"]}
    pool: dict[str, str | Values] = {}
    for name in values:
        if name in tuned:
            settings = {"mode": BASELINE, **typed(tuned[name], hints, f"models: {name}", problems)}
            if "dataset" not in settings:
                problems.append(f"models: {name} has training settings but no dataset; add one")
            elif settings["mode"] != BASELINE and method_of(settings["mode"]).is_adapter:
                problems.append(f"models: {name}: mode must be one of lora, full, not {settings['mode']!r}")
            if _is_name(name, "models", problems):
                pool[name] = settings
        elif name in named:
            pool[name] = named[name]
    problems += [
        f"models: {one} and {other} are the same model, which would count twice in a basis; leave one out, or train it with another seed or data set"
        for one, other in itertools.combinations(pool, 2)
        if pool[one] == pool[other]
    ]
    return pool


def _rows(blocks: object, scope: Scope, problems: list[str]) -> Iterator[Row]:
    if not isinstance(blocks, list) or not blocks:
        problems.append("grid must be a list of at least one block, each with a mode")
        return
    for number, block in enumerate(blocks, start=1):
        where = f"grid, block {number}"
        if not isinstance(block, dict):
            problems.append(f"{where} must hold `name: value` lines, not {block!r}")
            continue
        for axes, settings in _combinations(block, where, problems):
            if row := build_row(settings, axes, scope, where, problems):
                yield row


def _combinations(block: Mapping[str, Any], where: str, problems: list[str]) -> Iterator[tuple[set[str], Values]]:
    """Every combination of a block's lists with each of its explicit rows, and the names of the settings that vary."""
    lists = dict(block)
    explicit = lists.pop("rows", [{}])
    if not isinstance(explicit, list) or not explicit or not all(isinstance(row, dict) for row in explicit):
        problems.append(f"{where}: rows must be a list of at least one row, not {explicit!r}")
        return
    axes = {key for key, value in lists.items() if _is_axis(key, value)}
    if empty := sorted(key for key in axes if not lists[key]):
        problems.append(f"{where}: {', '.join(empty)} must not be an empty list; give at least one value, or leave it out")
        return
    choices: Sequence[list[Any]] = [lists[key] if key in axes else [lists[key]] for key in lists]
    if (count := len(explicit) * math.prod(map(len, choices))) > _MOST_ROWS:
        problems.append(f"{where}: its lists combine to {count:,} rows, more than the {_MOST_ROWS:,} that a grid can have")
        return
    for row in explicit:
        for values in itertools.product(*choices):
            yield axes | row.keys(), {**dict(zip(lists, values, strict=True)), **row}


def _is_axis(key: str, value: Any) -> bool:
    return isinstance(value, list) and (key not in _LIST_SETTINGS or not value or isinstance(value[0], list))


def _check_printed(table: str | None, rows: Sequence[Row]) -> list[str]:
    """Problems with the grid's `paper_table` and the `printed` names of its rows."""
    tables = paper_tables()
    if table is None:
        return (
            ["rows with a printed name need paper_table, the table of the paper that has them"]
            if any(r.printed for r in rows)
            else []
        )
    if table not in tables:
        return [f"paper_table must be one of {', '.join(tables)}, not {table!r}"]
    printed = tables[table]["rows"]
    return [unknown_key(row.printed, printed, f"table {table}") for row in rows if row.printed and row.printed not in printed]
