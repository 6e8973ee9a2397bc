"""Draws records from families of generators, drops repeats and holds whole groups out; every shipped set is made here.

It knows nothing of any subject: families live in their own modules, and reading files or hub data is `cora_cli.data`'s affair.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cora_cli.rundir import sha256_text

Item = TypeVar("Item")

SPARE = 1.25  # drawn beyond the target, because held-out groups do not come in exact sizes
PATIENCE = 40  # repeats in a row after which a family counts as exhausted


class Dice:
    """Seeded choices built on `random()` alone, the one method whose sequence Python promises never to change."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(int(sha256_text(seed)[:16], 16)).random

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self._random() * stop)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def choice(self, pool: Sequence[Item]) -> Item:
        """One element of `pool`."""
        return pool[self.below(len(pool))]

    def shuffled(self, pool: Sequence[Item]) -> list[Item]:
        """A new list with the elements of `pool` in random order (Fisher and Yates)."""
        items = list(pool)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def sample(self, pool: Sequence[Item], count: int) -> list[Item]:
        """`count` different positions of `pool`, in random order. Raises `ValueError` where it holds fewer."""
        if count > len(pool):
            raise ValueError(f"cannot draw {count} elements from {len(pool)}")
        return self.shuffled(pool)[:count]

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """`count` integers in [low, high], repeats allowed."""
        return [self.between(low, high) for _ in range(count)]


@dataclass(frozen=True)
class Draft:
    """One record before the split. Drafts of a family that share `group` all land on the same side of it."""

    instruction: str
    output: str
    input: str = ""
    group: str = ""
    assertions: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[str, str]:
        """What the model sees, and so what makes two records the same."""
        return self.instruction, self.input

    @property
    def holdout_key(self) -> str:
        """The group, or else the text worked on, so that another wording of the same question never crosses the split."""
        return self.group or self.input or self.instruction

    def record(self) -> dict[str, Any]:
        """The record as data sets hold it; `assertions` only where there are any."""
        columns: dict[str, Any] = {"instruction": self.instruction, "input": self.input, "output": self.output}
        return columns | {"assertions": list(self.assertions)} if self.assertions else columns


Family = Callable[[Dice], Draft]


@dataclass(frozen=True)
class BuiltinSplit:
    """The two sides of a shipped set; columns `instruction`, `input`, `output`, for code also `assertions`."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def draw(dice: Dice, families: Sequence[Family], count: int, excluded: frozenset[str]) -> list[list[Draft]]:
    """At least `count` drafts with different prompts, one list per family, taken in turns; none with a text or answer in `excluded`.

    A family that has nothing new left stops early and the others make up for it. Raises `ValueError` where all have stopped.
    """
    drawn: list[list[Draft]] = [[] for _ in families]
    seen: set[tuple[str, str]] = set()
    active = list(range(len(families)))
    while active and sum(map(len, drawn)) < count:
        for index in list(active):
            for _ in range(PATIENCE):
                draft = families[index](dice)
                if draft.prompt not in seen and excluded.isdisjoint((draft.holdout_key, draft.output)):
                    seen.add(draft.prompt)
                    drawn[index].append(draft)
                    break
            else:
                active.remove(index)
    if not active:
        raise ValueError(f"the families hold only {sum(map(len, drawn))} different prompts, {count} are needed")
    return drawn


def build(seed: str, families: Sequence[Family], train: int, test: int, excluded: frozenset[str] = frozenset()) -> BuiltinSplit:
    """A set of exactly `train` and `test` records in random order, every family on both sides in proportion.

    Whole groups of drafts (`Draft.holdout_key`) are held out. Raises `ValueError` where the families are too small.
    """
    dice = Dice(seed)
    kept: list[Draft] = []
    held: list[Draft] = []
    for drafts in draw(dice, families, math.ceil(SPARE * (train + test)), excluded):
        groups: dict[str, list[Draft]] = {}
        for draft in drafts:
            groups.setdefault(draft.holdout_key, []).append(draft)
        share = math.ceil(len(drafts) * test / (train + test))
        taken = 0
        for group in dice.shuffled(list(groups.values())):
            (held if taken < share else kept).extend(group)
            taken += len(group)
    if len(kept) < train or len(held) < test:
        raise ValueError(f"{seed}: {len(kept)} training and {len(held)} held-out drafts for {train} and {test}")
    return BuiltinSplit(
        train=[draft.record() for draft in dice.shuffled(kept)[:train]],
        test=[draft.record() for draft in dice.shuffled(held)[:test]],
    )
