"""The inputs of a grid: finds, hashes and measures its models and data sets before anything runs.

It reads checkpoint headers and records, and never loads weights. Missing inputs are listed in `Inputs.unresolved`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.adapters.base import base_of
from cora_cli.basis.choices import DEFAULT_TARGET_MODULES, is_target
from cora_cli.data.chat import CLOCK
from cora_cli.data.records import Record, Schema
from cora_cli.data.split import Choice, DataSplit, load_split
from cora_cli.data.templates import reads_clock
from cora_cli.errors import CoraError
from cora_cli.evaluation.generate import end_tokens
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.rows import SPLIT_KEYS, Row
from cora_cli.experiments.values import Values
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
from cora_cli.models.skeleton import skeleton_of
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.reading import read_json
from cora_cli.records import KnownHash
from cora_cli.weights.matrices import loaded_matrices
from cora_cli.weights.planned import PlannedSource

_HUB_SECONDS = 10.0
_EVERY_ANSWER = "train_on"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """A model on this disk.

    `shapes` maps the full name of every two-dimensional weight to (out, in); `parameters` counts all parameters and `embedded`
    those of the input embedding; `heads` is the number of attention heads, if stated. `dated` says whether its chat template writes the date
    into prompts, `tokenizer_sha256` is the hash of what decides how text becomes tokens, `ends` are the tokens
    that end an answer by generation_config.json, `has_own_code` says whether it has classes of its own. For an adapter `shapes` is empty, both
    counts are 0, and `base_sha256` is the hash of its base model, if that is found. Hashes are None if they were not requested.
    """

    reference: str
    sha256: str | None
    shapes: dict[str, tuple[int, int]]
    parameters: int
    embedded: int
    heads: int | None = None
    dated: bool = False
    tokenizer_sha256: str | None = None
    ends: tuple[int, ...] = ()
    has_own_code: bool = False
    base_sha256: str | None = None
    _found: dict[tuple[str, ...], dict[str, tuple[int, int]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def targets(self, names: Sequence[str] = DEFAULT_TARGET_MODULES) -> Mapping[str, tuple[int, int]]:
        """Shape (out, in) of every weight that the target modules `names` match. Every row of a grid asks for it."""
        key = tuple(names)
        if key not in self._found:
            matching = {module: shape for module, shape in self.shapes.items() if any(is_target(module, name) for name in key)}
            self._found[key] = matching
        return self._found[key]

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Number of layers, hidden size and vocabulary size, from the shapes."""
        layers = len({part for name in self.shapes for part in name.split(".") if part.isdigit()}) or 1
        vocabulary, hidden = max(self.shapes.values(), key=lambda shape: shape[0])
        return layers, hidden, vocabulary


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """A data set that was read: the hash of its split, its schema, its held-out records, and the mean lengths of records in characters."""

    reference: str
    sha256: str
    schema: Schema
    train: int
    test: list[Record]
    characters: float
    response_characters: float


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Models by reference, data sets by `data_key`, the error for each reference that could not be resolved, and the hash of the weights and the tokenizer
    of an encoder of BERTScore that is a folder, where hashes were requested."""

    models: dict[str, ModelFacts]
    datasets: dict[str, DataFacts]
    unresolved: dict[str, str]
    encoder_sha256: str | None = None

    def require_all(self) -> None:
        """Raise `CoraError` that lists every model and data set that could not be resolved."""
        if self.unresolved:
            raise CoraError("; ".join(dict.fromkeys(self.unresolved.values())))


def used_sources(grid: Grid) -> list[str]:
    """Names of the source models that the basis of some row uses, in the order of the pool."""
    used = {name for row in grid.rows for name in row.sources}
    return [name for name in grid.models if name in used]


def references(grid: Grid) -> tuple[list[str], dict[str, tuple[str, Values]]]:
    """References of all models that the grid needs, and its data sets by key, each with the settings of its split."""
    settings = [grid.models[name] for name in used_sources(grid)]
    judges = [grid.judge["judge_model"]] if grid.judge and "judge_model" in grid.judge else []
    models = [grid.model, *(value for value in settings if isinstance(value, str)), *judges]
    splits = [(grid.datasets[row.dataset], split_settings(grid, row)) for row in grid.rows if row.dataset]
    splits += [(value["dataset"], value) for value in settings if not isinstance(value, str)]
    return list(dict.fromkeys(models)), {data_key(reference, values): (reference, values) for reference, values in splits}


def split_settings(grid: Grid, row: Row) -> Values:
    """What determines the split of a row's data: the settings of the file, and whether the row trains on every answer."""
    return grid.train | {name: value for name, value in (row.train or {}).items() if name == _EVERY_ANSWER}


def data_key(reference: str, settings: Values) -> str:
    """Key of a data set and its split. Rows and source models may split the same data set differently."""
    own = [f"{name}={settings[name]}" for name in SPLIT_KEYS if name in settings]
    return " ".join([reference, *own, *([f"{_EVERY_ANSWER}=all"] if _every_answer(settings) else [])])


def _every_answer(settings: Values) -> bool:
    """Whether training records are dropped where any answer of theirs is to a held-out prompt."""
    return settings.get(_EVERY_ANSWER) == "all"


def require_on_hub(grid: Grid) -> None:
    """Raise `CoraError` that lists every model that is not on the hub, before the first download.

    A hub that cannot be reached is ignored, because the models may be in the local cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    missing = []
    for reference in references(grid)[0]:
        hub_id, _, revision = reference.partition("@")
        if reference == EMBEDDED_MODEL or Path(reference).expanduser().exists() or hub_id.count("/") != 1:
            continue
        try:
            HfApi().model_info(hub_id, revision=revision or None, timeout=_HUB_SECONDS)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            missing.append(
                f"model {reference!r} is neither a local directory nor on the hub (if it is private, log in "
                "with `hf auth login`)"
            )
        except Exception:  # the hub's client raises many types if the hub is unreachable or busy
            continue
    if missing:
        raise CoraError("; ".join(missing))


def find_inputs(grid: Grid, memory: Path | None, trust_remote_code: bool = False, weights: bool = True) -> Inputs:
    """Find every model and data set that the grid names.

    `memory` is a file that caches the hashes of weights, valid while size and times of the files are unchanged.
    With None no weights are hashed. Without `weights` a model may be its configuration and its tokenizer alone, as is enough for a plan.
    """
    models, datasets = references(grid)
    digests = _Digests(memory) if memory else None
    found_models: dict[str, ModelFacts] = {}
    found_data: dict[str, DataFacts] = {}
    unresolved: dict[str, str] = {}
    for reference in models:
        try:
            model = resolve_model(reference, weights)
            planned = not (weights or model.is_adapter or model.has_weights)
            found_models[reference] = (
                _planned_facts(model, trust_remote_code) if planned else _model_facts(model, digests, trust_remote_code)
            )
        except CoraError as error:
            unresolved[reference] = str(error)
    for key, (reference, settings) in datasets.items():
        try:
            split = load_split(
                reference,
                settings.get("test_size"),
                settings.get("split_seed", 0),
                settings.get("validation_size"),
                choice=Choice(settings.get("columns"), settings.get("subset"), settings.get("split")),
                test_dataset=settings.get("test_dataset"),
                every_answer=_every_answer(settings),
            )
            found_data[key] = _data_facts(reference, split)
        except CoraError as error:
            unresolved[reference] = str(error)
    encoder, encoder_sha256 = (grid.evaluate or {}).get("bertscore_model"), None
    if digests and encoder and (place := Path(encoder).expanduser()).is_dir():
        try:
            model = ModelPath(encoder, place, None)
            encoder_sha256 = hashing.sha256_json([digests.of(model), model.text_hash()])
        except CoraError as error:
            unresolved[encoder] = str(error)
    return Inputs(found_models, found_data, unresolved, encoder_sha256)


def _model_facts(model: ModelPath, digests: "_Digests | None", trust_remote_code: bool) -> ModelFacts:
    sha256 = digests.of(model) if digests else None
    if model.is_adapter:
        base_sha256 = None
        with contextlib.suppress(CoraError):  # a basis of its change alone needs no base
            base_sha256 = digests.of(base_of(model)) if digests else None
        return ModelFacts(model.reference, sha256, {}, 0, 0, base_sha256=base_sha256)
    checkpoint = Checkpoint(model)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    matrices = loaded_matrices(model, checkpoint).shapes
    embedded = sum(size for name, size in sizes.items() if "embed" in name or ".wte" in name)
    # A tied head is stored once, but still costs a matrix product.
    total, heads = sum(sizes.values()), model.attention_heads()
    ends = tuple(end_tokens(model.generation_config().get("eos_token_id"), ()))
    text = model.text_hash(), ends, model.has_own_code
    return ModelFacts(model.reference, sha256, matrices, total, embedded, heads, _is_dated(model, trust_remote_code), *text)


def _planned_facts(model: ModelPath, trust_remote_code: bool) -> ModelFacts:
    """Facts of a model that holds no weights, whose hash is not known."""
    found = skeleton_of(model, trust_remote_code).model
    total = sum(weight.numel() for weight in found.parameters())
    embedded = sum(weight.numel() for name, weight in found.named_parameters() if "embed" in name or ".wte" in name)
    shapes, heads = PlannedSource(model, trust_remote_code).shapes, model.attention_heads()
    ends = tuple(end_tokens(model.generation_config().get("eos_token_id"), ()))
    text = model.text_hash(), ends, model.has_own_code
    return ModelFacts(model.reference, None, shapes, total, embedded, heads, _is_dated(model, trust_remote_code), *text)


def _is_dated(model: ModelPath, trust_remote_code: bool) -> bool:
    """Whether the model's chat template writes the date into prompts; a tokenizer that cannot be loaded is for the steps to report."""
    files = [model.path / "tokenizer_config.json", *model.path.rglob("*.jinja")]
    if not any(CLOCK.encode() in file.read_bytes() for file in files if file.is_file()):
        return False
    with contextlib.suppress(CoraError):
        return reads_clock("chat", load_tokenizer(model, trust_remote_code))
    return False


def _data_facts(reference: str, split: DataSplit) -> DataFacts:
    sample = split.train[:200]
    texts = [_texts(record) for record in sample]
    return DataFacts(
        reference,
        split.content_hash(),
        split.schema,
        len(split.train),
        split.test,
        sum(len(prompt) + len(response) for prompt, response in texts) / len(texts),
        sum(len(response) for _, response in texts) / len(texts),
    )


def _texts(record: Record) -> tuple[str, str]:
    """Approximate text of a record's prompt and response, for estimating lengths only."""
    if "messages" in record:
        contents = [str(message.get("content") or message.get("tool_calls") or "") for message in record["messages"]]
        return "".join(contents[:-1]), contents[-1]
    response = next(name for name in ("output", "completion", "text") if name in record)
    return "".join(str(record.get(key, "")) for key in ("instruction", "input", "prompt")), str(record[response])


class _Digests:
    """Content hashes of models, cached while size and times of their files are unchanged."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, Any] = read_json(memory, dict[str, KnownHash]) if memory.exists() else {}
        except CoraError:
            self._known = {}  # only a cache: hashes are computed again

    def of(self, model: ModelPath) -> str:
        state = _state(model.hashed_files())
        key = str(model.path.resolve())
        known = self._known.get(key)
        if known is not None and known["state"] == state:
            return str(known["sha256"])
        self._known[key] = {"state": state, "sha256": model.content_hash()}
        writing.write_json(self._memory, self._known)
        return str(self._known[key]["sha256"])


def _state(files: Iterable[Path]) -> list[list[Any]]:
    # Copying and unpacking can keep the time of modification of the original, but not that of the change on this disk.
    found = [(file.name, file.stat()) for file in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found]
