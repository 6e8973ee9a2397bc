"""Text without prompts: every token but the first carries loss."""

from cora_cli.data.formats.shape import Shape

ANSWERS = frozenset(
    {"label", "labels", "answer", "answers", "summary", "highlights", "target", "response", "output", "completion"}
)
"""Columns next to `text` that are answers to it: training on the text alone would leave out the task."""
TEXT = Shape("text only", "text", ("text",), incomplete_with=ANSWERS)
