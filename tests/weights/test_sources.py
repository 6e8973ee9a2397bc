import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from cora_cli.errors import CoraError
from cora_cli.models.loading import load_model
from cora_cli.weights.sources import architecture_of, open_source
from tests.weights.helpers import make_llama

from .helpers import local

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def copy(square_models, tmp_path):
    """A model directory that a test may damage."""
    return shutil.copytree(square_models[0], tmp_path / "copy")


def change_config(directory, **changed):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_it_lists_every_two_dimensional_weight_and_no_norm(grouped_models):
    source = open_source(local(grouped_models[0]))
    assert source.shapes[Q0] == (16, 16)
    assert source.shapes["model.layers.1.self_attn.k_proj"] == (8, 16)
    assert source.shapes["model.layers.1.mlp.up_proj"] == (24, 16)
    assert not any("norm" in name for name in source.shapes)
    assert source.bytes_read == 0


def test_the_architecture_is_what_the_configuration_states(grouped_models):
    assert open_source(local(grouped_models[0])).architecture == {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
    }
    assert architecture_of({"model_type": "x", "hidden_size": None, "torch_dtype": "float32"}) == {"model_type": "x"}


def test_the_content_hash_is_the_same_for_every_layout_and_place(square_models, tmp_path):
    model = make_llama(seed=0)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    hashes = {open_source(local(path)).content_hash([Q0, "lm_head"]) for path in (square_models[0], tmp_path / "sharded")}
    assert len(hashes) == 1


def test_the_content_hash_sees_values_types_and_which_modules_but_not_other_tensors(square_models, copy):
    def changed(**tensors) -> str:
        file = copy / "model.safetensors"
        save_file({**load_file(square_models[0] / "model.safetensors"), **tensors}, file)
        return open_source(local(copy)).content_hash([Q0])

    original = open_source(local(square_models[0]))
    weight = original.read(Q0)
    touched = weight.clone()
    touched[3, 3] += 1e-6
    assert changed(**{"model.norm.weight": torch.zeros(16)}) == original.content_hash([Q0])
    different = [changed(**{f"{Q0}.weight": touched}), changed(**{f"{Q0}.weight": weight.double()})]
    assert len({original.content_hash([Q0]), original.content_hash([Q0, "lm_head"]), *different}) == 4


def test_the_content_hash_costs_no_second_read(square_models):
    source = open_source(local(square_models[0]))
    source.read(Q0)
    once = source.bytes_read
    assert once == 16 * 16 * 4
    source.content_hash([Q0])
    assert source.bytes_read == once


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_model_and_tensor(copy, value):
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{Q0}.weight"][0, 0] = value
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CoraError, match=rf"copy: {Q0} .*not finite"):
        open_source(local(copy)).read(Q0)


def test_integer_weights_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{Q0}.weight"] = torch.ones(16, 16, dtype=torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CoraError, match="int8"):
        open_source(local(copy)).read(Q0)


def test_quantised_models_are_refused(copy):
    change_config(copy, quantization_config={"bits": 4})
    with pytest.raises(CoraError, match="quantised"):
        open_source(local(copy))


def change_tensors(directory, change):
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_weights_of_a_type_that_needs_scales_are_refused_by_name(copy):
    change_tensors(copy, lambda tensors: {**tensors, f"{Q0}.weight": tensors[f"{Q0}.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(CoraError, match=f"copy: {Q0} is stored as float8_e4m3fn; use a copy .* bf16, fp16 or fp32"):
        open_source(local(copy)).read(Q0)
    with pytest.raises(CoraError, match=rf"copy: {Q0}\.weight is stored as float8_e4m3fn"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_the_names_are_those_of_the_loaded_model(copy, square_models):
    change_tensors(copy, lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()})
    source, usual = open_source(local(copy)), open_source(local(square_models[0]))
    assert source.shapes == usual.shapes
    assert torch.equal(source.read(Q0), usual.read(Q0))
    assert source.content_hash([Q0]) == usual.content_hash([Q0])


def test_a_checkpoint_of_a_compiled_model_is_refused_by_its_prefix(copy):
    change_tensors(copy, lambda tensors: {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(CoraError, match=r"saved from a compiled model: .* such as _orig_mod.*save it again from the model inside"):
        open_source(local(copy))
    with pytest.raises(CoraError, match=r"saved from a compiled model: .* such as _orig_mod"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_tensors_that_the_model_does_not_take_are_no_modules_of_it(copy, capfd):
    change_tensors(copy, lambda tensors: {**tensors, "mtp.proj.weight": torch.ones(4, 4)})
    source = open_source(local(copy))
    assert "mtp.proj" not in source.shapes
    assert source.skipped == ["mtp.proj.weight"]
    load_model(local(copy), torch.float32, torch.device("cpu"), None)
    assert "1 tensors of its files are not used by LlamaForCausalLM, such as mtp.proj.weight" in capfd.readouterr().err


def test_gpt2_weights_are_read_as_out_by_in(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    source = open_source(local(tmp_path))
    assert source.shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert torch.equal(source.read("transformer.h.0.attn.c_attn"), model.transformer.h[0].attn.c_attn.weight.T)


def test_a_model_with_a_left_over_adapter_configuration_is_loaded_from_its_own_weights(copy, square_models):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    loaded = load_model(local(copy), torch.float32, torch.device("cpu"), None)
    usual = load_file(square_models[0] / "model.safetensors")
    assert torch.equal(loaded.state_dict()[f"{Q0}.weight"], usual[f"{Q0}.weight"])
    assert loaded.config.name_or_path == str(copy)
