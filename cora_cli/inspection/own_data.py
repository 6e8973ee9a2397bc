"""The records on which each inspected model is scored: those that its training held out, or those of a data set that the user names.

Records whose prompts any of the inspected models was trained on are left out: what a model remembers says nothing about a common subspace.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cora_cli.adapters.base import check_base
from cora_cli.adapters.install import target_linears
from cora_cli.data.encode import Example, encode_records, notices
from cora_cli.data.records import Record, Schema, is_among
from cora_cli.data.split import BUILTIN_PREFIX, load_records, load_test_records
from cora_cli.data.templates import Template, choose_template
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.targets import check_test_records
from cora_cli.models.configuration import load_configuration
from cora_cli.models.fused import split_projections
from cora_cli.models.loading import context_length
from cora_cli.models.model_path import ModelPath
from cora_cli.models.skeleton import build_skeleton
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.models.trained_on import check_code, say_unrecorded, trained_on
from cora_cli.progress import note, say
from cora_cli.records import read_run, template_date
from cora_cli.rundir import RunDirectory
from cora_cli.settings import TemplateName
from cora_cli.weights.sources import WeightSource
from cora_cli.writing import utf8

OWN = "own"
"""The value of --data for which each run is scored on the records that it held out."""


@dataclasses.dataclass(frozen=True)
class OwnData:
    """The data of one model: where they come from, and its records as tokens."""

    dataset: str
    examples: Sequence[Example]


@dataclasses.dataclass(frozen=True)
class _Request:
    """The records to read, and the run whose template and length of records apply."""

    dataset: str
    run: RunDirectory | None
    held_out: bool


def read_own_data(
    requests: Sequence[str],
    models: Mapping[str, ModelPath],
    sources: Mapping[str, WeightSource],
    base: ModelPath,
    target_modules: tuple[str, ...],
    limit: int | None,
) -> dict[str, OwnData]:
    """The data of each of `models` that has any, the first `limit` examples of it; reads no weights.

    `requests` are the values of --data: `own`, or pairs such as `json=records.jsonl`. Raises `UsageError` for a request that fits no
    model, and `CoraError` for data that cannot be read or hold no records, and for `target_modules` that are no linear layers.
    """
    found = _requests(requests, models)
    if without := [name for name in models if name not in found]:
        note(f"without --data, and so only among the others: {', '.join(without)}")
    skeleton = build_skeleton(_configuration(base))
    split_projections(skeleton, target_modules)
    target_linears(skeleton, target_modules)
    for model in (*models.values(), base):
        say_unrecorded(model)
    known = {digest for model in (*models.values(), base) if (record := trained_on(model)) for digest in record.prompts}
    data = {}
    for name, request in found.items():
        if models[name].is_adapter:
            check_base(models[name], base)
        check_code(models[name], base, trusts=False, remedy="inspect it without --data, which runs no such code")
        data[name] = _read(name, request, models[name], sources[name], base, known, limit)
    return data


def _configuration(base: ModelPath) -> Any:
    try:
        return load_configuration(base)
    except CoraError as error:
        if not base.has_own_code:
            raise
        raise CoraError(
            f"--data passes records through {base.reference}, which transformers knows by the Python code in its folder alone, and `cora inspect` does "
            "not run that; inspect without --data"
        ) from error


def _requests(requests: Sequence[str], models: Mapping[str, ModelPath]) -> dict[str, _Request]:
    """What to read for each model, in the order of `models`: runs that are not named have their own records."""
    given: dict[str, _Request] = {}
    for text in requests:
        if text == OWN:
            continue
        # A name may contain an equals sign, as directories of runs do.
        name = max((name for name in models if utf8(text).startswith(f"{name}=")), key=len, default=None)
        if name is None:
            raise UsageError(
                f"--data {text} names no inspected model; write NAME=DATASET with a NAME of {', '.join(models)}, or {OWN} for runs of "
                "`cora train`"
            )
        if name in given:
            raise UsageError(f"--data names {name} twice; name it once")
        dataset = text.split("=", name.count("=") + 1)[-1]
        if not dataset:
            raise UsageError(f"--data {text} names no data set; write {name}=DATASET")
        source = RunDirectory(Path(dataset).expanduser())
        given[name] = _held_out(source) if source.exists() else _Request(dataset, _run_of(models[name]), False)
    own = {name: _held_out(run) for name, model in models.items() if name not in given and (run := _run_of(model))}
    if not given and not own:
        raise UsageError(
            f"--data {OWN} needs a run of `cora train` among the models; name the data of others with NAME=DATASET"
        )
    together = {**given, **own}
    return {name: together[name] for name in models if name in together}


def _run_of(model: ModelPath) -> RunDirectory | None:
    """The run of `cora train` whose result `model` is."""
    run = RunDirectory(model.path.parent)
    return run if run.exists() and model.path == run.result else None


def _held_out(run: RunDirectory) -> _Request:
    check_test_records(run, read_run(run))
    return _Request(str(run.test_records), run, True)


def _read(
    name: str,
    request: _Request,
    model: ModelPath,
    source: WeightSource,
    base: ModelPath,
    known: set[str],
    limit: int | None,
) -> OwnData:
    records, schema = _load(name, request)
    new = [record for record in records if not is_among(record, schema, known)]
    if len(new) < len(records):
        note(
            f"{name}: {len(records) - len(new)} of {len(records)} records are left out: an inspected model was trained on them"
        )
    if not new:
        raise CoraError(f"{request.dataset} has no records for {name} that no inspected model was trained on; name other data")
    record = read_run(request.run) if request.run else None
    tokenizer = (
        load_tokenizer(base, adapter=model) if model.is_adapter else load_tokenizer(model if model.has_tokenizer else base)
    )
    trained = trained_on(model)
    stated, length = (trained.template, trained.max_length) if trained else (None, None)
    if record:
        stated, length = record["data"]["template"], record["fingerprint"]["settings"].get("max_length")
    # These schemas have one template each, whatever the model was trained with.
    wanted = "auto" if stated is None or schema in ("messages", "text") else cast("TemplateName", stated)
    date = template_date(record) if record else trained.date if trained else None
    template = Template(choose_template(wanted, schema, tokenizer), schema, tokenizer, date)
    if template.reads_clock and date is None:
        say(f"{name}: the chat template writes the date into its prompts: {template.date}")
    config = _configuration(base if model.is_adapter else model)
    context, rows = context_length(config), _embedding_rows(config, source)
    # The training cut its records to its length; that of a model from elsewhere is not known, and only its context limits them.
    encoded = encode_records(new, template, int(length or context), "own", rows, context=context)
    for notice in notices(encoded):
        note(f"records for {name}: {notice}")
    return OwnData(request.dataset, encoded.examples[:limit])


def _load(name: str, request: _Request) -> tuple[list[Record], Schema]:
    if request.held_out and not (Path(request.dataset).is_file() and Path(request.dataset).stat().st_size):
        raise CoraError(f"{name} holds out no records; name its data with --data {name}=DATASET")
    if request.dataset.startswith(BUILTIN_PREFIX):
        return load_test_records(request.dataset)
    return load_records(request.dataset, usual="test")


def _embedding_rows(config: Any, source: WeightSource) -> int:
    """The rows of the model's embedding, which an adapter may have extended."""
    skeleton = build_skeleton(config)
    embedding: Any = skeleton.get_input_embeddings()
    [name] = [name for name, module in skeleton.named_modules() if module is embedding]
    return source.shapes[name][0] if name in source.shapes else int(embedding.weight.shape[0])
