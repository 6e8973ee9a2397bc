"""What the user should know about the records of a run: what is cut, dropped, unused or trained otherwise than it reads.

A run says it when it starts, and a dry run as well.
"""

from collections.abc import Iterator

from cora_cli.data.encode import notices
from cora_cli.data.records import earlier_answers, unused_columns
from cora_cli.data.templates import unread_notice
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
    if config.train_on == "last" and (several := sum(map(earlier_answers, data.train))):
        yield f"{several} training conversations have earlier answers, which carry no loss; --train-on all trains on each answer"
    if data.overlapping:
        yield f"{data.overlapping} training records dropped: their prompts are also in the held-out or validation set"
