"""The shapes in which data sets are published: how each is recognised, announced and read, and which are refused."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from cora_cli.data.records import prompt_key, turns
from cora_cli.data.split import Choice, load_records, load_split
from cora_cli.errors import CoraError, UsageError
from tests.data.files import SAID, TALK, jsonl, write


@pytest.mark.parametrize(
    ("record", "name", "schema", "read"),
    [
        (
            {"instruction": "i", "output": "o", "text": "t"},
            "Alpaca",
            "alpaca",
            {"instruction": "i", "input": "", "output": "o"},
        ),
        (
            {"instruction": "i", "context": "c", "response": "r"},
            "Dolly",
            "alpaca",
            {"instruction": "i", "input": "c", "output": "r"},
        ),
        ({"question": "q", "answer": "a"}, "question/answer", "prompt", {"prompt": "q", "completion": "a"}),
        ({"prompt": "q", "completion": "a"}, "prompt/completion", "prompt", {"prompt": "q", "completion": "a"}),
        ({"prompt": "q", "response": "a"}, "prompt/response", "prompt", {"prompt": "q", "completion": "a"}),
        ({"conversations": TALK}, "ShareGPT", "messages", {"messages": SAID}),
        ({"conversations": SAID}, "ShareGPT", "messages", {"messages": SAID}),
        (
            {"conversations": TALK, "system": "s"},
            "ShareGPT",
            "messages",
            {"messages": [{"role": "system", "content": "s"}, *SAID]},
        ),
        ({"messages": SAID, "tools": [{"name": "f"}]}, "messages", "messages", {"messages": SAID, "tools": [{"name": "f"}]}),
        ({"text": "t"}, "text only", "text", {"text": "t"}),
    ],
)
def test_a_known_shape_is_recognised_and_announced(record, name, schema, read, tmp_path, capfd):
    dataset = jsonl(tmp_path / "a.jsonl", record, record)
    records, found = load_records(dataset)
    assert found == schema
    assert {key: records[0][key] for key in read} == read
    assert capfd.readouterr().err == f"{dataset}: read as {name}, 2 records\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"},
            "found the columns completion, instruction, output, prompt, which could be Alpaca or prompt/completion",
        ),
        ({"messages": SAID, "conversations": TALK}, "could be messages or ShareGPT"),
        ({"instruction": "i", "output": "o", "response": "r"}, "could be Alpaca or Dolly"),
        ({"question": "q", "answer": "B", "choices": ["x"]}, "records of question/answer have no choices"),
        ({"question": "q", "answer": "a", "prompt": "p"}, "records of question/answer have no prompt"),
        ({"text": "t", "label": 1}, "records of text only have no label"),
        ({"instruction": "i", "context": "c", "output": "o"}, "records of Alpaca have no context"),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]},
            "records of Alpaca have no history, system, which would be missing in the prompt; write the records as messages, or name the columns",
        ),
        ({"instruction": "i", "output": "o", "Input": "x"}, "records of Alpaca have no Input"),
        ({"prompt": "p", "completion": "c", "suffix": "s"}, "records of prompt/completion have no suffix"),
        ({"messages": SAID, "history": [["a", "b"]]}, "records of messages have no history"),
        ({"conversations": TALK, "system_prompt": "s"}, "records of ShareGPT have no system_prompt"),
    ],
)
def test_columns_that_could_be_something_else_are_refused_with_the_way_to_choose(record, message, tmp_path):
    with pytest.raises(CoraError) as caught:
        load_records(jsonl(tmp_path / "a.jsonl", record))
    assert message in str(caught.value)
    assert "--columns" in str(caught.value)


def test_columns_of_a_prompt_that_hold_nothing_decide_nothing_and_those_that_were_not_chosen_are_left_out(tmp_path):
    empty = {"instruction": "i", "output": "o", "system": " ", "history": [], "text": "t"}
    assert load_records(jsonl(tmp_path / "a.jsonl", empty))[1] == "alpaca"
    path = jsonl(tmp_path / "b.jsonl", {"instruction": "i", "output": "o", "System": "s", "id": 1})
    (record,), _ = load_records(path, Choice(columns=("prompt=instruction", "response=output")))
    assert record == {"prompt": "i", "completion": "o", "id": 1}
    talk = jsonl(tmp_path / "c.jsonl", {"messages": SAID, "system": "s", "documents": [{"text": "d"}]})
    (record,), _ = load_records(talk, Choice(columns=("messages=messages",)))
    assert record.keys() == {"messages", "documents"}


@pytest.mark.parametrize(("role", "meant"), [("User", "user"), ("human", "user"), (" system", "system")])
def test_a_role_that_templates_do_not_know_is_refused_by_name(role, meant, tmp_path):
    talk = {"messages": [{"role": role, "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(CoraError, match=rf"messages have the role '{role}', which chat templates do not know; write '{meant}'"):
        load_records(jsonl(tmp_path / "a.jsonl", talk))


def test_a_later_record_with_more_of_a_prompt_is_refused_by_its_line(tmp_path):
    plain = {"question": "q", "answer": "a"}
    with pytest.raises(CoraError, match=r"line 2: records of question/answer have no context"):
        load_records(jsonl(tmp_path / "a.jsonl", plain, {**plain, "context": "c"}))


def test_an_entry_that_says_two_things_about_its_speaker_or_text_is_refused(tmp_path):
    for other in ({"role": "assistant"}, {"content": "y"}):
        with pytest.raises(
            CoraError, match=r"line 1: conversations has an entry with both (from and role|value and content), which differ"
        ):
            load_records(jsonl(tmp_path / "a.jsonl", {"conversations": [{"from": "human", "value": "x", **other}, TALK[1]]}))


def asked_and_said(question, answer="a"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PARTS = [{"type": "text", "text": "one ", "cache_control": {"type": "ephemeral"}}, {"type": "input_text", "text": "two"}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": asked_and_said(PARTS, [{"type": "output_text", "text": "a"}])}, asked_and_said("one two")),
        ({"messages": asked_and_said(["one ", {"text": "two"}])}, asked_and_said("one two")),
        ({"messages": json.dumps(asked_and_said("one two"))}, asked_and_said("one two")),
        ({"messages": asked_and_said("q"), "system": "s"}, [{"role": "system", "content": "s"}, *asked_and_said("q")]),
        ({"messages": asked_and_said("q"), "system": PARTS}, [{"role": "system", "content": "one two"}, *asked_and_said("q")]),
        ({"conversations": [{"from": "Human", "value": PARTS}, {"from": "GPT", "value": "a"}]}, asked_and_said("one two")),
        ({"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}, asked_and_said("q")),
    ],
)
def test_a_conversation_is_read_in_the_forms_in_which_it_is_published(record, messages, tmp_path):
    (found,), schema = load_records(jsonl(tmp_path / "a.jsonl", record))
    assert (schema, found["messages"]) == ("messages", messages)
    assert "system" not in found
    column = next(iter(record))
    if "system" not in record:
        (chosen,), _ = load_records(jsonl(tmp_path / "b.jsonl", {"talk": record[column]}), Choice(columns=("messages=talk",)))
        assert chosen["messages"] == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": asked_and_said([{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "x"}}])},
            "line 1: messages, message 1, holds a part of the type image_url; only parts of text",
        ),
        ({"messages": asked_and_said([{"type": "text", "text": None}])}, 'message 1, holds {"type": "text", "text": null}'),
        ({"messages": asked_and_said("q", [])}, "message 2, has the content [], which says nothing"),
        ({"messages": '[{"role": "user"'}, "line 1: messages is text that is not valid JSON"),
        (
            {"messages": "hello"},
            'messages must be a list of {role, content} that ends with the assistant\'s answer, not "hello"',
        ),
        ({"messages": asked_and_said("q"), "system": 5}, "line 1: system must be text, not 5"),
        (
            {"messages": [{"role": "system", "content": "t"}, *asked_and_said("q")], "system": "s"},
            "line 1: the column system and the first entry of messages both hold a system message",
        ),
        (
            {"messages": [*asked_and_said("q"), {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "and message 3 of 3, of the role assistant, has the content null next to function_call; text is needed, or tool_calls",
        ),
        ({"messages": [{"content": "q"}, *asked_and_said("q")]}, 'and message 1 of 3 has no role: {"content": "q"}'),
        ({"messages": asked_and_said("q")[:1] * 2}, "and the last of 2 is of the role user"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused_by_its_line_and_the_part_at_fault(record, message, tmp_path):
    with pytest.raises(CoraError) as caught:
        load_records(jsonl(tmp_path / "a.jsonl", record))
    assert message in str(caught.value)


def test_an_answer_of_weight_0_is_part_of_the_prompt_and_is_not_trained(tmp_path):
    first, second = asked_and_said("q1", "a1"), asked_and_said("q2", "a2")
    plain = {"messages": [*first, *second]}
    weighed = {
        "messages": [
            first[0] | {"weight": None},
            first[1] | {"weight": 0},
            second[0] | {"weight": 0},
            second[1] | {"weight": 1},
        ]
    }
    (record, other), schema = load_records(jsonl(tmp_path / "a.jsonl", weighed, plain))
    assert [message.get("weight") for message in record["messages"]] == [None, 0, None, None]
    assert [len(turn["messages"]) for turn in turns(record, schema)] == [4]
    assert [len(turn["messages"]) for turn in turns(other, schema)] == [2, 4]
    assert prompt_key(record, schema) == prompt_key(other, schema)


@pytest.mark.parametrize(
    ("mark", "value", "said"), [("weight", 1, True), ("train", True, True), ("loss", True, True), ("weight", 0, False)]
)
def test_a_question_that_is_marked_as_trained_has_no_effect_and_that_is_said(mark, value, said, tmp_path, capsys):
    question, answer = asked_and_said("q", "a")
    (record,), schema = load_records(jsonl(tmp_path / "a.jsonl", {"messages": [question | {mark: value}, answer]}))
    assert [turn["messages"][-1]["content"] for turn in turns(record, schema)] == ["a"]
    assert ("1 messages that are no answers are marked as trained, which has no effect" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("mark", "no", "yes"),
    [
        ("train", False, True),
        ("training", False, True),
        ("loss", False, True),
        ("train", 0, 1),
        ("loss", 0.0, 1.0),
        ("train", "False", "true"),
        ("loss_weight", 0.0, 1.0),
        ("loss_scale", 0, 1),
    ],
)
def test_the_marks_of_other_programs_say_whether_an_answer_is_trained(mark, no, yes, tmp_path):
    first, second = ({**SAID[1], mark: trained} for trained in (no, yes))
    question = {**SAID[0], mark: False}
    dataset = jsonl(tmp_path / "a.jsonl", {"messages": [question, first, question, second]})
    (record,), schema = load_records(dataset)
    assert [message.get("weight") for message in record["messages"]] == [None, 0, None, None]
    assert [len(turn["messages"]) for turn in turns(record, schema)] == [4]
    assert all(message.keys() <= {"role", "content", "weight"} for message in record["messages"][1::2])
    with pytest.raises(CoraError, match="line 1: the last answer is marked as not trained"):
        load_records(jsonl(tmp_path / "b.jsonl", {"messages": [question, first]}))
    with pytest.raises(CoraError, match=f"message 2, has {mark}, weight, of which one says that it is trained and another"):
        load_records(jsonl(tmp_path / "c.jsonl", {"messages": [question, first | {"weight": 1}]}))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0, "line 1: the last answer is marked as not trained"),
        (0.5, "line 1: a message has the weight 0.5; known are 0 and 1"),
        ("1", 'the weight "1"'),
    ],
)
def test_a_weight_that_leaves_nothing_to_train_or_is_none_is_refused(weight, message, tmp_path):
    question, answer = asked_and_said("q")
    with pytest.raises(CoraError) as caught:
        load_records(jsonl(tmp_path / "a.jsonl", {"messages": [question, answer | {"weight": weight}]}))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "mark",
    [{"loss_weight": 0.5}, {"loss_scale": "ignore"}, {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}],
)
def test_a_share_of_the_loss_or_marks_of_parts_of_an_answer_are_refused(mark, tmp_path):
    question, answer = asked_and_said("q")
    with pytest.raises(
        CoraError, match=rf"message 2, has {next(iter(mark))} .*; cora trains all of an answer or nothing of it"
    ):
        load_records(jsonl(tmp_path / "a.jsonl", {"messages": [question, answer | mark]}))
    nothing = dict.fromkeys(mark)
    load_records(jsonl(tmp_path / "b.jsonl", {"messages": [question, answer | nothing]}))


CALL = {"name": "clock", "arguments": {"zone": "UTC"}}


@pytest.mark.parametrize("written", [CALL, [CALL, {**CALL, "name": "calendar"}]])
def test_calls_of_tools_as_llama_factory_writes_them_are_the_assistants(written, tmp_path):
    talk = [TALK[0], {"from": "function_call", "value": json.dumps(written)}, {"from": "observation", "value": "noon"}, TALK[1]]
    [record], _ = load_records(jsonl(tmp_path / "a.jsonl", {"conversations": talk}))
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    calls = [call["function"] for call in record["messages"][1]["tool_calls"]]
    assert calls == (written if isinstance(written, list) else [written])


@pytest.mark.parametrize(
    ("written", "problem"),
    [("clock()", "whose value is not valid JSON"), ("[]", "whose value is no call"), ("3", "is no call")],
)
def test_a_call_that_is_none_is_refused_by_its_place(written, problem, tmp_path):
    talk = [TALK[0], {"from": "function_call", "value": written}]
    with pytest.raises(CoraError, match=f"line 1: conversations has an entry from function_call .*{problem}"):
        load_records(jsonl(tmp_path / "a.jsonl", {"conversations": talk}))


def test_an_unknown_speaker_is_refused_by_name(tmp_path):
    with pytest.raises(CoraError, match=r'line 1: conversations has an entry from "alien"; known are human'):
        load_records(jsonl(tmp_path / "a.jsonl", {"conversations": [{"from": "alien", "value": "x"}, TALK[1]]}))


@pytest.mark.parametrize(
    ("columns", "schema", "read"),
    [
        (("prompt=title", "response=body"), "prompt", {"prompt": "t", "completion": "b"}),
        (("prompt=title", "input=note", "response=body"), "alpaca", {"instruction": "t", "input": "n", "output": "b"}),
        (("messages=talk",), "messages", {"messages": SAID}),
        (("text=body",), "text", {"text": "b"}),
    ],
)
def test_chosen_columns_are_read_and_no_others_can_be_taken_for_the_record(columns, schema, read, tmp_path, capfd):
    record = {"title": "t", "body": "b", "note": "n", "talk": TALK, "instruction": "wrong", "output": "wrong", "id": 3}
    records, found = load_records(jsonl(tmp_path / "a.jsonl", record), Choice(columns))
    assert found == schema
    assert {**read, "id": 3}.items() <= records[0].items()
    assert "instruction, output" in capfd.readouterr().err
    assert load_records(jsonl(tmp_path / "again.jsonl", records[0]))[1] == schema


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("prompt=a",), "must name one of these: prompt, response;"),
        (("prompt",), "must be pairs such as prompt=question,response=answer, not 'prompt'"),
        (("prompt=a", "response=a"), "uses one column twice"),
        (("prompt=a", "answer=b"), "not prompt, answer"),
    ],
)
def test_choices_that_make_no_record_are_refused(columns, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load_records(jsonl(tmp_path / "a.jsonl", {"a": "x", "b": "y"}), Choice(columns))


def test_a_chosen_column_that_is_missing_is_named(tmp_path):
    with pytest.raises(CoraError, match="line 1: column body is missing; found title"):
        load_records(jsonl(tmp_path / "a.jsonl", {"title": "t"}), Choice(("prompt=title", "response=body")))


def test_the_records_of_a_test_set_are_held_out_and_their_prompts_not_trained_on(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{n}", "completion": "c"} for n in range(5)))
    test = jsonl(tmp_path / "b.jsonl", {"question": "p3", "answer": "x"})
    split = load_split(train, None, 0, test_dataset=test)
    assert split.test == [{"prompt": "p3", "completion": "x"}]
    assert [record["prompt"] for record in split.train] == ["p0", "p1", "p2", "p4"]
    assert split.overlapping == 1
    with pytest.raises(UsageError, match="--test-size 2 has no effect with --test-dataset"):
        load_split(train, 2, 0, test_dataset=test)
    with pytest.raises(CoraError, match=r"read as prompt and those of .* as messages"):
        load_split(train, None, 0, test_dataset=jsonl(tmp_path / "c.jsonl", {"messages": SAID}))


def test_the_held_out_records_of_a_run_of_any_version_are_read_by_their_schema(tmp_path, capfd):
    record = {"instruction": "i", "input": "", "output": "o", "prompt": "p", "completion": "c"}
    (tmp_path / "run.json").write_text("{}")
    assert load_records(jsonl(tmp_path / "test.jsonl", record)) == ([record], "alpaca")
    assert capfd.readouterr().err == ""


def test_equal_texts_have_equal_prompts_and_other_texts_have_not():
    assert prompt_key({"text": "a", "id": 1}, "text") == prompt_key({"text": "a"}, "text") != prompt_key({"text": "b"}, "text")


@pytest.mark.parametrize(
    ("record", "chosen", "column"),
    [
        ({"question": "q", "answer": 4}, None, "answer"),
        ({"instruction": "q", "response": None}, None, "response"),
        ({"q": "q", "score": 4.5}, ("prompt=q", "response=score"), "score"),
    ],
)
def test_a_value_that_is_no_text_is_refused_by_the_name_that_its_column_has_in_the_file(record, chosen, column, tmp_path):
    with pytest.raises(CoraError, match=f"line 1: {column} must be text, not "):
        load_records(jsonl(tmp_path / "a.jsonl", record), Choice(chosen))


@pytest.mark.parametrize("column", ["image", "images", "audios", "functions"])
def test_a_column_of_images_or_functions_is_refused_where_it_holds_some(column, tmp_path):
    talk = {"messages": asked_and_said("q")}
    assert len(load_records(jsonl(tmp_path / "a.jsonl", {**talk, column: []}))[0]) == 1
    refused = (
        f"records of messages have no {column}, which would be missing in the prompt; leave .*: --columns messages=messages$"
    )
    with pytest.raises(CoraError, match=refused):
        load_records(jsonl(tmp_path / "b.jsonl", {**talk, column: ["x.png"]}))
    assert len(load_records(jsonl(tmp_path / "b.jsonl", {**talk, column: ["x.png"]}), Choice(("messages=messages",)))[0]) == 1


@pytest.mark.parametrize(
    ("entries", "columns", "said"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]}, {}, True),
        ({}, {"tools": [{"name": "f", "parameters": {"properties": {"x": {"type": "string"}, "y": None}}}]}, True),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, {}, False),
        ({"name": None, "tool_calls": None}, {"tools": None, "id": {"x": None}}, False),
    ],
)
def test_json_with_nulls_inside_tools_or_calls_of_them_is_told(entries, columns, said, tmp_path, capsys):
    question, answer = asked_and_said("q")
    load_records(jsonl(tmp_path / "a.jsonl", {"messages": [question, {**answer, **entries}], **columns}))
    assert ("1 record has nulls inside tools or calls of tools" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "q", "input": "nan", "output": "a"}, True),
        ({"prompt": "q", "completion": " None\n"}, True),
        ({"messages": asked_and_said("<NA>")}, True),
        ({"text": "null"}, True),
        ({"instruction": "Is None null?", "input": "", "output": "nan is neither"}, False),
        ({"instruction": "q", "input": None, "output": "a"}, False),
    ],
)
def test_words_that_programs_write_for_missing_values_are_told(record, said, tmp_path, capsys):
    load_records(jsonl(tmp_path / "a.jsonl", record))
    assert ("1 record has a text that is nothing but nan, None, null or the like" in capsys.readouterr().err) is said


def test_messages_as_python_prints_them_are_refused_with_what_keeps_lists(tmp_path):
    with pytest.raises(CoraError, match=r"messages is text that is not valid JSON .*; write the data as JSON Lines or Parquet"):
        load_records(jsonl(tmp_path / "a.jsonl", {"messages": str(SAID)}))


def test_a_history_that_is_an_empty_list_in_text_is_no_part_of_a_prompt(tmp_path):
    assert len(load_records(jsonl(tmp_path / "a.jsonl", {"instruction": "i", "output": "o", "history": "[]"}))[0]) == 1


def test_what_pandas_has_for_no_value_is_none(tmp_path):
    record = {"instruction": "i", "input": float("nan"), "output": "o", "history": float("nan")}
    assert load_records(jsonl(tmp_path / "a.jsonl", record))[0][0]["input"] == ""
    with pytest.raises(CoraError, match="output must be text, not NaN; leave out records without it"):
        load_records(jsonl(tmp_path / "b.jsonl", {**record, "output": float("nan")}))


def test_times_and_decimals_within_messages_and_documents_are_text_and_missing_values_none(tmp_path):
    at = datetime.datetime(2023, 4, 9, 0, 2, 53, tzinfo=datetime.UTC)
    messages = [{**message, "timestamp": at, "toxicity": decimal.Decimal("0.10"), "score": float("nan")} for message in SAID]
    documents = [{"title": "t", "day": at.date(), "tags": [{"hour": at.time(), "rank": float("nan")}]}]
    file = write(tmp_path / "a.parquet", [{"messages": messages, "documents": documents}])
    [read] = load_records(str(file))[0]
    # As a chat template that reads them would write them.
    assert read == {
        "messages": [{**message, "timestamp": "2023-04-09 00:02:53+00:00", "toxicity": "0.10"} for message in SAID],
        "documents": [{"title": "t", "day": "2023-04-09", "tags": [{"hour": "00:02:53"}]}],
    }


def test_an_entry_of_a_message_that_json_cannot_hold_is_named(tmp_path):
    messages = [{**message, "image": b"\xff\xd8"} for message in SAID]
    with pytest.raises(CoraError, match=r"and image of message 1 is nothing that JSON can hold: .*; leave it out"):
        load_records(str(write(tmp_path / "a.parquet", [{"messages": messages}])))


def test_a_uuid_within_a_message_is_text(tmp_path):
    own = pyarrow.ExtensionArray.from_storage(pyarrow.uuid(), pyarrow.array([bytes(range(16))] * 2, pyarrow.binary(16)))
    texts = [pyarrow.array([message[name] for message in SAID]) for name in ("role", "content")]
    messages = pyarrow.ListArray.from_arrays([0, 2], pyarrow.StructArray.from_arrays([*texts, own], ["role", "content", "id"]))
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    [read] = load_records(str(tmp_path / "a.parquet"))[0]
    assert {message["id"] for message in read["messages"]} == {"00010203-0405-0607-0809-0a0b0c0d0e0f"}
