"""The rows of runs and evaluations outside a grid: which of them are compared, and what each is called.

It reads the settings in records; `collect` reads the numbers.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing, records
from cora_cli.errors import CoraError
from cora_cli.methods.registry import label_of
from cora_cli.progress import say
from cora_cli.reporting.plain_inputs import Plain, named_by_contents, read_plain
from cora_cli.reporting.report_rows import Row, clean
from cora_cli.rundir import EvaluationDirectory, RunDirectory, evaluations_in

_READ = {"start_models_sha256": "start_models", "peft": "peft_config"}
"""Inputs of single methods in a fingerprint, which are compared by their hashes, and the flags that name their files."""
_OF_NO_METHOD = frozenset({"eval_steps", "gradient_checkpointing"})
"""Settings of a training that change nothing of what it trains."""


def with_ranks(places: Sequence[Path]) -> list[Path]:
    """The places, each run followed by its evaluations at lower ranks. Says which of these answer other records than the run's own evaluation, or
    than the first of them, and leaves them out."""
    found: list[Path] = []
    for place in places:
        found.append(place)
        run = RunDirectory(place)
        if not (at_ranks := run.evaluations_at_ranks()):
            continue
        answered: dict[Path, str | None] = {}
        for evaluation in (EvaluationDirectory(one) for one in (run.evaluation, *at_ranks)):
            try:
                answered |= {evaluation.root: _answered(evaluation)} if evaluation.metrics.is_file() else {}
            except CoraError as error:
                if evaluation.root != run.evaluation:  # that one is missing in the row of the run, with the reason
                    say(f"{evaluation.root} is left out: {error}")
        for one, records_sha256 in answered.items():
            if records_sha256 != next(iter(answered.values())):
                say(f"{one} is left out: it answers other records than {next(iter(answered))}; name it alone to report it")
            elif one != run.evaluation:
                found.append(one)
    return found


def _answered(evaluation: EvaluationDirectory) -> str | None:
    settings = records.read_metrics(evaluation)["generation"].get("settings", {})
    return settings.get("records_sha256")


def labelled(rows: Sequence[Row]) -> list[Row]:
    """The rows in groups whose runs and evaluations are compared, with the base models that were evaluated with runs, under labels that differ where
    they do. Says which evaluations in runs are left out. Raises `CoraError` for copies of one run."""
    _say_left_out(rows)
    found = [read_plain(row) for row in _without_own_evaluations(rows)]
    _refuse_copies(found)
    with_bases = [(plain, _base_of(plain, found)) for plain in found]
    bases = [base for _, base in with_bases if base is not None]
    named = named_by_contents([*found, *bases])
    own, named_bases = named[: len(found)], iter(named[len(found) :])
    hosted = [(plain, next(named_bases)) for plain, (_, base) in zip(own, with_bases, strict=True) if base is not None]
    return _distinct(_grouped([*own, *_comparable_bases(hosted)]))


def _without_own_evaluations(rows: Sequence[Row]) -> list[Row]:
    """The rows without evaluations that stand in the row of their run already."""
    own = {row.evaluation.resolve() for row in rows if row.run is not None and row.evaluation is not None}
    return [row for row in rows if row.run is not None or row.evaluation is None or row.evaluation.resolve() not in own]


def _say_left_out(rows: Sequence[Row]) -> None:
    """Say which evaluations in the directories of runs are in no row, such as those of other records."""
    shown = {row.evaluation.resolve() for row in rows if row.evaluation is not None}
    for run in (RunDirectory(row.run) for row in rows if row.run is not None):
        told = {place.resolve() for place in (run.base_evaluation, *run.evaluations_at_ranks())}
        for one in evaluations_in(run):
            if one.root.resolve() not in shown | told:
                say(f"{one.root} is left out: a run is reported with its own evaluation alone; name it alone to report it")


def _base_of(plain: Plain, named: Sequence[Plain]) -> Plain | None:
    """The base model that was evaluated with a run, unless its evaluation was named itself. Says where the run's own evaluation, which it is
    compared with, or that of the base cannot be read."""
    if plain.row.run is None:
        return None
    base = EvaluationDirectory(RunDirectory(plain.row.run).base_evaluation)
    known = {other.row.evaluation.resolve() for other in named if other.row.evaluation is not None}
    if not base.metrics.is_file() or base.root.resolve() in known:
        return None
    if not plain.evaluation:
        say(
            f"{base.root} is left out: the evaluation of {plain.row.run}, which it belongs to, is missing or damaged; "
            f"`cora evaluate {plain.row.run} --with-base` completes both"
        )
        return None
    try:
        return read_plain(row_of_evaluation(base))
    except CoraError as error:
        say(f"{base.root} is left out: {error}; `cora evaluate {plain.row.run} --with-base --overwrite` makes it again")
        return None


def _comparable_bases(hosted: Sequence[tuple[Plain, Plain]]) -> list[Plain]:
    """One row for each base model that was evaluated with a run, on the same records and with the same settings as the run itself. Says which of them
    are left out, and why."""
    found: list[tuple[str, dict[str, str], Plain]] = []
    for plain, base in hosted:
        conditions = base.conditions
        differing = _differing(conditions, plain.conditions)
        differing += [] if base.row.model == plain.row.model else ["model"]
        if differing:
            say(
                f"{base.row.evaluation} is left out: it has another {' and another '.join(differing)} than {plain.row.evaluation}; "
                f"`cora evaluate {plain.row.run} --with-base --overwrite` evaluates both alike"
            )
            continue
        placed = dataclasses.replace(base, row=dataclasses.replace(base.row, group=plain.row.group))
        # One that was scored by further metrics is the same.
        same = hashing.sha256_json([plain.row.group, {**conditions, "metrics": None}])
        found.append((same, conditions["metrics"], placed))
    return [
        base
        for place, (one, metrics, base) in enumerate(found)
        if not any(
            one == other and (metrics.items() < more.items() or (metrics.items() == more.items() and at < place))
            for at, (other, more, _) in enumerate(found)
        )
    ]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In words, which conditions of two evaluations differ; a metric that only one of them has is none."""
    shared = one["metrics"].keys() & other["metrics"].keys()
    metrics = [f"signature of {name}" for name in shared if one["metrics"][name] != other["metrics"][name]]
    words = {"records_sha256": "set of records"}
    return [*(words.get(name, name) for name in one if name != "metrics" and one[name] != other[name]), *sorted(metrics)]


def row_of_run(run: RunDirectory) -> Row:
    """The row of a run, with its evaluation."""
    record = records.read_run(run)
    settings, plan = record["fingerprint"]["settings"], record["plan"]
    basis = record["basis"]
    # A Laplace approximation of a LoRA is no LoRA that others can be compared with.
    mode = f"laplace {record['mode']}" if "laplace" in record else record["mode"]
    candidates = (run.evaluation, run.root / "evaluation")
    evaluation = max(candidates, key=lambda path: (EvaluationDirectory(path).metrics.is_file(), path.is_dir()))
    only_at_ranks = not evaluation.is_dir() and bool(run.evaluations_at_ranks())
    return Row(
        name=clean(str(run.root)),
        printed=None,
        group=clean(f"{record['model']['reference']} on {record['data']['dataset']}"),
        mode=mode,
        label=label_of(mode, plan, run.record),
        rank=plan["rank"] if plan else None,
        n_models=_models_behind(basis, record["model"]) if basis else None,
        sources=tuple(clean(str(source["reference"])) for source in basis["sources"]) if basis else (),
        learning_rate=settings["learning_rate"],
        seed=record["seeds"]["seed"],
        model=clean(record["model"]["reference"]),
        dataset=clean(record["data"]["dataset"]),
        run=run.root,
        evaluation=None if only_at_ranks else evaluation,
        basis=Path(basis["path"]) if basis and Path(basis["path"]).is_file() else None,
    )


def _models_behind(basis: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    """How many different models a basis is made of, 0 where that is the base `model` alone, or a copy, which no fine-tuning informs."""
    if basis.get("of_base"):
        return 0
    named = [(each["reference"].partition("@")[0], each.get("revision")) for each in (model, *basis["sources"])]
    return len({each["hash"] for each in basis["sources"]}) if len({*named}) > 1 else 0


def row_of_evaluation(evaluation: EvaluationDirectory) -> Row:
    """The row of an evaluation without a run: of a model, of an adapter, or of another program's answers."""
    record = records.read_metrics(evaluation)
    settings = record["generation"].get("settings", {})
    name = clean(str(record["name"]))
    # What answers another program's model gave, nobody knows here.
    mode = "adapter" if settings.get("adapter_sha256") else "base" if settings.get("model") else "answers"
    return Row(
        name=clean(str(evaluation.root)),
        printed=None,
        group="",
        mode=mode,
        label="base" if mode == "base" else name,
        rank=None,
        n_models=None,
        sources=(),
        learning_rate=None,
        seed=0,
        model=clean(str(settings.get("model", name))),
        dataset="",
        run=None,
        evaluation=evaluation.root,
        basis=None,
    )


def _grouped(found: Sequence[Plain]) -> list[Plain]:
    """Give evaluations without a run a group. A model that no run and no adapter of the group was trained on is not the base there, and goes by
    its own name."""
    placed = [plain if plain.row.group else _with(plain, group=_group_of(plain, found)) for plain in found]
    named = []
    for plain in placed:
        row = plain.row
        others = [other.row for other in placed if other.row.group == row.group and other.row.mode != "answers"]
        trained = [other for other in others if other.mode != "base"]
        is_base = all(other.model == row.model for other in trained or others)
        named.append(plain if row.mode != "base" or is_base else _with(plain, mode="model", label=row.model))
    return named


def _with(plain: Plain, **changes: Any) -> Plain:
    return dataclasses.replace(plain, row=dataclasses.replace(plain.row, **changes))


def _group_of(plain: Plain, found: Sequence[Plain]) -> str:
    """The group of the runs, or where they have several, of those with the model and the records of the evaluation `plain`."""
    alike = [other for other in found if other.row.group]
    conditions: tuple[Callable[[Plain], bool], ...] = (
        lambda other: other.row.model == plain.row.model,
        lambda other: other.answered == plain.answered,
    )
    for holds in conditions:
        if len({other.row.group for other in alike}) > 1:
            alike = [other for other in alike if holds(other)]
    groups = {other.row.group for other in alike}
    return groups.pop() if len(groups) == 1 else "evaluations"


def _distinct(found: Sequence[Plain]) -> list[Row]:
    """The rows with labels that are different where runs are."""
    settings = {plain.row.name: _settings_of(plain.run) if plain.run else {} for plain in found}
    bases = {plain.row.name: plain.run["basis"] for plain in found if plain.run.get("basis")}
    # Copies of one basis file share one name, and files that were written to one path have names of their own.
    paths = {basis["sha256"]: basis["path"] for basis in bases.values()}
    written = Counter(paths.values())
    paths = {sha256: path if written[path] == 1 else f"{path} sha256 {sha256[:12]}" for sha256, path in paths.items()}
    labels: dict[tuple[str, str], list[Plain]] = {}
    for plain in found:
        labels.setdefault((plain.row.group, plain.row.label), []).append(plain)
    renamed = {}
    for alike in labels.values():
        # Settings with a column of their own in the tables are left out of the label.
        own = [settings[plain.row.name] for plain in alike]
        names = sorted({name for each in own for name in each} - {"rank", "alpha", "learning_rate", "seed"})
        differing = [name for name in names if len({str(each.get(name)) for each in own}) > 1]
        used: dict[int | None, set[str | None]] = {}
        alphas: dict[int | None, set[float]] = {}
        for plain in alike:
            used.setdefault(plain.row.n_models, set()).add(bases.get(plain.row.name, {}).get("sha256"))
            if plan := plain.run.get("plan"):
                alphas.setdefault(plain.row.rank, set()).add(plan["alpha"])
        without_run = sum(plain.row.run is None for plain in alike)
        for plain, each in zip(alike, own, strict=True):
            row = plain.row
            extra = [f"{name}={each.get(name)}" for name in differing]
            # By default it follows the rank, which has a column.
            if len(alphas.get(row.rank, ())) > 1:
                extra.append(f"alpha={plain.run['plan']['alpha']:g}")
            # The number of source models has a column, but two bases from equally many models are two methods.
            if len(used[row.n_models]) > 1 and row.name in bases:
                extra.append(f"basis={paths[bases[row.name]['sha256']]}")
            if row.run is None and without_run > 1:
                extra.append(row.name)
            renamed[row.name] = dataclasses.replace(row, label=clean(" ".join([row.label, *extra])))
    return [renamed[plain.row.name] for plain in found]


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run differs by from others of its method: the settings of its training, what it read from further files, the number of processes that
    multiplies its batch, and the settings that a user chose for `cora laplace`.
    """
    laplace = record.get("laplace") or {}
    chosen = {"prior_precision"} if laplace.get("chosen_by") == "the user" else set()
    own = {name: laplace.get(name) for name in ("directions", "records", *sorted(chosen))} if laplace else {}
    fingerprint = record["fingerprint"]
    read = {name: hashing.sha256_json(fingerprint[key])[:12] for key, name in _READ.items() if key in fingerprint}
    settings = {name: value for name, value in fingerprint["settings"].items() if name not in _OF_NO_METHOD}
    return {**settings, "processes": record["hardware"].get("processes", 1), **read, **own}


def _refuse_copies(found: Sequence[Plain]) -> None:
    """Raise `CoraError` for two runs with one seed and equal inputs: as two seeds they would feign certainty."""
    known: dict[str, str] = {}
    for plain in found:
        if plain.run:
            basis = (plain.run.get("basis") or {}).get("sha256")
            facts = [plain.run.get(key) for key in ("mode", "plan", "fingerprint", "seeds", "result_sha256")]
            same = hashing.sha256_json([*facts, basis])
            if (other := known.setdefault(same, plain.row.name)) != plain.row.name:
                raise CoraError(
                    f"{other} and {plain.row.name} are the same training, with the same seed and the same inputs, so they would count as two "
                    "seeds; report only one of them"
                )
