"""Which tokens the files of a tokenizer give, and what is said where transformers makes others of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CodeLlamaTokenizer, PreTrainedTokenizerFast

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.models import tokenizer
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.tokenizer import load_tokenizer, save_tokenizer


@pytest.mark.parametrize("absent", ["sentencepiece", "protobuf"])
def test_a_tokenizer_of_sentencepiece_alone_names_the_packages_that_it_needs(absent, tiny_model, tmp_path, monkeypatch):
    directory = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(tokenizer, f"is_{name}_available", lambda name=name: name != absent)
    with pytest.raises(CoraError, match=r"tokenizer\.model is one of SentencePiece, .* `pip install sentencepiece protobuf`"):
        load_tokenizer(resolve_model(str(directory)))


def test_a_tokenizer_s_configuration_alone_is_refused_with_what_is_missing(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    place = directory / "tokenizer_config.json"
    writing.write_json(place, {**json.loads(place.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(CoraError, match=r"a file of its vocabulary is missing, such as tokenizer\.json; copy it"):
        load_tokenizer(resolve_model(str(directory)))


def test_a_tokenizer_without_an_end_token_is_refused_with_the_one_that_the_model_names(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    place = directory / "tokenizer_config.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    end = settings.pop("eos_token")
    writing.write_json(place, settings)
    with pytest.raises(CoraError, match=rf"set eos_token in tokenizer_config\.json .* such as \"{re.escape(end)}\"$"):
        load_tokenizer(resolve_model(str(directory)))


def test_a_tokenizer_that_knows_no_letter_a_is_loaded(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    inner = Tokenizer(WordLevel({"</s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(directory)
    assert load_tokenizer(resolve_model(str(directory)))("CAT")["input_ids"] == [2, 1, 4]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_tokenizer_that_transformers_reads_otherwise_than_its_file_says_is_named(model_type, tiny_model, tmp_path, capsys):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    writing.write_json(directory / "config.json", {**config, "model_type": model_type})
    ids = load_tokenizer(resolve_model(str(directory)))("2026 !")["input_ids"]
    described = Tokenizer.from_file(str(directory / "tokenizer.json"))
    is_said = "transformers splits text as its Qwen2Tokenizer does" in capsys.readouterr().err
    assert is_said == (model_type == "qwen2")
    assert is_said or ids == described.encode("2026 !").ids


CONTROL, OTHER_TOKENS = "<|end|>", "into other tokens than tokenizer.json describes"


def prepending(directory: Path, legacy: bool = False) -> ModelPath:
    """A folder with a tokenizer that sets a space before each text, and behind each control token, as Llama 2's does; stated to be of Llama's class,
    which, unless `legacy`, sets it before the first text alone."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens([AddedToken(CONTROL, special=True, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>").save_pretrained(directory)
    place = directory / "tokenizer_config.json"
    stated = json.loads(place.read_text(encoding="utf-8"))
    writing.write_json(place, {**stated, "tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    return ModelPath(directory.name, directory, None)


def of_type(model: Path, model_type: str, directory: Path) -> ModelPath:
    """The configuration of a model, as one of another type."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writing.write_json(directory / "config.json", {**config, "model_type": model_type})
    return ModelPath(directory.name, directory, None)


def test_a_tokenizer_that_is_read_otherwise_behind_control_tokens_alone_is_named(tmp_path, capsys):
    model = prepending(tmp_path / "model")
    text = f"{CONTROL}hi"
    described = Tokenizer.from_file(str(model.path / "tokenizer.json")).encode(text, add_special_tokens=False).tokens
    found = load_tokenizer(model).tokenize(text)
    assert (described, found) == ([CONTROL, "▁", "h", "i"], [CONTROL, "h", "i"])
    assert OTHER_TOKENS in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_an_adapter_s_tokenizer_is_read_as_the_program_that_trained_it_wrote_it(model_type, tiny_model, tmp_path, capsys):
    """Transformers knows that tokenizers of the type phi3 state a wrong class, but an adapter's folder does not tell the type."""
    base, adapter = of_type(tiny_model, model_type, tmp_path / "base"), prepending(tmp_path / "adapter")
    file = str(adapter.path / "tokenizer.json")
    used = Tokenizer.from_file(file)
    used.enable_padding(length=64)  # as the file has it where the last call asked for this
    used.save(file)
    found = load_tokenizer(base, adapter=adapter)
    save_tokenizer(found, base.path, base.path)
    for each in (found, load_tokenizer(base)):  # as it is written next to a merged model, too
        assert each.tokenize(f"{CONTROL}hi") == [CONTROL, "▁", "h", "i"]
    assert "other tokens" not in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_tokenizer_that_is_another_one_next_to_the_model_is_named_as_it_is_written(model_type, tiny_model, tmp_path, capsys):
    written = of_type(tiny_model, model_type, tmp_path / "merged")
    save_tokenizer(load_tokenizer(resolve_model(str(tiny_model))), written.path, tmp_path / "out")
    said = f"{tmp_path / 'out'}: transformers reads this tokenizer as its Qwen2Tokenizer, which gives other tokens than the tokenizer of {tiny_model}"
    assert (said in capsys.readouterr().err) == (model_type == "qwen2")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_is_written_gives_the_tokens_of_the_one_that_was_read(legacy, tiny_model, tmp_path, capsys):
    """Transformers reads `legacy` of a tokenizer of Llama's class, but does not write it."""
    model = prepending(of_type(tiny_model, "llama", tmp_path / "model").path, legacy)
    own = load_tokenizer(model)
    assert (own.tokenize(f"{CONTROL}hi")[1] == "▁") == legacy
    for name in ("adapter", "complete"):
        (tmp_path / name).mkdir()
        shutil.copy(model.path / "config.json", tmp_path / name) if name == "complete" else None
        save_tokenizer(own, tmp_path / name, tmp_path / name)
        again = load_tokenizer(ModelPath(name, tmp_path / name, None))
        assert again.tokenize(f"{CONTROL}hi") == own.tokenize(f"{CONTROL}hi")
    assert "gives other tokens" not in capsys.readouterr().err


@pytest.mark.parametrize("difference", ["normal form", "start token"])
def test_a_class_that_leaves_out_what_the_file_describes_is_named_and_not_taken_for_an_adapter(
    difference, tiny_model, tmp_path, capsys
):
    """The class of GPT-NeoX has NFC as its normal form, and by itself no start token."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *sorted(ByteLevel.alphabet())])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.normalizer = normalizers.NFKC() if difference == "normal form" else normalizers.NFC()
    if difference == "start token":
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for name in ("model", "adapter"):
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>").save_pretrained(tmp_path / name)
        place = tmp_path / name / "tokenizer_config.json"
        stated = json.loads(place.read_text(encoding="utf-8"))
        writing.write_json(place, {**stated, "tokenizer_class": "GPTNeoXTokenizer"})
    model = of_type(tiny_model, "gpt_neox", tmp_path / "model")
    described = inner.encode("１").ids
    assert load_tokenizer(model)("１")["input_ids"] != described
    assert OTHER_TOKENS in capsys.readouterr().err
    assert load_tokenizer(model, adapter=ModelPath("adapter", tmp_path / "adapter", None))("１")["input_ids"] == described
    assert OTHER_TOKENS not in capsys.readouterr().err


def test_a_tokenizer_without_tokens_for_most_texts_is_read_and_written(tmp_path):
    """Such as those of DNA: the library raises where there is no token for a character, and none that stands for unknown ones."""
    inner = Tokenizer(WordLevel({"</s>": 0, "A": 1, "C": 2}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(tmp_path)
    place = tmp_path / "tokenizer_config.json"
    stated = json.loads(place.read_text(encoding="utf-8"))
    for name in (None, "GPTNeoXTokenizer"):
        writing.write_json(place, {**stated, **({"tokenizer_class": name} if name else {})})
        found = load_tokenizer(ModelPath("model", tmp_path, None))
        if name is None:
            save_tokenizer(found, tmp_path, tmp_path)
            assert load_tokenizer(ModelPath("model", tmp_path, None))("CA")["input_ids"] == [2, 1]


def test_what_is_tried_with_a_tokenizer_leaves_it_as_it_is(tmp_path):
    """CodeLlama's has a token behind which it sets other spaces in all texts that follow."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))])}
    tokenizer = CodeLlamaTokenizer(vocab=vocabulary, merges=[], add_prefix_space=False)
    tokenizer.add_tokens(["<FILL_ME>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    fresh = AutoTokenizer.from_pretrained(tmp_path).tokenize("hi")
    found = load_tokenizer(ModelPath("model", tmp_path, None))
    save_tokenizer(found, tmp_path, tmp_path)
    assert found.tokenize("hi") == fresh
    found("a <FILL_ME> b")
    assert found.tokenize("hi") != fresh  # which is how a trial would show
