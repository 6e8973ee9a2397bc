"""Questions with their answers, such as GSM8K.

A question that comes with a passage or with choices is none of these: the question alone would be another task.
"""

from cora_cli.data.formats.shape import Raw, Shape, renamed


def _read(record: Raw, where: str) -> Raw:
    return renamed(record, {"question": "prompt", "answer": "completion"})


_PARTS_OF_THE_PROMPT = frozenset({"context", "passage", "document", "article", "choices", "options", "input", "instruction"})
QUESTION_ANSWER = Shape("question/answer", "prompt", ("question", "answer"), _read, _PARTS_OF_THE_PROMPT)
