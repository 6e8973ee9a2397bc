"""What is held out of a data set and what is trained, and which prompts are one."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cora_cli.data.records import Record, prompt_hash, prompt_hashes, prompt_key
from cora_cli.data.split import load_split, load_test_records
from cora_cli.errors import CoraError, UsageError
from tests.data.files import ALPACA, repeatable, write

numbered = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(40)]


def test_the_records_to_evaluate_on_are_the_whole_file(tmp_path):
    assert load_test_records(str(write(tmp_path / "a.json", [ALPACA, ALPACA]))) == ([ALPACA, ALPACA], "alpaca")


@pytest.mark.parametrize(
    ("size", "held_out"), [(None, 4), (0, 0), (0.0, 0), (0.25, 10), (0.99, 40), (1, 1), (1.0, 1), (7, 7), (39, 39)]
)
def test_the_test_size_is_a_count_from_one_on_and_a_share_below(size, held_out, tmp_path):
    dataset = str(write(tmp_path / "a.jsonl", numbered))
    if held_out == len(numbered):
        with pytest.raises(CoraError, match="holds 40 records, so holding out 40 leaves none to train on"):
            load_split(dataset, size, seed=0)
        return
    split = load_split(dataset, size, seed=0)
    assert len(split.test) == held_out
    assert sorted([*split.train, *split.test], key=numbered.index) == numbered


def test_a_share_that_holds_out_no_record_is_refused_and_said_of_the_usual_one(tmp_path, capfd):
    dataset = str(write(tmp_path / "a.jsonl", numbered[:4]))
    with pytest.raises(CoraError, match=r"has too few records \(4\) for a held-out share of 0.05: none would be held out"):
        load_split(dataset, 0.05, seed=0)
    assert load_split(dataset, None, seed=0).test == []
    assert "for a held-out share of 0.1: none is held out" in capfd.readouterr().err


@pytest.mark.parametrize("size", [-1, -0.1, 1.5, math.nan, math.inf])
def test_a_test_size_that_is_neither_count_nor_share_is_a_usage_error(size, tmp_path):
    with pytest.raises(UsageError, match="--test-size must be a count, or a share between 0 and 1"):
        load_split(str(write(tmp_path / "a.jsonl", numbered)), size, seed=0)


@pytest.mark.parametrize("size", [40, 41, 10**9])
def test_a_test_size_that_leaves_nothing_to_train_on_is_refused(size, tmp_path):
    with pytest.raises(CoraError, match=f"holds 40 records, so holding out {size} leaves none"):
        load_split(str(write(tmp_path / "a.jsonl", numbered)), size, seed=0)


def test_the_split_depends_on_the_seed_alone_and_keeps_the_files_order(tmp_path):
    dataset = str(write(tmp_path / "a.jsonl", numbered))
    first, again, other = load_split(dataset, 10, 3), load_split(dataset, 10, 3), load_split(dataset, 10, 4)
    assert first == again
    assert first.content_hash() == again.content_hash() != other.content_hash()
    assert first.test != other.test
    assert first.test == sorted(first.test, key=numbered.index)
    assert first.train == sorted(first.train, key=numbered.index)


@given(
    kind=st.sampled_from(["alpaca", "prompt", "messages"]),
    keys=st.lists(st.integers(0, 6), min_size=2, max_size=20).filter(lambda keys: len(set(keys)) > 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
@repeatable
def test_no_held_out_prompt_is_trained_on_and_what_that_drops_is_counted(kind, keys, seed, data, tmp_path):
    forms = {
        # The further column `prompt`, which holds the answer too in some published sets, must not hide an equal question.
        "alpaca": lambda key, n: {"instruction": "i", "input": str(key), "output": f"{n}", "prompt": f"i {key} {n}"},
        "prompt": lambda key, n: {"prompt": str(key), "completion": f"{n}"},
        "messages": lambda key, n: {
            "messages": [{"role": "user", "content": str(key)}, {"role": "assistant", "content": f"{n}"}]
        },
    }
    records = [forms[kind](key, n) for n, key in enumerate(keys)]
    size = data.draw(st.integers(1, len(set(keys)) - 1))  # so that a prompt is left to train on
    dataset = str(write(tmp_path / "a.jsonl", records))
    split = load_split(dataset, size, seed)
    held_out = {prompt_key(record, split.schema) for record in split.test}
    assert len(split.test) == size
    assert held_out.isdisjoint(prompt_key(record, split.schema) for record in split.train)
    assert len(split.train) + split.overlapping == len(records) - size
    assert all(record in split.train for record in records if prompt_key(record, split.schema) not in held_out)


@given(
    keys=st.lists(st.integers(0, 8), min_size=6, max_size=30).filter(lambda keys: len(set(keys)) > 5),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
)
@repeatable
def test_validation_records_come_out_of_the_training_part_and_share_no_prompt_with_it(keys, seed, count, tmp_path):
    records = [{"prompt": str(key), "completion": str(n)} for n, key in enumerate(keys)]
    dataset = str(write(tmp_path / "a.jsonl", records))
    plain = load_split(dataset, 2, seed)
    split = load_split(dataset, 2, seed, validation_size=count)
    prompts = [{record["prompt"] for record in part} for part in (split.train, split.test, split.validation)]
    assert split.test == plain.test
    assert len(split.validation) == count
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(prompts, 2))
    assert len(split.train) + count + split.overlapping == len(plain.train) + plain.overlapping
    assert split.content_hash() != plain.content_hash()
    assert load_split(dataset, 2, seed, validation_size=count) == split


def test_setting_everything_aside_is_refused(tmp_path):
    dataset = str(write(tmp_path / "a.jsonl", [{"prompt": str(n), "completion": "c"} for n in range(6)]))
    with pytest.raises(CoraError, match="5 for validation leave none"):
        load_split(dataset, 1, 0, validation_size=5)
    same = str(write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": str(n)} for n in range(9)]))
    with pytest.raises(CoraError, match=r"prompt also occurs in the validation records.*; leave out --validation-size"):
        load_split(same, 0, 0, validation_size=3)


def test_a_split_whose_every_prompt_is_held_out_is_refused(tmp_path):
    records = [{"prompt": "same", "completion": str(n)} for n in range(5)]
    with pytest.raises(
        CoraError, match=r"every training prompt also occurs in the held-out records.*; --test-size 0 holds none out"
    ):
        load_split(str(write(tmp_path / "a.jsonl", records)), 1, seed=0)
    assert len(load_split(str(write(tmp_path / "a.jsonl", records)), 0, seed=0).train) == 5


def test_prompts_that_differ_only_in_their_tools_are_different(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    keys = {
        prompt_key(Record({**talk, **tools}), "messages")
        for tools in ({}, {"tools": [{"name": "x"}]}, {"tools": [{"name": "y"}]})
    }
    assert len(keys) == 3


def test_conversations_that_differ_in_an_earlier_call_or_a_name_have_different_prompts():
    answer = {"role": "assistant", "content": "b"}

    def key(**extra):
        first = {"role": "assistant", "content": "", **extra}
        return prompt_key(Record({"messages": [{"role": "user", "content": "a"}, first, answer]}), "messages")

    assert len({key(), key(tool_calls=[{"name": "x"}]), key(tool_calls=[{"name": "y"}]), key(name="z")}) == 4
    call = {"function": {"name": "x"}}
    assert key(tool_calls=[{**call, "id": "1"}]) == key(tool_calls=[{**call, "id": "2"}])


def test_records_whose_messages_differ_only_in_what_no_template_reads_have_one_prompt(tmp_path):
    def talk(question, number):
        marks = {"turn_identifier": number, "timestamp": f"2024-01-0{number + 1}", "name": None}
        return {"messages": [{"role": "user", "content": question, **marks}, {"role": "assistant", "content": "b", **marks}]}

    path = write(tmp_path / "talks.jsonl", [talk(f"q{place % 3}", place) for place in range(9)])
    split = load_split(str(path), 2, seed=0)
    held_out = {record["messages"][0]["content"] for record in split.test}
    assert held_out.isdisjoint(record["messages"][0]["content"] for record in split.train)
    assert split.overlapping == 9 - len(split.test) - len(split.train) > 0


def test_a_record_with_a_held_out_prompt_among_its_earlier_turns_is_not_trained_where_every_answer_is(tmp_path):
    def talk(*said):
        roles = ("user", "assistant") * len(said)
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}

    both = [talk(f"q{n}", f"a{n}", "more", f"b{n}") for n in range(6)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*both, *(talk(f"q{n}", f"a{n}") for n in range(6))]))
    last, every = (load_split(str(path), 4, 0, None, every) for every in (False, True))
    asked = {record["messages"][0]["content"] for record in every.test if len(record["messages"]) == 2}
    assert asked, "the split of this seed holds out a first turn"
    assert every.test == last.test
    assert not asked & {record["messages"][0]["content"] for record in every.train}
    assert every.overlapping > last.overlapping
    hashes = set(prompt_hashes(every.train, every.schema, True))
    assert hashes.isdisjoint(prompt_hash(record, every.schema) for record in every.test)
