"""The families of each built-in set, and the five single skills; the demonstration fine-tunes one model on each skill.

The skills use generators of `builtin:instruct` or similar forms; the families are defined in the module of their subject.
"""

from collections.abc import Mapping, Sequence

from cora_cli.data.builtin import (
    code_data,
    code_lists,
    code_numbers,
    code_text,
    facts,
    labels,
    lists,
    numbers,
    passages,
    sql,
    texts,
    writing,
)
from cora_cli.data.builtin.build import Dice, Draft, Family


def arithmetic(dice: Dice) -> Draft:
    """A word problem, always given as an input text, with the steps as its answer."""
    question, working = dice.choice(numbers.PROBLEMS)(dice)
    lead = dice.choice(
        ("Solve the problem. Show the working.", "Calculate step by step.", "Work this out and explain each step.")
    )
    return Draft(lead, working, question)


def json_object(dice: Dice) -> Draft:
    """A sentence as JSON; the fields are named in the instruction."""
    draft = lists.extract_json(dice)
    return Draft(
        f"{draft.instruction} {dice.choice(('Answer with JSON only.', 'Return nothing else.'))}", draft.output, draft.input
    )


def rewrite(dice: Dice) -> Draft:
    """An informal message made formal or the other way round, or a sentence in another tense or voice."""
    draft = writing.rewrite_tone(dice) if dice.chance(0.7) else writing.change_verb(dice)
    return Draft(
        f"{draft.instruction} {dice.choice(('Keep the meaning.', 'Give only the new text.'))}", draft.output, draft.input
    )


FAMILIES: Mapping[str, Sequence[Family]] = {
    "instruct": [
        family for module in (passages, writing, texts, labels, lists, numbers, facts, sql) for family in module.FAMILIES
    ],
    "code": [family for module in (code_lists, code_text, code_numbers, code_data) for family in module.FAMILIES],
    "task-sentiment": [labels.sentiment_task],
    "task-arithmetic": [arithmetic],
    "task-json": [json_object],
    "task-rewrite": [rewrite],
    "task-sql": [sql.query],
}
