"""The types of merged weights: those of the base's files, rounded once, and a line where a change is lost."""

import pytest
import torch
from peft import (
    HiraConfig,
    LoraConfig,
    RandLoraConfig,
    RoadConfig,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter, say_rounded_away
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from cora_cli.weights.sources import open_source
from tests.adapters.helpers import copy_of, foreign
from tests.training.families import build


@pytest.mark.parametrize(("kind", "said"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_stored_means_the_type_in_the_files_whatever_the_configuration_says(kind, said, tiny_model, tmp_path):
    base = copy_of(tiny_model, tmp_path / "base", kind, dtype=said)
    foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {tensor.dtype for tensor in after.values()} == {kind}
    untouched = [name for name in after if "q_proj" not in name]
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_weights_of_two_types_of_16_bits_stay_as_they_are(tiny_model, tmp_path):
    copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    file = tmp_path / "base" / "model.safetensors"
    weights = {key: (tensor * 1.01).half() if ".layers.1." in key else tensor for key, tensor in load_file(file).items()}
    weights = {key: (tensor.float() + 1e-4).half() if ".layers.1." in key else tensor for key, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    foreign(tmp_path / "base", tmp_path / "adapter", target_modules=r".*layers\.0\..*q_proj")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    others = [key for key in weights if "layers.0.self_attn.q_proj" not in key]
    assert all(merged[key].dtype == weights[key].dtype and torch.equal(merged[key], weights[key]) for key in others)


def test_a_change_that_is_rounded_away_is_named_whatever_type_one_other_tensor_has(tiny_model, tmp_path, capsys):
    copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    file = tmp_path / "base" / "model.safetensors"
    weights = {key: tensor.float() if key == "model.norm.weight" else tensor for key, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    foreign(tmp_path / "base", tmp_path / "adapter", lora_alpha=1e-4)
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert "of it is lost where the merged weights are rounded to their type" in capsys.readouterr().err


def test_joined_experts_keep_the_type_of_their_files(tmp_path):
    """Next to a tensor of another type, as in DeepSeek V3, whose files hold each expert apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build("deepseek_v3")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    apart = {key: tensor.float() if "correction_bias" in key else tensor for key, tensor in weights.items()}
    assert any(".experts.1." in key for key in apart)
    assert {tensor.dtype for tensor in apart.values()} == {torch.bfloat16, torch.float32}
    save_file(apart, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in merged.items()} == {key: tensor.dtype for key, tensor in apart.items()}


def test_weights_of_several_types_keep_theirs(tiny_model, tmp_path):
    base = copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {name: tensor.dtype for name, tensor in mixed.items()}


@pytest.mark.parametrize(
    "config",
    [
        RandLoraConfig(r=4),
        HiraConfig(r=4),
        RoadConfig(group_size=8),
        VeraConfig(r=16, d_initial=1.0, save_projection=False),
        UniLoraConfig(r=4, theta_d_length=64),
    ],
    ids=["RandLoRA", "HiRA", "RoAd", "VeRA without projections", "Uni-LoRA"],
)
def test_what_other_methods_change_is_rounded_once(config, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build("qwen2")).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config.target_modules = {"q_proj", "down_proj"}  # one with a bias, and one without
    wrapped = get_peft_model(wide, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert (weight != expected[name].to(torch.bfloat16)).float().mean() < 1e-3, name


@pytest.mark.parametrize("dtype", ["stored", "bf16"])
def test_a_merged_embedding_is_rounded_once(dtype, tiny_model, tmp_path):
    """PEFT multiplies its A and B in the type of the weight."""
    base = copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    foreign(tiny_model, tmp_path / "adapter", complete=False, target_modules=["embed_tokens"])
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged", base=resolve_model(str(base)), dtype=dtype)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (next(tensor for key, tensor in state.items() if f"lora_embedding_{factor}" in key).double() for factor in "AB")
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = before.double() + 2 * (b @ a).T  # the scale: alpha 8 over r 4
    assert (merged["model.embed_tokens.weight"] != expected.to(torch.bfloat16)).float().mean() < 1e-3
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_merged_experts_are_rounded_once(tmp_path):
    """PEFT rounds the change of a parameter first."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build("qwen3_moe")).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    wrapped = get_peft_model(wide, LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        assert (weight != expected[name].to(torch.bfloat16)).float().mean() < 1e-3, name


def test_a_merged_weight_is_rounded_once(tiny_model, tmp_path):
    base = copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    found, source = load_file(tmp_path / "merged" / "model.safetensors"), open_source(resolve_model(str(tmp_path / "adapter")))
    for name in source.targets(("q_proj",)):
        # Sums in float32 may lie on the other side of the middle between two numbers of bfloat16; very few do.
        different = found[f"{name}.weight"] != source.read(name).to(torch.bfloat16)
        assert different.float().mean() < 1e-3


def test_a_merged_weight_that_the_type_of_the_base_cannot_hold_is_refused(tiny_model, tmp_path):
    base = copy_of(tiny_model, tmp_path / "base", torch.float16)
    tensors = load_file(base / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    foreign(base, tmp_path / "adapter", lora_alpha=10_000_000)
    with pytest.raises(
        CoraError, match=r"q_proj\.weight is stored as float16, which the merged weight exceeds; use --dtype fp32"
    ):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("alpha", "lost"), [(8, False), (0.001, True)])
def test_a_change_that_the_type_of_the_weights_rounds_away_is_named(alpha, lost, tiny_model, tmp_path, capsys):
    base = copy_of(tiny_model, tmp_path / "base", torch.bfloat16)
    foreign(base, tmp_path / "adapter", lora_alpha=alpha)
    adapter = resolve_model(str(tmp_path / "adapter"))
    merge_adapter(adapter, tmp_path / "merged")
    assert ("of it is lost where the merged weights are rounded to their type" in capsys.readouterr().err) is lost
    merge_adapter(adapter, tmp_path / "exact", dtype="fp32")
    assert "is lost" not in capsys.readouterr().err


def test_into_weights_that_are_held_quantised_nothing_is_merged_and_so_nothing_rounded_away(tiny_model, tmp_path, capsys):
    foreign(tiny_model, tmp_path / "adapter", lora_alpha=0.001)
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    base.is_quantized = True
    adapter = resolve_model(str(tmp_path / "adapter"))
    assert say_rounded_away(load_adapter(base, adapter), adapter) is None
    assert "is lost" not in capsys.readouterr().err
