"""Adapters that name the modules of their base as an earlier transformers or the class for images and text does."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaForConditionalGeneration,
)

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.loading import load_model
from cora_cli.models.references import resolve_model
from cora_cli.weights.sources import open_source
from tests.training.families import COMMON, EXPERTS

IDS = torch.tensor([[1, 5, 9, 7, 3, 2]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def load(model: Path):
    return load_model(resolve_model(str(model)), torch.float32, torch.device("cpu"), None)


@pytest.fixture
def named_as_before(gemma3, tmp_path) -> tuple[Path, Path]:
    """An adapter by PEFT on all linear layers of the text decoder, and the same with the names that transformers gave before 4.52."""
    targets = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, base_model_name_or_path=str(gemma3))
    get_peft_model(AutoModelForCausalLM.from_pretrained(gemma3), config).save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    old = {key.replace("model.model.language_model.", "model.language_model.model."): tensor for key, tensor in tensors.items()}
    assert not old.keys() & tensors.keys()
    save_file(old, tmp_path / "old/adapter_model.safetensors", metadata={"format": "pt"})
    return tmp_path / "old", tmp_path / "new"


def test_an_adapter_with_the_names_of_an_earlier_transformers_is_read_as_peft_loads_it(gemma3, named_as_before):
    old, new = (resolve_model(str(directory)) for directory in named_as_before)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma3), new.path))
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(gemma3)))
    for adapter in (old, new):
        assert torch.equal(logits(load_adapter(AutoModelForCausalLM.from_pretrained(gemma3), adapter)), expected)
    before, after = open_source(old), open_source(new)
    assert before.shapes == after.shapes
    assert all(torch.equal(before.read(module), after.read(module)) for module in after.shapes)


@pytest.fixture
def laguna(tmp_path) -> Path:
    """A model of a family in which transformers' rule for a name in files, `shared_expert.`, fits one in the model, `shared_experts`."""
    torch.manual_seed(0)
    settings = {**COMMON, **EXPERTS, "num_attention_heads_per_layer": None, "mlp_layer_types": ["sparse", "sparse"]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("laguna", **settings)).save_pretrained(tmp_path / "laguna")
    return tmp_path / "laguna"


def test_a_name_of_the_model_that_a_rule_for_names_in_files_fits_is_kept(laguna, tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "shared_experts.down_proj"], init_lora_weights=False, base_model_name_or_path=str(laguna)
    )
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(laguna), config)
    trained.save_pretrained(tmp_path / "adapter")
    expected = logits(trained.eval())
    adapter = resolve_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(load_adapter(load(laguna), adapter)), expected)
    merge_adapter(adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected)


@pytest.mark.parametrize("named", ["gpt2", "gemma3", "gemma3 as before"])
def test_the_embeddings_that_an_adapter_holds_are_exported_whatever_they_are_called(named, gpt2, gemma3, tmp_path):
    base = gpt2 if named == "gpt2" else gemma3
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = len(model.get_input_embeddings().weight) + 2
    model.resize_token_embeddings(rows)
    targets = r".*c_attn" if named == "gpt2" else r".*language_model.*q_proj"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, base_model_name_or_path=str(base))
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    if named.endswith("as before"):
        before = {
            "base_model.model.model.language_model.": "base_model.model.language_model.model.",
            "base_model.model.lm_head.": "base_model.model.language_model.lm_head.",
        }
        tensors = load_file(file)
        for new, old in before.items():
            tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(rows)
    loaded = PeftModel.from_pretrained(grown, tmp_path / "exported").eval()
    torch.testing.assert_close(logits(loaded), logits(wrapped), atol=1e-5, rtol=1e-5)


def test_an_adapter_with_two_names_of_one_layer_is_refused(gemma3, named_as_before):
    old, new = named_as_before
    both = load_file(old / "adapter_model.safetensors") | load_file(new / "adapter_model.safetensors")
    save_file(both, old / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CoraError,
        match=r"base_model\.model\.language_model\.model\.layers\.0.* belongs to no layer of Gemma3ForConditionalGeneration",
    ):
        load_adapter(AutoModelForCausalLM.from_pretrained(gemma3), resolve_model(str(old)))
    with pytest.raises(CoraError, match=r"language_model\.model\.layers\.0.* matches no module of its base"):
        open_source(resolve_model(str(old)))


def test_an_adapter_of_the_class_for_text_alone_fits_the_class_for_images_and_text(gemma3, tmp_path):
    torch.manual_seed(1)
    settings = {
        "target_modules": ["q_proj", "down_proj"],
        "alpha_pattern": {r"model.layers.0.*": 32},
        "layers_to_transform": [0, 1],
    }
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, base_model_name_or_path=str(gemma3), **settings)
    both = load(gemma3)
    text = Gemma3ForCausalLM(both.config.text_config)
    text.model.load_state_dict(both.model.language_model.state_dict())
    text.name_or_path = str(gemma3)
    wrapped = get_peft_model(text, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = resolve_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(load_adapter(load(gemma3), adapter)), logits(wrapped), atol=1e-5, rtol=1e-5)
    merged = wrapped.merge_and_unload().model.layers[0].self_attn.q_proj.weight.double()
    found = open_source(adapter).read("model.language_model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(found, merged, atol=1e-6, rtol=0)


def test_the_text_part_of_an_image_model_is_merged_into_a_model_that_is_loaded_again(mllama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path=str(mllama))
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(mllama), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(wrapped.eval()), atol=1e-5, rtol=1e-5)


PATTERNS = {
    "target_modules": r".*language_model.*(q|v|down)_proj",
    "rank_pattern": {r"language_model.*layers.0.self_attn.q_proj": 3},
    "alpha_pattern": {r"language_model.*v_proj": 16},
    "exclude_modules": r".*layers\.2\..*",
}
SAVED = {"target_modules": r".*language_model.*(q|gate)_proj", "modules_to_save": ["lm_head"], "use_rslora": True}
IMAGES = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["multi_modal_projector"]}
NORM = {"target_modules": ["q_proj"], "modules_to_save": ["language_model.norm"]}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": {"language_model.embed_tokens": [3, 5]}}


@pytest.mark.parametrize(
    "settings", [PATTERNS, SAVED, IMAGES, NORM, TOKENS], ids=["patterns", "saved", "images", "norm", "tokens"]
)
def test_an_adapter_of_the_class_for_images_and_text_changes_the_language_model_as_there(settings, mllama, tmp_path, capsys):
    """Its patterns fit the names of that class alone, so that on the language model they would leave out layers, ranks and scales in silence."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, base_model_name_or_path=str(mllama), **settings)
    wrapped = get_peft_model(MllamaForConditionalGeneration.from_pretrained(mllama), config).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            parameter.data += 0.2
    wrapped.save_pretrained(tmp_path / "adapter")
    expected, adapter = logits(wrapped), resolve_model(str(tmp_path / "adapter"))
    assert not torch.allclose(expected, logits(load(mllama)), atol=1e-2)
    loaded = load_adapter(load(mllama), adapter, base=resolve_model(str(mllama)))
    said = "are of parts that MllamaForCausalLM lacks, such as base_model" in capsys.readouterr().err
    assert said == (settings in (IMAGES, NORM, TOKENS))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    merge_adapter(adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)
    merged = wrapped.merge_and_unload().model.language_model.layers[0].self_attn.q_proj.weight.double()
    source = open_source(adapter)
    (name,) = (module for module in source.shapes if module.endswith("layers.0.self_attn.q_proj"))
    torch.testing.assert_close(source.read(name), merged, atol=1e-6, rtol=0)


@pytest.mark.parametrize("saved", ["lm_head", "input_layernorm"])  # the part that reads images has such a norm, too
def test_an_exported_lora_has_the_names_of_the_class_that_its_adapter_has(saved, mllama, tmp_path):
    """PEFT on that class finds no others, and leaves the adapter out without a word."""
    torch.manual_seed(1)
    settings = {**PATTERNS, "modules_to_save": [saved]}
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, base_model_name_or_path=str(mllama), **settings)
    wrapped = get_peft_model(MllamaForConditionalGeneration.from_pretrained(mllama), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    exported = PeftModel.from_pretrained(MllamaForConditionalGeneration.from_pretrained(mllama), tmp_path / "exported").eval()
    torch.testing.assert_close(logits(exported), logits(wrapped), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits(load_adapter(load(mllama), resolve_model(str(tmp_path / "exported")))), logits(wrapped), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=r".*language_model.*(q|down)_proj", init_weights=False),
        IA3Config(
            target_modules=r".*language_model.*(v|down)_proj",
            feedforward_modules=r".*language_model.*down_proj",
            init_ia3_weights=False,
        ),
    ],
    ids=["loha", "ia3"],
)
def test_so_does_an_adapter_of_another_method(config, mllama, tmp_path):
    torch.manual_seed(1)
    wrapped = get_peft_model(MllamaForConditionalGeneration.from_pretrained(mllama), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    found = logits(load_adapter(load(mllama), resolve_model(str(tmp_path / "adapter"))))
    torch.testing.assert_close(found, logits(wrapped), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(load(mllama)), atol=1e-3)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "mlp.down_proj"]])
def test_an_ia3_that_peft_stores_with_feedforward_modules_that_are_no_targets_is_loaded(targets, tiny_model, tmp_path):
    torch.manual_seed(1)
    config = IA3Config(target_modules=targets, init_ia3_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"`feedforward_modules` should be a subset"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    found = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), resolve_model(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(found), logits(wrapped))


def test_an_adapter_that_changes_other_parts_than_the_language_model_alone_is_refused(mllama, tmp_path):
    config = LoraConfig(r=2, target_modules=r".*vision_model.*q_proj", init_lora_weights=False)
    wrapped = get_peft_model(MllamaForConditionalGeneration.from_pretrained(mllama), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CoraError, match=r"changes none of the layers of MllamaForCausalLM, only others, such as base_model.*vision_model"
    ):
        load_adapter(load(mllama), resolve_model(str(tmp_path / "adapter")), base=resolve_model(str(mllama)))


@pytest.mark.parametrize("prefix", ["bare", "", "feed_forward.", "language_model.model.layers.0.feed_forward."])
def test_fused_experts_that_an_adapter_of_that_class_changes_are_found(prefix, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}
    text |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "projector_input_dim": 16, "projector_output_dim": 16}
    torch.manual_seed(0)
    base = Llama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config={**vision, "vision_output_dim": 16})
    ).eval()
    base.save_pretrained(tmp_path / "base")
    parameters = ["gate_up_proj", "down_proj"]
    if prefix != "bare":
        parameters = [f"{prefix}experts.{name}" for name in parameters]
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", target_parameters=parameters, init_lora_weights=False)
    wrapped = get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter, path = resolve_model(str(tmp_path / "adapter")), resolve_model(str(tmp_path / "base"))
    torch.testing.assert_close(
        logits(load_adapter(load(tmp_path / "base"), adapter, base=path)), logits(wrapped), atol=1e-5, rtol=1e-5
    )
    assert "model.layers.0.self_attn.q_proj" in open_source(adapter, open_source(path)).shapes


def test_the_ranks_that_a_pruned_adalora_of_that_class_is_left_with_are_those_of_its_files(mllama, tmp_path):
    torch.manual_seed(1)
    config = AdaLoraConfig(
        init_r=4, target_r=2, target_modules=r".*language_model.*[02].mlp.down_proj", total_step=6, tinit=1, tfinal=1
    )
    wrapped = get_peft_model(MllamaForConditionalGeneration.from_pretrained(mllama), config)
    optimizer = torch.optim.SGD([one for one in wrapped.parameters() if one.requires_grad], lr=0.1)
    for step in range(1, 6):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    adapter = resolve_model(str(tmp_path / "adapter"))
    assert adapter.adapter_config()["rank_pattern"]
    torch.testing.assert_close(logits(load_adapter(load(mllama), adapter)), logits(wrapped), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_model_without_its_head_is_refused_as_such(tiny_model, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    get_peft_model(AutoModel.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    adapter = resolve_model(str(tmp_path / "adapter"))
    with pytest.raises(CoraError, match="it is of the model without its head, as embedding models are"):
        load_adapter(load(tiny_model), adapter)
    with pytest.raises(
        CoraError, match=r"it is of the model without its head, where model\.layers\.0\.self_attn\.q_proj is called so"
    ):
        open_source(adapter)


def test_the_magnitudes_of_dora_have_one_of_two_names_in_files(tiny_model, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected, file = logits(wrapped), tmp_path / "adapter/adapter_model.safetensors"
    long = {f"{key}.weight" if key.endswith("vector") else key: tensor for key, tensor in load_file(file).items()}
    save_file(long, file, metadata={"format": "pt"})
    torch.testing.assert_close(logits(load_adapter(load(tiny_model), resolve_model(str(tmp_path / "adapter")))), expected)
