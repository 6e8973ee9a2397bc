"""The preset `small`: runs any grid with a small model, local fine-tunes and built-in data, in minutes instead of weeks.

Settings of the method (modes, ranks, initializations, numbers of models, seeds) are kept. Settings of scale are replaced, and
each replacement adds a sentence to the conditions of the grid.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.tasks import LEARNING_RATE, TASK_BATCH, TASK_EVAL_LIMIT, TASK_RANK, TASK_STEPS, TASKS
from cora_cli.experiments.values import Values
from cora_cli.methods.registry import BASELINE, METHODS, OPTIONAL_SETTINGS
from cora_cli.models.references import resolve_model
from cora_cli.training.config import NOT_PART_OF_THE_RESULT
from cora_cli.training.proposal import AUTO

JUDGED, REPLY_TOKENS = 8, 64
STEPS, BATCH, HELD_OUT, PROMPTS, NEW_TOKENS, PROMPT_BATCH = 12, 8, 40, 40, 48, 20
# A step of Adam changes each weight by about this much; adapters tolerate twenty times more.
FULL_LEARNING_RATE = 5e-5
# Resources per step, if the preset runs on a cluster.
RESOURCES = {"cpus": 2, "mem_gb": 8, "timeout_min": 120}
_METHOD = frozenset({"rank", "b_init", "start", "target_modules", "dropout", "seed", "split_seed", *OPTIONAL_SETTINGS})
_SCALE = frozenset(
    {
        *("epochs", "max_steps", "batch_size", "gradient_accumulation", "gradient_checkpointing", "max_length", "limit"),
        *("eval_limit", "eval_steps", "save_steps", "keep_checkpoints", "warmup_ratio", "template"),
    }
)
_GENERATION = frozenset({"limit", "max_new_tokens", "batch_size"})
_SCORED = frozenset({"metrics", "metric_variant", "execute_code", "same_process", "readability"})
# The conditions name what stands in for these.
_ANNOUNCED = {
    "train": frozenset(
        {"epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "eval_limit", "validation_size"}
    )
    | NOT_PART_OF_THE_RESULT,
    "evaluate": _GENERATION,
}
_NEEDS_EQUAL_SHAPES = ("global", "layer")
_EVALUATED = (
    f"Each run answers {PROMPTS} prompts with at most {NEW_TOKENS} tokens.",
    "BERTScore is on a small encoder (MiniLM-L6), not on the paper's scale.",
)


def small(values: Mapping[str, Any], model: str, has_bases: bool) -> Values:
    """Convert the values of a valid grid file to `model` and to a scale for two CPU cores.

    `has_bases` says whether any row has a basis, or starts from source models. Raises `UsageError` if the grid has more models or data sets than the built-in
    ones that replace them, or if it varies a setting that the preset sets.
    """
    defaults = values.get("defaults") or {}
    pool = list(values.get("models") or {}) if has_bases else []
    if len(pool) > len(TASKS):
        raise UsageError(
            f"preset small provides {len(TASKS)} source models, but the grid has {len(pool)}; shorten models, or leave out "
            "--preset"
        )
    renamed = dict(zip(pool, TASKS, strict=False))
    datasets, replaced = _datasets(values.get("datasets") or {})
    given = defaults.get("train") or {}
    train = {key: value for key, value in given.items() if key in _METHOD}
    train |= {"validation_size": HELD_OUT} if "validation_size" in given else {}
    rate = AUTO if given.get("learning_rate") == AUTO else LEARNING_RATE
    train |= {"learning_rate": rate, "max_steps": STEPS, "batch_size": BATCH, "eval_limit": HELD_OUT}
    evaluate: Any = defaults.get("evaluate")
    if evaluate is not False:
        evaluate = {key: value for key, value in (evaluate or {}).items() if key in _SCORED}
        evaluate |= {"limit": PROMPTS, "max_new_tokens": NEW_TOKENS, "batch_size": PROMPT_BATCH}
    judge: Any = defaults.get("judge")
    if judge is not None:
        # A model of this size seldom keeps to the form; asked again, it is held to it.
        judge = {"judge_model": model, "limit": JUDGED, "max_tokens": REPLY_TOKENS, "tries": 2} | {
            key: judge[key] for key in ("rubric", "retest") if key in judge
        }
    shapes = _Shapes(model)
    basis = shapes.adapted((defaults.get("basis") if has_bases else None) or {}, "rank")
    blocks = [shapes.adapted(_block(part, renamed), "basis_rank") for block in values["grid"] for part in _by_rate(block)]
    tuned = {
        "mode": BASELINE,
        "rank": TASK_RANK,
        "max_steps": TASK_STEPS,
        "batch_size": TASK_BATCH,
        "eval_limit": TASK_EVAL_LIMIT,
    }
    conditions = [
        *(values.get("conditions") or ()),
        f"The base model is {model} instead of {values.get('model')}.",
        *replaced,
        f"Each run takes {STEPS} steps of {BATCH} records at learning rate {LEARNING_RATE:g} ({FULL_LEARNING_RATE:g} where all weights "
        "are trained, and as the grid says where it sweeps it).",
        *([] if evaluate is False else _EVALUATED),
        *_not_taken(defaults, values["grid"]),
        *([f"The judge is {model} and judges {JUDGED} records. A judge this small is usually disqualified."] if judge else []),
        *shapes.conditions(),
    ]
    sweep = values.get("sweep")
    # Its rungs are steps of the complete scale; without them they are shares of the steps here.
    stages = {"sweep": {key: value for key, value in sweep.items() if key != "rungs"}} if isinstance(sweep, dict) else {}
    return {
        **{key: values[key] for key in ("name", "title", "paper_table", "margin", "confirm") if key in values},
        **stages,
        "conditions": conditions,
        "model": model,
        "models": {
            task: {"dataset": f"builtin:task-{task}", "learning_rate": LEARNING_RATE, **tuned} for task in renamed.values()
        },
        "datasets": datasets,
        "resources": {"all": RESOURCES},
        "defaults": {"train": train, "basis": basis, "evaluate": evaluate, "judge": judge},
        "grid": blocks,
    }


def tuned_here(sources: Sequence[str]) -> tuple[str, ...]:
    """A sentence on the source models that some row of a converted grid uses; only these are fine-tuned."""
    return (f"The source models were fine-tuned here, {TASK_STEPS} steps each on {', '.join(sources)}.",) if sources else ()


def _datasets(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The built-in data set for each name in the grid, and a sentence for each replacement."""
    mapped, conditions = {}, []
    for name, reference in given.items():
        mapped[name] = reference
        if not reference.startswith("builtin:"):
            mapped[name] = "builtin:code" if "code" in f"{name} {reference}".lower() else "builtin:instruct"
            conditions.append(f"The data set {name} is {mapped[name]} instead of {reference}.")
    if len(set(mapped.values())) < len(mapped):
        raise UsageError(
            f"preset small has only builtin:instruct and builtin:code, too few to replace {', '.join(given)}; leave out "
            "--preset"
        )
    return mapped, conditions


def _not_taken(defaults: Mapping[str, Any], blocks: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence on the settings of the grid that decide results, that this scale leaves at their defaults, and that no other sentence names."""
    given = {"train": {*(defaults.get("train") or {})} - _METHOD, "evaluate": {*(defaults.get("evaluate") or {})} - _SCORED}
    given["train"] |= {key for block in blocks for key in block} & _SCALE
    left = {where: ", ".join(sorted(keys - _ANNOUNCED[where])) for where, keys in given.items()}
    named = "; ".join(f"{where}: {names}" for where, names in left.items() if names)
    return [f"These settings of the grid do not apply at this scale, and have their defaults: {named}."] if named else []


def _by_rate(block: Mapping[str, Any]) -> list[Values]:
    """Split full fine-tuning off into its own block, because it needs another learning rate."""
    modes = block.get("mode")
    if not isinstance(modes, list) or not (full := [mode for mode in modes if _trains_all_weights(mode)]):
        return [dict(block)]
    others = [mode for mode in modes if mode not in full]
    return [*([{**block, "mode": others}] if others else []), *({**block, "mode": mode} for mode in full)]


def _trains_all_weights(mode: Any) -> bool:
    return isinstance(mode, str) and mode in METHODS and not METHODS[mode].is_adapter


def _block(block: Mapping[str, Any], renamed: Mapping[str, str], sweeps: bool = False) -> Values:
    """Remove settings of scale from a block or row, and keep a learning-rate sweep.

    Raises `UsageError` if it varies another such setting.
    """
    rows = block.get("rows") or []
    if varied := sorted(key for key in _SCALE & block.keys() if isinstance(block[key], list)) + sorted(
        _SCALE & {key for row in rows for key in row}
    ):
        raise UsageError(
            f"preset small sets {varied[0]} itself, so it cannot run a grid that varies {varied[0]}; leave out --preset"
        )
    kept = {key: value for key, value in block.items() if key not in _SCALE}
    rate = kept.get("learning_rate")
    if not sweeps and not isinstance(rate, list) and rate != AUTO:
        kept.pop("learning_rate", None)
        if _trains_all_weights(block.get("mode")):
            kept["learning_rate"] = FULL_LEARNING_RATE
    if "sources" in kept:
        kept["sources"] = _renamed(kept["sources"], renamed)
    if "rows" in kept:
        swept = len({row.get("learning_rate") for row in rows}) > 1
        kept["rows"] = [_block(row, renamed, swept) for row in rows]
    return kept


def _renamed(sources: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(sources, list):
        return [_renamed(source, renamed) for source in sources]
    return ",".join(renamed[name.strip()] for name in sources.split(","))


class _Shapes:
    """Adapts the basis settings of a grid to the shapes of a model, and records each change."""

    def __init__(self, model: str) -> None:
        try:
            found = resolve_model(model)
            config, heads = found.language_config(), found.attention_heads() or 1
        except CoraError as error:
            raise UsageError(f"preset small needs the configuration of its model: {error}") from error
        width = next(
            (size for name in ("hidden_size", "n_embd", "d_model", "dim") if isinstance(size := config.get(name), int)), None
        )
        if width is None:
            raise UsageError(
                f"preset small needs the width of its model, which config.json of {model} does not state as hidden_size"
            )
        key_value_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or width // heads
        self._grouped = key_value_heads != heads
        # One less than the number of rows: a centred matrix has one direction less.
        self._most = key_value_heads * head - 1
        self._shares: set[str] = set()
        self._ranks: set[int] = set()

    def adapted(self, settings: Mapping[str, Any], rank_key: str) -> Values:
        """Limit the settings of a basis, block or row to what the shapes allow; `rank_key` is the key of the basis rank."""
        result = dict(settings)
        for key in {"share", rank_key} & result.keys():
            value = result[key]
            # Several values can become the same one.
            many = isinstance(value, list)
            result[key] = list(dict.fromkeys(self._one(key, each) for each in value)) if many else self._one(key, value)
        if isinstance(result.get("rows"), list):
            result["rows"] = [self.adapted(row, rank_key) for row in result["rows"]]
        return result

    def conditions(self) -> list[str]:
        """A sentence for each change that `adapted` made."""
        found = [
            f"There is one basis per projection instead of `share: {share}`, since grouped queries give K and V fewer rows than Q, so that "
            "their weights cannot be averaged."
            for share in sorted(self._shares)
        ]
        return found + [
            f"The basis has rank {self._most} instead of {rank}: this model's narrowest weight allows no more."
            for rank in sorted(self._ranks)
        ]

    def _one(self, key: str, value: Any) -> Any:
        if key == "share" and self._grouped and value in _NEEDS_EQUAL_SHAPES:
            self._shares.add(value)
            return "projection"
        if key != "share" and isinstance(value, int) and value > self._most:
            self._ranks.add(value)
            return self._most
        return value
