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
from cora_cli.experiments.rows import SPLIT_KEYS
from cora_cli.methods.registry import method_of
from cora_cli.progress import say
from cora_cli.reporting.report_rows import Row, clean
from cora_cli.rundir import EvaluationDirectory, RunDirectory

_READ = {"start_models_sha256": "start_models", "peft": "peft_config"}
"""Inputs of single methods in a fingerprint, which are compared by their hashes, and the flags that name their files."""
_INPUTS = {"model_sha256": "weights", "tokenizer_sha256": "tokenizer", "data_sha256": "data"}


def with_ranks(places: Sequence[Path]) -> list[Path]:
    """The places, each run followed by its evaluations at lower ranks. Says which of these answer other records than the run's own evaluation, or
    than the first of them, and leaves them out."""
    found: list[Path] = []
    for place in places:
        found.append(place)
        run = RunDirectory(place)
        if not (at_ranks := run.evaluations_at_ranks()):
            continue
        evaluations = [EvaluationDirectory(one) for one in (run.evaluation, *at_ranks)]
        answered = {one.root: _setting_of(one, "records_sha256") for one in evaluations if one.metrics.is_file()}
        for one, records_sha256 in answered.items():
            if records_sha256 != next(iter(answered.values())):
                say(f"{one} is left out: it answers other records than {next(iter(answered))}; name it alone to report it")
            elif one != run.evaluation:
                found.append(one)
    return found


def labelled(rows: Sequence[Row]) -> list[Row]:
    """The rows in groups whose runs and evaluations are compared, with the base models that were evaluated with runs, under labels that differ where
    they do. Raises `CoraError` for copies of one run."""
    rows = _by_inputs(_without_own_evaluations(rows))
    return _distinct([*rows, *_bases_of(rows)])


def _without_own_evaluations(rows: Sequence[Row]) -> list[Row]:
    """The rows without evaluations that stand in the row of their run already."""
    own = {row.evaluation.resolve() for row in rows if row.run is not None and row.evaluation is not None}
    return [row for row in rows if row.run is not None or row.evaluation is None or row.evaluation.resolve() not in own]


def _bases_of(rows: Sequence[Row]) -> list[Row]:
    """One row for each base model that was evaluated with a run, on the same records and with the same settings as the run itself. Says which of them
    are left out, and why."""
    found: list[tuple[str, set[tuple[str, str]], Row]] = []
    known = {row.evaluation.resolve() for row in rows if row.evaluation is not None}
    for row in rows:
        if row.run is None or row.evaluation is None:
            continue
        run = RunDirectory(row.run)
        own, base = EvaluationDirectory(row.evaluation), EvaluationDirectory(run.base_evaluation)
        if not (own.metrics.is_file() and base.metrics.is_file()) or base.root.resolve() in known:
            continue
        of_base, conditions = row_of_evaluation(base), _conditions(base)
        weights = {of_base.name: _weights_of(of_base, {}), row.name: _weights_of(row, records.read_run(run))}
        differing = _differing(conditions, _conditions(own))
        differing += [] if _have_one_model(of_base, row, weights) else ["model"]
        if differing:
            say(
                f"{base.root} is left out: it has another {' and another '.join(differing)} than {own.root}; "
                f"`cora evaluate {run.root} --with-base --overwrite` evaluates both alike"
            )
            continue
        # Copies of one model are one base, and so is one that was scored by further metrics.
        model = weights[of_base.name] or of_base.model
        same = hashing.sha256_json([row.group, model, {**conditions, "metrics": None}])
        found.append((same, {*conditions["metrics"].items()}, dataclasses.replace(of_base, group=row.group)))
    return [
        row
        for place, (one, metrics, row) in enumerate(found)
        if not any(
            one == other and (metrics < more or (metrics == more and at < place)) for at, (other, more, _) in enumerate(found)
        )
    ]


def _conditions(evaluation: EvaluationDirectory) -> dict[str, Any]:
    """What must be equal for the evaluations of two models to be compared: the records, the decoding and the metrics."""
    record = records.read_metrics(evaluation)
    settings = record["generation"].get("settings", {})
    names = ("records_sha256", "template", "max_new_tokens", "decoding", "dtype")
    signatures = {name: metric["signature"] for name, metric in record["metrics"].items()}
    return {**{name: settings.get(name) for name in names}, "metrics": signatures}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In words, which conditions of two evaluations differ; a metric that only one of them has is none."""
    shared = one["metrics"].keys() & other["metrics"].keys()
    metrics = [f"signature of {name}" for name in shared if one["metrics"][name] != other["metrics"][name]]
    words = {"records_sha256": "set of records"}
    return [*(words.get(name, name) for name in one if name != "metrics" and one[name] != other[name]), *sorted(metrics)]


def _setting_of(evaluation: EvaluationDirectory, name: str) -> str | None:
    """A setting by which the answers were generated, None where it is not recorded, as of another program's answers."""
    settings = records.read_metrics(evaluation)["generation"].get("settings", {})
    return settings.get(name)


def row_of_run(run: RunDirectory) -> Row:
    """The row of a run, with its evaluation."""
    record = records.read_run(run)
    settings, plan = record["fingerprint"]["settings"], record["plan"]
    unusual = plan["b_init"] if plan and plan["b_init"] != method_of(plan["mode"], run.record).b_init else ""
    # Of the mode mean-delta itself, the start is the mode.
    start = plan.get("start") if plan and plan.get("start") != plan["mode"] else None
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
        label=" ".join(filter(None, (mode, unusual, start))),
        rank=plan["rank"] if plan else None,
        n_models=len(basis["sources"]) if basis else None,
        sources=tuple(clean(str(source["reference"])) for source in basis["sources"]) if basis else (),
        learning_rate=settings["learning_rate"],
        seed=record["seeds"]["seed"],
        model=clean(record["model"]["reference"]),
        dataset=clean(record["data"]["dataset"]),
        run=run.root,
        evaluation=None if only_at_ranks else evaluation,
        basis=Path(basis["path"]) if basis and Path(basis["path"]).is_file() else None,
    )


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


def _grouped(rows: Sequence[Row], runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Give evaluations without a run a group. A model that no run and no adapter of the group was trained on is not the base there, and goes by
    its own name."""
    weights = {row.name: _weights_of(row, runs[row.name]) for row in rows}
    placed = [row if row.group else dataclasses.replace(row, group=_group_of(row, rows, weights)) for row in rows]
    named = []
    for row in placed:
        others = [other for other in placed if other.group == row.group and other.mode != "answers"]
        trained = [other for other in others if other.mode != "base"]
        if row.mode == "base" and not all(_have_one_model(row, other, weights) for other in trained or others):
            # The weights at one place can change between a training and an evaluation.
            changed = any(other.model == row.model for other in others if other is not row)
            name = f"{row.model}, weights sha256 {(weights[row.name] or '')[:12]}" if changed else row.model
            named.append(dataclasses.replace(row, mode="model", label=name, model=name))
        else:
            named.append(row)
    return _under_one_name(named, weights)


def _under_one_name(rows: Sequence[Row], weights: Mapping[str, str | None]) -> list[Row]:
    """The rows, those of copies of a model or of a data set under the name of the first one in their group: what has two names is not compared."""
    renamed = []
    for row in rows:
        alike = [other for other in rows if other.group == row.group and _have_one_model(other, row, weights)]
        dataset = next(other.dataset for other in alike if (other.run is None) == (row.run is None))
        renamed.append(dataclasses.replace(row, model=alike[0].model, dataset=dataset))
    return renamed


def _group_of(row: Row, rows: Sequence[Row], weights: Mapping[str, str | None]) -> str:
    """The group of the runs, or where they have several, of those with the model, the weights and the records of the evaluation `row`."""
    conditions: tuple[Callable[[Row], bool], ...] = (
        lambda other: other.model == row.model or _have_one_model(other, row, weights),
        lambda other: _have_one_model(other, row, weights),
        lambda other: _evaluated(other, "records_sha256") == _evaluated(row, "records_sha256"),
    )
    alike = [other for other in rows if other.group]
    for holds in conditions:
        if len({other.group for other in alike}) > 1:
            alike = [other for other in alike if holds(other)]
    groups = {other.group for other in alike}
    return groups.pop() if len(groups) == 1 else "evaluations"


def _have_one_model(one: Row, other: Row, weights: Mapping[str, str | None]) -> bool:
    """Whether two rows have one model below their adapters: one hash, or as far as one of them did not record it, one name."""
    hash_of_one, hash_of_other = weights[one.name], weights[other.name]
    return one.model == other.model if None in (hash_of_one, hash_of_other) else hash_of_one == hash_of_other


def _weights_of(row: Row, record: Mapping[str, Any]) -> str | None:
    """The hash of the model below a row's adapter, if it was recorded: by its run, or without one by its evaluation."""
    return record["fingerprint"].get("model_sha256") if record else _evaluated(row, "model_sha256")


def _evaluated(row: Row, setting: str) -> str | None:
    """A setting of a row's evaluation, None without one."""
    evaluation = EvaluationDirectory(row.evaluation) if row.evaluation is not None else None
    return _setting_of(evaluation, setting) if evaluation is not None and evaluation.metrics.is_file() else None


def _distinct(rows: list[Row]) -> list[Row]:
    """Give evaluations without a run the group of the runs with the same model, and make the labels of different runs different."""
    runs = _records_of(rows)
    rows = _grouped(rows, runs)
    settings = {name: _settings_of(record) if record else {} for name, record in runs.items()}
    _refuse_copies(runs)
    bases = {name: record["basis"]["sha256"] for name, record in runs.items() if record.get("basis")}
    # Copies of one basis file share one name, and files that were written to one path have names of their own.
    paths = {record["basis"]["sha256"]: record["basis"]["path"] for record in runs.values() if record.get("basis")}
    written = Counter(paths.values())
    paths = {sha256: path if written[path] == 1 else f"{path} sha256 {sha256[:12]}" for sha256, path in paths.items()}
    labels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        labels.setdefault((row.group, row.label), []).append(row)
    renamed = {}
    for alike in labels.values():
        # Settings with a column of their own in the tables are left out of the label.
        names = sorted({name for row in alike for name in settings[row.name]} - {"rank", "alpha", "learning_rate", "seed"})
        differing = [name for name in names if len({str(settings[row.name].get(name)) for row in alike}) > 1]
        used: dict[int | None, set[str | None]] = {}
        alphas: dict[int | None, set[float]] = {}
        for row in alike:
            used.setdefault(row.n_models, set()).add(bases.get(row.name))
            if plan := runs[row.name].get("plan"):
                alphas.setdefault(row.rank, set()).add(plan["alpha"])
        without_run = sum(row.run is None for row in alike)
        for row in alike:
            extra = [f"{name}={settings[row.name].get(name)}" for name in differing]
            # By default it follows the rank, which has a column.
            if len(alphas.get(row.rank, ())) > 1:
                extra.append(f"alpha={runs[row.name]['plan']['alpha']:g}")
            # The number of source models has a column, but two bases from equally many models are two methods.
            if len(used[row.n_models]) > 1 and row.name in bases:
                extra.append(f"basis={paths[bases[row.name]]}")
            if row.run is None and without_run > 1:
                extra.append(row.name)
            renamed[row.name] = dataclasses.replace(row, label=clean(" ".join([row.label, *extra])))
    return [renamed[row.name] for row in rows]


def _records_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """`run.json` of each row by its name, empty without a run."""
    return {row.name: records.read_run(RunDirectory(row.run)) if row.run is not None else {} for row in rows}


def _by_inputs(rows: Sequence[Row]) -> list[Row]:
    """One group for runs of one model and one data set, by their contents, under the name of the first: copies have other names, and what has one name
    may have changed from run to run."""
    found: dict[tuple[str, ...], set[str]] = {}
    runs = _records_of(rows)
    rows = _without_copies(rows, runs)
    inputs = {row.name: _digests(row, runs[row.name]) for row in rows}
    for digests in inputs.values():
        for place, digest in digests.items():
            found.setdefault(place, set()).add(digest)
    changed = {place for place, digests in found.items() if len(digests) > 1}
    divided = []
    for row in rows:
        own = {place[1]: digest for place, digest in inputs[row.name].items() if place in changed}
        said = ", ".join(f"{_INPUTS[kind]} sha256 {digest[:12]}" for kind, digest in own.items())
        divided.append(dataclasses.replace(row, group=f"{row.group}, {said}") if said else row)
    return divided


def _without_copies(rows: Sequence[Row], runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The rows, those of copies of a model or a data set in the group of the first one."""
    first: dict[tuple[str, ...], str] = {}
    renamed = []
    for row in rows:
        digests = tuple(_digests(dataclasses.replace(row, group=""), runs[row.name]).items())
        contents = tuple(text for place, digest in digests for text in (*place, digest))
        is_complete = len(digests) == len(_INPUTS)
        renamed.append(dataclasses.replace(row, group=first.setdefault(contents, row.group)) if is_complete else row)
    return renamed


def _digests(row: Row, record: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """The hash of each input of a row's run, by the group, the kind of input and what else decides about it; earlier versions did not hash tokenizers."""
    if not record:
        return {}
    fingerprint = record["fingerprint"]
    split = hashing.sha256_json([fingerprint["settings"].get(name) for name in SPLIT_KEYS])
    others = {"data_sha256": (split,)}
    return {
        (row.group, kind, *others.get(kind, ())): fingerprint[kind] for kind in _INPUTS if fingerprint.get(kind) is not None
    }


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run differs by from others of its method: the settings of its training, what it read from further files, the number of processes that
    multiplies its batch, and the settings that a user chose for `cora laplace`.
    """
    laplace = record.get("laplace") or {}
    chosen = {"prior_precision"} if laplace.get("chosen_by") == "the user" else set()
    own = {name: laplace.get(name) for name in ("directions", "records", *sorted(chosen))} if laplace else {}
    fingerprint = record["fingerprint"]
    read = {name: hashing.sha256_json(fingerprint[key])[:12] for key, name in _READ.items() if key in fingerprint}
    return {**fingerprint["settings"], "processes": record["hardware"].get("processes", 1), **read, **own}


def _refuse_copies(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `CoraError` for two runs, by name, with one seed and equal inputs: as two seeds they would feign certainty."""
    known: dict[str, str] = {}
    for name, record in runs.items():
        if record:
            basis = (record.get("basis") or {}).get("sha256")
            facts = [record.get(key) for key in ("mode", "plan", "fingerprint", "seeds", "result_sha256")]
            same = hashing.sha256_json([*facts, basis])
            if (other := known.setdefault(same, name)) != name:
                raise CoraError(
                    f"{other} and {name} are the same training, with the same seed and the same inputs, so they would count as two seeds; "
                    "report only one of them"
                )
