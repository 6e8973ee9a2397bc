"""Several processes, as torchrun starts them, that answer the prompts of an evaluation together.

The first does the evaluation and alone reads and writes its files. The others wait for work, which it deals out wave by wave: the
computation of a wave does not depend on who does it (see `generate`).
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cora_cli.environment import launched_processes

_PATIENCE = datetime.timedelta(days=30)
"""Processes without a prompt wait for the others; torchrun ends all of them where one fails."""


class Processes:
    """This process among `count`; `ALONE` is a process without others."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does the evaluation."""
        return self.rank == 0

    def tell(self, what: Any) -> None:
        """Send `what` from the first process to the others."""
        if self.count > 1:
            torch.distributed.broadcast_object_list([what], 0)

    def told(self) -> Any:
        """What the first process tells next."""
        heard = [None]
        torch.distributed.broadcast_object_list(heard, 0)
        return heard[0]

    def deal(self, waves: Sequence[Any], answer: Callable[[Any], Any]) -> Iterator[list[tuple[Any, Any]]]:
        """Have `waves` answered, as many at a time as there are processes; yields waves with their answers.

        Raises what the answer of any process raised. The others take part by calling `answer_round` when they are told its number.
        """
        for start in range(0, len(waves), self.count):
            self.tell(start)
            yield self.answer_round(waves, start, answer)

    def answer_round(self, waves: Sequence[Any], start: int, answer: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
        """Answer the wave of this process among those from `start` on; returns those of all processes with their answers."""
        group = waves[start : start + self.count]
        if self.count == 1:
            return [(group[0], answer(group[0]))]
        mine: tuple[Any, Exception | None] = (None, None)
        try:
            if self.rank < len(group):
                mine = answer(group[self.rank]), None
        except Exception as error:  # handed to the first process, which would wait for it forever
            mine = None, error
        answers: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(answers, mine)
        if failed := next((error for _, error in answers if error is not None), None):
            raise failed
        return [(wave, found) for wave, (found, _) in zip(group, answers, strict=False)]


ALONE = Processes()


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that a launcher started for this command, which meet here; at the end, the first sends the others home."""
    count = launched_processes()
    if count == 1:
        yield ALONE
        return
    # Only objects are exchanged, which needs no GPU.
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    processes = Processes(torch.distributed.get_rank(), count)
    try:
        yield processes
    except Exception:
        _dismiss(processes)
        raise
    _dismiss(processes)


def _dismiss(processes: Processes) -> None:
    if processes.is_first:
        processes.tell(None)
    torch.distributed.destroy_process_group()
