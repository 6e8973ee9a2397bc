import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cora_cli.errors import CoraError
from cora_cli.models.loading import load_model, stored_types
from cora_cli.weights.sources import architecture_of, open_source
from tests.training.families import COMMON
from tests.weights.helpers import make_llama

from .helpers import local

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


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
    with pytest.raises(
        CoraError,
        match=r"quantised, 4 bits\), but its files hold plain ones; if they were merged .*, remove quantization_config",
    ):
        open_source(local(copy))
    change_tensors(copy, lambda tensors: {**tensors, f"{Q0}.weight": torch.ones(16, 16, dtype=torch.uint8)})
    with pytest.raises(CoraError, match="copy is stored quantised; use a copy with weights in bf16"):
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
    with pytest.raises(
        CoraError, match=r"saved from a compiled model: .* such as _orig_mod.*save it again from the model inside"
    ):
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: {}, rf"hold no weight for {Q0}, which its config.json describes as \(16, 16\)"),
        (
            lambda weight: {f"{Q0}.weight": weight.flatten()},
            rf"{Q0}\.weight has the shape \(256,\), but .* describes \(16, 16\)",
        ),
        (lambda weight: {f"{Q0}.weight": weight.view(4, 4, 16)}, r"has the shape \(4, 4, 16\), but .* describes \(16, 16\)"),
        (lambda weight: {f"{Q0}.weight": weight[:0]}, r"is stored without its numbers, with the shape \(0, 16\)"),
        (lambda weight: {f"{Q0}.weight": weight[:8]}, r"has the shape \(8, 16\), but .* describes \(16, 16\)"),
        (
            lambda weight: {f"{Q0}.base_layer.weight": weight},
            rf"hold no weight for {Q0}, .* and its files hold {Q0}\.base_layer\.weight",
        ),
        (
            lambda weight: {f"{Q0}.weight": weight, f"{Q0}.weight_scale": torch.ones(1)},
            rf"hold {Q0}\.weight_scale next to the weight",
        ),
        (
            lambda weight: {f"{Q0}.weight": weight, f"{Q0}.lora_A.weight": weight[:2]},
            rf"hold {Q0}\.lora_A\.weight next to the weight",
        ),
        (
            lambda weight: {f"{Q0}.weight": weight.to(torch.float8_e4m3fn), f"{Q0}.weight_scale_inv": torch.ones(1, 1)},
            rf"{Q0}\.weight is stored as float8_e4m3fn; use a copy of the model with weights in bf16, fp16 or fp32",
        ),
        (
            lambda weight: {f"{Q0}.weight": weight[:8].to(torch.uint8), f"{Q0}.weight.absmax": torch.ones(4)},
            rf"{Q0}\.weight is stored as (U8|uint8); use a copy of the model with weights in bf16, fp16 or fp32",
        ),
        (lambda weight: {f"{Q0}.weight": weight, f"{Q0}.bias": weight[0]}, rf"hold {Q0}\.bias next to the weight"),
        (
            lambda weight: {f"{Q0}.weight": weight, f"{Q0.removeprefix('model.')}.weight": weight.clone()},
            rf"layers.0.* and {Q0}\.weight are both the weight of {Q0}",
        ),
    ],
)
def test_a_layer_whose_weight_cannot_be_read_is_refused_where_it_is_a_target(copy, change, said):
    def changed(tensors):
        weight = tensors.pop(f"{Q0}.weight")
        return {**tensors, **{key: tensor.clone() for key, tensor in change(weight).items()}}

    change_tensors(copy, changed)
    with pytest.raises(CoraError, match=f"copy: .*{said}"):
        open_source(local(copy)).targets(["q_proj"])
    assert len(open_source(local(copy)).targets(["v_proj"])) == 2
    with pytest.raises(CoraError, match="copy"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_layers_that_the_configuration_leaves_out_are_refused_alike_by_all(copy):
    change_config(copy, num_hidden_layers=1)
    said = r"copy: its files hold 1 more layers, such as model\.layers\.1, than its config.json describes"
    with pytest.raises(CoraError, match=said):
        open_source(local(copy)).targets(["q_proj"])
    with pytest.raises(CoraError, match=said):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_a_layer_of_another_kind_behind_the_last_one_is_left_out(copy):
    def with_prediction_of_further_tokens(tensors):
        further = {key.replace("layers.1", "layers.2"): tensor.clone() for key, tensor in tensors.items() if "layers.1" in key}
        return {**tensors, **further, "model.layers.2.eh_proj.weight": torch.ones(4, 4)}

    change_tensors(copy, with_prediction_of_further_tokens)
    assert len(open_source(local(copy)).targets(["q_proj"])) == 2
    load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_a_weight_of_another_shape_and_a_tensor_beside_a_weight_are_refused_on_loading(copy):
    change_tensors(copy, lambda tensors: {**tensors, f"{Q0}.bias": torch.ones(16)})
    with pytest.raises(CoraError, match=rf"hold {Q0}\.bias, which LlamaForCausalLM does not take, next to the weight of {Q0}"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)
    change_tensors(
        copy, lambda tensors: {key: tensor[:8] if key == f"{Q0}.weight" else tensor for key, tensor in tensors.items()}
    )
    with pytest.raises(CoraError, match=rf"copy: {Q0}\.weight has the shape \(8, 16\), but .* describes \(16, 16\)"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_weights_of_a_model_that_transformers_does_not_know_are_matrices_with_nothing_beside_them(copy):
    change_config(copy, model_type="of-its-own")
    change_tensors(copy, lambda tensors: {**tensors, f"{Q0}.weight": tensors[f"{Q0}.weight"].flatten()})
    with pytest.raises(CoraError, match=rf"copy: {Q0}\.weight has the shape \(256,\); a matrix of two dimensions is required"):
        open_source(local(copy)).targets(["q_proj"])
    change_tensors(copy, lambda tensors: {**tensors, V1 + ".lora_A.weight": torch.ones(2, 16)})
    with pytest.raises(CoraError, match=rf"copy: its files hold {V1}\.lora_A\.weight next to the weight of {V1}"):
        open_source(local(copy)).targets(["v_proj"])


@pytest.mark.parametrize("wrapper", ["module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
@pytest.mark.parametrize("place", ["", "model.layers.0."])
def test_a_checkpoint_of_a_training_wrapper_is_refused_alike_by_all(copy, wrapper, place):
    change_tensors(
        copy, lambda tensors: {key.replace(place, f"{place}{wrapper}.", 1): tensor for key, tensor in tensors.items()}
    )
    for read in (open_source, lambda model: load_model(model, torch.float32, torch.device("cpu"), None)):
        with pytest.raises(CoraError, match=rf"copy was saved from .* such as .*{wrapper}\..*the model inside \({wrapper}\)"):
            read(local(copy))


def as_bin(directory, wrap, name="pytorch_model.bin"):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(wrap(tensors), directory / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("entry", ["state_dict", "model", None])
def test_the_tensors_of_a_file_of_torch_are_read_by_all_also_in_an_entry(copy, square_models, entry, name):
    as_bin(copy, lambda tensors: {entry: tensors, "epoch": 3} if entry else tensors, name)
    torch.save({"step": torch.ones(1)}, copy / "optimizer.pt")
    usual = load_file(square_models[0] / "model.safetensors")
    assert torch.equal(open_source(local(copy)).read(Q0), usual[f"{Q0}.weight"])
    loaded = load_model(local(copy), torch.float32, torch.device("cpu"), None).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in usual.items())


def test_a_file_of_torch_may_hold_parameters(copy, square_models):
    as_bin(copy, lambda tensors: {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})
    weight = open_source(local(copy)).read(Q0)
    assert torch.equal(weight, open_source(local(square_models[0])).read(Q0))
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda tensors: {"model": tensors, "ema": tensors}, "holds tensors in 'model', 'ema', so it is not clear"),
        (lambda tensors: {"model": tensors, **tensors}, "holds tensors in 'model' and next to it, so it is not clear"),
        (lambda tensors: {"optimizer": tensors}, "holds tensors in 'optimizer', so it is not clear"),
    ],
)
def test_a_bin_file_with_tensors_in_several_places_is_refused_by_name(copy, wrap, said):
    as_bin(copy, wrap)
    for read in (open_source, lambda model: load_model(model, torch.float32, torch.device("cpu"), None)):
        with pytest.raises(CoraError, match=f"pytorch_model.bin {said}.*; save the model's state_dict alone"):
            read(local(copy))


@pytest.mark.parametrize(
    "names", [("model.fp16.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")]
)
def test_weights_without_the_usual_name_or_an_index_are_read_by_all(copy, square_models, names):
    usual = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for number, name in enumerate(names):
        part = {key: tensor for place, (key, tensor) in enumerate(usual.items()) if place % len(names) == number}
        save_file(part, copy / name, metadata={"format": "pt"})
    assert torch.equal(open_source(local(copy)).read(Q0), usual[f"{Q0}.weight"])
    loaded = load_model(local(copy), torch.float32, torch.device("cpu"), None).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in usual.items())
    assert not (copy / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ('{"eos_token_id": "2"}', 'is damaged: eos_token_id must be an integer or a list or null, not "2"'),
        ('{"eos_token_id": [2, true]}', "must be an integer, not true"),
        ('{"temperature": "hot"}', "temperature must be a finite number or null"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_malformed_generation_configuration_is_refused_by_its_entry(copy, text, said):
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(CoraError, match=f"generation_config.json .*{said}"):
        load_model(local(copy), torch.float32, torch.device("cpu"), None)


def test_gpt2_weights_are_read_as_out_by_in(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    source = open_source(local(tmp_path))
    assert source.shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert torch.equal(source.read("transformer.h.0.attn.c_attn"), model.transformer.h[0].attn.c_attn.weight.T)


def test_weights_of_an_unknown_model_whose_biases_are_as_long_as_their_columns_are_read_as_out_by_in(tmp_path):
    """Code that comes with a model, as Jais', may be that of GPT-2."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, model_type="of-its-own")
    source = open_source(local(tmp_path))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj"):
        assert torch.equal(
            source.read(f"transformer.h.1.{name}"), model.transformer.h[1].get_submodule(name).weight.T.contiguous()
        )
    assert torch.equal(source.read("transformer.wte"), model.transformer.wte.weight)
    change_tensors(
        tmp_path, lambda found: {name: one.T.contiguous() if "h.1.mlp.c_fc.w" in name else one for name, one in found.items()}
    )
    source = open_source(local(tmp_path))
    assert torch.equal(source.read("transformer.h.1.mlp.c_fc"), model.transformer.h[1].mlp.c_fc.weight.T.contiguous())
    with pytest.raises(
        CoraError, match=r"whether transformer\.h\.0\.attn\.c_proj is stored as \(out, in\) or as \(in, out\) is not known"
    ):
        source.targets(["attn.c_proj"])


@pytest.mark.parametrize(
    "wrong", [{"n_head": 3}, {"activation_function": "foo"}, {"layer_norm_epsilon": "1e-5"}, {"n_layer": None}]
)
def test_a_known_model_whose_configuration_describes_none_is_refused_since_its_layers_may_be_transposed(tmp_path, wrong):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).save_pretrained(tmp_path)
    change_config(tmp_path, **wrong)
    with pytest.raises(CoraError, match=rf"config\.json of {tmp_path} "):
        open_source(local(tmp_path))


@pytest.mark.parametrize("of_an_adapter", [False, True])
def test_an_image_and_text_type_of_which_transformers_makes_no_causal_model_is_refused_as_by_training(tmp_path, of_an_adapter):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", **sizes, "image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", **sizes, "vocab_size": 64}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63))
    model.save_pretrained(tmp_path / "base")
    if of_an_adapter:
        model.name_or_path = str(tmp_path / "base")
        targets = r".*language_model.*\.(q_proj|v_proj)"
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CoraError, match="base is a llava model, which transformers does not load as a causal language model; use"
    ):
        open_source(local(tmp_path / ("adapter" if of_an_adapter else "base")))


def test_a_model_with_a_left_over_adapter_configuration_is_loaded_from_its_own_weights(copy, square_models):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    loaded = load_model(local(copy), torch.float32, torch.device("cpu"), None)
    usual = load_file(square_models[0] / "model.safetensors")
    assert torch.equal(loaded.state_dict()[f"{Q0}.weight"], usual[f"{Q0}.weight"])
    assert loaded.config.name_or_path == str(copy)


def test_tensors_that_the_class_tells_transformers_to_pass_over_are_named(copy, capfd, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\.", r"inv_freq"])
    added = {"mtp.proj.weight": torch.ones(4, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(copy, lambda tensors: {**tensors, **added})
    load_model(local(copy), torch.float32, torch.device("cpu"), None)
    assert "1 tensors of its files are not used by LlamaForCausalLM, such as mtp.proj.weight" in capfd.readouterr().err


def test_layers_that_the_files_hold_as_one_tensor_are_read_apart(tmp_path):
    """HRM-Text's files have one for q, k, v and a gate, which transformers cuts as it loads them."""
    torch.manual_seed(0)
    settings = {**COMMON, "num_key_value_heads": 4, "H_cycles": 1, "L_cycles": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("hrm_text", **settings)).save_pretrained(tmp_path / "model")
    assert any("gqkv_proj" in key for key in load_file(tmp_path / "model" / "model.safetensors"))
    loaded, source = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), open_source(local(tmp_path / "model"))
    linears = {name: module.weight for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears.keys() <= source.shapes.keys()
    assert all(torch.equal(source.read(name), weight) for name, weight in linears.items())
    assert not source.faults
    first = next(name for name in linears if name.endswith("q_proj"))
    assert source.sharing([first]) == {first}
    assert stored_types(local(tmp_path / "model")).keys() == dict(loaded.named_parameters()).keys()


def test_targets_in_several_parts_of_a_model_of_its_own_code_are_named(copy, capsys):
    change_config(copy, model_type="of its own", auto_map={"AutoModelForCausalLM": "code.Model"})
    for weights in copy.glob("*.safetensors"):
        tensors = load_file(weights)
        open_source(local(copy)).say_left_out(["q_proj"])
        assert "several parts" not in capsys.readouterr().err
        save_file({**tensors, "vision.encoder.0.q_proj.weight": torch.ones(16, 16)}, weights, metadata={"format": "pt"})
    open_source(local(copy)).say_left_out(["q_proj"])
    assert "the target modules are layers of several parts: model.layers, vision.encoder; if one" in capsys.readouterr().err
    open_source(local(copy)).say_left_out(["k_proj"])
    assert "several parts" not in capsys.readouterr().err
