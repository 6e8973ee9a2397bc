"""What the user should know about the records of a run: what is cut, dropped, unused or trained otherwise than it reads.

A run says it when it starts, and a dry run as well.
"""

from collections.abc import Iterator
from pathlib import Path

from cora_cli.data.encode import notices
from cora_cli.data.records import earlier_answers, is_among, repeated_notice, repeated_prompts, unused_columns
from cora_cli.data.templates import end_notice, plain_notice, unread_notice
from cora_cli.errors import CoraError
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.trained_on import known_prompts
from cora_cli.training.config import TrainConfig
from cora_cli.training.prepare import Prepared


def notices_on_records(config: TrainConfig, prepared: Prepared) -> Iterator[str]:
    """One sentence for each fact."""
    for name, encoded in (("training", prepared.train), ("held-out", prepared.test), ("validation", prepared.validation)):
        for notice in notices(encoded):
            yield f"{name} records: {notice}"
    data = prepared.data
    records = [*data.train, *data.test]
    if unused := unused_columns(records, data.schema):
        yield f"{config.dataset}: columns that are not used: {', '.join(unused)}"
    if unread := prepared.template.unread(records):
        yield f"{config.dataset}: {unread_notice(unread)}"
    if (end := prepared.template.end_as_text) is not None:
        yield f"{config.model}: {end_notice(end)}"
    if config.template == "auto" and (data.schema, prepared.template.name) == ("prompt", "plain"):
        yield f"{config.dataset}: {plain_notice(prepared.template.tokenizer)}"
    if config.train_on == "last" and (several := sum(map(earlier_answers, data.train))):
        yield f"{several} training conversations have earlier answers, which carry no loss; --train-on all trains on each answer"
    if data.overlapping:
        yield f"{data.overlapping} training records dropped: their prompts are also in the held-out or validation set"
    measured = data.test[: config.eval_limit]
    if repeated := repeated_prompts(measured, data.schema):
        yield f"held-out records: {repeated_notice(repeated, len(measured))}"
    yield from _behind_basis(prepared)[1]
    for model in models_behind(config, prepared):
        prompts = known_prompts(model)
        if known := sum(is_among(record, data.schema, prompts) for record in data.test):
            yield f"{known} of {len(data.test)} held-out records have prompts that {model.reference} was already trained on"


def models_behind(config: TrainConfig, prepared: Prepared) -> Iterator[ModelPath]:
    """The models whose training a run carries on: its base, those that it starts from and, as far as they are at hand, those of its basis."""
    yield prepared.model_path
    for reference in config.start_models or ():
        yield resolve_model(reference, weights=False)
    yield from _behind_basis(prepared)[0]


def _behind_basis(prepared: Prepared) -> tuple[list[ModelPath], list[str]]:
    """The models of which the basis is made and that are at hand; and sentences on those whose records cannot be read, without which a basis serves."""
    found, faults = [], []
    for source in prepared.basis.sources if prepared.basis else ():
        if (place := Path(source.reference)).is_dir():
            model = ModelPath(source.reference, place, source.revision)
            try:
                known_prompts(model)
            except CoraError as error:
                faults.append(f"which prompts {model.reference}, a source of the basis, was trained on is not known: {error}")
            else:
                found.append(model)
    return found, faults
