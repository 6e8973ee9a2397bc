"""Every judgment that is to be asked for, in an order that tells the judge nothing.

A message names no system. Answers of models, references and shuffled references come in random order, and pairs in both orders.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli import hashing
from cora_cli.evaluation.judge.answers import Answers
from cora_cli.evaluation.judge.rubrics import Rubric
from cora_cli.evaluation.judge.wording import write_message


@dataclasses.dataclass(frozen=True)
class Question:
    """One judgment: of a record's answer under one name, or under two in the order in which they are shown; `repeat` is 0 or 1."""

    rubric: Rubric
    record: int
    names: tuple[str, ...]
    repeat: int
    prompt: str
    reference: str
    answers: tuple[str, ...]
    request_sha256: str = ""

    def message(self, again: str = "") -> str:
        """The message to send; `again` says why the last reply was of no use."""
        return write_message(self.rubric, self.prompt, self.reference, self.answers, again)


def all_questions(
    rubrics: Sequence[Rubric], answers: Answers, retest: bool, seed: int, judge: Mapping[str, Any]
) -> list[Question]:
    """All questions in random order. Equal requests of one repetition have one hash, and so one judgment.

    `judge` is what else decides about a reply: the judge and the settings of its requests.
    """
    found = []
    for rubric in rubrics:
        pairs = answers.pairs() if rubric.is_preference else []
        shown: list[tuple[str, ...]] = [names for pair in pairs for names in (pair, pair[::-1])]
        shown = shown or [(name,) for name in answers.names]
        for names in shown:
            texts = [answers.of(name) for name in names]
            for record, prompt in enumerate(answers.prompts):
                ours = tuple(text for each in texts if (text := each[record]) is not None)
                if len(ours) == len(names):
                    reference = answers.references[record]
                    found += [Question(rubric, record, names, n, prompt, reference, ours) for n in range(1 + retest)]
    random.Random(seed).shuffle(found)
    return [
        dataclasses.replace(question, request_sha256=hashing.sha256_json([judge, question.message(), question.repeat]))
        for question in found
    ]
