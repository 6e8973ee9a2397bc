"""Plans the steps that the rows of a grid need: commands, dependencies, and the keys by which equal steps are shared.

A step is one `cora` command. `ledger` decides whether it is done, and `execute` runs it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cora_cli import hashing
from cora_cli.basis.choices import BasisChoices
from cora_cli.data.templates import resolve_auto
from cora_cli.errors import UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.rubrics import load_rubric
from cora_cli.experiments.dates import date_of_grid, date_of_run
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs, data_key, used_sources
from cora_cli.experiments.rows import Row, starts_from_models
from cora_cli.experiments.values import Values
from cora_cli.methods.registry import METHODS, method_of
from cora_cli.rundir import RunDirectory
from cora_cli.settings import DtypeName, TemplateName
from cora_cli.training.config import TrainConfig
from cora_cli.training.laplace_config import LaplaceConfig

Kind = Literal["model", "basis", "proposal", "train", "laplace", "evaluate", "judge"]
COMMANDS: dict[Kind, str] = {
    "model": "train",
    "basis": "extract-basis",
    "proposal": "train",
    "train": "train",
    "laplace": "laplace",
    "evaluate": "evaluate",
    "judge": "judge",
}
PLAN_FORMAT = 1
FOLDERS = ("runs", "models", "bases", "proposals", "evaluations", "judgings", "records", "steps", "logs", "slurm")
"""The folders in the output directory of a grid."""
BASES = "bases_of_adapters"
"""The name of `Plan.bases` in the records."""
SCORING = frozenset(
    {
        *("metrics", "metric_variant", "bertscore_model", "bertscore_sha256", "bertscore_layer", "bleu_tokenize"),
        *("readability", "bootstrap", "seed", "execute_code", "same_process"),
    }
)
"""Settings of an evaluation that do not affect predictions (`seed` only without a temperature): after a change, only the metrics are computed
again."""


def of_answers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of an evaluation that determine its answers."""
    return {
        name: value for name, value in facts.items() if name not in SCORING or (name == "seed" and facts.get("temperature"))
    }


@dataclasses.dataclass(frozen=True)
class Step:
    """One `cora` command of a plan.

    `output` is the directory or file that it writes, relative to the plan's output directory. `facts` has the settings and
    content hashes that determine the result, with the key of a step in place of a hash of its result; `key` is their hash.
    `needs` names the steps that it depends on, and `argv` has the arguments of `cora`. `stop_at` is the optimizer step at which a training
    of a sweep stops, None for the end; it is no part of the key, since the training goes on from there.
    """

    name: str
    kind: Kind
    output: str
    facts: dict[str, Any]
    needs: tuple[str, ...]
    argv: tuple[str, ...]
    stop_at: int | None = None

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of everything that determines the result."""
        return hashing.sha256_json([self.kind, self.facts])


@dataclasses.dataclass(frozen=True)
class StepFlags:
    """The flags of `ablate` that its steps take over. `trust_remote_code` identifies trainings of a model with classes of its own, `dtype` answers of the base model where it is not auto."""

    device: str = "auto"
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of a grid, each after its dependencies. `steps_of` names the steps of each row in the order in which they run. A judging
    belongs to no row: it needs the answers of all rows with one data set.

    `records` maps files to write before anything runs, relative to `out`, to the held-out records for the base model. `date` is what a chat
    template that writes the date takes for it in every step, `tokenizer` the hash of the base model's tokenizer, and `ends` the tokens that end an answer
    by that model's generation_config.json, none where it has no such file; both are None where they are not known. `bases` has the hashes of the bases
    of the adapters among the source models, by the adapters' hashes.
    """

    grid: Grid
    out: Path
    steps: dict[str, Step]
    steps_of: dict[str, tuple[str, ...]]
    records: dict[str, list[Any]]
    date: str
    tokenizer: str | None
    ends: tuple[int, ...] | None = None
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def texts(self) -> dict[str, Any]:
        """What decides how text becomes tokens and where an answer ends, and the bases of adapters, as far as it is known: no part of a step's key."""
        ends = None if self.ends is None else list(self.ends)
        known = {"tokenizer_sha256": self.tokenizer, "end_tokens": ends, BASES: dict(self.bases) or None}
        return {name: value for name, value in known.items() if value is not None}

    def of_kind(self, row: str, kind: Kind) -> Step | None:
        """The row's step of this kind, or None."""
        return next((self.steps[name] for name in self.steps_of[row] if self.steps[name].kind == kind), None)

    def needed_for(self, rows: list[str]) -> set[str]:
        """Names of all steps that these rows need, including dependencies, and of the judgings whose answers are all among them."""
        wanted, found = [name for row in rows for name in self.steps_of[row]], set()
        while wanted:
            name = wanted.pop()
            found.add(name)
            wanted += [need for need in self.steps[name].needs if need not in found]
        return found | {step.name for step in self._judgings if found.issuperset(step.needs)}

    @functools.cached_property
    def _judgings(self) -> list[Step]:
        return [step for step in self.steps.values() if step.kind == "judge"]


def make_plan(grid: Grid, out: Path, inputs: Inputs, flags: StepFlags) -> Plan:
    """Plan the steps of all rows of the grid in the directory `out`. Equal steps are planned once."""
    return _Planner(grid, out, inputs, flags).plan()


class _Planner:
    def __init__(self, grid: Grid, out: Path, inputs: Inputs, flags: StepFlags) -> None:
        self._grid, self._out, self._inputs, self._flags = grid, out, inputs, flags
        model = inputs.models.get(grid.model)
        # The flag identifies a training, which may be of other classes with it: it counts only where the model has classes of its own.
        trusts = flags.trust_remote_code and model is not None and model.has_own_code
        self._taken: Values = dataclasses.asdict(dataclasses.replace(flags, trust_remote_code=trusts))
        self._steps: dict[str, Step] = {}
        self._records: dict[str, list[Any]] = {}
        self._fine_tunes: dict[str, Step] = {}
        self._date = date_of_grid(out)

    def plan(self) -> Plan:
        for name in used_sources(self._grid):
            settings = self._grid.models[name]
            if not isinstance(settings, str):
                self._fine_tunes[name] = self._fine_tune(name, settings)
        ranks: dict[str, int] = {}
        for row in self._grid.rows:
            if row.basis is not None:
                group = self._basis_facts(row)[0]
                ranks[group] = max(ranks.get(group, 0), row.basis_rank or 0)
        steps_of = {}
        for row in self._grid.rows:
            way: list[Step] = []
            if row.basis is not None:
                way.append(self._basis(row, ranks[self._basis_facts(row)[0]]))
            basis = way[0] if way else None
            if row.stage == "proposal":
                steps_of[row.name] = tuple(step.name for step in [*way, self._propose(row, basis)])
                continue
            runs = [self._train(one, basis) for one in row.members()] if row.train is not None else []
            way += runs
            if row.laplace is not None and row.stage != "sweep":
                runs = [self._laplace(row, runs[0])]
                way += runs
            if row.mode != "basis" and row.stage != "sweep" and self._grid.evaluate is not None:
                way.append(self._evaluate(row, runs, self._grid.evaluate))
            steps_of[row.name] = tuple(step.name for step in way)
        if self._grid.judge is not None:
            for dataset in dict.fromkeys(row.dataset for row in self._grid.rows if row.dataset is not None):
                self._judge(dataset, self._grid.judge, [row for row in self._grid.rows if row.dataset == dataset], steps_of)
        model = self._inputs.models.get(self._grid.model)
        tokenizer, ends = (model.tokenizer_sha256, model.ends) if model else (None, None)
        facts = self._inputs.models.values()
        bases = {one.sha256: one.base_sha256 for one in facts if one.sha256 and one.base_sha256}
        return Plan(self._grid, self._out, self._steps, steps_of, self._records, self._date, tokenizer, ends, bases)

    def _add(self, step: Step) -> Step:
        planned = self._steps.setdefault(step.name, step)
        if planned.key != step.key:
            differing = sorted(
                name for name in {*planned.facts, *step.facts} if planned.facts.get(name) != step.facts.get(name)
            )
            raise UsageError(
                f"two rows would write {step.output} with different settings ({', '.join(differing)}); vary these in one block, so that "
                "they become part of the names"
            )
        if planned.stop_at is not None and (step.stop_at is None or step.stop_at > planned.stop_at):
            # Rows of a sweep that share a run may need it up to different steps.
            self._steps[step.name] = planned = step
        return planned

    def _keyed(self, prefix: str, kind: Kind, facts: dict[str, Any], needs: tuple[str, ...]) -> Step:
        """A step that several rows can share, with its key in its name; the caller sets output and arguments."""
        bare = Step("", kind, "", facts, needs, ())
        return dataclasses.replace(bare, name=f"{prefix}-{bare.key[:12]}")

    def _model_hash(self, reference: str) -> str:
        facts = self._inputs.models.get(reference)
        return (facts.sha256 if facts else None) or f"not hashed: {reference}"

    def _data_hash(self, key: str) -> str:
        facts = self._inputs.datasets.get(key)
        return facts.sha256 if facts else f"not read: {key}"

    def _config(
        self,
        mode: Any,
        settings: Values,
        dataset: str,
        output: str,
        basis: str | None = None,
        models: tuple[str, ...] | None = None,
    ) -> TrainConfig:
        place: Values = {"model": self._grid.model, "dataset": dataset, "output_dir": str(self._out / output)}
        starts: Values = {"basis": basis, "start_models": models}
        return TrainConfig(**place, **starts, mode=mode, resume=True, **self._taken, **settings)

    def _writes_date(self, data: str, template: TemplateName) -> bool:
        """Whether the prompts of a data set, by its key, hold a date."""
        model, facts = self._inputs.models.get(self._grid.model), self._inputs.datasets.get(data)
        if model is None or facts is None or not model.dated:
            return False
        return resolve_auto(template, facts.schema, has_chat=True) == "chat"

    def _dated(self, config: TrainConfig, settings: Values) -> TrainConfig:
        """With the date of the grid, where prompts hold one and the file gives none. It is no part of a step's key: it never changes.

        A run that an earlier version of cora began on another day keeps that date.
        """
        if config.template_date or not self._writes_date(_key_of_data(config, settings), config.template):
            return config
        return dataclasses.replace(config, template_date=date_of_run(RunDirectory(Path(config.output_dir))) or self._date)

    def _training_facts(self, config: TrainConfig, settings: Values, kind: Kind, basis: str | None = None) -> dict[str, Any]:
        """`settings` determine the split of the data: those of the file, or of the source model.

        Several processes together have larger batches, so their number is one of the facts.
        """
        processes = self._grid.resources[kind].processes
        data = self._data_hash(_key_of_data(config, settings))
        hashes = {"model": self._model_hash(self._grid.model), "dataset": data}
        adapter = config.adapter_plan()
        read = method_of(config.mode).inputs(adapter) if adapter is not None else {}
        others = {**({"basis": basis} if basis else {}), **({"processes": processes} if processes > 1 else {})}
        return {**config.result_settings(), **hashes, **read, **others}

    def _fine_tune(self, name: str, settings: Values) -> Step:
        own = {key: value for key, value in settings.items() if key not in ("mode", "dataset")}
        config = self._config(settings["mode"], own, settings["dataset"], "")
        step = self._keyed(f"model-{name}", "model", self._training_facts(config, settings, "model"), ())
        output = f"models/{step.name.removeprefix('model-')}"
        config = self._dated(dataclasses.replace(config, output_dir=str(self._out / output)), settings)
        return self._add(dataclasses.replace(step, output=output, argv=words("train", config)))

    def _basis_facts(self, row: Row) -> tuple[str, dict[str, Any], tuple[str, ...]]:
        """What identifies a row's basis apart from its rank: a hash, the facts, and the steps that it depends on."""
        assert row.basis is not None
        hashes, needs = self._sources(row)
        choices = BasisChoices(**row.basis).to_json()
        del choices["rank"]
        facts = {**choices, "sources": hashes or [self._model_hash(self._grid.model)]}
        if choices["source"] == "delta":
            facts["base"] = self._model_hash(self._grid.model)
        return hashing.sha256_json(facts), facts, needs

    def _sources(self, row: Row) -> tuple[list[str], tuple[str, ...]]:
        """What identifies a row's source models, in order, and the steps that fine-tune them."""
        tuned = [self._fine_tunes[name] for name in row.sources if name in self._fine_tunes]
        hashes = [
            self._fine_tunes[name].key if name in self._fine_tunes else self._model_hash(self._reference(name))
            for name in row.sources
        ]
        return hashes, tuple(step.name for step in tuned)

    def _reference(self, source: str) -> str:
        """The argument of `cora` for a source model: its reference, or the run that fine-tunes it."""
        value = self._grid.models[source]
        return value if isinstance(value, str) else str(self._out / self._fine_tunes[source].output)

    def _basis(self, row: Row, rank: int) -> Step:
        assert row.basis is not None
        _, facts, needs = self._basis_facts(row)
        step = self._keyed("basis", "basis", {**facts, "rank": rank}, needs)
        output = f"bases/{step.key[:12]}.safetensors"
        base = self._grid.model if facts["source"] == "delta" else None
        models = tuple(self._reference(name) for name in row.sources) or (self._grid.model,)
        # `ledger` has already checked the file: if it exists, it is damaged or outdated, so overwrite it.
        place = ("--output", str(self._out / output), "--overwrite", "--device", self._flags.device)
        flags = words("extract-basis", BasisChoices(**{**row.basis, "rank": rank}))[1:]
        argv = ("extract-basis", *models, *place, *(("--base", base) if base else ()), *flags)
        return self._add(dataclasses.replace(step, output=output, argv=argv))

    def _train(self, row: Row, basis: Step | None) -> Step:
        config, facts, needs = self._training(row, basis, f"runs/{row.name}")
        argv = words("train", self._dated(config, self._grid.train))
        return self._add(Step(f"train-{row.name}", "train", f"runs/{row.name}", facts, needs, argv, row.stop_at))

    def _propose(self, row: Row, basis: Step | None) -> Step:
        """What measures the curvature that a row's learning rates follow from; it trains nothing."""
        output = f"proposals/{row.name}.json"
        config, facts, needs = self._training(row, basis, f"runs/{row.name}", "proposal")
        config = dataclasses.replace(config, probe=str(self._out / output), resume=False, dtype="auto")
        return self._add(
            Step(
                f"proposal-{row.name}", "proposal", output, facts, needs, words("train", self._dated(config, self._grid.train))
            )
        )

    def _training(
        self, row: Row, basis: Step | None, output: str, kind: Kind = "train"
    ) -> tuple[TrainConfig, dict[str, Any], tuple[str, ...]]:
        """The settings of a row's training, its facts, and the steps that it depends on."""
        assert row.train is not None
        assert row.dataset is not None
        place = str(self._out / basis.output) if basis else None
        from_models = starts_from_models(row.mode, row.train)
        models = tuple(map(self._reference, row.sources)) if from_models else None
        settings = {**row.train, "stop_at": row.stop_at}
        config = self._config(row.mode, settings, self._grid.datasets[row.dataset], output, place, models)
        facts = self._training_facts(config, self._grid.train, kind, basis.key if basis else None)
        needs = (basis.name,) if basis else ()
        if from_models:
            hashes, tuned = self._sources(row)
            facts, needs = {**facts, "start_models": hashes}, (*needs, *tuned)
        return config, facts, needs

    def _laplace(self, row: Row, run: Step) -> Step:
        assert row.laplace is not None
        output = f"runs/{row.name}"
        place: Values = {"run": str(self._out / run.output), "output_dir": str(self._out / output)}
        taken = {name: value for name, value in self._taken.items() if name != "dtype"}  # the run has its own
        config = LaplaceConfig(**place, **taken, **row.laplace)
        facts = {**dataclasses.asdict(config), "run": run.key}
        for name in ("output_dir", "device", "trust_remote_code"):
            del facts[name]
        return self._add(Step(f"laplace-{row.name}", "laplace", output, facts, (run.name,), words("laplace", config)))

    def _evaluate(self, row: Row, runs: Sequence[Step], settings: Values) -> Step:
        """The evaluation of a row's run, of the average of several, or of the base model."""
        method = METHODS.get(row.mode)
        draws = method is not None and (method.learns_distribution or row.laplace is not None)
        without_effect = {
            *(() if draws else ("draws",)),
            *(("merge",) if method is None or not method.is_adapter else ()),
        }
        settings = {key: value for key, value in settings.items() if key not in without_effect}
        # `overwrite` replaces results that `ledger` found outdated; predictions with equal settings are reused.
        common = {**self._taken, "overwrite": True, **settings}
        encoder = self._inputs.encoder_sha256
        facts: dict[str, Any] = {**settings, **({"bertscore_sha256": encoder} if encoder else {})}
        if runs:
            several = len(runs) > 1
            output = f"evaluations/{row.name}" if several else f"{runs[0].output}/evaluation"
            places = tuple(str(self._out / run.output) for run in runs)
            config = EvaluateConfig(runs=places, output_dir=str(self._out / output), ensemble=several, **common)
            facts |= {"runs": [run.key for run in runs]} if several else {"run": runs[0].key}
            needs = tuple(run.name for run in runs)
            return self._add(Step(f"evaluate-{row.name}", "evaluate", output, facts, needs, words("evaluate", config)))
        assert row.dataset is not None
        common.setdefault("template", self._grid.train.get("template", "auto"))
        data = data_key(self._grid.datasets[row.dataset], self._grid.train)
        hashes = {"model": self._model_hash(self._grid.model), "dataset": self._data_hash(data)}
        facts = {**facts, "template": common["template"], **hashes}
        if self._flags.dtype != "auto":  # a run's evaluation has it from the run
            facts["dtype"] = self._flags.dtype
        if self._taken["trust_remote_code"]:
            facts["trust_remote_code"] = True
        if self._writes_date(data, common["template"]):
            # Unlike the grid's own date, that of the file may change.
            if date := self._grid.train.get("template_date"):
                facts.setdefault("template_date", date)
            common.setdefault("template_date", date or self._date)
        step = self._keyed("evaluate-base", "evaluate", of_answers(facts), ())
        records, output = f"records/{row.dataset}.jsonl", f"evaluations/{step.key[:12]}"
        if data in self._inputs.datasets:
            self._records[records] = self._inputs.datasets[data].test
        place: Values = {"model": self._grid.model, "dataset": str(self._out / records), "output_dir": str(self._out / output)}
        argv = words("evaluate", EvaluateConfig(**place, **common))
        return self._add(dataclasses.replace(step, output=output, argv=argv, facts=facts))

    def _judge(self, dataset: str, settings: Values, rows: list[Row], steps_of: Mapping[str, tuple[str, ...]]) -> None:
        """One judging of the answers of all rows with one data set, which shares the anchors among them."""
        evaluations: dict[str, Step] = {}
        base, runs = None, []
        for row in rows:
            if row.mode == "basis":
                continue
            *before, evaluation = (self._steps[name] for name in steps_of[row.name])
            evaluations[evaluation.name] = evaluation
            if before:
                runs.append(str(self._out / before[-1].output))
            else:
                base = str(self._out / evaluation.output)
        if not runs:
            return
        output = f"judgings/{dataset}"
        # `overwrite` replaces a result that `ledger` found outdated; judgments of equal requests are reused.
        config = JudgeConfig(
            runs=tuple(runs),
            base=base,
            output_dir=str(self._out / output),
            overwrite=True,
            **((dataclasses.asdict(self._flags) if "judge_model" in settings else {}) | settings),
        )
        answers = {name: hashing.sha256_json(of_answers(step.facts)) for name, step in evaluations.items()}
        rubrics = [load_rubric(rubric).sha256 for rubric in config.rubric]
        facts = {**settings, "rubrics": rubrics, "answers": answers, **self._judge_facts(settings)}
        argv = words("judge", config)
        self._add(Step(f"judge-{dataset}", "judge", output, facts, tuple(evaluations), argv))

    def _judge_facts(self, settings: Values) -> dict[str, Any]:
        """What a judge on this machine is; empty for one at an endpoint."""
        if (judge := settings.get("judge_model")) is None:
            return {}
        found, known = {"judge_sha256": self._model_hash(judge)}, self._inputs.models.get(judge)
        if known is None:
            return found
        own_code = {"trust_remote_code": True} if known.has_own_code and self._flags.trust_remote_code else {}
        return {**found, "judge_tokenizer_sha256": known.tokenizer_sha256, "judge_end_tokens": list(known.ends), **own_code}


def _key_of_data(config: TrainConfig, settings: Values) -> str:
    """The key of the data of a training; see `_Planner._training_facts` for `settings`."""
    return data_key(config.dataset, {**settings, "train_on": config.train_on})


@functools.cache
def _flags(configuration: type) -> list[tuple[str, Any, str | None]]:
    """Name, default and flag of each field; the flag is None for a positional argument. Cached: every step of a grid asks."""
    return [
        (
            field.name,
            field.default,
            None
            if field.metadata.get("argument")
            else (field.metadata.get("flags") or ("--" + field.name.replace("_", "-"),))[0],
        )
        for field in dataclasses.fields(configuration)
    ]


def words(command: str, config: Any) -> tuple[str, ...]:
    """The arguments of `cora` that give `config`; settings at their default are left out."""
    arguments: list[str] = []
    flags: list[str] = []
    for name, default, flag in _flags(config.__class__):
        value = getattr(config, name)
        if flag is None:
            arguments += (value,) if isinstance(value, str) else value or ()
        elif value != default:
            if isinstance(value, bool):
                flags.append(flag if value else f"--no-{flag[2:]}")
            else:
                flags += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return (command, *arguments, *flags)
