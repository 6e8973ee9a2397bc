"""What one evaluation consists of: models, the records that each answers, and where the results go.

It also tells which of the records a run was trained on, whose scores say nothing about new ones.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing
from cora_cli import records as shapes
from cora_cli.adapters.base import base_of
from cora_cli.adapters.loading import check_rank
from cora_cli.adapters.peft_settings import changes_input
from cora_cli.adapters.posterior import has_posterior
from cora_cli.data.records import Record, Schema, is_among
from cora_cli.data.split import load_test_records
from cora_cli.data.templates import Template, reads_clock, resolve_auto
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import DEFAULT_DRAWS, EvaluateConfig, check_run
from cora_cli.evaluation.generate import end_tokens
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import absolute, resolve_base, resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.models.trained_on import check_code, say_other_tokenizer, say_unrecorded, trained_on
from cora_cli.progress import note
from cora_cli.rundir import EvaluationDirectory, RunDirectory, unlike_record
from cora_cli.settings import TemplateName


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing to evaluate: a base model with or without an adapter, the records to answer, and the output directory.

    `own_records` are those held out by the training that produced it. `date` is what a chat template that writes the date takes for it, None
    where neither the user nor a training decides. `rank` is what the adapter is cut to. `others` are the further members of an ensemble, whose
    first one is `base` with `adapter`. `draws` are those from the distribution of the adapter, 0 for its mean. `of_base` tells the base model of
    runs, which answers their records.
    """

    name: str
    base: ModelPath
    adapter: ModelPath | None
    dataset: str
    template: TemplateName
    output: EvaluationDirectory
    own_records: Path | None = None
    date: str | None = None
    rank: int | None = None
    others: tuple["Target", ...] = ()
    draws: int = 0
    of_base: bool = False

    @property
    def members(self) -> tuple["Target", ...]:
        """The models behind it: itself, and the others of an ensemble."""
        return (self, *self.others)

    @property
    def tokenizer(self) -> ModelPath:
        """Where the tokenizer is: with the adapter if its directory holds one of its own, else with the base model."""
        return self.adapter if self.adapter is not None and self.adapter.has_tokenizer else self.base

    def other_dataset(self, records: Sequence[Record]) -> str | None:
        """Where the `records` to answer are from, if not all of them are those that the training, or that of another run for a model alone, held out."""
        place, own = Path(self.dataset), self.own_records
        if own is None:
            run = RunDirectory(place.parent)
            is_held_out = place.name == run.test_records.name and run.exists()
        else:
            held_out: set[str] = set()
            with contextlib.suppress(CoraError):  # a run that held nothing out
                held_out |= set(map(hashing.sha256_json, load_test_records(str(own))[0]))
            is_held_out = held_out.issuperset(map(hashing.sha256_json, records))
        return None if is_held_out else absolute(self.dataset)

    def tokenizer_hash(self) -> str:
        """SHA-256 over what decides how text becomes tokens, including a chat template that is stored with the adapter."""
        own = self.adapter is not None and not self.adapter.has_tokenizer and self.adapter.chat_template.is_file()
        found = self.tokenizer.tokenizer_hash()
        if not own or self.adapter is None:
            return found
        return hashing.sha256_json([found, hashing.sha256_file(self.adapter.chat_template)])

    def text_hash(self) -> str | None:
        """As `tokenizer_hash`, but as a training records it; None where the adapter has a tokenizer or a chat template of its own."""
        own = self.adapter is not None and (self.adapter.has_tokenizer or self.adapter.chat_template.is_file())
        return None if own else self.base.text_hash()

    def base_ends_hash(self) -> str | None:
        """SHA-256 of the base's generation_config.json, which says what ends an answer; None where there is none."""
        ends = self.base.path / "generation_config.json"
        return hashing.sha256_file(ends) if ends.is_file() else None


def find_targets(config: EvaluateConfig) -> list[Target]:
    """Find every model, and raise `CoraError` for those that cannot be evaluated before any model is loaded.

    With `config.with_base`, the base model of each run answers the same records and comes before it.
    """
    if config.model:
        model = resolve_model(config.model, weights=not config.dry_run)
        base, adapter = _base_and_adapter(config, model)
        assert config.dataset is not None
        assert config.output_dir is not None
        out = EvaluationDirectory(Path(config.output_dir))
        record = trained_on(adapter or base)
        date = config.template_date or (record.date if record else None)
        draws = _draws(config, adapter)
        target = Target(config.model, base, adapter, config.dataset, config.template, out, date=date, draws=draws)
        _check_effects(config, [target])
        return _at_ranks(config, target)
    targets: list[Target] = []
    for name in config.runs or ():
        own, compared = _targets_of_run(config, name)
        if compared is not None and not any(_same_answers(compared, other, config.trust_remote_code) for other in targets):
            if any(compared.name == other.name for other in targets):  # for other prompts or records
                compared = dataclasses.replace(compared, name=f"{compared.base.reference} (base of {name})")
            targets.append(compared)
        targets += _at_ranks(config, own)
    _check_effects(config, targets)
    if config.ensemble:
        return _as_ensemble(config, targets)
    bases = [target for target in targets if target.of_base]
    if config.output_dir and len(bases) > 1:
        raise CoraError(
            f"{bases[0].name} and {bases[1].name} would be written to the same directory {bases[0].output.root}; evaluate their runs separately, "
            "or leave out --output-dir"
        )
    if len({target.output.root.resolve() for target in targets}) < len(targets):
        raise CoraError(
            "a run is named twice, or two runs have the same name, so that they would be written to the same directory; evaluate them separately"
        )
    return targets


def _draws(config: EvaluateConfig, adapter: ModelPath | None) -> int:
    """How many draws from the adapter's distribution to average; 0 where it has none."""
    if not has_posterior(adapter):
        return 0
    draws = DEFAULT_DRAWS if config.draws is None else config.draws
    if draws and config.backend == "vllm":
        raise CoraError(
            f"{adapter.reference if adapter else ''} has a distribution of weights, whose draws only --backend transformers averages; "
            "--draws 0 evaluates its mean"
        )
    return draws


def _check_effects(config: EvaluateConfig, targets: Sequence[Target]) -> None:
    """Raise `CoraError` where draws are wanted and there is nothing to draw from, or no adapter that could be left unmerged, or a metric that an adapter
    does not allow."""
    for target in targets:
        check_code(target.adapter or target.base, target.base, config.trust_remote_code)
        _check_calibration(config, target)
    if not config.merge and all(target.adapter is None for target in targets):
        raise CoraError(f"--no-merge has no effect: {targets[-1].name} is a complete model, without an adapter; leave it out")
    if config.draws and not any(target.draws for target in targets):
        raise CoraError(
            f"{targets[-1].name} has no distribution of weights: --draws applies to runs of mode scalabl and of `cora laplace`; leave it out"
        )


def _check_calibration(config: EvaluateConfig, target: Target) -> None:
    if config.measures_calibration and target.adapter is not None and changes_input(target.adapter):
        kind = target.adapter.adapter_config()["peft_type"]
        raise CoraError(f"--metrics calibration does not support adapters of {kind}, which change the input; leave it out")


def _as_ensemble(config: EvaluateConfig, targets: Sequence[Target]) -> list[Target]:
    """The runs among `targets` as one, after the base model if that is wanted.

    Raises `CoraError` for runs that cannot be averaged: one twice, other tokens, or other prompts or records.
    """
    bases, runs = ([one for one in targets if one.of_base is wanted] for wanted in (True, False))
    if len(bases) > 1:
        raise CoraError(f"--with-base needs one base model, but the runs have {' and '.join(one.name for one in bases)}")
    first = runs[0]
    weights: dict[str | None, str] = {}
    for run in runs:
        own = (run.adapter or run.base).content_hash()
        if own in weights:
            raise CoraError(
                f"{weights[own]} and {run.name} have the same weights; an ensemble needs runs that were trained independently, such as with "
                "other seeds"
            )
        weights[own] = run.name
        for what, of in (
            ("tokenizers", lambda one: _text_of(one, config)),
            ("templates", lambda one: one.template),
            ("dates in their prompts", lambda one: one.date if reads_clock(one.template, _tokenizer(one, config)) else None),
        ):
            if of(run) != of(first):
                raise CoraError(f"{first.name} and {run.name} cannot be one ensemble: they have different {what}")
        if not config.dataset and hashing.sha256_file(Path(run.dataset)) != hashing.sha256_file(Path(first.dataset)):
            raise CoraError(
                f"{first.name} and {run.name} hold out different records: train them with one --split-seed, or name the records to answer "
                "with --dataset"
            )
    assert config.output_dir is not None
    root = Path(config.output_dir)
    name = f"ensemble of {', '.join(Path(run.name).resolve().name for run in runs)}"
    out = EvaluationDirectory(root / "ensemble" if config.with_base else root)
    return [*bases, dataclasses.replace(first, name=name, output=out, others=tuple(runs[1:]))]


def _text_of(target: Target, config: EvaluateConfig) -> tuple[Any, ...]:
    """What decides how text becomes tokens, and which tokens end an answer; transformers writes one tokenizer in more than one way."""
    tokenizer = _tokenizer(target, config)
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else (type(tokenizer), tokenizer.get_vocab())
    name = resolve_auto(target.template, "messages", bool(tokenizer.chat_template))
    ends = end_tokens(target.base.generation_config().get("eos_token_id"), Template(name, "messages", tokenizer).ends)
    return rules, tokenizer.chat_template, tokenizer.special_tokens_map, sorted(ends)


def _tokenizer(target: Target, config: EvaluateConfig) -> Any:
    return load_tokenizer(target.base, config.trust_remote_code, target.adapter)


def _at_ranks(config: EvaluateConfig, target: Target) -> list[Target]:
    """The target at each of `--ranks`, with a directory for each; the target itself where there are none."""
    if not config.ranks:
        return [target]
    if target.adapter is None:
        raise CoraError(f"{target.name} is a complete model, which has no rank; leave out --ranks")
    if target.draws:
        raise CoraError(
            f"{target.name} has a distribution of weights, which belongs to its full rank: --ranks cuts its mean; give --draws 0 as well"
        )
    found, root = [], target.output.root
    for rank in dict.fromkeys(map(int, config.ranks)):
        check_rank(target.adapter, rank)
        out = root / f"rank-{rank}" if config.output_dir else root.with_name(f"{root.name}-rank-{rank}")
        found.append(dataclasses.replace(target, name=f"{target.name} rank {rank}", output=EvaluationDirectory(out), rank=rank))
    return found


def _targets_of_run(config: EvaluateConfig, name: str) -> tuple[Target, Target | None]:
    """A run, and its base model if that is wanted."""
    check_run(name)
    run = RunDirectory(Path(name))
    record = shapes.read_run(run)
    if record["status"] != "finished":
        raise CoraError(
            f"{name} is not finished (status {record['status']}); complete it with the same `cora train` command and --resume"
        )
    if not config.dataset:
        check_test_records(run, record)
    base, adapter = _base_and_adapter(config, resolve_model(name))
    template = record["data"]["template"] if config.template == "auto" else config.template
    dataset, root, base_root = config.dataset or str(run.test_records), run.evaluation, run.base_evaluation
    if config.output_dir:
        place = Path(config.output_dir)
        root = place / run.root.resolve().name if len(config.runs or ()) > 1 or config.with_base else place
        base_root = place / "base"
    date = config.template_date or shapes.template_date(record)
    out = EvaluationDirectory(root)
    own = Target(name, base, adapter, dataset, template, out, run.test_records, date, draws=_draws(config, adapter))
    if not config.with_base:
        return own, None
    if adapter is None:  # a complete model; its base is the one that the training started from
        base = resolve_base(config.base, not config.dry_run) or _start_of(name, record, not config.dry_run)
    base_out = EvaluationDirectory(base_root)
    return own, Target(f"{base.reference} (base)", base, None, dataset, template, base_out, date=date, of_base=True)


def _start_of(name: str, record: dict[str, Any], weights: bool) -> ModelPath:
    """The model that the training of the run `name` started from; `weights` as in `resolve_model`."""
    reference, revision = record["model"]["reference"], record["model"].get("revision")
    try:
        return resolve_model(f"{reference.partition('@')[0]}@{revision}" if revision else reference, weights)
    except CoraError as error:
        raise CoraError(f"the base model of {name} cannot be found (pass its path with --base): {error}") from error


def _same_answers(one: Target, other: Target, trust_remote_code: bool) -> bool:
    """Whether two targets would give the same answers; runs of one split have equal files of held-out records."""

    def identity(target: Target) -> tuple[Path, ModelPath | None, str, str]:
        records = Path(target.dataset)
        content = hashing.sha256_file(records) if records.is_file() else target.dataset
        return target.base.path, target.adapter, content, target.template

    if identity(one) != identity(other):
        return False
    return one.date == other.date or not reads_clock(one.template, load_tokenizer(one.base, trust_remote_code, one.adapter))


def check_own_records(path: Path) -> None:
    """Raise `CoraError` as `check_test_records` does, if the records at `path` are those that a run held out."""
    run = RunDirectory(path.parent)
    if path.name == run.test_records.name and run.exists():
        check_test_records(run, shapes.read_run(run))


def check_test_records(run: RunDirectory, record: dict[str, Any]) -> None:
    """Raise `CoraError` if the held-out records are not those of the training; earlier versions did not record their hash."""
    expected = record["data"].get("test_sha256")
    if expected is not None and (not run.test_records.is_file() or hashing.sha256_file(run.test_records) != expected):
        raise CoraError(
            f"{unlike_record(run.test_records, run.record)}; restore it, or name the records to answer with --dataset"
        )


def _base_and_adapter(config: EvaluateConfig, model: ModelPath) -> tuple[ModelPath, ModelPath | None]:
    """The base model, and the adapter if `model` is one. Raises `CoraError` for `--base` with a complete model."""
    if model.is_adapter:
        base = resolve_base(config.base, not config.dry_run) or base_of(model, not config.dry_run)
        say_other_tokenizer(model, base)
        return base, model
    if config.base and not config.with_base:
        raise CoraError(f"{model.reference} is a complete model, which has no base; leave out --base")
    return model, None


@dataclasses.dataclass(frozen=True)
class TrainedPrompts:
    """The hashes of the prompts that the evaluated runs were trained on, and the data sets that they came from."""

    hashes: frozenset[str]
    datasets: frozenset[str]

    def separate(self, records: Sequence[Record], schema: Schema, target: Target, exclude: bool | None) -> list[Record]:
        """The records to answer; says how many were trained on.

        `exclude` leaves those out; None does so where the records come from the data set of a training.
        """
        if exclude and not self.hashes:
            note(f"--exclude-trained leaves no prompt out: of {target.name}, no record says which prompts it was trained on")
        rest = [record for record in records if not is_among(record, schema, self.hashes)]
        found = len(records) - len(rest)
        if not found:
            return list(records)
        leave_out = target.dataset in self.datasets if exclude is None else exclude
        what = "they are left out" if leave_out else "--exclude-trained leaves them out"
        note(f"{found} of {len(records)} prompts of {target.dataset} were trained on; {what}")
        if not leave_out:
            return list(records)
        if not rest:
            raise CoraError(
                f"all {len(records)} prompts of {target.dataset} were trained on, which leaves none to answer; --no-exclude-trained answers them"
            )
        return rest


def trained_prompts(targets: Sequence[Target]) -> TrainedPrompts:
    """What `targets` and their base models were trained on; all of them answer the same records, so that they can be compared."""
    hashes: set[str] = set()
    datasets: set[str] = set()
    unknown: set[Path] = set()
    unrecorded: dict[Path, ModelPath] = {}
    for target in [member for one in targets for member in one.members]:
        for model in (target.adapter, target.base):
            if model is None:
                continue
            if (record := trained_on(model)) is None:
                unrecorded.setdefault(model.path, model)
                continue
            hashes |= record.prompts
            datasets |= set(record.datasets)
            if not record.complete and target.dataset != str(target.own_records):
                unknown.add(record.place)
    for model in unrecorded.values():
        say_unrecorded(model)
    for place in sorted(unknown):
        note(f"{place} was trained by a version that did not record its prompts: whether it was trained on these is not known")
    files = {Path(dataset).resolve() for dataset in datasets}
    datasets |= {target.dataset for target in targets if Path(target.dataset).resolve() in files}
    return TrainedPrompts(frozenset(hashes), frozenset(datasets))
