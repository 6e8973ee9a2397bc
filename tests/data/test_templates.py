import pytest
from transformers import AutoTokenizer

from cora_cli import embedded
from cora_cli.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Rendered, choose_template, render
from cora_cli.errors import CoraError


class Plain:
    """A tokenizer without a chat template."""

    chat_template = None


@pytest.fixture(scope="module")
def chat():
    return AutoTokenizer.from_pretrained(embedded.model_directory())


ALPACA = {"instruction": "Translate {this}.", "input": "a {b} {", "output": "c"}
BARE = {**ALPACA, "input": ""}
PAIR = {"prompt": "Once upon", "completion": " a time"}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
}


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


@pytest.mark.parametrize(
    ("template", "schema"), [("chat", "alpaca"), ("chat", "prompt"), ("chat", "messages"), ("auto", "messages")]
)
def test_a_chat_without_a_chat_template_is_refused(template, schema):
    with pytest.raises(CoraError, match="the tokenizer has none"):
        choose_template(template, schema, Plain())


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_conversation_fits_no_other_template(template, chat):
    with pytest.raises(CoraError, match=f"chat messages need --template chat, not {template}"):
        choose_template(template, "messages", chat)


def test_alpaca_has_two_forms_and_braces_of_the_data_are_only_text():
    with_input = render(ALPACA, "alpaca", "alpaca", Plain())
    assert with_input.prompt == ALPACA_WITH_INPUT.replace("{instruction}", "Translate {this}.").replace("{input}", "a {b} {")
    assert "### Input:\na {b} {\n\n### Response:\n" in with_input.prompt
    bare = render(BARE, "alpaca", "alpaca", Plain())
    assert bare.prompt == ALPACA_WITHOUT_INPUT.replace("{instruction}", "Translate {this}.")
    assert "Input" not in bare.prompt
    assert with_input.response == bare.response == "c"
    assert with_input.special_tokens
    assert render(PAIR, "prompt", "alpaca", Plain()).prompt == ALPACA_WITHOUT_INPUT.replace("{instruction}", "Once upon")


def test_plain_leaves_a_pair_as_it_is_and_joins_instruction_and_input():
    assert render(PAIR, "prompt", "plain", Plain()) == Rendered("Once upon", " a time", special_tokens=True)
    assert render(ALPACA, "alpaca", "plain", Plain()).prompt == "Translate {this}.\na {b} {"
    assert render(BARE, "alpaca", "plain", Plain()).prompt == "Translate {this}."


def test_the_last_answer_of_a_conversation_is_the_response_and_all_before_is_the_prompt(chat):
    rendered = render(TALK, "messages", "chat", chat)
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
    assert render(record, schema, "chat", chat).prompt == expected
