"""The answers of several runs to the same prompts, packed so that one page can hold and show them.

The texts are hostile: they are compressed and written in base64, so nothing in them can end the page's script, and `assets/answers.js`
puts them on the page as text only.
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Sequence
from typing import Any

LARGEST_BYTES = 3_600_000
"""Of the packed answers of one page, so that the page with its figures stays below 5 MB."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One run's answer: its `text`, a score (or None) for each measure, and notes such as the fate of its program or a judgment."""

    text: str
    scores: tuple[float | None, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One record: `prompt`, `reference`, and one answer per run."""

    prompt: str
    reference: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Prompts with the answers of `runs`. `measures` names the scores, `lower_is_better` those of them that are better when small."""

    title: str
    runs: tuple[str, ...]
    measures: tuple[str, ...]
    lower_is_better: frozenset[str]
    prompts: tuple[Prompt, ...]


def pack(answers: AnswerSet, largest: int = LARGEST_BYTES) -> str:
    """The set as base64 of gzip of JSON, with the first prompts only where all of them would be more than `largest` characters.

    The JSON says with `total` how many prompts there were.
    """
    count = len(answers.prompts)
    packed = _packed(answers, count)
    while len(packed) > largest and count > 1:
        count = max(1, min(count - 1, int(count * largest / len(packed) * 0.97)))
        packed = _packed(answers, count)
    return packed


def _packed(answers: AnswerSet, count: int) -> str:
    value: dict[str, Any] = {
        "runs": answers.runs,
        "measures": answers.measures,
        "lower": sorted(answers.lower_is_better),
        "total": len(answers.prompts),
        "prompts": [_prompt(prompt) for prompt in answers.prompts[:count]],
    }
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()


def _prompt(prompt: Prompt) -> list[Any]:
    return [
        prompt.prompt,
        prompt.reference,
        [[answer.text, _rounded(answer.scores), answer.notes] for answer in prompt.answers],
    ]


def _rounded(scores: Sequence[float | None]) -> list[float | None]:
    return [None if score is None else round(score, 4) for score in scores]
