"""Adapters of embeddings: rows for added tokens, without padding, and those that nobody has."""

import json

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from tests.adapters.helpers import copy_of, foreign, logits


def test_an_adapter_of_embeddings_with_which_peft_stores_their_weights_is_merged(tiny_model, tmp_path):
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    expected = foreign(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-5
    )


def test_an_embedding_and_a_head_that_the_files_hold_apart_are_not_said_to_part(tiny_model, tmp_path, capsys):
    base = copy_of(tiny_model, tmp_path / "base", torch.float32)
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert "were one weight" not in capsys.readouterr().err
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-5
    )


def test_an_adapter_with_added_tokens_brings_its_rows_and_its_tokenizer(tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size + 1
    expected = foreign(tiny_model, tmp_path / "adapter", rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == rows
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert "<call>" in AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_rows_of_added_tokens_without_the_tokenizer_that_has_them_are_named(has_tokenizer, tiny_model, tmp_path, capsys):
    foreign(tiny_model, tmp_path / "adapter", LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size + 1)
    if has_tokenizer:
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    for write in (merge_adapter, export_adapter):
        write(resolve_model(str(tmp_path / "adapter")), tmp_path / write.__name__)
        assert ("so the base's is used; copy the tokenizer of its training" in capsys.readouterr().err) != has_tokenizer


def test_an_adapter_with_added_tokens_is_exported_with_its_rows_and_its_tokenizer(tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size + 1
    expected = foreign(tiny_model, tmp_path / "adapter", rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(rows, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert "<call>" in AutoTokenizer.from_pretrained(tmp_path / "exported").get_vocab()


@pytest.mark.parametrize("complete", [True, False])
def test_an_adapter_that_trains_the_rows_of_added_tokens_alone_is_merged_and_exported(complete, tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size + 2
    added = [rows - 1, rows - 2]
    expected = foreign(tiny_model, tmp_path / "adapter", rows, complete=complete, trainable_token_indices=added)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == rows
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(rows)
    loaded = PeftModel.from_pretrained(base, tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_an_adapter_trained_without_the_padding_rows_of_its_base_is_merged_and_exported(settings, tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size
    padded = LlamaForCausalLM.from_pretrained(tiny_model)
    padded.resize_token_embeddings(rows + 64, mean_resizing=False)
    padded.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    expected = foreign(tmp_path / "base", tmp_path / "adapter", rows, **settings)
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == merged.config.vocab_size == rows
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    padded.resize_token_embeddings(rows)
    loaded = PeftModel.from_pretrained(padded, tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=0)


def test_the_rows_of_added_tokens_stay_with_an_adapter_that_becomes_a_lora(tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size + 1
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(rows)
    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False, base_model_name_or_path=str(tiny_model))
    wrapped = get_peft_model(base, config).eval()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(rows, mean_resizing=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "exported")), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_saved_head_that_peft_stores_twice_since_tokens_were_added_is_taken_once(gpt2, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    rows = base.config.vocab_size + 2
    base.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    config.base_model_name_or_path = str(gpt2)
    wrapped = get_peft_model(base, config).eval()
    for number, parameter in enumerate(one for one in wrapped.parameters() if one.requires_grad):
        parameter.add_(torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape), alpha=0.1 * (number + 1))
    expected = wrapped(torch.arange(12)[None]).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    stored = load_file(file)
    assert "base_model.model.lm_head.modules_to_save.weight" in stored
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(torch.arange(12)[None]).logits, expected, atol=1e-5, rtol=1e-5)
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    grown = AutoModelForCausalLM.from_pretrained(gpt2)
    grown.resize_token_embeddings(rows, mean_resizing=False)
    loaded = PeftModel.from_pretrained(grown, tmp_path / "exported").eval()
    torch.testing.assert_close(loaded(torch.arange(12)[None]).logits, expected, atol=1e-5, rtol=1e-5)
    stored["base_model.model.lm_head.modules_to_save.weight"] += 1
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"lm_head.modules_to_save.weight, belongs to no layer"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "other")


def test_rows_of_a_head_that_an_adapter_leaves_out_are_the_mean_of_the_others_and_named(tiny_model, tmp_path, capsys):
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    known = base.config.vocab_size
    foreign(tmp_path / "base", tmp_path / "adapter", known + 2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    del stored["base_model.model.lm_head.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    wrapped = load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), resolve_model(str(tmp_path / "adapter")))
    head, embedding = wrapped.get_output_embeddings().weight, wrapped.get_input_embeddings().weight
    torch.testing.assert_close(head[known:], base.lm_head.weight.mean(dim=0).expand(2, -1))
    assert torch.equal(embedding, stored["base_model.model.model.embed_tokens.weight"])
    assert "adds 2 tokens, but stores no rows of lm_head for them; they get the mean" in capsys.readouterr().err


def test_a_head_that_shared_its_weight_with_a_saved_embedding_has_no_rows_of_its_own(tiny_model, tmp_path, capsys):
    known = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size
    foreign(tiny_model, tmp_path / "adapter", known + 2, complete=False, modules_to_save=["embed_tokens"])
    load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), resolve_model(str(tmp_path / "adapter")))
    assert "adds 2 tokens, but stores no rows of lm_head for them" in capsys.readouterr().err


def test_an_embedding_with_more_rows_than_its_head_keeps_them(mllama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(mllama)
    rows = len(base.get_input_embeddings().weight)
    assert rows != len(base.get_output_embeddings().weight)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    wrapped = load_adapter(AutoModelForCausalLM.from_pretrained(mllama), resolve_model(str(tmp_path / "adapter")))
    assert len(wrapped.get_input_embeddings().weight) == rows


@pytest.mark.parametrize("write", [merge_adapter, export_adapter])
def test_tokens_of_its_tokenizer_for_which_an_adapter_has_no_rows_are_counted(write, tiny_model, tmp_path, capsys):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size
    foreign(tiny_model, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    write(resolve_model(str(tmp_path / "adapter")), tmp_path / "written")
    assert f"its tokenizer has {rows + 1:,} tokens, but the embedding {rows:,} rows" in capsys.readouterr().err


def test_an_adapter_with_rows_for_some_of_the_added_tokens_is_not_merged(tiny_model, tmp_path):
    rows = LlamaForCausalLM.from_pretrained(tiny_model).config.vocab_size
    foreign(tiny_model, tmp_path / "adapter", rows + 2, complete=False, trainable_token_indices=[rows])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match=rf"stores {rows + 1:,} embedding rows, fewer than the {rows + 2:,} tokens"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([1, 10**9], "trains row 1000000000, but the embedding of the base model has 8,192 rows"),
        ([8193], "trains row 8193, but"),
        ([-1], "trains row -1, but"),
        ([1, "a"], "trainable_token_indices"),
    ],
)
def test_an_adapter_that_trains_rows_beyond_those_that_anybody_has_is_refused(rows, said, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter", trainable_token_indices=[1, 2][: len(rows)])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": rows}))
    with pytest.raises(CoraError, match=said):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")


def test_an_adapter_with_fewer_embedding_rows_than_its_tokenizer_has_tokens_is_not_merged(tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter", 200)
    with pytest.raises(CoraError, match=r"stores 200 embedding rows, fewer than the [0-9,]+ tokens of its tokenizer"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
