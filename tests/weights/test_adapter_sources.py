"""An adapter as a source has the weights of the model that PEFT merges it into."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.cli import app
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.weights.planned import PlannedSource
from cora_cli.weights.sources import open_source
from tests.methods.helpers import plan_of
from tests.weights.helpers import CPU, change_config, change_tensors, dense_weights, local, make_adapter, make_llama

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.*q_proj": 3}},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 7}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "norms_by_their_ending": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_adapter_equals_the_model_that_peft_merges_it_into(grouped_models, tmp_path, setting):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", tmp_path / "merged", **SETTINGS[setting])
    source, dense = open_source(local(adapter)), dense_weights(tmp_path / "merged")
    assert {"embed_tokens"} >= {name.rpartition(".")[2] for name in dense.keys() - source.shapes.keys()}
    for module in source.shapes:
        assert source.read(module).dtype == torch.float64
        np.testing.assert_allclose(source.read(module).numpy(), dense[module], atol=2e-5)


def test_fan_in_fan_out_follows_the_layer_and_not_the_configuration_as_in_peft(copy, plain):
    change_config(copy, fan_in_fan_out=True)
    assert torch.equal(open_source(local(copy)).read(V1), open_source(local(plain)).read(V1))


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """An adapter that trained the biases of its layers, next to its base."""
    root = tmp_path_factory.mktemp("biased")
    model = make_llama(kv_heads=2, attention_bias=True)
    model.save_pretrained(root / "base")
    model.name_or_path = str(root / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="lora_only"))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    wrapped.save_pretrained(root / "adapter")
    wrapped.merge_and_unload().save_pretrained(root / "merged")
    return root / "adapter"


def test_trained_biases_are_no_part_of_the_weights_and_it_says_so(biased, capfd):
    source, dense = open_source(local(biased)), dense_weights(biased.parent / "merged")
    np.testing.assert_allclose(source.read(V1).numpy(), dense[V1], atol=2e-5)
    extract_basis([local(biased)], biased.parent / "b.safetensors", BasisChoices(rank=4, target_modules=("q_proj",)), None, CPU)
    said = capfd.readouterr().err
    assert re.search(
        r"adapter also trained 4 biases, such as base_model\.model\.model\.layers\.0\.\S+\.bias: they are no part", said
    )


@pytest.mark.parametrize(
    ("changed", "key", "said"),
    [
        (
            {"bias": "none"},
            None,
            r"holds \S+q_proj\.base_layer\.bias, but its adapter_config\.json has bias 'none', with which PEFT would",
        ),
        ({}, "model.layers.0.self_attn.k_proj.bias", r"k_proj\.bias, but its adapter_config\.json has bias 'lora_only'"),
        ({}, f"{Q0}.lora_B.bias", r"q_proj\.lora_B\.bias, but its adapter_config\.json has lora_bias False"),
        ({"bias": "all"}, f"{Q0}.lora_C.bias.more", "is neither a lora_A or lora_B matrix nor"),
    ],
)
def test_biases_that_peft_would_leave_out_are_refused_by_name(biased, tmp_path, changed, key, said):
    damaged = shutil.copytree(biased, tmp_path / "damaged")
    change_config(damaged, **changed)
    if key:
        change_tensors(damaged, lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(16)}))
    with pytest.raises(CoraError, match=said):
        open_source(local(damaged))


def test_embeddings_that_an_adapter_changes_are_not_offered(grouped_models, tmp_path):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    assert "model.embed_tokens" not in open_source(local(adapter)).shapes


@pytest.fixture
def tied(tmp_path):
    """A model whose head has the weight of its embedding, in the directory `base`."""
    model = make_llama()
    shared = type(model)(type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": True}))
    shared.save_pretrained(tmp_path / "base")
    return shared


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, {"target_modules": ["q_proj", "lm_head"]}],
)
def test_a_head_that_shares_the_weight_of_the_embedding_is_adapted_as_by_peft(tied, tmp_path, settings):
    wrapped = get_peft_model(tied, LoraConfig(r=2, init_lora_weights=False, **settings))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers="ensure_weight_tying" in settings)
    source = open_source(local(tmp_path / "adapter"), open_source(local(tmp_path / "base")))
    for module in (Q0, "lm_head"):
        layer = wrapped.base_model.model.get_submodule(module)
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(source.read(module), expected.double(), atol=1e-6, rtol=1e-5)


def test_a_head_that_the_files_hold_next_to_the_embedding_is_read_as_it_is_loaded(tied, tmp_path):
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, file, {"format": "pt"})
    source, loaded = open_source(local(tmp_path / "base")), LlamaForCausalLM.from_pretrained(tmp_path / "base")
    for module in ("lm_head", "model.embed_tokens"):
        torch.testing.assert_close(source.read(module).float(), loaded.get_submodule(module).weight.detach())


def test_a_head_is_not_offered_where_the_adapter_trains_tokens_of_the_embedding_whose_weight_it_shares(tied, tmp_path):
    wrapped = get_peft_model(tied, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    wrapped.save_pretrained(tmp_path / "adapter")
    base = open_source(local(tmp_path / "base"))
    assert base.shapes["lm_head"] == base.shapes["model.embed_tokens"] == (32, 16)
    assert open_source(local(tmp_path / "adapter"), base).shapes.keys() == base.shapes.keys() - {
        "lm_head",
        "model.embed_tokens",
    }


@pytest.mark.parametrize("setting", ["plain", "rslora", "patterns"])
def test_the_delta_to_its_own_base_is_scaled_b_times_a_exactly_and_reads_no_base(grouped_models, tmp_path, setting):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", **SETTINGS[setting])
    base = open_source(local(grouped_models[0]))
    source = open_source(local(adapter), base)
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{V1}.lora_{matrix}.weight"].double() for matrix in "AB")
    scale = {"plain": 6 / 4, "rslora": 6 / 2, "patterns": 6 / 2}[setting]
    assert torch.equal(source.own_delta(V1, base), scale * (b @ a))
    assert torch.equal(source.own_delta("lm_head", base), torch.zeros(32, 16, dtype=torch.float64))
    assert base.bytes_read == 0
    assert source.own_delta(V1, open_source(local(grouped_models[0]))) is None, "another base must be read"


def test_a_bin_adapter_reads_like_the_safetensors_one(copy, plain):
    tensors = load_file(copy / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").unlink()
    torch.save(tensors, copy / "adapter_model.bin")
    one, other = open_source(local(copy)), open_source(local(plain))
    assert torch.equal(one.read(Q0), other.read(Q0))
    assert one.content_hash([Q0]) == other.content_hash([Q0])


def test_a_given_base_takes_the_place_of_a_stale_path(copy, grouped_models):
    change_config(copy, base_model_name_or_path="/nowhere/at/all")
    missing = r"the base model of adapter .*copy cannot be found \(pass its path with --base\): .*nowhere"
    with pytest.raises(CoraError, match=missing):
        open_source(local(copy))
    assert open_source(local(copy), open_source(local(grouped_models[0]))).shapes[Q0] == (16, 16)


def test_an_adapter_that_names_no_base_asks_for_one(copy):
    change_config(copy, base_model_name_or_path=None)
    with pytest.raises(CoraError, match="--base"):
        open_source(local(copy))


def test_a_lora_without_alpha_has_the_default_of_peft_as_it_has_in_peft_and_it_is_said(copy, capsys):
    change_config(copy, lora_alpha=8)
    expected = open_source(local(copy)).read(Q0)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "lora_alpha"}))
    assert torch.equal(open_source(local(copy)).read(Q0), expected)
    assert "adapter_config.json has no lora_alpha; PEFT's default, 8, is used" in capsys.readouterr().err


def test_a_lora_without_r_has_the_default_of_peft(grouped_models, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(grouped_models[0]), config).save_pretrained(tmp_path)
    expected = open_source(local(tmp_path), open_source(local(grouped_models[0]))).read(Q0)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "r"}))
    assert torch.equal(open_source(local(tmp_path), open_source(local(grouped_models[0]))).read(Q0), expected)


def test_the_content_hash_covers_factors_scale_and_base(copy, plain, grouped_models):
    original = open_source(local(plain)).content_hash([Q0])
    other_base = open_source(local(plain), open_source(local(grouped_models[1]))).content_hash([Q0])
    change_config(copy, lora_alpha=8)
    other_alpha = open_source(local(copy)).content_hash([Q0])
    change_config(copy, lora_alpha=6)
    change_tensors(copy, lambda tensors: tensors[f"base_model.model.{Q0}.lora_A.weight"].add_(1e-3))
    other_factor = open_source(local(copy)).content_hash([Q0])
    assert len({original, other_base, other_alpha, other_factor}) == 4


@pytest.mark.parametrize("targets", [["q_proj"], None])
def test_an_adapter_that_also_changes_parameters_such_as_experts_is_read_where_it_changes_layers(tmp_path, targets):
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"]
    settings = LoraConfig(r=2, target_modules=targets, target_parameters=parameters, init_lora_weights=False)
    wrapped = get_peft_model(model, settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    source = open_source(local(tmp_path / "adapter"))
    merged = wrapped.merge_and_unload().state_dict()[f"{Q0}.weight"]
    assert torch.allclose(source.read(Q0), merged.double(), atol=1e-6)
    assert source.targets(["q_proj"]) == [Q0]
    with pytest.raises(CoraError, match=r"mlp\.gate is changed through target_parameters, so its weight is not W \+ s·B·A"):
        source.targets(["gate"])


def test_an_adapter_without_target_modules_is_that_of_pefts_own_for_the_type_of_model(copy):
    change_config(copy, target_modules=None)
    assert open_source(local(copy)).shapes[V1] == (8, 16)
    change_tensors(copy, lambda tensors: [tensors.pop(f"base_model.model.{V1}.lora_{matrix}.weight") for matrix in "AB"])
    with pytest.raises(CoraError, match=f"such as {V1}; the adapter is incomplete"):
        open_source(local(copy))


def test_the_distribution_of_an_adapter_is_said_to_be_left_out(copy, capfd):
    (copy / "posterior.safetensors").write_bytes(b"")
    open_source(local(copy))
    assert "copy has a distribution of weights; what is written here is its mean" in capfd.readouterr().err


def test_a_setting_that_peft_does_not_know_is_said(copy, capfd):
    change_config(copy, use_later=True)
    open_source(local(copy))
    assert "adapter_config.json sets use_later, which the installed PEFT" in capfd.readouterr().err


@pytest.fixture(scope="module")
def frozen_pair(grouped_models, tmp_path_factory):
    """A function that saves one trained `fb` adapter in full and compact form, and gives both directories and its basis file."""

    def made(b_init: str) -> tuple[Path, Path, Path]:
        root = tmp_path_factory.mktemp("frozen")
        path = root / "basis.safetensors"
        extract_basis([local(grouped_models[1])], path, BasisChoices(rank=4), None, CPU)
        basis = read_basis(path)
        settings = {"rank": 3, "alpha": 6.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 1}
        plan = plan_of("fb", b_init=b_init, a_init="gaussian", **settings)
        model = install_adapter(make_llama(kv_heads=2), plan, basis if plan.needs_basis else None)
        stated = (str(path), basis.sha256) if plan.needs_basis else (None, None)
        for form in ("full", "compact"):
            facts = AdapterFacts(
                plan, str(grouped_models[0]), None, local(grouped_models[0]).content_hash(), *stated, compact=form == "compact"
            )
            save_adapter(model, root / form, facts)
        return root / "full", root / "compact", path

    return made


@pytest.mark.parametrize("b_init", ["basis", "orthonormal"])
def test_a_compact_adapter_is_the_same_source_as_the_whole_one(frozen_pair, b_init):
    whole, compact, _ = frozen_pair(b_init)
    one, other = open_source(local(whole)), open_source(local(compact))
    assert torch.equal(one.read(Q0), other.read(Q0))
    assert not torch.equal(one.read(Q0), one.base.read(Q0).double())
    assert one.content_hash([Q0, V1]) == other.content_hash([Q0, V1])


def test_a_compact_adapter_whose_basis_is_gone_or_another_says_which_and_what_to_do(frozen_pair, tiny_basis):
    _, compact, basis = frozen_pair("basis")
    shutil.copy(tiny_basis, basis)
    with pytest.raises(CoraError, match=r"trained with the basis \w+, but .*basis.safetensors is \w+"):
        open_source(local(compact))
    basis.unlink()
    with pytest.raises(
        CoraError, match=r"its B comes from the basis .*, which does not exist; put it back, or .*cora merge --basis"
    ):
        open_source(local(compact))


def test_an_a_alone_without_its_record_is_refused(frozen_pair):
    _, compact, _ = frozen_pair("orthonormal")
    (compact / "cora.json").unlink()
    with pytest.raises(CoraError, match=r"stores only A, and cora\.json, which describes its B, is missing"):
        open_source(local(compact))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.0\..*_proj"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"modules_to_save": ["v_proj"]},
        {"modules_to_save": ["embed_tokens", "norm"]},  # post_attention_layernorm ends so, too
    ],
)
def test_an_adapter_of_some_layers_is_complete_where_its_configuration_says_so(grouped_models, tmp_path, settings):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", **settings)
    assert Q0 in open_source(local(adapter)).shapes


def test_a_saved_weight_of_a_layer_that_stores_in_by_out_is_read_as_out_by_in(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    settings = {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"], "fan_in_fan_out": True}
    wrapped = get_peft_model(model, LoraConfig(r=2, **settings))
    saved = torch.randn(16, 48)
    wrapped.base_model.model.transformer.h[0].attn.c_attn.modules_to_save["default"].weight.data = saved.clone()
    wrapped.save_pretrained(tmp_path / "adapter")
    source = open_source(local(tmp_path / "adapter"))
    assert source.shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert torch.equal(source.read("transformer.h.0.attn.c_attn"), saved.T.double())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_stores_twice_of_a_resized_vocabulary_is_read_once(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(36)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.modules_to_save.weight" in stored
    source = open_source(local(tmp_path / "adapter"), open_source(local(tmp_path / "base")))
    assert torch.equal(source.read("lm_head"), stored["base_model.model.lm_head.weight"].double())
    assert not any("modules_to_save" in module or "original_module" in module for module in source.shapes)


def test_layers_of_images_that_a_peft_adapter_changes_are_left_out_of_a_basis(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")

    source = open_source(local(tmp_path / "adapter"))
    (module,) = source.targets(["q_proj"])
    merged = adapted.merge_and_unload().get_submodule(module).weight
    assert torch.allclose(source.read(module).float(), merged, atol=1e-6)
    command = ["inspect", str(tmp_path / "adapter"), "--rank", "2", "--target-modules", "q_proj", "--device", "cpu"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    said = "that an adapter changes: 1, such as vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert shown.stderr.count(said) == 1
    assert not source.changes_only([module], source.base)
    assert PlannedSource(local(tmp_path / "base")).targets(["q_proj"]) == [module]
