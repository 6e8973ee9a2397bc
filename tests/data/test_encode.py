import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cora_cli import embedded
from cora_cli.data import encode
from cora_cli.data.encode import encode_prompt, encode_records, notices, split_tokens
from cora_cli.data.templates import Rendered, Template, choose_template
from cora_cli.errors import CoraError

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
FORMS = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "bos and eos": "<s> $A </s>"}


def make_tokenizer(adds: str = "nothing", one_special_token: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level characters with the merge "ab"; pad is eos. It adds what FORMS says around every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ab"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    start, end = ("</s>", "</s>") if one_special_token else ("<s>", "</s>")
    inner.add_special_tokens(sorted({start, end}))
    inner.post_processor = processors.TemplateProcessing(
        single=FORMS[adds].replace("<s>", start), special_tokens=[(name, inner.token_to_id(name)) for name in {start, end}]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=start, eos_token=end, pad_token=end)


TOKENIZERS = {
    **{adds: make_tokenizer(adds) for adds in FORMS},
    **{f"{adds}, one special token": make_tokenizer(adds, one_special_token=True) for adds in FORMS},
}
# Texts with an end token written out in the middle, at the start and at the end, and with a merge over the seam.
pieces = st.lists(st.sampled_from(["a", "b", "ab", " ", "é", "</s>", "x\n"]), max_size=5).map("".join)


@pytest.fixture(scope="module")
def embedded_tokenizer():
    return AutoTokenizer.from_pretrained(embedded.model_directory())


def prompt_records(*pairs):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=pieces, response=pieces, special=st.booleans())
@repeatable
def test_prompt_and_response_are_the_texts_with_the_start_tokens_before_and_one_end_token_behind(
    name, prompt, response, special
):
    tokenizer, eos = TOKENIZERS[name], TOKENIZERS[name].eos_token_id
    before = [tokenizer.bos_token_id] if special and name.startswith("bos") else []
    ids, answer = split_tokens(Rendered(prompt, response, special), tokenizer)
    if before and prompt.startswith(tokenizer.bos_token):
        before = []
    elif before and not prompt:
        response = response.removeprefix(tokenizer.bos_token)
    assert ids == encode_prompt(Rendered(prompt, "other", special), tokenizer), "training sees the prompt of generation"
    assert ids[: len(before)] == before
    assert tokenizer.decode(ids[len(before) :]) == prompt, "an end token in the text is a token like others"
    assert answer[-1] == eos
    written_out = response.endswith("</s>")
    assert tokenizer.decode(answer) == response if written_out else tokenizer.decode(answer) == response + "</s>"


@pytest.mark.parametrize("schema", ["text", "prompt"])
def test_a_start_token_that_the_text_spells_itself_is_not_added_again(schema):
    tokenizer = make_tokenizer("bos")
    record = {"text": "<s>[INST]a[/INST]b"} if schema == "text" else {"prompt": "<s>[INST]a[/INST]", "completion": "b"}
    (example,) = encode_records([record], Template("plain", schema, tokenizer), 200, "training").examples
    assert example.input_ids == [*tokenizer("[INST]a[/INST]b")["input_ids"], tokenizer.eos_token_id]


def test_tokenizers_of_the_test_add_what_they_say():
    added = {name: tokenizer("x")["input_ids"] for name, tokenizer in TOKENIZERS.items()}
    assert [len(ids) for ids in added.values()] == [1, 2, 2, 3] * 2


def test_a_response_is_written_as_in_one_text_where_the_seam_is_a_token_boundary_and_alone_where_not(embedded_tokenizer):
    prompt, response = split_tokens(Rendered("The answer:", " forty two", True), embedded_tokenizer)
    whole = embedded_tokenizer("The answer: forty two")["input_ids"]
    assert [*prompt, *response] == [*whole, embedded_tokenizer.eos_token_id]
    tokenizer = TOKENIZERS["nothing"]
    ids = tokenizer.convert_tokens_to_ids
    assert split_tokens(Rendered("xa", "bx", True), tokenizer) == (ids(["x", "a"]), [*ids(["b", "x"]), tokenizer.eos_token_id])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_loss_is_on_the_response_and_its_end_whatever_ids_they_hold(name):
    tokenizer = TOKENIZERS[name]
    records = prompt_records(("x</s>y</s>", "b</s>x"), ("x", ""), ("x", "ab</s>"))
    encoded = encode_records(records, Template("plain", "prompt", tokenizer), 100, "training")
    answers = [tokenizer.decode(example.input_ids[example.prompt_length :]) for example in encoded.examples]
    assert answers == ["b</s>x</s>", "</s>", "ab</s>"]
    assert encoded.response_tokens == 4 + 1 + 2
    assert encoded.tokens == encoded.response_tokens + sum(example.prompt_length for example in encoded.examples)
    assert (encoded.truncated, encoded.dropped) == (0, 0)


def test_a_chat_prompt_has_the_templates_own_start_tokens_only(embedded_tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    encoded = encode_records([{"messages": messages}], Template("chat", "messages", embedded_tokenizer), 100, "training")
    text = embedded_tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert embedded_tokenizer.decode(encoded.examples[0].input_ids) == text


def test_a_tokenizer_without_a_chat_template_gets_alpaca():
    tokenizer = TOKENIZERS["bos"]
    template = choose_template("auto", "alpaca", tokenizer)
    record = {"instruction": "Go.", "input": "", "output": "ok"}
    example = encode_records([record], Template(template, "alpaca", tokenizer), 1000, "training").examples[0]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<s>Below is an instruction")
    assert text.endswith("### Response:\nok</s>")


@given(prompt=st.integers(1, 12), response=st.integers(0, 12), longest=st.integers(2, 16))
@repeatable
def test_what_is_too_long_loses_the_prompts_beginning_and_a_response_that_does_not_fit_is_dropped(prompt, response, longest):
    tokenizer = TOKENIZERS["nothing"]
    short = {"prompt": "x", "completion": ""}
    long = {"prompt": "".join("cdefghijklmn"[:prompt]), "completion": "y" * response}
    encoded = encode_records([short, long], Template("plain", "prompt", tokenizer), longest, "training")
    room = longest - (response + 1)
    if room < 1:
        assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (1, 0, 1)
        return
    example = encoded.examples[1]
    assert tokenizer.decode(example.input_ids) == long["prompt"][-room:] + long["completion"] + "</s>"
    assert example.prompt_length == min(room, prompt)
    assert (encoded.truncated, encoded.dropped) == (int(prompt > room), 0)


def test_a_prompt_that_loses_its_beginning_keeps_its_start_token():
    tokenizer = TOKENIZERS["bos"]
    record = {"prompt": "cdefgh", "completion": "y"}
    kept = []
    for longest in (9, 8, 5, 4, 3):
        encoded = encode_records([record], Template("plain", "prompt", tokenizer), longest, "training")
        assert len(encoded.examples[0].input_ids) == longest
        kept.append((tokenizer.decode(encoded.examples[0].input_ids), encoded.truncated))
    assert kept == [("<s>cdefghy</s>", 0), ("<s>defghy</s>", 1), ("<s>ghy</s>", 1), ("<s>hy</s>", 1), ("hy</s>", 1)]


@pytest.mark.parametrize("count", [2, 3])
def test_many_records_are_counted_as_they_are_tokenized(count, monkeypatch, capsys):
    monkeypatch.setattr(encode, "_MANY", 3)
    template = Template("plain", "prompt", TOKENIZERS["bos"])
    encode_records(prompt_records(*[("a", "b")] * count), template, 8, "training")
    assert ("tokenizing the training records: 3/3 records" in capsys.readouterr().err) == (count == 3)


def test_a_record_without_a_single_prompt_token_is_dropped():
    records = prompt_records(("", "a"), ("x", "a"))
    assert encode_records(records, Template("plain", "prompt", TOKENIZERS["nothing"]), 10, "training").dropped == 1
    assert encode_records(records, Template("plain", "prompt", TOKENIZERS["bos"]), 10, "training").dropped == 0


def test_nothing_left_is_an_error_that_names_the_records_and_the_length():
    records = prompt_records(("x", "y" * 20), ("x", "y" * 30))
    with pytest.raises(CoraError, match=r"all 2 training records were dropped.*--max-length 8"):
        encode_records(records, Template("plain", "prompt", TOKENIZERS["nothing"]), 8, "training")
    assert encode_records([], Template("plain", "prompt", TOKENIZERS["nothing"]), 8, "held-out").examples == []


def test_where_the_models_context_is_the_limit_it_is_named_instead_of_the_setting():
    records = prompt_records(("x", "y" * 20))
    template = Template("plain", "prompt", TOKENIZERS["nothing"])
    with pytest.raises(
        CoraError, match=r"no response fits into the model's context of 8 tokens; use shorter records, or a model"
    ):
        encode_records(records, template, 1024, "training", context=8)
    with pytest.raises(CoraError, match=r"no response fits into --max-length 8; use a larger --max-length"):
        encode_records(records, template, 8, "training", context=512)


def test_empty_prompts_and_empty_answers_are_counted_apart_from_long_records():
    template = Template("plain", "prompt", TOKENIZERS["nothing"])
    pairs = [("a", "b"), ("", "b"), ("a", " "), ("a", "b " * 40)]
    records = prompt_records(*pairs)
    encoded = encode_records(records, template, 20, "training")
    assert (len(encoded.examples), encoded.dropped, encoded.promptless, encoded.empty) == (2, 2, 1, 1)
    assert notices(encoded) == [
        "0 prompts truncated, 1 records dropped as too long",
        "1 dropped because their prompt is empty",
        "1 with an answer that is empty or white space",
    ]
    with pytest.raises(CoraError, match="all 1 training records were dropped: their prompts are empty"):
        encode_records(records[1:2], template, 20, "training")


def test_a_text_that_the_tokenizer_cannot_take_is_named():
    digits = Tokenizer(models.WordLevel({"1": 0, "2": 1, "</s>": 2}, unk_token="<unk>"))
    digits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits, eos_token="</s>")
    with pytest.raises(
        CoraError, match=r"the tokenizer cannot turn the text '12x' into tokens: WordLevel error: Missing \[UNK\]"
    ):
        split_tokens(Rendered("12x", "1", special_tokens=False), tokenizer)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_start_token_is_found_without_the_letter_a(refuses):
    vocabulary = {text: index for index, text in enumerate(["</s>", "<s>", "A", "C", "G", "T"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?") if refuses else models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert split_tokens(Rendered("GAT", "TACA", special_tokens=True), tokenizer) == ([1, 4, 2, 5], [5, 2, 3, 2, 0])


def test_the_vocabulary_is_not_gone_through_for_each_record_of_a_tokenizer_that_knows_the_letter_a(monkeypatch):
    tokenizer = make_tokenizer("bos")
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: pytest.fail("sorting a large vocabulary takes 0.1 s"))
    assert (
        encode_prompt(Rendered("a", "b", special_tokens=True), tokenizer)[1:]
        == tokenizer("a", add_special_tokens=False)["input_ids"]
    )


def test_text_that_the_tokenizer_leaves_out_is_counted():
    inner = Tokenizer(models.BPE(vocab={"</s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    template = Template("plain", "prompt", tokenizer)
    encoded = encode_records(prompt_records(("GATTACA", "CAT"), ("GA T", "C</s>A"), ("GAU", "CA")), template, 100, "training")
    assert encoded.unknown == 1
    assert notices(encoded)[-1] == (
        "1 with text that the tokenizer does not know, and replaces by its unknown token or leaves out"
    )


def test_words_whose_letters_alone_are_refused_are_known():
    inner = Tokenizer(models.WordLevel({"</s>": 0, "left": 1, "right": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = Template("plain", "prompt", PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    assert encode_records(prompt_records(("left ", "right")), template, 100, "training").unknown == 0


@pytest.mark.parametrize(("prompt", "response"), [("a ", "b c"), ("a", "b"), ("a  ", " b"), ("a ", "\nb")])
def test_a_response_gets_no_space_of_the_tokenizer_where_it_is_tokenized_on_its_own(prompt, response):
    letters = {text: index for index, text in enumerate(["</s>", "▁", "\n", "a", "b", "c", "▁b", "ab", "▁▁"])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[("▁", "b"), ("a", "b"), ("▁", "▁")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    asked, answer = split_tokens(Rendered(prompt, response, special_tokens=True), tokenizer)
    assert asked == tokenizer(prompt)["input_ids"], "training sees the prompt of generation"
    assert tokenizer.decode([*asked, *answer]) == f"{prompt}{response}</s>"
