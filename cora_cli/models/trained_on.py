"""What a model was trained on: recorded in its run directory, or next to its weights by `cora merge` and `cora export`.

Scores on prompts of the training say nothing about new ones, so the record must follow the weights. It holds hashes of prompts
(`data.records.prompt_hash`), not the prompts.
"""

import dataclasses
import re
from pathlib import Path

from cora_cli import hashing, rundir, writing
from cora_cli.errors import CoraError
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import note
from cora_cli.reading import read_text
from cora_cli.records import CarriedTraining, read_run, read_sealed, template_date, write_sealed
from cora_cli.rundir import RunDirectory

RECORD, PROMPTS = "trained_on.json", "trained_prompts.txt"
_TRAINED_BY = re.compile(rb"^Trained by cora ", re.MULTILINE)
"""A line of the card of every result (`adapters.card`)."""


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """The hashes of the prompts that a model was trained on, the data sets that they came from, their template, the date that it writes, the
    tokens to which their training cut examples, and whether it ran the code that comes with the base.

    `place` is the directory with the record. It is not `complete` where an early version trained, which recorded no prompts.
    """

    place: Path
    prompts: frozenset[str]
    complete: bool
    datasets: tuple[str, ...]
    date: str | None
    template: str | None = None
    max_length: int | None = None
    trust_remote_code: bool | None = None


def run_of(model: ModelPath) -> RunDirectory | None:
    """The run whose result, or one of whose checkpoints, the model is; None for a model from elsewhere."""
    checkpoints = model.path.resolve().parent
    its = RunDirectory(checkpoints.parent)
    return its if checkpoints == its.checkpoints and its.exists() else rundir.run_of_result(model.path)


def trained_on(model: ModelPath) -> TrainedOn | None:
    """The record of a model's training, None for a model from elsewhere. Raises `CoraError` if the record was changed."""
    if (model.path / RECORD).exists():
        carried = read_sealed(model.path / RECORD, CarriedTraining)
        prompts = _read_prompts(model.path / PROMPTS, carried["trained_prompts_sha256"])
        date, template, length = carried["template_date"], carried.get("template"), carried.get("max_length")
        trusts, datasets = carried.get("trust_remote_code"), tuple(carried["datasets"])
        return TrainedOn(model.path, prompts, carried["complete"], datasets, date, template, length, trusts)
    run = run_of(model)
    if run is None:
        return None
    record = read_run(run)
    data = record["data"]
    prompts = _read_prompts(run.trained_prompts, data.get("trained_prompts_sha256"))
    settings, complete = record["fingerprint"]["settings"], run.trained_prompts.exists()
    date, length, trusts = template_date(record), settings.get("max_length"), settings.get("trust_remote_code")
    return TrainedOn(run.root, prompts, complete, (data["dataset"],), date, data["template"], length, trusts)


def known_prompts(model: ModelPath) -> frozenset[str]:
    """The hashes of the prompts that a model is known to have been trained on."""
    record = trained_on(model)
    return record.prompts if record else frozenset()


def say_unrecorded(model: ModelPath) -> None:
    """Say so where `cora` trained a model and its files were taken away from the record, so that nothing tells which prompts it knows."""
    if trained_on(model) is None and _is_of_cora(model):
        note(
            f"{model.reference} was trained by cora, but the record of its prompts is not next to it, as it is in its run's directory and in what "
            "`cora export` and `cora merge` write: which prompts it was trained on is not known"
        )


def check_code(model: ModelPath, base: ModelPath, trusts: bool, remedy: str = "give --trust-remote-code") -> None:
    """Raise `CoraError` where a model was trained by the code that comes with its base, and this command would take transformers' own class, or the
    other way round: folders with code may have a type that transformers knows too."""
    record = trained_on(model) if base.has_own_code else None
    if record is None or record.trust_remote_code in (None, trusts):
        return
    if record.trust_remote_code:
        raise CoraError(
            f"{model.reference} was trained with --trust-remote-code, by the code that comes with {base.reference}; without it, transformers' own "
            f"class may compute something else: {remedy}"
        )
    raise CoraError(
        f"{model.reference} was trained without the code that comes with {base.reference}, which may compute something else; leave out "
        "--trust-remote-code"
    )


def say_other_weights(adapter: ModelPath) -> None:
    """Say so where an adapter was trained on a base in 4 bits: what is computed from it now is on the base's stored weights."""
    run = run_of(adapter)
    if run is not None and read_run(run)["fingerprint"]["settings"].get("load_in_4bit"):
        note(
            f"{adapter.reference} was trained on its base in 4 bits (--load-in-4bit), and is put on the base's stored weights here: answers and "
            "losses differ a little from those that the training measured"
        )


def say_other_tokenizer(adapter: ModelPath, base: ModelPath) -> None:
    """Say so where the tokenizer or chat template of `base` is no longer the one with which a run trained `adapter`, which has none of its own; and
    where `adapter` has a tokenizer of its own that lacks the chat template of the base's, as one that was downloaded in part."""
    if adapter.has_tokenizer and base.has_chat_template and not adapter.has_chat_template:
        note(
            f"the tokenizer in {adapter.reference} has no chat template, and that of its base {base.reference} is not taken in its place; if the adapter was "
            "trained with it, copy chat_template.jinja there"
        )
    run = run_of(adapter)
    if run is None or adapter.has_tokenizer:
        return
    then = read_run(run)["fingerprint"].get("tokenizer_sha256")
    if then is not None and base.text_hash() != then:
        note(
            f"the tokenizer of {base.reference}, or its chat template, is not the one that {adapter.reference} was trained with, so its prompts and "
            "answers may be others; restore it, or train again"
        )


def _is_of_cora(model: ModelPath) -> bool:
    card = model.path / rundir.CARD
    return (model.path / "cora.json").exists() or (card.is_file() and _TRAINED_BY.search(card.read_bytes()) is not None)


def _read_prompts(path: Path, expected: str | None) -> frozenset[str]:
    if expected is not None and (not path.is_file() or hashing.sha256_file(path) != expected):
        raise CoraError(
            f"{path} {'was changed after it was written' if path.exists() else 'is missing'}, so nothing tells which prompts were trained on; restore it"
        )
    return frozenset(read_text(path).split() if path.exists() else ())


def carry_record(directory: Path, *models: ModelPath) -> None:
    """Write what `models` were trained on into `directory`, which holds a model that was made of them; nothing if none has a record."""
    for model in models:
        say_unrecorded(model)
    found = [each for model in models if (each := trained_on(model))]
    if not found:
        return
    listed = "".join(f"{digest}\n" for digest in sorted({digest for each in found for digest in each.prompts}))
    record: CarriedTraining = {
        "datasets": list(dict.fromkeys(name for each in found for name in each.datasets)),
        "trained_prompts_sha256": hashing.sha256_text(listed),
        "complete": all(each.complete for each in found),
        "template_date": next((each.date for each in found if each.date), None),
        "template": next((each.template for each in found if each.template), None),
        "max_length": next((each.max_length for each in found if each.max_length), None),
        "trust_remote_code": found[0].trust_remote_code,
    }
    write_sealed(directory / RECORD, record)
    writing.write_text(directory / PROMPTS, listed)
