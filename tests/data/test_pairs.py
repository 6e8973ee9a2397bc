"""Pairs of a prompt and an answer that are messages, and preference data: what is read as a conversation, and what is refused with what would work."""

import json

import numpy as np
import pytest

from cora_cli.data.records import prompt_key, turns
from cora_cli.data.split import Choice, load_records
from cora_cli.errors import CoraError
from tests.data.files import SAID, TALK, jsonl

ASKED, ANSWERED = SAID[:1], SAID[1:]


@pytest.mark.parametrize(
    ("record", "columns", "name"),
    [
        ({"prompt": ASKED, "completion": ANSWERED}, None, "prompt/completion of messages"),
        ({"prompt": ASKED, "response": ANSWERED}, None, "prompt/response of messages"),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, None, "prompt/completion of messages"),
        ({"prompt": json.dumps(ASKED), "completion": json.dumps(ANSWERED)}, None, "prompt/completion of messages"),
        (
            {"response": "wrong", "rejected": ANSWERED, "prompt": ASKED, "chosen": ANSWERED},
            ("response=chosen", "prompt=prompt"),
            "response from chosen and prompt from prompt of messages",
        ),
    ],
)
def test_a_prompt_and_an_answer_that_are_lists_of_messages_are_one_conversation(record, columns, name, tmp_path, capfd):
    dataset = jsonl(tmp_path / "a.jsonl", {**record, "id": 1, "tools": [{"name": "f"}]})
    records, schema = load_records(dataset, Choice(columns))
    assert (schema, records[0]["messages"], records[0]["id"], records[0]["tools"]) == ("messages", SAID, 1, [{"name": "f"}])
    assert not {"prompt", "completion", "response", "chosen"} & records[0].keys()
    assert f"{dataset}: read as {name}, 1 record\n" in capfd.readouterr().err


def test_only_the_completion_of_a_conversation_is_trained_also_where_every_answer_is(tmp_path):
    record = {"prompt": [ASKED[0], {**ANSWERED[0], "weight": None}, *ASKED], "completion": ANSWERED, "system": "s"}
    (read,), schema = load_records(jsonl(tmp_path / "a.jsonl", record))
    assert [message["role"] for message in read["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [len(turn["messages"]) for turn in turns(read, schema)] == [5]
    same = {"messages": [{"role": "system", "content": "s"}, *SAID, *SAID]}
    assert prompt_key(read, schema) == prompt_key(same, schema)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": ASKED, "completion": "a"}], "line 1: completion must be a list of {role, content}, as"),
        ([{"prompt": "q", "completion": ANSWERED}], "line 1: prompt must be a list of {role, content}, as"),
        ([{"prompt": ASKED, "completion": ANSWERED}, {"prompt": "q", "completion": "a"}], "line 2: prompt must be a list of"),
        ([{"prompt": "q", "completion": "a"}, {"prompt": ASKED, "completion": ANSWERED}], "line 2: prompt must be text"),
        ([{"prompt": json.dumps(ASKED), "completion": "a"}], "line 1: completion must be a list of {role, content}, as"),
        ([{"prompt": str(ASKED), "completion": str(ANSWERED)}], "line 1: prompt is text that is not valid JSON"),
        ([{"prompt": ASKED, "completion": SAID}], "line 1: completion must be a list of one message of the role assistant"),
        ([{"prompt": ASKED, "completion": ASKED}], "line 1: completion must be a list of one message of the role assistant"),
        ([{"prompt": ASKED, "response": []}], "line 1: response must be a list of one message of the role assistant"),
        ([{"prompt": SAID, "completion": ANSWERED}], "line 1: prompt ends with an answer"),
        ([{"prompt": [], "completion": ANSWERED}], "line 1: prompt is empty"),
        ([{"prompt": ["q"], "completion": ANSWERED}], "line 1: messages must be a list of .* message 1 of 2 has no role"),
    ],
)
def test_a_prompt_and_an_answer_that_are_no_conversation_are_refused_by_line_and_column(records, message, tmp_path):
    with pytest.raises(CoraError, match=message):
        load_records(jsonl(tmp_path / "a.jsonl", *records))


@pytest.mark.parametrize(
    ("record", "columns", "read"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt=prompt,response=chosen", {"prompt": "q", "completion": "a"}),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "prompt=question,response=chosen", {"prompt": "q"}),
        ({"prompt": ASKED, "chosen": ANSWERED, "rejected": ANSWERED}, "prompt=prompt,response=chosen", {"messages": SAID}),
        ({"prompt": "q", "chosen": SAID, "rejected": SAID}, "messages=chosen", {"messages": SAID}),
        ({"chosen": SAID, "rejected": SAID}, "messages=chosen", {"messages": SAID}),
        (
            {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
            "prompt=instruction,input=input,response=chosen",
            {"instruction": "i", "input": "x", "output": "a"},
        ),
        ({"chosen": "Human: q", "rejected": "Human: r"}, "text=chosen", {"text": "Human: q"}),
        ({"prompt": "q", "chosen": json.dumps(SAID), "rejected": "[]"}, "messages=chosen", {"messages": SAID}),
        (
            {
                "input": {"messages": ASKED, "tools": [{"name": "f"}], "parallel_tool_calls": True},
                "preferred_output": ANSWERED,
                "non_preferred_output": ASKED,
            },
            "prompt=input,response=preferred_output",
            {"messages": SAID, "tools": [{"name": "f"}]},
        ),
        (
            {"conversations": TALK[:1], "chosen": TALK[1], "rejected": TALK[1]},
            "prompt=conversations,response=chosen",
            {"messages": SAID},
        ),
        ({"messages": ASKED, "chosen": ANSWERED[0], "rejected": {}}, "prompt=messages,response=chosen", {"messages": SAID}),
    ],
)
def test_preferences_are_refused_with_the_columns_that_work(record, columns, read, tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", record)
    with pytest.raises(CoraError, match=f"chosen answers: --columns {columns}"):
        load_records(dataset)
    (found,), _ = load_records(dataset, Choice(tuple(columns.split(","))))
    assert read.items() <= found.items()


@pytest.mark.parametrize(
    ("prompt", "chosen", "text"),
    [("q", ANSWERED, "prompt"), ("q", ANSWERED[0], "prompt"), ("q", json.dumps(ANSWERED), "prompt"), (ASKED, "a", "chosen")],
)
def test_a_prompt_and_a_chosen_answer_of_which_one_is_text_are_refused_with_what_to_write(prompt, chosen, text, tmp_path):
    with pytest.raises(CoraError, match=f"write {text} as a list of messages too"):
        load_records(jsonl(tmp_path / "a.jsonl", {"prompt": prompt, "chosen": chosen, "rejected": chosen}))


def test_a_conversation_with_its_answer_is_read_as_it_is_next_to_the_same_as_preferences(tmp_path):
    record = {"prompt": "q", "messages": SAID, "chosen": SAID, "rejected": SAID, "score_chosen": 8.0}
    (read,), _ = load_records(jsonl(tmp_path / "a.jsonl", record))
    assert read["messages"] == SAID


UNWANTED = [
    ({"prompt": "q", "completion": "a"}, "label", "completion", "prompt=prompt,response=completion"),
    ({"prompt": ASKED, "response": ANSWERED}, "label", "response", "prompt=prompt,response=response"),
    ({"messages": SAID}, "kto_tag", "answer", "messages=messages"),
    ({"conversations": TALK}, "label", "answer", "messages=conversations"),
    ({"instruction": "i", "output": "a"}, "kto_tag", "output", "prompt=instruction,response=output"),
    (
        {"instruction": "i", "context": "c", "response": "a"},
        "label",
        "response",
        "prompt=instruction,input=context,response=response",
    ),
    ({"question": "q", "answer": "a"}, "label", "answer", "prompt=question,response=answer"),
]


@pytest.mark.parametrize("value", [False, "False "])
@pytest.mark.parametrize(("record", "name", "answer", "columns"), UNWANTED)
def test_an_answer_marked_as_not_wanted_is_refused_unless_the_columns_are_named(record, name, answer, columns, value, tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", {**record, name: True}, {**record, name: value})
    message = f"line 2: the {name} is false, .* mark the {answer} as rejected; .* with --columns {columns}"
    with pytest.raises(CoraError, match=message):
        load_records(dataset)
    assert len(load_records(dataset, Choice(tuple(columns.split(","))))[0]) == 2


@pytest.mark.parametrize("labels", [(1, 0), ("1", "0"), (None, 0.0), ("", "0.0"), (True, 0)])
def test_labels_of_0_and_1_next_to_a_prompt_and_a_completion_may_be_marks_or_classes_and_are_refused(labels, tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", *({"prompt": "p", "completion": "c", "label": label} for label in labels))
    with pytest.raises(CoraError, match=r"line 2: the label is 0, .* may mark the completion as rejected"):
        load_records(dataset)


@pytest.mark.parametrize("labels", [(0, 2), ("0", "1", "2"), (0, "positive"), (-1, 0), (1, 1), ([False], 0)])
def test_other_labels_next_to_a_prompt_and_a_completion_are_classes(labels, tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", *({"prompt": "p", "completion": "c", "label": label} for label in labels))
    assert len(load_records(dataset)[0]) == len(labels)


@pytest.mark.parametrize(
    ("answer", "is_refused"),
    [
        (str(SAID), True),  # as pandas writes it
        (str([{"role": "assistant", "content": np.str_("a")}]), True),
        (json.dumps(SAID), True),
        (json.dumps(SAID[1:]), True),
        (json.dumps(TALK), True),
        (json.dumps([{"role": "user", "content": "another"}, SAID[1]]), False),  # as a model may be asked to write it
        (json.dumps([{"role": "tester", "content": "q"}]), False),
        ("[{'a': 1}]", False),
    ],
)
@pytest.mark.parametrize(("asked", "answered"), [("prompt", "completion"), ("instruction", "output"), ("question", "chosen")])
def test_an_answer_that_is_the_text_of_messages_is_refused(asked, answered, answer, is_refused, tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", *({asked: "q", answered: answer} for _ in range(2)))
    columns = (f"prompt={asked}", f"response={answered}") if answered == "chosen" else None
    if is_refused:
        with pytest.raises(
            CoraError, match=f"line 1: {answered} is the text of a list of messages: .* complete conversations as messages"
        ):
            load_records(dataset, Choice(columns=columns))
    else:
        assert len(load_records(dataset, Choice(columns=columns))[0]) == 2
