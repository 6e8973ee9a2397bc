"""The distinct trainings of a grid: the checks that each makes at its start, and its memory, measured on fake tensors.

Rows that differ only in learning rate, seed and the like are one training here. No weights are read, and a basis need not exist yet.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.experiments.estimate import SHARED_PART, Estimate
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs, used_sources
from cora_cli.experiments.rows import Row, short
from cora_cli.experiments.steps import Plan, StepFlags
from cora_cli.methods.registry import method_of
from cora_cli.planning.page import CARDS, fits, size_text
from cora_cli.progress import progress, quiet
from cora_cli.render.table import Cell, table_text
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, plan_run
from cora_cli.training.prepare import Prepared, Shared, prepare
from cora_cli.training.probe import examples_of_proposal
from cora_cli.training.proposal import AUTO
from cora_cli.training.rough import rough_peak
from cora_cli.training.work import work_of
from cora_cli.weights.start_models import check_start_models

LAYERS, MOST = 240, 24
"""Layers of all models together, and trainings, that a plan measures unless it is told how many: 8 trainings of 30 layers, in some 20 seconds."""
IRRELEVANT = frozenset(
    {
        *("output_dir", "model", "dataset", "dry_run", "processes", "resume", "stop_at"),  # set below
        *("device", "dtype", "trust_remote_code"),  # set below, from the flags
        *("learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "alpha", "rslora", "seed"),
        *("eval_steps", "save_steps", "keep_checkpoints", "save_tokenizer", "validation_loss"),
    }
)
"""Settings that change neither what a training checks nor its memory, except by the order of the data, which comes from the seed: memory is that
of the largest micro-batch of all seeds."""
_KEY = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.name not in IRRELEVANT)

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Training:
    """A training of a grid, and the names of the rows that are like it; `key` is equal for trainings of equal memory.

    `start_models` are those of the models that it starts from which the grid does not train itself.
    """

    config: TrainConfig
    rows: list[str]
    key: Key
    start_models: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Volume:
    """What `rows` rows of one kind of training read and write each: the tokens of a complete run, of which `labels` carry loss, and the bytes of the
    stored adapter, None where there is none or it is not measured."""

    name: str
    rows: int
    tokens: int
    labels: int
    adapter: int | None


@dataclasses.dataclass(frozen=True)
class GridMemory:
    """Peak bytes of the training of each row that was measured, and of all rows a count from shapes; `unknown` has a sentence for trainings that
    cannot be measured, `volumes` the tokens of each distinct one and the size of its adapter.

    `measured` of `distinct` trainings were measured for `hardware`; `from_models` of them start from models and cannot be.
    """

    peaks: dict[str, int]
    rough: dict[str, int]
    unknown: tuple[str, ...]
    measured: int
    distinct: int
    from_models: int
    hardware: Hardware
    volumes: tuple[Volume, ...] = ()


def distinct_trainings(grid: Grid, flags: StepFlags) -> list[Training]:
    """The trainings of all rows, each with the settings of the first row that is like it, and those of the source models."""
    found: dict[Key, Training] = {}
    common: dict[str, Any] = {"model": grid.model, "dry_run": True, **dataclasses.asdict(flags)}
    for row in grid.rows:
        if row.train is None:
            continue
        sources = [grid.models[name] for name in row.sources] if row.training.start_models else []
        references = tuple(source for source in sources if isinstance(source, str))
        key = (row.dataset, references, *(getattr(row.training, name) for name in _KEY))
        if (key, row.stop_at) not in found:
            own: dict[str, Any] = {"dataset": grid.datasets[row.dataset or ""], "stop_at": row.stop_at}
            config = dataclasses.replace(row.training, **common, **own, processes=grid.resources["train"].processes)
            found[key, row.stop_at] = Training(config, [], key, references)
        found[key, row.stop_at].rows.append(row.name)
    for name in used_sources(grid):
        settings = grid.models[name]
        if not isinstance(settings, str):
            config = TrainConfig(output_dir="o", **common, **settings, processes=grid.resources["model"].processes)
            found["model", name] = Training(config, [f"models: {name}"], ("model", name))
    return list(found.values())


def check_trainings(
    trainings: Sequence[Training], grid: Grid, inputs: Inputs, hardware: Hardware
) -> list[tuple[Training, Prepared]]:
    """Check every training as its run would at its start, apart from weights. Those whose model or data set is missing are left out.

    Raises `CoraError` that lists every problem with a row that has it.
    """
    if grid.model not in inputs.models:
        return []
    shared, found, problems = Shared(), [], []
    for training in trainings:
        if training.config.dataset in inputs.unresolved:
            continue
        try:
            with quiet():  # the run's own log will have its notices
                prepared = prepare(training.config, planned=hardware, shared=shared)
                _check_starts(training, prepared, inputs)
                if training.config.learning_rate == AUTO:
                    examples_of_proposal(prepared)
                found.append((training, prepared))
        except CoraError as error:
            more = f" and {len(training.rows) - 1} more" if len(training.rows) > 1 else ""
            problems.append(f"{training.rows[0]}{more}: {error}")
    if problems:
        raise CoraError("; ".join(problems))
    return found


def _check_starts(training: Training, prepared: Prepared, inputs: Inputs) -> None:
    """Raise `CoraError` where a training cannot start from one of its models that are here."""
    known = tuple(reference for reference in training.start_models if reference in inputs.models)
    if known:
        only = method_of(training.config.mode).adapters_only
        check_start_models(known, prepared.model_path, prepared.layers, only)


def measure_memory(
    plan: Plan,
    chosen: Collection[str],
    checked: Sequence[tuple[Training, Prepared]],
    most: int | Literal["all"] | None,
    hardware: Hardware,
) -> GridMemory:
    """Measure `most` distinct trainings of the chosen rows, those with the largest estimates first; by default as many as have `LAYERS`.

    Each is measured with the largest micro-batch of all runs that are like it, members of ensembles and the confirming runs of a sweep included.
    """
    by_name = {row.name: row for row in plan.grid.rows}
    wanted = {name for name in chosen if by_name[name].train is not None}
    rows: dict[Key, list[str]] = {}
    first: dict[Key, tuple[TrainConfig, Prepared]] = {}
    for training, prepared in checked:
        if like := [name for name in training.rows if name in wanted]:
            rows.setdefault(training.key, []).extend(like)
            first.setdefault(training.key, (dataclasses.replace(training.config, stop_at=None), prepared))
    seeds = {key: {seed for name in names for seed in _seeds(by_name[name], plan.grid)} for key, names in rows.items()}
    works = {key: work_of(*first[key], seeds[key]) for key in first}
    rough = {key: rough_peak(*first[key], works[key]) for key in first}
    # These models need not exist yet.
    order = sorted((key for key in first if not first[key][0].start_models), key=rough.__getitem__, reverse=True)
    from_models = len(first) - len(order)
    if most != "all":
        order = order[: most if most is not None else _default_count(first[order[0]][1]) if order else 0]
    peaks: dict[str, int] = {}
    unknown: list[str] = []
    adapters: dict[Key, int | None] = {}
    with progress("measuring memory", len(order), "trainings") as shown:
        for key in order:
            try:
                with quiet():
                    measured = plan_run(*first[key], seeds[key]).measured
            except CoraError as error:
                raise type(error)(f"{rows[key][0]}: {error}") from error
            if isinstance(measured, Measured):
                peaks |= dict.fromkeys(rows[key], measured.memory.total)
                adapters[key] = measured.adapter_bytes
            else:
                unknown.append(measured)
            shown.advance()
    by_row = {name: rough[key] for key, names in rows.items() for name in names}
    kinds = [_kind(by_name[names[0]]) for names in rows.values()]
    volumes = (
        Volume(
            kind if kinds.count(kind) == 1 else names[0], len(names), works[key].tokens, works[key].labels, adapters.get(key)
        )
        for kind, (key, names) in zip(kinds, rows.items(), strict=True)
    )
    sentences = tuple(dict.fromkeys(unknown))
    return GridMemory(peaks, by_row, sentences, len(order), len(first), from_models, hardware, tuple(volumes))


def _kind(row: Row) -> str:
    """The name of a row's run without its seed and its learning rate."""
    rate = AUTO if row.learning_rate is None else short(row.learning_rate)
    return row.run.removesuffix(f"_seed{row.seed}").replace(f"_lr{rate}", "")


def _seeds(row: Row, grid: Grid) -> set[int]:
    """The seeds of the runs of a row: of its members, and those that may confirm it."""
    later = grid.confirm.seeds if grid.confirm is not None else ()
    rows = [row, *(dataclasses.replace(row, stage="confirm").with_seed(seed) for seed in later)]
    return {member.seed for one in rows for member in one.members()}


def _default_count(prepared: Prepared) -> int:
    return min(MOST, max(1, LAYERS // int(prepared.model_config.get_text_config(decoder=True).num_hidden_layers)))


def memory_cell(row: Row, memory: GridMemory) -> str:
    """The memory of a row's training: measured, or after a ~ counted from shapes."""
    if row.train is None:
        return "-"
    if row.name in memory.peaks:
        return size_text(memory.peaks[row.name])
    return f"~{_about(memory.rough[row.name])}" if row.name in memory.rough else "unknown"


def volume_table(memory: GridMemory, width: int | None) -> list[str]:
    """The tokens and the adapter of each distinct training, as a table with lines of at most `width` characters; nothing where there is none."""
    if not memory.volumes:
        return []
    headers = ("training", "rows", "tokens", "with loss", "adapter")
    cells = [
        (
            each.name,
            f"{each.rows}",
            f"{each.tokens:,}",
            f"{each.labels:,}",
            "-" if each.adapter is None else size_text(each.adapter),
        )
        for each in memory.volumes
    ]
    return [table_text(headers, [list(map(Cell, row)) for row in cells], width), ""]


def memory_notes(plan: Plan, chosen: Sequence[str], memory: GridMemory, estimates: Mapping[str, Estimate]) -> list[str]:
    """What the column of memory holds, the cards that the trainings fit, and what other steps take."""
    notes = []
    others = [estimates[name].bytes for name, step in plan.steps.items() if step.kind != "train" and name in estimates]
    if memory.distinct:
        notes.append(
            "training: rows that differ only in learning rate, seed and the like are one, named after the first; tokens: of a complete run; "
            "with loss: those of them that carry loss; adapter: its size on disk, where its memory is measured"
        )
        on_gpu = memory.hardware.device.type == "cuda"
        notes.append(
            f"memory: peak of the training's tensors {'on a CUDA GPU' if on_gpu else 'on the processor'} in {memory.hardware.dtype_name}, as "
            "`cora train --dry-run` computes it, with the largest batch of all seeds; ~ marks estimates"
        )
        if memory.measured < memory.distinct - memory.from_models:
            notes.append(
                f"measured: {memory.measured} of {memory.distinct} distinct trainings, those with the largest estimates (--measure all measures all)"
            )
        if memory.from_models:
            notes.append(
                "rows that start from models are not measured, since what they take depends on the ranks of these models"
            )
        notes += [f"not measured: {sentence}" for sentence in memory.unknown]
        if on_gpu:
            wanted = set(chosen)
            notes += _fitting([row for row in plan.grid.rows if row.name in wanted and row.train is not None], memory)
    if others:
        notes.append(f"other steps take up to about {_about(max(others))} (estimate)")
    return notes


def _about(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _fitting(rows: Sequence[Row], memory: GridMemory) -> list[str]:
    """How many of the rows' trainings fit each card. Estimates count twice, since they can be half of the truth; starts from models do not."""
    names = [row.name for row in rows if row.training.start_models is None]
    if not names or not memory.rough.keys() >= set(names):
        return []
    sizes = [memory.peaks.get(name, memory.rough[name] / SHARED_PART) for name in names]
    cards = (f"{card} GB: {sum(fits(size, card * 2**30) for size in sizes)}" for card in CARDS)
    left_out = f", without the {len(rows) - len(names)} that start from models" if len(names) < len(rows) else ""
    guessed = sum(name not in memory.peaks for name in names)
    counted = f" ({guessed} counted as twice their estimates, which can be half of the truth)" if guessed else ""
    return [f"of {len(names)} trainings{counted}{left_out}, the number that fits a card of  {'  '.join(cards)}"]
