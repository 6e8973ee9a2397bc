"""The embedded language model and its tokenizer."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cora_cli import embedded
from cora_cli.embedded import language_model

LOST_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.model_directory())


def test_the_configuration_is_that_of_smollm2_135m() -> None:
    config = AutoModelForCausalLM.from_pretrained(embedded.model_directory()).config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 576, 9, 3)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (49152, 1536, 8192)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings
    assert getattr(config, "quantization_config", None) is None


def test_weights_are_stored_once_in_bfloat16_without_a_second_output_matrix() -> None:
    with safe_open(embedded.model_directory() / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert len(names) == 30 * 9 + 2
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}


def test_the_model_answers_a_chat_question(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.model_directory())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


def test_conversion_agrees_with_the_gguf_reader_of_transformers(tmp_path: Path) -> None:
    _write_small_gguf(tmp_path / "small.gguf")
    (tmp_path / "converted").mkdir()
    language_model.convert_gguf(tmp_path / "small.gguf", tmp_path / "converted")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def _write_small_gguf(path: Path) -> None:
    """A one-layer Llama with grouped queries: hidden 16, heads of 4, every weight different."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    hidden, heads, groups, inner = 16, 4, 2, 24
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    key = hidden // heads * groups
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (key, hidden)}
    shapes |= {"blk.0.attn_v": (key, hidden), "blk.0.attn_output": (hidden, hidden), "blk.0.ffn_norm": (hidden,)}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(derandomize=True, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = "".join(character for character in text if ord(character) not in LOST_BYTES)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["x", " lead", "tail \n", "a  b\t\tc\n\n\n", "def f(x):\n    return  x\n", "naïve 你好 🙂 ½"])
def test_spaces_newlines_and_unicode_survive_a_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_leave_the_whitespace_before_them_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("y =  12\n\n3 ٤").input_ids)
    assert pieces == ["y", "Ġ=", "ĠĠ", "1", "2", "ĊĊ", "3", "Ġ", "Ù", "¤"]


def test_no_token_is_added_silently(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("").input_ids == []
    assert tokenizer("hello world").input_ids == [28120, 905]
    assert tokenizer("a", "b").input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids


def test_special_tokens_are_one_id_each_and_can_be_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    ids = tokenizer("<|im_start|>user\nhi<|im_end|><|endoftext|><empty_output>").input_ids
    assert ids == [1, 4093, 198, 6004, 2, 0, 16]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)


def test_the_chat_template_is_smollm2s(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_saved_copy_of_the_tokenizer_gives_the_same_ids(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>x =  12\n\n3 naïve 🙂<|im_end|>"
    assert copy(text).input_ids == tokenizer(text).input_ids
    assert copy.chat_template == tokenizer.chat_template
