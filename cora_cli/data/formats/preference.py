"""Preference data, with chosen and rejected answers: no shape that can be trained, but what would work is said."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli.data.formats.prompt import TALK, holds_conversation
from cora_cli.data.formats.shape import Raw, Shape, is_nan
from cora_cli.errors import CoraError
from cora_cli.reading import Malformed, parse_json

_PROMPTS = ("prompt", "question", "instruction", "query", "input", "messages", "conversations")
_PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
"""The columns of the two answers: the usual ones, and OpenAI's."""
_MARKS = ("label", "kto_tag")
"""Columns that say whether an answer is wanted: that of TRL and axolotl, and that of LLaMA-Factory."""


def advice_for_preferences(record: Raw) -> str | None:
    """How to train on the chosen answers of preference data; None for records that are none, or that have the answer in a conversation too."""
    answer = next((chosen for chosen, rejected in _PAIRS if record.keys() >= {chosen, rejected}), None)
    if answer is None:
        return None
    chosen = _parsed(record[answer])
    prompt = next((name for name in _PROMPTS if name in record), None)
    start = "preference data; to train on the chosen answers:"
    if isinstance(chosen, list) and (len(chosen) > 1 or prompt is None):
        return f"{start} --columns messages={answer}"
    if prompt is None:
        return f"{start} --columns text={answer} takes them as they are, with loss on all of the text"
    columns = f"--columns prompt={prompt},response={answer}"
    asked, answered = holds_conversation(_parsed(record[prompt])), holds_conversation(chosen)
    if asked != answered:
        return f"{start} write {answer if asked else prompt} as a list of messages too, then give {columns}"
    if prompt == "instruction" and record.get("input"):
        return f"{start} --columns prompt=instruction,input=input,response={answer}"
    return f"{start} {columns}"


def lacks_answer(record: Raw) -> bool:
    """Whether a conversation of a record ends with what is to be answered, so that the answer is in another column."""
    talks = [talk for name in ("messages", "conversations") if isinstance(talk := _parsed(record.get(name)), list)]
    speakers = [talk[-1].get("role", talk[-1].get("from")) for talk in talks if talk and isinstance(talk[-1], Mapping)]
    return any(speaker in ("user", "human") for speaker in speakers)


def _parsed(value: Any) -> Any:
    """A value, or the messages whose JSON text it is."""
    if isinstance(value, str) and TALK.match(value):
        with contextlib.suppress(Malformed):
            return parse_json(value)
    return value


def refuse_unwanted(located: Sequence[tuple[str, Any]], shape: Shape) -> None:
    """Raise `CoraError` at the first record that says that its answer is not wanted, unless the user named the columns.

    Next to a prompt and a completion, tables may hold 0 and 1 for false and true. Where a data set has no other labels, nothing tells those from
    the numbers of two classes, so they are refused as well; with other labels they are classes.
    """
    if shape.is_chosen:
        return
    records = [(where, record) for where, record in located if isinstance(record, Mapping)]
    for name in _MARKS:
        marks = [(where, record, _mark(record[name])) for where, record in records if name in record]
        is_pair = len(shape.needs) == 2 and shape.needs[0] == "prompt"
        could_be_wanted = is_pair and all(mark in (0, 1, None) for _, _, mark in marks)
        for where, record, mark in marks:
            answer = "answer" if len(shape.needs) == 1 else shape.needs[1]
            remedy = f"train on all of them with --columns {choice_of(shape, record)}"
            if mark is False:
                raise CoraError(
                    f"{where}: the {name} is false, by which preference data mark the {answer} as rejected; leave such records out, or {remedy}"
                )
            if could_be_wanted and mark == 0:
                raise CoraError(
                    f"{where}: the {name} is 0, and no record has another than 0 or 1: it may mark the {answer} as rejected, as in preference "
                    f"data; if it does, leave such records out, else {remedy}"
                )


def _mark(value: Any) -> Any:
    """A label with its text as the truth value or the number that it spells; None for nothing, such as an empty cell."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("", "true", "false"):
            return {"": None, "true": True, "false": False}[text]
        try:
            value = float(text)
        except ValueError:
            return text
    return None if is_nan(value) else value


def choice_of(shape: Shape, record: Raw) -> str:
    """The columns of a shape as a user names them."""
    if len(shape.needs) == 1:
        return f"{shape.schema}={shape.needs[0]}"
    given = next((name for name in ("input", "context") if record.get(name) and name in shape.reads), None)
    middle = f"input={given}," if given else ""
    return f"prompt={shape.needs[0]},{middle}response={shape.needs[1]}"
