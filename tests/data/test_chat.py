"""What a chat template reads from the clock, and in which form it gets messages."""

import dataclasses
import time

import pytest

from cora_cli.data.chat import ChatTemplate
from cora_cli.data.records import Record
from cora_cli.data.templates import Template
from cora_cli.errors import CoraError
from tests.data.conversations import CHATML, TALK, with_template

CLOCK = "{{ strftime_now('%d %b %Y %H:%M') }} " + CHATML


def test_a_template_that_writes_the_date_writes_the_given_one():
    tokenizer = with_template(CLOCK)
    template = Template("chat", "messages", tokenizer, "2024-02-29")
    assert template.reads_clock
    assert template.render(TALK).prompt.startswith("29 Feb 2024 00:00 <|im_start|>")
    assert Template("chat", "messages", tokenizer, "2025-01-01").render(TALK).prompt.startswith("01 Jan 2025 00:00 ")


def test_the_seconds_of_a_date_do_not_depend_on_the_time_zone(monkeypatch):
    template = Template("chat", "messages", with_template("{{ strftime_now('%s %%s') }} " + CHATML), "2024-02-29")
    for zone in ("UTC", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert template.render(TALK).prompt.startswith("1709164800 %s ")
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}", "{{ [['a', 'b']] | map('random') | join }}"])
def test_a_template_that_draws_at_random_is_refused(draw):
    with pytest.raises(
        CoraError, match=r"^data\.jsonl, line 3: the chat template draws at random, such as by Jinja's filter random"
    ):
        Template("chat", "messages", with_template(draw + CHATML)).render(Record(TALK, "data.jsonl, line 3"))


def test_a_template_that_writes_an_object_instead_of_its_text_is_refused_unless_the_data_has_that_text():
    generator = "{{ messages | map(attribute='role') }}" + CHATML
    with pytest.raises(
        CoraError, match=r"the chat template writes <generator object sync_do_map at 0x.*, which differs in every process"
    ):
        Template("chat", "messages", with_template(generator)).render(TALK)
    question = {"role": "user", "content": "What is <object object at 0x7f00deadbeef>?"}
    talk = {"messages": [question, TALK["messages"][-1]]}
    assert "0x7f00deadbeef" in Template("chat", "messages", with_template(CHATML)).render(talk).prompt


def test_without_a_date_it_writes_that_of_today(monkeypatch):
    monkeypatch.setattr("cora_cli.data.templates.today", lambda: "2031-07-09")
    assert Template("chat", "messages", with_template(CLOCK)).render(TALK).prompt.startswith("09 Jul 2031 ")


def test_other_templates_read_no_clock():
    assert not Template("chat", "messages", with_template(CHATML)).reads_clock
    assert not Template("alpaca", "alpaca", with_template(CLOCK)).reads_clock


@pytest.mark.parametrize("written", ["m['content'][:1]", "m['content'] | upper", "m['content'] | tojson | replace('w', 'W')"])
def test_a_template_that_changes_texts_gets_no_parts_which_it_would_print_as_they_are(written: str):
    template = Template("chat", "messages", with_template(CHATML.replace("m['content']", written)))
    talk = {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "two"}]}
    rendered = template.render(Record(talk, "a"))
    assert "type" not in (rendered.prompt + rendered.response).lower()
    assert rendered.left_out == ("assistant", "user")


def test_a_template_that_writes_the_parts_of_messages_gets_texts_as_parts():
    of_parts = CHATML.replace(
        "{{ m['content'] }}", "{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    )
    assert of_parts != CHATML
    needing = CHATML.replace("m['content']", "m['content'][0]['text'] + ''")
    other = Template("chat", "messages", with_template(CHATML)).render(Record(TALK, "a"))
    for text in (of_parts, needing):
        one = Template("chat", "messages", with_template(text)).render(Record(TALK, "a"))
        assert dataclasses.astuple(one) == dataclasses.astuple(other)
        assert one.left_out == ()


def test_a_text_that_is_in_what_such_a_template_writes_around_the_messages_is_a_part_too():
    of_parts = CHATML.replace("m['content']", "m['content'] | selectattr('type', 'defined') | map(attribute='text') | join")
    talk = Record({"messages": [{"role": "user", "content": "s"}, {"role": "assistant", "content": "a"}]}, "a")
    one, other = (Template("chat", "messages", with_template(text)).render(talk) for text in (of_parts, CHATML))
    assert dataclasses.astuple(one) == dataclasses.astuple(other)


@pytest.mark.parametrize("endless", ["text", "parts"])
def test_a_template_that_never_ends_is_not_asked_again_where_nothing_would_stop_it(endless):
    class Tokenizer:
        def apply_chat_template(self, messages, **_):
            if isinstance(messages[0]["content"], str) == (endless == "text"):
                raise CoraError("took more than 10 s")
            return "hello" if endless == "text" else ""

    with pytest.raises(CoraError, match="more than 10 s"):
        ChatTemplate(Tokenizer(), "2026-01-01").apply([{"role": "user", "content": "hello"}], {})
