"""One row of a grid: checks its settings, chooses its source models, and gives it a stable, readable name.

A row is one method with one seed. `steps` plans the commands that it needs.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cora_cli.basis.choices import DEFAULT_RANK, BasisChoices
from cora_cli.errors import UsageError
from cora_cli.experiments.values import Values, fields_of, typed
from cora_cli.methods.method import Method
from cora_cli.methods.registry import METHODS, OPTIONAL_SETTINGS, Mode, method_of, taken_settings
from cora_cli.training.config import TrainConfig
from cora_cli.training.laplace_config import LaplaceConfig
from cora_cli.training.proposal import AUTO

if TYPE_CHECKING:
    RowMode = str
else:
    RowMode = Literal["base", "basis", Mode]
TRAIN_KEYS = fields_of(
    TrainConfig,
    leave_out=(
        *("model", "dataset", "output_dir", "mode", "basis", "start_models"),  # set for each step
        *("resume", "stop_at", "dry_run", "rate_from", "processes", "probe", "probe_examples"),
        *("device", "dtype", "trust_remote_code"),  # flags of `ablate` itself
    ),
)
Stage = Literal["proposal", "sweep", "confirm"]
BASIS_KEYS = fields_of(BasisChoices, leave_out=("rank", "target_modules"))
_SOURCE_KEYS: dict[str, Any] = {"n_models": int, "sources": tuple[str, ...], "source_seed": int, "basis_rank": int}
_SHOWN_KEYS: dict[str, Any] = {"mode": RowMode, "label": str, "printed": str}
_AVERAGE_KEYS: dict[str, Any] = {"ensemble": int, "laplace": dict[str, Any]}
"""What turns the runs of a row into a model whose predictions are averaged."""
LAPLACE_KEYS = fields_of(LaplaceConfig, leave_out=("run", "output_dir", "device", "trust_remote_code"))
SEEDS_APART = 1000
"""The distance between the seeds of an ensemble's members, whose first one has the seed of its row."""
# The split is set once per file, so that all rows are compared on the same held-out records.
SPLIT_KEYS = ("test_size", "split_seed", "validation_size", "columns", "subset", "split", "test_dataset")
_OWN_TRAIN_KEYS = {name: hint for name, hint in TRAIN_KEYS.items() if name not in SPLIT_KEYS}
ROW_KEYS: dict[str, Any] = {**_SHOWN_KEYS, "dataset": str, **_OWN_TRAIN_KEYS, **_SOURCE_KEYS, **BASIS_KEYS, **_AVERAGE_KEYS}
_ADAPTER_KEYS = frozenset({"rank", "b_init", "start", "target_modules", "dropout", "compact", *OPTIONAL_SETTINGS})
_ALWAYS_NAMED = frozenset(
    {*_SHOWN_KEYS, "dataset", "rank", "basis_rank", "n_models", "learning_rate", "seed", "b_init", "start"}
)


@dataclasses.dataclass(frozen=True)
class Scope:
    """What the file gives every row: names of models and data sets, training and basis defaults, the source-model seed."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    train: Values
    basis: Values
    basis_rank: int | None
    source_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. A field is None if it does not apply to the row's mode.

    `sources` names models of the pool; it is empty for the control with `n_models` 0, whose basis comes from the base model.
    `train` has settings of `TrainConfig`, and `basis` has settings of `BasisChoices` without the rank. `basis_rank` is the rank
    that the row needs. `ensemble` is the number of runs whose predictions are averaged, `laplace` the settings of `cora laplace` for the row's run;
    `run` is the name of the run that is trained, which a plain row of the same training shares. `stage` is the part of a grid with `sweep` and `confirm` to which the row belongs; a row of the stage `proposal` trains nothing.
    `stop_at` is the optimizer step at which its training stops, None for the end of the schedule. `learning_rate` is None also while it is to be
    proposed.
    """

    name: str
    label: str
    mode: RowMode
    printed: str | None = None
    dataset: str | None = None
    rank: int | None = None
    n_models: int | None = None
    source_seed: int = 0
    sources: tuple[str, ...] = ()
    learning_rate: float | None = None
    seed: int = 0
    train: Values | None = None
    basis: Values | None = None
    basis_rank: int | None = None
    stage: Stage | None = None
    stop_at: int | None = None
    run: str = ""
    ensemble: int | None = None
    laplace: Values | None = None

    @property
    def method(self) -> tuple[object, ...]:
        """What identifies the row apart from its learning rate and its seed."""
        return (self.dataset, self.label, self.printed, self.shown_mode, self.rank, self.n_models)

    @property
    def is_auto(self) -> bool:
        """Whether the row's learning rates are those around one that is proposed (`training.proposal`)."""
        return self.train is not None and self.train.get("learning_rate") == AUTO

    @property
    def shown_mode(self) -> str:
        """The mode, with what averages the predictions of its runs."""
        return " ".join(filter(None, (_average(self.ensemble, self.laplace), self.mode)))

    def members(self) -> list["Row"]:
        """The plain rows that train: the row itself, or the members of an ensemble. A run of a sweep is never averaged."""
        plain = dataclasses.replace(self, name=self.run, ensemble=None, laplace=None)
        count = self.ensemble if self.ensemble and self.stage != "sweep" else 1
        return [plain.with_seed(self.seed + SEEDS_APART * number) for number in range(count)]

    def with_seed(self, seed: int) -> "Row":
        """The row with another seed."""
        old, new = f"_seed{self.seed}", f"_seed{seed}"
        names: Values = {"name": self.name.removesuffix(old) + new, "run": self.run.removesuffix(old) + new}
        return dataclasses.replace(self, **names, seed=seed, train={**(self.train or {}), "seed": seed})

    def proposing(self, seed: int) -> "Row":
        """The row that only measures what its learning rate is proposed from."""
        return dataclasses.replace(self, stage="proposal", ensemble=None, laplace=None).with_seed(seed)

    def at(self, learning_rate: float, seed: int, stage: Stage | None, stop_at: int | None = None) -> "Row":
        """The row of the same method with another learning rate and seed."""
        assert self.train is not None
        train = {**self.train, "learning_rate": learning_rate}
        if stage == "confirm":
            train["validation_loss"] = False  # which would choose the learning rate that is known by now
        names: Values = {"name": self._at_rate(self.name, learning_rate), "run": self._at_rate(self.run, learning_rate)}
        changed: Values = {"learning_rate": learning_rate, "stage": stage, "stop_at": stop_at}
        return dataclasses.replace(self, **names, train=train, **changed).with_seed(seed)

    def _at_rate(self, name: str, learning_rate: float) -> str:
        """A name of the row, or of its run, with another learning rate."""
        ours = f"_lr{AUTO if self.learning_rate is None else short(self.learning_rate)}"
        # The data set's name stands before the rate and may look like one.
        before = name.find(f"_{self.dataset}_") + 1
        place = name.find(ours, before + len(self.dataset or "") if before else 0)
        place = place if place >= 0 else name.index(ours)
        return name[:place] + f"_lr{short(learning_rate)}" + name[place + len(ours) :]

    @functools.cached_property
    def training(self) -> TrainConfig:
        """The training settings of a row that trains, with placeholders for paths and references."""
        train = self.train or {}
        return TrainConfig(
            **_placeholders(self.basis is not None, starts_from_models(self.mode, train)), mode=self.mode, **train
        )

    def differences(self, other: "Row") -> list[str]:
        """The settings in which two rows that train differ, other than learning rate and seed."""
        one, another = self._settings(), other._settings()
        return sorted(key for key in one.keys() | another.keys() if one.get(key) != another.get(key))

    @property
    def settings_text(self) -> str:
        """All settings of a row that trains but its learning rate and seed: equal for equal ones."""
        return json.dumps(self._settings(), sort_keys=True, default=str)

    def _settings(self) -> Values:
        plan = self.training.adapter_plan()
        alpha = {} if plan is None else {"alpha": plan.alpha}  # by default it follows the rank
        own = {key: getattr(self, key) for key in ("sources", "basis_rank", "ensemble", "laplace")}
        settings = {**self.training.result_settings(), **alpha, **(self.basis or {}), **own}
        return {key: value for key, value in settings.items() if key not in ("learning_rate", "seed")}

    def as_dict(self) -> Values:
        """The row as plain values for YAML."""
        values = dataclasses.asdict(self)
        values["sources"] = list(self.sources)
        for part in (values["train"], values["basis"]):
            if part:
                part.update({key: list(value) for key, value in part.items() if isinstance(value, tuple)})
        return values


def starts_from_models(mode: str, train: Values) -> bool:
    """Whether a row of `mode` with these settings of training starts from the source models themselves, and not from a basis of them."""
    return bool(train.get("start")) or (mode in METHODS and METHODS[mode].start_from in ("models", "adapters"))


def _placeholders(with_basis: bool, with_models: bool) -> Values:
    """Paths and references of a training, of which only the presence matters."""
    models = ("s",) if with_models else None
    return {"model": "m", "dataset": "d", "output_dir": "o", "basis": "b" if with_basis else None, "start_models": models}


def build_row(settings: Values, varied: Collection[str], scope: Scope, where: str, problems: list[str]) -> Row | None:
    """Create the row that `settings` describe. If they are invalid, returns None and adds sentences to `problems`.

    `varied` names the settings that vary within the row's block and are therefore part of its name.
    """
    found = len(problems)
    values = typed(settings, ROW_KEYS, where, problems)
    mode: Any = values.get("mode")
    if mode is None and "mode" not in settings:
        problems.append(f"{where}: mode is missing; it must be one of {', '.join(get_args(RowMode))}")
    if len(problems) > found:
        return None
    if "laplace" in values:
        values["laplace"] = typed(values["laplace"], LAPLACE_KEYS, f"{where}: laplace", problems)
    needs_basis = mode == "basis" or (mode in METHODS and _needs_basis(METHODS[mode], values))
    from_models = starts_from_models(mode, {**scope.train, **values})
    useless = values.keys() - _useful_keys(mode, needs_basis, from_models)
    if useless:
        problems.append(f"{where}: {', '.join(sorted(useless))} has no effect in {_described(mode, values)}; leave it out")
        return None
    row = _assemble(mode, needs_basis, values, scope, where, problems)
    if len(problems) > found:
        return None
    if row.train is not None:  # rows that differ in such a setting alone would be one run under several names
        for why, names in row.training.unused().items():
            problems += [f"{where}: {name} has no effect {why}; leave it out" for name in names if name in values]
    if len(problems) > found:
        return None
    told_apart = _told_apart(values, varied, {"method"} if mode == "basis" else set())
    label = " ".join([values.get("label") or _label(row), *(f"{key}={text}" for key, text in told_apart)])
    plain = dataclasses.replace(row, ensemble=None, laplace=None)
    run = _name(plain, values, {*varied} - {*_AVERAGE_KEYS}, scope)
    return dataclasses.replace(row, name=_name(row, values, varied, scope), run=run, label=label)


def _needs_basis(method: Method, values: Values) -> bool:
    """Whether a row trains on a basis; if its mode does not require one, only if the row sets a basis or its sources."""
    return method.needs_basis(values.get("b_init")) or (
        method.uses_basis_if_given and not values.keys().isdisjoint(_SOURCE_KEYS | BASIS_KEYS)
    )


def _useful_keys(mode: str, needs_basis: bool, from_models: bool) -> set[str]:
    shown = {*_SHOWN_KEYS}
    if mode == "base":
        return {*shown, "dataset"}
    about_basis = {*_SOURCE_KEYS, *BASIS_KEYS} if needs_basis else {*_SOURCE_KEYS} - {"basis_rank"} if from_models else set()
    if mode == "basis":
        return {*shown, *about_basis, "target_modules"}
    return {*shown, "dataset", *_OWN_TRAIN_KEYS, *_AVERAGE_KEYS, *about_basis} - _foreign_keys(mode)


def _foreign_keys(mode: str) -> frozenset[str]:
    """The settings of training that mean nothing to a mode."""
    method = method_of(mode)
    if not method.is_adapter:
        return _ADAPTER_KEYS
    return OPTIONAL_SETTINGS - taken_settings(method) | (frozenset() if method.b_init_is_free else {"b_init"})


def _described(mode: str, values: Values) -> str:
    start = values.get("b_init")
    return f"mode {mode}" + (f" with b_init {start}" if start and mode in METHODS and METHODS[mode].b_init_is_free else "")


def _assemble(mode: Any, needs_basis: bool, values: Values, scope: Scope, where: str, problems: list[str]) -> Row:
    """The row without its name and label."""
    dataset = None if mode == "basis" else _dataset(values.get("dataset"), scope, where, problems)
    from_models = starts_from_models(mode, {**scope.train, **values})
    sources = _sources(values, scope, where, problems) if needs_basis or from_models else ()
    if from_models and not sources:
        problems.append(f"{where}: a start from models needs at least one of them")
    train = None
    if mode not in ("base", "basis"):
        inherited = {key: value for key, value in scope.train.items() if key not in _foreign_keys(mode)}
        train = {**inherited, **{key: values[key] for key in values.keys() & TRAIN_KEYS.keys()}}
        train = {key: value for key, value in train.items() if key != "b_init" or value != "basis"}
        try:
            config = TrainConfig(**_placeholders(needs_basis, from_models), mode=mode, **train)
        except UsageError as error:
            problems.append(f"{where}: {error}")
            train = None
    if train is not None:
        problems += [f"{where}: {problem}" for problem in _average_problems(config, values)]
    adapter = config.adapter_plan() if train is not None else None
    rank = None if adapter is None else config.rank
    basis = {**scope.basis, **{key: values[key] for key in values.keys() & BASIS_KEYS.keys()}} if needs_basis else None
    if basis is not None and adapter is not None and adapter.basis_side == "input":
        basis["side"] = "input"
    fixed = values.get("basis_rank", scope.basis_rank)
    needed = method_of(mode).b_width(adapter) if adapter is not None else None
    if needs_basis and fixed is not None and (fixed < 1 or (needed or 1) > fixed):
        problems.append(
            f"{where}: rank {needed or fixed} needs a basis of at least that rank, but the grid sets the basis rank to {fixed}"
        )
    if basis is not None and not sources and basis.get("source") == "delta":
        problems.append(
            f"{where}: n_models 0 and source delta exclude each other, because the base would be subtracted from itself"
        )
    if basis is not None:
        targets = values.get("target_modules") or scope.train.get("target_modules")
        basis |= {"target_modules": targets} if targets else {}
        try:
            BasisChoices(**basis)
        except UsageError as error:
            problems.append(f"{where}: {error}")
    return Row(
        name="",
        label="",
        mode=mode,
        printed=_filled(values.get("printed"), values, where, problems),
        dataset=dataset,
        rank=rank,
        n_models=len(sources) if needs_basis or from_models else None,
        source_seed=values.get("source_seed", scope.source_seed),
        sources=sources,
        learning_rate=config.learning_rate if train is not None and config.learning_rate != AUTO else None,
        seed=config.seed if train is not None else 0,
        train=train,
        basis=basis,
        basis_rank=(fixed or needed or DEFAULT_RANK) if needs_basis else None,
        ensemble=values.get("ensemble"),
        laplace=values.get("laplace"),
    )


def _average_problems(config: TrainConfig, values: Values) -> list[str]:
    """What keeps the runs of a row from being averaged, as sentences."""
    found = []
    if {*_AVERAGE_KEYS} <= values.keys():
        found.append("set either ensemble or laplace, not both")
    if values.get("ensemble", 2) < 2:
        found.append(f"ensemble must be at least 2 members, not {values['ensemble']}")
    if "laplace" in values:
        if config.start is not None:
            found.append(f"laplace needs a run that starts at the base model, not one with start {config.start}")
        if not method_of(config.mode).takes_laplace or config.load_in_4bit:
            fitting = ", ".join(method.name for method in METHODS.values() if method.takes_laplace)
            what = f"mode {config.mode}{' on a base in 4 bits' if config.load_in_4bit else ''}"
            found.append(
                f"laplace needs a mode that trains A and B of each layer as they are, on a base that is not in 4 bits ({fitting}), not {what}"
            )
        try:
            LaplaceConfig("r", "o", **values["laplace"])
        except UsageError as error:
            found.append(f"laplace: {error}")
    return found


def _average(ensemble: int | None, laplace: Values | None) -> str:
    """How the runs of a row are averaged, in a word."""
    return "ensemble" if ensemble else "laplace" if laplace is not None else ""


def _dataset(name: str | None, scope: Scope, where: str, problems: list[str]) -> str:
    if name is None and len(scope.datasets) == 1:
        return scope.datasets[0]
    if scope.datasets and name not in scope.datasets:  # a grid without any is a problem of its own
        problems.append(f"{where}: dataset must be one of {', '.join(scope.datasets)}, not {name!r}")
    return name or ""


def _sources(values: Values, scope: Scope, where: str, problems: list[str]) -> tuple[str, ...]:
    """The source models: those in `sources`, or `n_models` chosen at random from the pool as in the paper, or the pool."""
    if "sources" in values:
        sources: tuple[str, ...] = values["sources"]
        if "n_models" in values:
            problems.append(f"{where}: set either sources or n_models, not both")
        if missing := [name for name in sources if name not in scope.models]:
            known = ", ".join(scope.models) or "none"
            problems.append(f"{where}: sources must be names from models ({known}), not {missing[0]!r}")
        if len(set(sources)) < len(sources):
            problems.append(f"{where}: sources must not name a model twice")
        return sources
    count = values.get("n_models", len(scope.models))
    if not 0 <= count <= len(scope.models):
        problems.append(f"{where}: n_models must be 0 to {len(scope.models)}, the number of models in the file, not {count}")
        return ()
    if "n_models" not in values and not count:
        problems.append(
            f"{where}: a basis needs models, but the file lists none; add models, or set n_models: 0 to use only the base model"
        )
    chosen = random.Random(f"{values.get('source_seed', scope.source_seed)}/{count}").sample(sorted(scope.models), count)
    return tuple(name for name in scope.models if name in chosen)


def _filled(printed: str | None, values: Values, where: str, problems: list[str]) -> str | None:
    """Fill the `{placeholders}` of the printed name with values of the row."""
    try:
        return printed.format_map(values) if printed else None
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        problems.append(f"{where}: printed {printed!r} uses {error}, which this row does not set")
        return None


def _label(row: Row) -> str:
    if row.mode == "basis":
        assert row.basis is not None
        return str(row.basis.get("method", "svd"))
    starts = [(row.train or {}).get(key) for key in ("b_init", "start")]
    return " ".join([row.shown_mode, *filter(None, starts), *(["n=0"] if row.n_models == 0 else [])])


def _told_apart(values: Values, varied: Collection[str], shown: Collection[str]) -> list[tuple[str, str]]:
    """Settings that vary within the block and have no fixed place in the row's name, with their values as text."""
    found = []
    for key in sorted({*varied} & values.keys() - _ALWAYS_NAMED - {*shown}):
        value = values[key]
        if key == "peft_config":
            value = Path(value).name  # a path would lead out of the row's place
        found.append((key, _text(value)))
    return found


def _text(value: Any) -> str:
    """A setting's value as it stands in a name."""
    if isinstance(value, dict):
        return "+".join(f"{name}-{_text(one)}" for name, one in sorted(value.items())) or "default"
    return "+".join(value) if isinstance(value, tuple) else short(value) if isinstance(value, float) else str(value).lower()


def _name(row: Row, values: Values, varied: Collection[str], scope: Scope) -> str:
    starts = [(row.train or {}).get(key) for key in ("b_init", "start")]
    if row.mode == "basis":
        assert row.basis is not None
        parts = [f"basis-{row.basis.get('method', 'svd')}", row.basis.get("share", "module"), f"r{row.basis_rank}"]
    else:
        stem = METHODS[row.mode].file_stem if row.mode in METHODS else row.mode
        parts = ["-".join(filter(None, [_average(row.ensemble, row.laplace), stem, *starts]))]
        parts += [str(row.dataset)] if len(scope.datasets) > 1 else []
        parts += [f"r{row.rank}"] if row.rank is not None else []
    parts += [f"n{row.n_models}"] if row.n_models is not None else []
    parts += [f"lr{short(row.learning_rate)}"] if row.learning_rate is not None else [f"lr{AUTO}"] if row.is_auto else []
    shown = {"method", "share"} if row.mode == "basis" else set()
    parts += [f"{key.replace('_', '-')}-{text}" for key, text in _told_apart(values, varied, shown)]
    parts += [f"seed{row.seed}"] if row.train is not None else []
    return "_".join(parts)


def short(value: float) -> str:
    """Format a number for a name: `1e-4`, `1.5e-3`, `0.25`, `3`."""
    if value and abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:g}"
