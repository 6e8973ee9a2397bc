"""Build every built-in set: draw records from families of generators, drop duplicates and hold out complete groups.

The families are in the modules of their subject; files and hub data are read by `cora_cli.data.split`.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cora_cli.hashing import sha256_text

Item = TypeVar("Item")

SPARE = 1.25  # draw more than the target, because held-out groups do not have exact sizes
PATIENCE = 40  # repeats in a row after which a family counts as exhausted


class Dice:
    """Seeded choices based only on `random()`, the one method whose sequence Python guarantees never to change."""

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
        """`count` different positions of `pool`, in random order. Raises `ValueError` if it holds fewer."""
        if count > len(pool):
            raise ValueError(f"cannot draw {count} elements from {len(pool)}")
        return self.shuffled(pool)[:count]

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """`count` integers in [low, high], repeats allowed."""
        return [self.between(low, high) for _ in range(count)]


@dataclass(frozen=True)
class Draft:
    """One record before the split. Drafts of a family with the same `group` are all on the same side of the split."""

    instruction: str
    output: str
    input: str = ""
    group: str = ""
    assertions: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[str, str]:
        """The text that the model sees; two records with the same prompt are duplicates."""
        return self.instruction, self.input

    @property
    def holdout_key(self) -> str:
        """The group, or else the input text, so that two wordings of one question are always on the same side of the split."""
        return self.group or self.input or self.instruction

    def record(self) -> dict[str, Any]:
        """The record as stored in a data set; `assertions` only if there are any."""
        columns: dict[str, Any] = {"instruction": self.instruction, "input": self.input, "output": self.output}
        return columns | {"assertions": list(self.assertions)} if self.assertions else columns


Family = Callable[[Dice], Draft]


@dataclass(frozen=True)
class BuiltinSplit:
    """The two sides of a built-in set; columns `instruction`, `input`, `output`, for code also `assertions`."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def draw(dice: Dice, families: Sequence[Family], count: int, excluded: frozenset[str]) -> list[list[Draft]]:
    """At least `count` drafts with different prompts, one list per family, drawn in turns; no text or answer is in `excluded`.

    A family that runs out of new drafts stops early and the others fill the gap. Raises `ValueError` if all run out.
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
    """A set of exactly `train` and `test` records in random order, with every family in proportion on both sides.

    Complete groups of drafts (`Draft.holdout_key`) are held out. Raises `ValueError` if the families are too small.
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
        raise ValueError(f"{seed}: {len(kept)} training and {len(held)} held-out drafts are too few for {train} and {test}")
    return BuiltinSplit(
        train=[draft.record() for draft in dice.shuffled(kept)[:train]],
        test=[draft.record() for draft in dice.shuffled(held)[:test]],
    )
