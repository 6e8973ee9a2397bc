import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cora_cli.errors import CoraError
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


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"model_type": "gpt2"}, r"stored as \(in, out\)"), ({"quantization_config": {"bits": 4}}, "quantised")],
)
def test_models_whose_weights_mean_something_else_are_refused(copy, changed, said):
    change_config(copy, **changed)
    with pytest.raises(CoraError, match=said):
        open_source(local(copy))
