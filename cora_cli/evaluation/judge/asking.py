"""What a judge is to this program: it takes messages and gives replies, or says why there is none."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Call:
    """A message to send. `number` tells the caller which of its calls was answered.

    A reply to a call with an `opening` begins with it, and ends with the object that it opens, where the judge can be held to that.
    """

    number: int
    message: str
    opening: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a judge said, the tokens that it counted (None where it does not say), and the model that it says it is.

    `is_cut`: it ended at the limit of its length.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    model: str | None = None
    is_cut: bool = False


@dataclasses.dataclass(frozen=True)
class NoReply:
    """Why there is no reply. `paid` if the server may have computed one; `last` if the call is not tried again."""

    reason: str
    paid: bool
    last: bool


class Judge(Protocol):
    """Answers calls in any order; an endpoint answers several at a time."""

    identity: dict[str, Any]
    """What decides about its replies apart from the message."""
    has_replied: bool
    """Whether it is known to reply, so that a refusal is for what a message says."""

    def ask(self, calls: Sequence[Call], allowed: Callable[[Call], bool]) -> Iterator[tuple[Call, Reply | NoReply]]:
        """The replies as they come. `allowed` is asked before each request; once it refuses, no further one is sent.

        Raises `CoraError` where no call can succeed, after all replies under way were given.
        """
        ...
