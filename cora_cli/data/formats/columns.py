"""The columns that a user names with `--columns`, for data sets whose shape is not known or could be several."""

import dataclasses
from collections.abc import Sequence

from cora_cli.data.formats.conversation import messages_of
from cora_cli.data.formats.prompt import pair_of_messages
from cora_cli.data.formats.shape import OF_PROMPTS, Raw, Shape
from cora_cli.data.records import TEMPLATE_COLUMNS, TEST_COLUMNS, Schema
from cora_cli.errors import UsageError

HOW_TO_CHOOSE = "name the columns to use, such as --columns prompt=QUESTION,response=ANSWER"
_FORMS: dict[frozenset[str], tuple[Schema, dict[str, str]]] = {
    frozenset({"prompt", "response"}): ("prompt", {"prompt": "prompt", "response": "completion"}),
    frozenset({"prompt", "input", "response"}): (
        "alpaca",
        {"prompt": "instruction", "input": "input", "response": "output"},
    ),
    frozenset({"messages"}): ("messages", {"messages": "messages"}),
    frozenset({"text"}): ("text", {"text": "text"}),
}
"""For each set of roles that makes a record: its schema, and the column of each role in it."""
_OF_SHAPES = frozenset(
    {
        *("instruction", "input", "output", "context", "response", "prompt", "completion", "question", "answer"),
        *("messages", "conversations", "system", "text", "canonical_solution", "code"),
    }
)
"""Columns by which a shape is recognised. Those that were not chosen are left out, so that nothing later takes them for the record."""


def chosen_shape(choices: Sequence[str]) -> Shape:
    """The shape of `role=column` choices. Raises `UsageError` for roles that make no record."""
    pairs = [choice.partition("=") for choice in choices]
    if bad := next(
        (choice for choice, (role, sign, column) in zip(choices, pairs, strict=True) if not (role and sign and column)), None
    ):
        raise UsageError(f"--columns must be pairs such as prompt=question,response=answer, not {bad!r}")
    columns = {role.strip(): column.strip() for role, _, column in pairs}
    form = _FORMS.get(frozenset(columns))
    if form is None or len(columns) < len(pairs):
        known = "; ".join(
            ", ".join(names) for names in (("prompt", "response"), ("prompt", "input", "response"), ("messages",), ("text",))
        )
        raise UsageError(f"--columns must name one of these: {known}; not {', '.join(role for role, _, _ in pairs)}")
    if len(set(columns.values())) < len(columns):
        raise UsageError(f"--columns uses one column twice: {', '.join(choices)}")
    schema, names = form

    def read(record: Raw, where: str) -> Raw:
        chosen = {names[role]: record[column] for role, column in columns.items()}
        if schema == "messages":
            chosen["messages"] = messages_of(chosen["messages"], where, columns["messages"])
        return {**chosen, **_rest(record, schema, {*chosen, *columns.values()})}

    name = " and ".join(f"{role} from {column}" for role, column in columns.items())
    if columns.keys() != {"prompt", "response"}:
        return Shape(name, schema, tuple(columns.values()), read, is_chosen=True)
    pair = pair_of_messages(name, columns["prompt"], columns["response"], is_chosen=True)

    def read_pair(record: Raw, where: str) -> Raw:
        own = {column: record[column] for column in pair.needs}
        return pair.read({**own, **_rest(record, "messages", {"messages", *own})}, where)

    of_messages = dataclasses.replace(pair, read=read_pair)
    return Shape(name, schema, tuple(columns.values()), read, is_chosen=True, of_messages=of_messages)


def _rest(record: Raw, schema: Schema, taken: set[str]) -> Raw:
    """The columns next to those that are `taken`, without any by which a shape is recognised or that would be a part of a prompt."""
    return {
        name: value
        for name, value in record.items()
        if name in TEST_COLUMNS
        or (schema == "messages" and name in TEMPLATE_COLUMNS)
        or (name not in (_OF_SHAPES | taken) and name.strip().lower() not in OF_PROMPTS)
    }
