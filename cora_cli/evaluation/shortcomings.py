"""Counts the answers whose scores say less than they seem to: those that were cut, are empty, or hold thoughts."""

from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli.evaluation.thoughts import has_thoughts

KINDS = {
    "cut": "cut at the limit of new tokens",
    "empty": "empty",
    "thoughts": "with thoughts, which text metrics score as a part of them",
}
"""What is counted, in words that follow "answers"."""


def count_shortcomings(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of answers of each of `KINDS` in the lines of `predictions.jsonl`, without those of which there are none.

    With several samples, those of the first are counted, which text metrics score. Thoughts that the reference has too are what was asked for.
    """
    counts = dict.fromkeys(KINDS, 0)
    for line in lines:
        prediction, reference = line["prediction"], line["reference"]
        counts["cut"] += line.get("finish_reason") == "length"
        counts["empty"] += not prediction.strip()
        counts["thoughts"] += has_thoughts(prediction, reference)
    return {kind: count for kind, count in counts.items() if count}
