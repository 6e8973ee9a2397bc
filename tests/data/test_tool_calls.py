"""How calls of tools, and what stands next to them, are trained and named."""

import pytest

from cora_cli.data.records import Record
from cora_cli.data.templates import Template
from cora_cli.errors import CoraError
from tests.data.conversations import CHATML, QUESTION, TALK, with_template


@pytest.mark.parametrize("text", [{}, {"content": None}])
def test_an_answer_of_calls_alone_may_have_a_template_that_needs_a_text_where_there_are_no_calls(text):
    written = "{% if m.tool_calls %}call{% else %}{{ m['role'] + m['content'] }}{% endif %}"
    tokenizer = with_template(CHATML.replace("{{ m['content'] }}", written))
    record = {"messages": [TALK["messages"][1], {"role": "assistant", **text, "tool_calls": [{"name": "clock"}]}]}
    rendered = Template("chat", "messages", tokenizer).render(record)
    assert (rendered.answer, rendered.lead) == ("call", "")


@pytest.mark.parametrize("text", [{}, {"content": None}])
def test_a_call_stands_next_to_an_empty_text_where_the_template_refuses_null(text):
    # As in Qwen3's template: the text is joined to the role even where there are calls.
    written = "{{ m['role'] + m['content'] }}{% for c in m.tool_calls or [] %}[{{ c.name }}]{% endfor %}"
    tokenizer = with_template(CHATML.replace("{{ m['content'] }}", written))
    call = {"role": "assistant", **text, "tool_calls": [{"name": "clock"}]}
    template = Template("chat", "messages", tokenizer)
    assert template.render({"messages": [TALK["messages"][1], call]}).answer.endswith("[clock]")
    result = [{"role": "tool", "content": "noon"}, {"role": "assistant", "content": "It is noon."}]
    assert "[clock]" in template.render({"messages": [TALK["messages"][1], call, *result]}).prompt


def test_a_template_that_refuses_null_and_writes_no_calls_refuses_the_record():
    tokenizer = with_template(CHATML.replace("{{ m['content'] }}", "{{ m['role'] + m['content'] }}"))
    record = {"messages": [TALK["messages"][1], {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]}
    with pytest.raises(CoraError, match=r"refuses the conversation: .* has none"):
        Template("chat", "messages", tokenizer).render(record)


def test_a_call_behind_the_result_of_a_tool_is_trained_where_prompts_have_no_header_there():
    # As in DeepSeek V3's template, which also ends results otherwise where a call follows them.
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'tool' %}[RESULT]{{ m.content }}"
        "{% if loop.last or not messages[loop.index0 + 1].tool_calls %}[/RESULT]{% endif %}"
        "{% elif m.tool_calls %}[CALL]{{ m.tool_calls[0].name }}<|im_end|>{% else %}{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}assistant: {% endif %}"
    )
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"name": name}]} for name in ("clock", "calendar")]
    record = {"messages": [TALK["messages"][1], calls[0], {"role": "tool", "content": "noon"}, calls[1]]}
    rendered = Template("chat", "messages", tokenizer).render(record)
    assert (rendered.prompt[-15:], rendered.response) == ("[RESULT]noon[/RESULT]"[-15:], "[CALL]calendar")
    assert (rendered.own_turn, rendered.left_out) == (False, ())


@pytest.mark.parametrize("calls", [None, []])
def test_a_message_whose_calls_are_null_or_an_empty_list_has_none(calls):
    written = "{% if 'tool_calls' in m %}[CALLS]{% else %}{{ m['content'] }}{% endif %}"
    template = Template("chat", "messages", with_template(CHATML.replace("{{ m['content'] }}", written)))
    record = {"messages": [{**message, "tool_calls": calls} for message in TALK["messages"]]}
    assert template.render(record) == template.render(TALK)


def test_results_of_tools_that_the_template_quotes_are_not_left_out():
    quoting = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}")
    record = {"messages": [{"role": "tool", "content": 'say "é"\n'}, *TALK["messages"][1:]]}
    assert "tool" not in Template("chat", "messages", with_template(quoting)).render(record).left_out


@pytest.mark.parametrize("written", ["{{ c['function']['arguments'] | tojson }}", "{{ c['function']['arguments'] }}"])
def test_arguments_of_calls_as_json_text_are_never_written_as_a_quoted_string(written):
    calling = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}" + written + "{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    record = {"messages": [TALK["messages"][1], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert Template("chat", "messages", with_template(calling)).render(record).response == '{"zone": "UTC"}'
    assert call["function"]["arguments"] == '{"zone": "UTC"}'


CALLS = "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}[{{ c['function']['name'] }}: WRITTEN]{% endfor %}"


def calling(written, arguments, **more):
    call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
    record = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], **more}
    return CHATML.replace("{{ m['content'] }}", CALLS.replace("WRITTEN", written)), record


@pytest.mark.parametrize("arguments", ['{"zone": "é"}', {"zone": "é"}])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{% for n, v in c['function']['arguments'].items() %}{{ n }}={{ v }}{% endfor %}", "zone=é"),
        ("{{ c['function']['arguments'] | tojson }}", '{"zone": "é"}'),
        ("{{ '' + c['function']['arguments'] }}", '{"zone": "é"}'),
        ("{{ c['function']['arguments'] }}", '{"zone": "é"}'),
    ],
)
def test_arguments_of_calls_have_the_form_that_the_template_needs(written, expected, arguments):
    text, record = calling(written, arguments)
    assert Template("chat", "messages", with_template(text)).render(record).response == f"[clock: {expected}]"


def test_a_call_is_trained_without_the_question_where_the_template_writes_texts_otherwise_than_they_are():
    text = (
        "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ 'last ' if loop.last }}{{ m.content | upper }}<|im_end|>"
        "{% elif m.tool_calls %}<call>{{ m.tool_calls[0].name }}<|im_end|>{% else %}{{ m.content | upper }}<|im_end|>{% endif %}{% endfor %}"
        "{{ ' ' if add_generation_prompt }}"
    )
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": name}]} for name in ("clock", "calendar")]
    record = {"messages": [QUESTION, calls[0], {"role": "tool", "content": "noon"}, calls[1]]}
    response = Template("chat", "messages", with_template(text)).render(record).response
    assert QUESTION["content"].upper() not in response
    assert response.endswith("<call>calendar")


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_is_trained_without_the_question_where_the_system_message_stands_before_the_one_to_be_answered(content, space):
    # As in the templates of Mistral 7B v0.3 and Nemo.
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ messages[0].content + ' ' if loop.last }}{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[CALL]{{ m.tool_calls[0].name }}<|im_end|>{% elif m.role == 'assistant' %}SPACE{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ).replace("SPACE", space)
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "clock"}]}
    rendered = Template("chat", "messages", with_template(text)).render({"messages": [*TALK["messages"][:2], call]})
    assert (rendered.prompt, rendered.response) == ("[INST]Be brief. one?[/INST]", "[CALL]clock")
    said = {"role": "assistant", "content": "noon"}
    rendered = Template("chat", "messages", with_template(text)).render({"messages": [*TALK["messages"][:2], said]})
    assert (rendered.prompt, rendered.response) == ("[INST]Be brief. one?[/INST]", f"{space}noon")


def test_a_call_is_never_trained_with_the_conversation_before_it():
    # As in Apertus's template: calls and their results are one turn, and the list of results ends otherwise before a call next to null.
    text = (
        "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}{% if loop.last or messages[loop.index0 + 1].content is string %}]{% endif %}"
        "{% elif m.role == 'user' %}{{ m.content }}{% else %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = Template("chat", "messages", with_template(text))
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": name}]} for name in ("clock", "calendar")]
    record = {"messages": [QUESTION, calls[0], {"role": "tool", "content": "noon"}, calls[1]]}
    rendered = template.render(record)
    assert (rendered.response, rendered.left_out) == ("<call>calendar</call>", ())
    calls[1]["content"] = ""
    assert template.render(record) == rendered


@pytest.mark.parametrize("ends_with_call", [True, False])
@pytest.mark.parametrize(
    ("calls", "lost"),
    [
        ("m['tool_calls'] or []", False),
        ("(m['tool_calls'] or [])[:1]", True),
        ("(m['tool_calls'] if not m['content'] else []) or []", True),
    ],
)
def test_calls_that_a_template_does_not_write_are_named(calls, lost, ends_with_call):
    text, record = calling("{{ c['function']['arguments'] | tojson }}", {"zone": "UTC"}, tools=[{"name": "clock"}])
    text = "{{ tools | tojson }}" + text.replace("m['tool_calls'] or []", calls)
    answer = record["messages"][1]
    answer["tool_calls"] *= 2
    answer["content"] = "Let me see: clock."
    if not ends_with_call:
        record["messages"] += [{"role": "tool", "content": "12"}, {"role": "assistant", "content": "noon"}]
    assert Template("chat", "messages", with_template(text)).render(record).left_out == (("assistant",) if lost else ())


def test_a_template_of_its_own_for_tools_decides_about_arguments_ends_and_what_it_reads():
    text, record = calling("{{ c['function']['arguments'] | tojson }}", '{"zone": "UTC"}', tools=[{"name": "clock"}])
    named = {"default": CHATML, "tool_use": text.replace("<|im_end|>", "<file_sep>")}
    template = Template("chat", "messages", with_template(named))
    end = template.tokenizer.convert_tokens_to_ids("<file_sep>")
    rendered = template.render(record)
    assert (rendered.response, rendered.end) == ('[clock: {"zone": "UTC"}]', end)
    assert template.ends == {end, template.tokenizer.convert_tokens_to_ids("<|im_end|>"), template.tokenizer.eos_token_id}
    assert template.unread([Record(record)]) == ["tools"]
    assert template.unread([Record({"messages": record["messages"]})]) == ["tool_calls"]


def test_a_call_ends_before_the_next_answer_that_a_template_begins_behind_every_end():
    text, record = calling("x", {})
    before = text.partition("{% if add_generation_prompt %}")[0].replace("<|im_end|>", "END")
    end = "{% if m['tool_calls'] %}<file_sep><|im_end|>{% elif m['role'] == 'assistant' %}<|im_end|>{% endif %}"
    template = Template("chat", "messages", with_template(before.replace("END", end) + "{{ '<|im_start|>assistant\\n' }}"))
    rendered = template.render(record)
    assert (rendered.response, template.tokenizer.convert_ids_to_tokens(rendered.end)) == ("[clock: x]<file_sep>", "<|im_end|>")


def test_what_a_template_writes_behind_the_last_message_is_no_part_of_an_answer():
    _, record = calling("x", {})
    turn = "{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    messages = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + turn + "{% endfor %}"
    asked = "<|im_start|>system\nWrite an action, or use directly-answer.<|im_end|>\n"
    start = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = Template("chat", "messages", with_template(messages + asked + start))
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    talk, call = template.render({"messages": TALK["messages"][1:3]}), template.render(record)
    assert (talk.response, talk.end) == ("1", end)
    assert (call.response.strip(), call.end) == ("[clock]", None)


def test_a_call_is_trained_where_prompts_begin_an_answer_otherwise_than_the_template_writes_it():
    text, record = calling("x", {})
    thoughts = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    text = text.replace("{{ m['content'] or '' }}", thoughts + "{{ m['content'] or '' }}")
    before, _, after = text.rpartition("<|im_start|>assistant\n")
    template = Template("chat", "messages", with_template(f"{before}<|im_start|>assistant\n<think></think>{after}"))
    rendered = template.render(record)
    assert rendered.prompt.endswith("assistant\n<think></think>")
    assert (rendered.response, rendered.own_turn, rendered.left_out) == ("[clock: x]", False, ())
    record["messages"][-1]["reasoning_content"] = "hm"
    assert (template.render(record).response, template.render(record).left_out) == ("[clock: x]", ("assistant",))
    opened = Template("chat", "messages", with_template(f"{before}<|im_start|>assistant\n<think>\n{after}"))
    assert opened.render(record).response == "hm</think>[clock: x]"


@pytest.mark.parametrize(
    ("start", "written"),
    [
        ("\n  <|im_start|>assistant\n\n", ""),
        ("<|im_start|>assistant \n", ""),
        ("  <|im_start|> assistant\n", ""),
        ("<|im_start|>assistant\n", "\n "),
    ],
)
def test_the_header_of_a_call_is_not_repeated_where_prompts_have_other_white_space_in_it(start, written):
    text, record = calling("x", {})
    text = text.replace("<|im_start|>assistant\n{% endif", start + "{% endif").replace(
        "<|im_start|>{{", f"{written}<|im_start|>{{{{"
    )
    rendered = Template("chat", "messages", with_template(text)).render(record)
    assert rendered.prompt.endswith(start)
    assert (rendered.response, rendered.own_turn) == ("[clock: x]", False)


def test_a_text_next_to_a_call_may_name_the_token_by_which_prompts_begin_an_answer():
    text, record = calling("x", {})
    template = Template(
        "chat",
        "messages",
        with_template(text.replace("|im_start|>assistant\n{% endif", "|im_start|>assistant\n<think>\n{% endif")),
    )
    record["messages"][-1]["content"] = "Use the <think> tag."
    rendered = template.render(record)
    assert rendered.prompt.endswith("assistant\n<think>\n")
    assert rendered.response == "Use the <think> tag.[clock: x]"


@pytest.mark.parametrize(
    ("prompted", "written"), [("Assistant:", "Action:"), ("<answer>", "<action>"), ("[ANSWER]", "[ACTION]")]
)
def test_a_call_is_trained_with_the_complete_word_or_control_token_in_which_it_differs_from_prompts(prompted, written):
    text = (
        "{% for m in messages %}{% if m.tool_calls %}ACTION{{ m.tool_calls[0].function.name }}{% elif m.role == 'user' %}{{ m.content }}"
        "{% else %}ANSWER{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}"
    )
    text = text.replace("ANSWER", prompted).replace("ACTION", written)
    template, (_, record) = Template("chat", "messages", with_template(text)), calling("x", {})
    rendered = template.render(record)
    assert (rendered.prompt, rendered.response) == (f"one?<|im_end|>\n{prompted}", f"{written}clock")
    record["messages"][-1]["tool_calls"][0]["function"]["name"] = "say Assistant: hi"
    assert template.render(record).response == f"{written}say Assistant: hi"


@pytest.mark.parametrize("thinking", [{}, {"thinking": "It said noon."}])
def test_an_answer_has_its_channel_where_prompts_alone_have_the_turn_of_an_earlier_calls_thoughts(thinking):
    # As in gpt-oss' template, which leaves out the thoughts of a call once the conversation has its answer.
    tokenizer = with_template(
        "{% set answered = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{% for m in messages %}"
        "{% if m.thinking and not (m.tool_calls and answered) %}<|im_start|>assistant<think>{{ m.thinking }}<|im_end|>{% endif %}"
        "{% if m.tool_calls %}<|im_start|>assistant to={{ m.tool_calls[0].name }}<|im_end|>"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant<final>{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    call = {"role": "assistant", "content": "", "thinking": "A clock.", "tool_calls": [{"name": "clock"}]}
    answer = {"role": "assistant", "content": "Noon.", **thinking}
    record = {"messages": [QUESTION, call, {"role": "tool", "content": "12"}, answer]}
    rendered = Template("chat", "messages", tokenizer).render(record)
    thought = "<think>It said noon.<|im_end|><|im_start|>assistant" if thinking else ""
    assert rendered.response == f"{thought}<final>Noon."
    assert rendered.prompt.endswith(
        "<think>A clock.<|im_end|><|im_start|>assistant to=clock<|im_end|><|im_start|>tool: 12<|im_end|><|im_start|>assistant"
    )
