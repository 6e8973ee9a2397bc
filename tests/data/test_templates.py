import copy

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.normalizers import NFKC, Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cora_cli import embedded
from cora_cli.data.encode import encode_records, notices
from cora_cli.data.records import Record
from cora_cli.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Rendered, Template, choose_template
from cora_cli.errors import CoraError
from tests.data.conversations import CHATML, QUESTION, TALK, TOOLS, with_template


class Plain:
    """A tokenizer without a chat template."""

    chat_template = None
    eos_token_id = 0

    def convert_ids_to_tokens(self, index):
        return "</s>"


@pytest.fixture(scope="module")
def chat():
    return AutoTokenizer.from_pretrained(embedded.model_directory())


ALPACA = {"instruction": "Translate {this}.", "input": "a {b} {", "output": "c"}
BARE = {**ALPACA, "input": ""}
PAIR = {"prompt": "Once upon", "completion": " a time"}


@pytest.mark.parametrize(
    ("template", "schema", "has_chat", "chosen"),
    [
        ("auto", "alpaca", False, "alpaca"),
        ("auto", "alpaca", True, "chat"),
        ("auto", "prompt", False, "plain"),
        ("auto", "prompt", True, "plain"),
        ("auto", "messages", True, "chat"),
        ("alpaca", "alpaca", True, "alpaca"),
        ("alpaca", "prompt", True, "alpaca"),
        ("chat", "alpaca", True, "chat"),
        ("chat", "prompt", True, "chat"),
        ("plain", "alpaca", True, "plain"),
    ],
)
def test_auto_follows_tokenizer_and_columns_and_a_named_template_is_taken(template, schema, has_chat, chosen, chat):
    assert choose_template(template, schema, chat if has_chat else Plain()) == chosen


def test_a_tokenizer_that_splits_control_tokens_is_refused_for_its_chat_template(chat):
    split = copy.deepcopy(chat)
    split.split_special_tokens = True
    with pytest.raises(CoraError, match="the tokenizer sets split_special_tokens"):
        choose_template("chat", "alpaca", split)
    assert choose_template("plain", "alpaca", split) == "plain"


@pytest.mark.parametrize(
    ("template", "schema"), [("chat", "alpaca"), ("chat", "prompt"), ("chat", "messages"), ("auto", "messages")]
)
def test_a_chat_without_a_chat_template_is_refused(template, schema):
    with pytest.raises(CoraError, match=r"the tokenizer has none; put one next to it as chat_template\.jinja"):
        choose_template(template, schema, Plain())


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_conversation_fits_no_other_template(template, chat):
    with pytest.raises(CoraError, match=f"chat messages need --template chat, not {template}"):
        choose_template(template, "messages", chat)


def test_alpaca_has_two_forms_and_braces_of_the_data_are_only_text():
    with_input = Template("alpaca", "alpaca", Plain()).render(ALPACA)
    assert with_input.prompt == ALPACA_WITH_INPUT.replace("{instruction}", "Translate {this}.").replace("{input}", "a {b} {")
    assert "### Input:\na {b} {\n\n### Response:\n" in with_input.prompt
    bare = Template("alpaca", "alpaca", Plain()).render(BARE)
    assert bare.prompt == ALPACA_WITHOUT_INPUT.replace("{instruction}", "Translate {this}.")
    assert "Input" not in bare.prompt
    assert with_input.response == bare.response == "c"
    assert with_input.special_tokens
    assert Template("alpaca", "prompt", Plain()).render(PAIR).prompt == ALPACA_WITHOUT_INPUT.replace(
        "{instruction}", "Once upon"
    )


def test_plain_leaves_a_pair_as_it_is_and_joins_instruction_and_input():
    assert Template("plain", "prompt", Plain()).render(PAIR) == Rendered("Once upon", " a time", special_tokens=True)
    assert Template("plain", "alpaca", Plain()).render(ALPACA).prompt == "Translate {this}.\na {b} {"
    assert Template("plain", "alpaca", Plain()).render(BARE).prompt == "Translate {this}."


def test_the_last_answer_of_a_conversation_is_the_response_and_all_before_is_the_prompt(chat):
    rendered = Template("chat", "messages", chat).render(TALK)
    assert rendered.response == "2"
    assert rendered.prompt == chat.apply_chat_template(TALK["messages"][:-1], tokenize=False, add_generation_prompt=True)
    assert rendered.prompt.endswith("<|im_start|>assistant\n")
    assert "1<|im_end|>" in rendered.prompt
    assert not rendered.special_tokens, "the template has written the start tokens itself"


@pytest.mark.parametrize(
    ("record", "schema", "user"),
    [(ALPACA, "alpaca", "Translate {this}.\n\na {b} {"), (BARE, "alpaca", "Translate {this}."), (PAIR, "prompt", "Once upon")],
)
def test_other_records_become_one_question_of_the_user(record, schema, user, chat):
    expected = chat.apply_chat_template([{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)
    assert Template("chat", schema, chat).render(record).prompt == expected


BLOCK = "<think>\n\n</think>\n\n"


def test_an_answer_ends_with_the_token_by_which_the_template_ends_a_turn():
    tokenizer = with_template(CHATML)
    template = Template("chat", "messages", tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rendered = template.render(TALK)
    assert (rendered.response, rendered.end) == ("2", end)
    assert template.ends == {end, tokenizer.eos_token_id}
    assert Template("alpaca", "alpaca", tokenizer).ends == {tokenizer.eos_token_id}
    assert encode_records([TALK], template, 200, "training").examples[0].input_ids[-1] == end


def test_a_template_without_an_end_of_a_turn_leaves_the_tokenizers_end_token():
    template = Template(
        "chat", "messages", with_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    )
    assert template.ends == {template.tokenizer.eos_token_id}
    assert template.render(TALK).end is None


def test_an_end_of_a_turn_that_is_no_token_is_known():
    assert Template("chat", "messages", with_template(CHATML.replace("im_end", "im_stop"))).end_as_text == "<|im_stop|>"
    assert Template("plain", "prompt", with_template(CHATML.replace("im_end", "im_stop"))).end_as_text is None
    for text in (CHATML, CHATML.replace("<|im_end|>", ""), CHATML.replace("<|im_end|>", "{{ eos_token }}")):
        assert Template("chat", "messages", with_template(text)).end_as_text is None


def test_another_end_than_usual_is_the_end_of_that_answer():
    called = "{% if m['tool_calls'] %}call<|endoftext|>{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    tokenizer = with_template(CHATML.replace("{{ m['content'] }}<|im_end|>", called))
    record = {"messages": [TALK["messages"][1], {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]}
    rendered = Template("chat", "messages", tokenizer).render(record)
    assert (rendered.response, rendered.answer, rendered.end) == ("call", "call", tokenizer.eos_token_id)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("begun", "end"), [("", "<|im_end|>"), ("<call>", "<file_sep>")])
def test_an_end_token_that_closes_every_turn_is_trained_but_not_one_at_the_end_of_a_conversation(begun, end, last_only):
    closing = "{% if not add_generation_prompt %}<|endoftext|>{% endif %}" if last_only else ""
    ended = "<|im_end|>" if last_only else "<|im_end|><|endoftext|>"
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        f"{{% if '<call>' in m.content %}}{ended.replace('<|im_end|>', '<file_sep>')}{{% else %}}{ended}{{% endif %}}{{% endfor %}}"
        f"{closing}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    )
    tokenizer = with_template(text)
    (example,) = encode_records(
        [{"messages": [QUESTION, {"role": "assistant", "content": f"1{begun}"}]}],
        Template("chat", "messages", tokenizer),
        100,
        "training",
    ).examples
    answer = tokenizer.decode(example.input_ids[example.prompt_length :])
    assert answer == f"1{begun}{end}{'' if last_only else '<|endoftext|>'}"
    assert Template("chat", "messages", tokenizer).ends == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_an_answer_that_ends_by_the_closing_token_alone_has_it_once():
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if '<bye>' not in m.content %}<|im_end|>{% endif %}<|endoftext|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for content, ended in (("1", "1<|im_end|><|endoftext|>"), ("1<bye>", "1<bye><|endoftext|>")):
        records = [{"messages": [QUESTION, {"role": "assistant", "content": content}]}]
        (example,) = encode_records(records, Template("chat", "messages", tokenizer), 100, "training").examples
        assert tokenizer.decode(example.input_ids[example.prompt_length :]) == ended


def test_tools_documents_and_template_arguments_reach_the_template():
    tokenizer = with_template(TOOLS + "{{ documents }}{{ style }}" + CHATML)
    record = {**TALK, "tools": [{"name": "clock"}], "documents": [{"text": "d"}], "chat_template_kwargs": {"style": "terse"}}
    prompt = Template("chat", "messages", tokenizer).render(record).prompt
    assert '"clock"' in prompt
    assert "[{'text': 'd'}]terse" in prompt


def test_what_the_chat_template_does_not_mention_is_listed():
    answer = {"role": "assistant", "content": "2", "weight": 0, "name": None, "reasoning": "r", "mood": "m"}
    records = [Record({**TALK, "messages": [*TALK["messages"][:-1], answer]}), Record({**TALK, "tools": [{"name": "clock"}]})]
    assert Template("chat", "messages", with_template(CHATML)).unread(records) == ["mood", "reasoning", "tools"]
    mentioned = with_template(TOOLS + "{{ messages[-1].reasoning }}" + CHATML)
    assert Template("chat", "messages", mentioned).unread(records) == ["mood"]
    assert Template("alpaca", "alpaca", mentioned).unread([Record({"instruction": "a", "output": "b"})]) == []


@pytest.mark.parametrize(
    "before", ["{% set tools = [] %}" + TOOLS, "Use no tools. ", "{% if messages[0].tools %}{{ tools }}{% endif %}"]
)
def test_tools_that_the_chat_template_mentions_but_does_not_write_are_listed(before):
    records = [Record(TALK), Record({**TALK, "tools": [{"name": "clock"}]})]
    assert Template("chat", "messages", with_template(before + CHATML)).unread(records) == ["tools"]
    assert Template("chat", "messages", with_template(before + CHATML)).unread(records[:1]) == []


def test_a_block_that_the_template_puts_before_an_answer_is_trained_but_no_part_of_the_reference():
    thinking = CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}" + BLOCK + "{% endif %}{{ m['content'] }}"
    )
    rendered = Template("chat", "messages", with_template(thinking)).render(TALK)
    assert (rendered.response, rendered.lead, rendered.answer) == (BLOCK + "2", BLOCK, "2")
    assert rendered.own_turn


@pytest.mark.parametrize(
    ("entries", "lead"),
    [
        ({"id": 7}, BLOCK),
        ({"tool_calls": None}, BLOCK),
        ({"reasoning_content": ""}, BLOCK),
        ({"reasoning_content": "hm"}, ""),
    ],
)
def test_entries_of_an_answer_that_the_template_does_not_write_leave_its_own_block_out_of_the_reference(entries, lead):
    block = "{% if loop.last and m['role'] == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    template = Template("chat", "messages", with_template(CHATML.replace("{{ m['content'] }}", block + "{{ m['content'] }}")))
    rendered = template.render({"messages": [TALK["messages"][1], {"role": "assistant", "content": "2", **entries}]})
    assert (rendered.lead, rendered.answer) == (lead, rendered.response.removeprefix(lead))


def test_an_entry_that_is_null_is_written_as_one_that_is_absent():
    named = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{% if m.name is defined %} {{ m.name }}{% endif %}")
    nulls = {"messages": [{**message, "name": None} for message in TALK["messages"]]}
    template = Template("chat", "messages", with_template(named))
    assert template.render(nulls) == template.render(TALK)


@pytest.mark.parametrize(
    ("before", "text", "lead", "answer"),
    [
        ("", "m['content']", "", "    return 2\n"),
        (" ", "m['content']", " ", "    return 2\n"),
        (BLOCK, "m['content']", BLOCK, "    return 2\n"),
        (" ", "m['content'] | trim", " ", "return 2"),
    ],
)
def test_the_indentation_of_an_answer_is_no_part_of_what_the_template_puts_before_it(
    before: str, text: str, lead: str, answer: str
):
    template = CHATML.replace("{{ m['content'] }}", f"{{% if m['role'] == 'assistant' %}}{before}{{% endif %}}{{{{ {text} }}}}")
    record = {"prompt": "def f():\n", "completion": "    return 2\n"}
    rendered = Template("chat", "prompt", with_template(template)).render(record)
    assert (rendered.lead, rendered.answer) == (lead, answer)


def test_an_answer_that_the_template_renders_otherwise_is_trained_as_written_and_counted():
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = Template("chat", "messages", with_template(opened))
    rendered = template.render(TALK)
    assert rendered.prompt.endswith("assistant\n<think>\n")
    assert (rendered.response, rendered.own_turn) == ("2", False)
    assert encode_records([TALK], template, 200, "training").apart == 1


@pytest.mark.parametrize(
    ("opening", "answer", "trained"),
    [
        ("<think>\n", "<think>\nt\n</think>\n\n2", "t\n</think>\n\n2"),
        ("<think>", " <think>\nt</think>2", "\nt</think>2"),
        ("[THINK]", "[THINK]t[/THINK]2", "t[/THINK]2"),
        ("<think>\n", "2 <think>", "2 <think>"),
    ],
)
def test_thoughts_that_the_prompt_begins_are_not_begun_twice(opening, answer, trained):
    without_thoughts = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1].split('[/THINK]')[-1] }}")
    template = Template(
        "chat",
        "messages",
        with_template(without_thoughts.replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}")),
    )
    rendered = template.render({"messages": [TALK["messages"][1], {"role": "assistant", "content": answer}]})
    assert rendered.prompt.endswith(f"assistant\n{opening}")
    assert (rendered.response, rendered.answer) == (trained, trained)


@pytest.mark.parametrize(
    ("prompted", "written", "lead"),
    [
        ("<think>\n", "<think></think>", "</think>"),  # Nemotron 3
        ("<think>", "</think>", "</think>"),  # GLM-4.7
        ("<|START_THINKING|>", "<|START_TEXT|>", "<|START_TEXT|>"),  # Command A
        ("<think></think>", "</think>", ""),  # DeepSeek V3.2
        ("<think>\n", "", ""),
        ("\n", " ", ""),
    ],
)
def test_a_text_follows_what_the_template_writes_before_every_answer_where_prompts_begin_it_otherwise(prompted, written, lead):
    text = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}WRITTEN{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistantPROMPTED{% endif %}"
    )
    template = Template("chat", "messages", with_template(text.replace("WRITTEN", written).replace("PROMPTED", prompted)))
    rendered = template.render(TALK)
    assert rendered.prompt.endswith(f"assistant{prompted}")
    assert (rendered.response, rendered.lead, rendered.answer) == (f"{lead}2", lead, "2")
    thought = {"role": "assistant", "content": "<think>hm</think>2"}
    assert template.render({"messages": [QUESTION, thought]}).response.endswith("hm</think>2")


def test_a_text_that_names_the_tag_of_thoughts_follows_their_end_as_others_do():
    text = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<think>{% endif %}"
    )
    template = Template("chat", "messages", with_template(text))
    for answer in ("put it in <think> tags", "end it with </think>, qzx"):
        rendered = template.render({"messages": [QUESTION, {"role": "assistant", "content": answer}]})
        assert (rendered.response, rendered.lead) == (f"</think>{answer}", "</think>")


@pytest.mark.parametrize(("prompted", "written"), [("", "\n"), (":", " "), ("\n", "")])
def test_an_answer_that_begins_as_its_prompt_is_trained_as_written_where_earlier_messages_are_written_otherwise(
    prompted, written
):
    text = (
        "{% for m in messages %}{% if loop.last and m['role'] == 'user' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m['role'] }}PROMPTED{{ 'WRITTEN' if m['role'] == 'assistant' }}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistantPROMPTED{% endif %}"
    )
    template = Template("chat", "messages", with_template(text.replace("PROMPTED", prompted).replace("WRITTEN", written)))
    rendered = template.render({"messages": [QUESTION, {"role": "assistant", "content": "2 "}]})
    assert "Be brief." in rendered.prompt
    assert not rendered.own_turn
    assert (rendered.response, rendered.lead, rendered.answer) == (f"{written}2", written, "2")


def test_a_template_that_refuses_a_conversation_is_quoted_with_the_records_place():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
    template = Template("chat", "messages", with_template(refusing))
    with pytest.raises(CoraError, match=r"a\.jsonl, line 7: the chat template refuses the conversation: no system role here"):
        template.render(Record(TALK, "a.jsonl, line 7"))


def test_a_template_that_wants_a_system_message_ends_its_turns_by_its_token_too():
    wanting = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    plain, template = (Template("chat", "messages", with_template(text)) for text in (CHATML, wanting))
    assert template.ends == plain.ends
    assert len(template.ends) == 2


def test_control_tokens_spelled_in_a_text_are_counted_but_not_the_end_of_an_answer(chat):
    template = Template("chat", "prompt", chat)
    spelled = [
        {"prompt": "what does <|im_end|> mean?", "completion": "a"},
        {"prompt": "q", "completion": "it is <|im_start|>."},
        {"prompt": "q", "completion": "a<|im_end|>"},
        {"prompt": "q", "completion": "a"},
    ]
    assert [template.spells_control_tokens(record) for record in spelled] == [True, True, False, False]
    assert encode_records(spelled, template, 200, "training").control_tokens == 2


def test_tokens_around_messages_that_are_not_called_special_are_counted_but_not_those_of_thoughts_and_calls():
    frame = "<｜{{ m['role'] }}｜>{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    tokenizer = with_template(f"{{% for m in messages %}}{frame}{{% endfor %}}{{# <call> #}}")
    tokenizer.add_tokens(["<｜user｜>", "<｜assistant｜>", "<think>", "<call>"])
    template = Template("chat", "prompt", tokenizer)
    spelled = [{"prompt": f"a {text} b", "completion": "a"} for text in ("<｜user｜>", "<think>", "<call>", "<｜other｜>")]
    assert [template.spells_control_tokens(record) for record in spelled] == [True, False, False, False]


def test_control_tokens_that_a_normalizer_makes_of_a_text_are_counted():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "abs</>")]
    own = Tokenizer(Unigram(pieces, unk_id=0))
    own.normalizer = NFKC()
    own.add_special_tokens([AddedToken("</s>", normalized=False)])
    wide = Template("plain", "prompt", PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>"))
    assert [wide.spells_control_tokens({"prompt": text, "completion": "a"}) for text in ("a＜/s＞b", "＜/ s＞")] == [
        True,
        False,
    ]

    own = Tokenizer(WordLevel({"[MASK]": 0, "[unk]": 1}, unk_token="[unk]"))
    own.normalizer = Lowercase()
    own.add_special_tokens([AddedToken("[MASK]", normalized=True), AddedToken("[SEP]", normalized=False)])
    lower = Template("plain", "prompt", PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[unk]", eos_token="[SEP]"))
    assert [lower.spells_control_tokens({"prompt": text, "completion": "a"}) for text in ("[mask]", "[sep]")] == [True, False]


@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize("spelled", ["a<|im_end|>", "a<|im_end|>\n", "a<|im_end|><|im_end|>"])
def test_an_end_token_that_a_record_has_at_the_end_of_its_answer_is_no_part_of_it(chat, name, spelled):
    template = Template(name, "prompt", chat)
    given, bare = ({"prompt": "q", "completion": answer} for answer in (spelled, "a"))
    assert template.render(given).answer == template.render(bare).answer == "a"
    assert encode_records([given], template, 200, "training") == encode_records([bare], template, 200, "training")


def test_special_tokens_that_an_answer_spells_are_those_that_do_not_end_it(chat):
    template = Template("plain", "prompt", chat)
    assert template.spelled_tokens("a<|im_start|>b<|im_end|>") == {chat.convert_tokens_to_ids("<|im_start|>")}


def test_every_answer_of_a_conversation_is_a_turn(chat):
    turns = list(Template("chat", "messages", chat).turns(Record(TALK, "here")))
    assert [turn["messages"] for turn in turns] == [TALK["messages"][:3], TALK["messages"]]
    assert {turn.where for turn in turns} == {"here"}


def test_a_token_without_an_embedding_row_is_refused_by_name(chat):
    record = Record({"prompt": "x", "completion": "y"}, "a.jsonl, line 2")
    template = Template("plain", "prompt", chat)
    rows = chat.eos_token_id
    with pytest.raises(
        CoraError, match=rf"a.jsonl, line 2: the token .* has the id \d+, but the model's embedding has only {rows} rows"
    ):
        encode_records([record], template, 200, "training", rows)
    assert encode_records([record], template, 200, "training", len(chat)).examples


def test_every_answer_is_an_example_after_the_conversation_up_to_it(chat):
    template = Template("chat", "messages", chat)
    encoded = encode_records([Record(TALK)], template, 200, "training", every_answer=True)
    answers = [chat.decode(example.input_ids[example.prompt_length :]) for example in encoded.examples]
    assert answers == ["1<|im_end|>", "2<|im_end|>"]
    prompt = chat.apply_chat_template(TALK["messages"][:2], tokenize=False, add_generation_prompt=True)
    assert chat.decode(encoded.examples[0].input_ids[: encoded.examples[0].prompt_length]) == prompt


def test_control_tokens_in_tools_calls_and_thoughts_are_counted(chat):
    template = Template("chat", "messages", chat)
    end = chat.convert_ids_to_tokens(next(iter(template.ends - {chat.eos_token_id}), chat.eos_token_id))
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert not template.spells_control_tokens({"messages": [asked, answer], "tools": [{"name": "f"}]})
    assert template.spells_control_tokens({"messages": [asked, answer], "tools": [{"name": end}]})
    assert template.spells_control_tokens({"messages": [asked, answer], "tools": [{"properties": {f"x{end}": {}}}]})
    assert template.spells_control_tokens({"messages": [asked, {**answer, "reasoning_content": f"so {end}"}]})
    quoting = copy.deepcopy(chat)
    quoting.add_special_tokens({"additional_special_tokens": ['<|"|>']})  # Gemma 4's, for texts in calls
    record = {"messages": [asked, answer], "tools": [{"name": "f", "description": 'quotes <|"|>'}]}
    assert Template("chat", "messages", quoting).spells_control_tokens(record)


def test_messages_that_the_template_leaves_out_are_counted_by_role():
    known = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
    template = Template("chat", "messages", with_template(known))
    assert template.render(TALK).left_out == ("system",)
    encoded = encode_records([TALK, {"messages": TALK["messages"][1:]}], template, 200, "training")
    assert encoded.left_out == {"system": 1}
    assert any("the roles system (1 records)" in notice for notice in notices(encoded))


def test_thoughts_that_the_template_removes_are_named_where_they_are_the_answers_own():
    removing = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    template = Template("chat", "messages", with_template(removing))
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>2"}
    question = {"role": "user", "content": "one?"}
    assert template.render({"messages": [question, thought]}).left_out == ("assistant",)
    assert template.render({"messages": [question, thought, *TALK["messages"][1:]]}).left_out == ()
    apart = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('</think>', '\n</think>\n\n') }}")
    assert Template("chat", "messages", with_template(apart)).render({"messages": [question, thought]}).left_out == ()


def test_an_answer_is_written_as_the_template_does_where_it_writes_earlier_messages_otherwise_before_one():
    text = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %} to all: {% endif %}"
        "{% if m['role'] != 'user' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    rendered = Template("chat", "messages", with_template(text)).render({"messages": TALK["messages"][1:3]})
    assert (rendered.response, rendered.lead, rendered.own_turn) == (" to all: 1", " to all: ", False)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_thoughts_reach_the_template_under_each_name_and_are_named_where_it_drops_them(name):
    written = "{% if m.reasoning_content and WHEN %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    record = Record({"messages": [QUESTION, {"role": "assistant", "content": "1", name: "hm"}]})
    for when, response, left_out in (("true", "<think>hm</think>1", ()), ("m.tool_calls", "1", ("assistant",))):
        text = CHATML.replace("{{ m['content'] }}", written.replace("WHEN", when))
        template = Template("chat", "messages", with_template(text))
        assert (template.render(record).response, template.render(record).left_out) == (response, left_out)
        assert template.unread([record]) == []


@pytest.mark.parametrize("thinks", [False, True])
def test_a_template_that_begins_an_answer_behind_every_conversation_as_the_records_variables_say_is_trained(thinks):
    # As in Command R7B's template: prompts have an empty block of thoughts, but answers begin with another token.
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '<say>' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '<said>' if m.role == 'assistant' }}<|im_end|>{% endfor %}"
        "<|im_start|>assistant{% if not thinks %}<think></think>{% endif %}"
    )
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<say>", "<said>")], special_tokens=True)
    record = {**TALK, "chat_template_kwargs": {"thinks": True}} if thinks else TALK
    rendered = Template("chat", "messages", tokenizer).render(record)
    assert rendered.prompt.endswith("two?<|im_end|><|im_start|>assistant" + ("" if thinks else "<think></think>"))
    assert (rendered.response, rendered.lead) == ("<say>2", "<say>")
    assert rendered.end == tokenizer.convert_tokens_to_ids("<said>")
