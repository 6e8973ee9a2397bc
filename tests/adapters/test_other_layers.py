"""Adapters on models whose linear layers are stored as (in, out), and on the language model of one that also takes images."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    MixtralConfig,
    ReformerConfig,
)

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import check_applied, install_adapter, target_linears
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merged_into_base
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import DEFAULT_TARGET_MODULES, BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.methods.parts.layers import adapted_layers
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.weights.sources import open_source
from tests.methods.helpers import SMALL, observed_in, plan_of
from tests.training.families import build

IDS = torch.tensor([[1, 5, 9, 7, 3, 2]])
SETTINGS = {"rank": 4, "alpha": 8.0, "rslora": False, "dropout": 0.0, "seed": 0}
PLAIN = sorted(name for name, method in METHODS.items() if method.is_adapter and method.takes_transposed and name != "peft")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def basis_of(model: Path, target: str, side: str, directory: Path) -> Basis:
    choices = BasisChoices(rank=4, target_modules=(target,), side=side)
    extract_basis([resolve_model(str(model))], directory / f"{side}.safetensors", choices, None, torch.device("cpu"))
    return read_basis(directory / f"{side}.safetensors")


def moved(wrapped) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


@pytest.mark.parametrize("mode", PLAIN)
def test_every_method_starts_stores_and_merges_on_layers_that_store_in_by_out(mode, gpt2, tmp_path):
    own = {"group_size": 4} if mode == "qa-lora" else SMALL.get(mode, {})
    plan = plan_of(mode, **{**SETTINGS, **own, "has_basis": mode in ("fb", "tb", "fa-basis")}, target_modules=("c_attn",))
    plan = METHODS[mode].for_model(plan, resolve_model(str(gpt2)).attention_heads())
    basis = basis_of(gpt2, "c_attn", plan.basis_side or "output", tmp_path) if plan.needs_basis else None
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    expected = logits(base)
    wrapped = install_adapter(base, plan, basis, observed_in(base, plan)).eval()
    if METHODS[mode].start_from is None and mode not in ("uni-lora", "vb-lora"):  # which start with a small random change
        torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=1e-4)
    moved(wrapped)
    trained = logits(wrapped)
    assert not torch.allclose(trained, expected, atol=1e-3)
    path = str(basis.path) if basis else None
    facts = AdapterFacts(plan, str(gpt2), None, "0" * 64, path, basis.sha256 if basis else None, compact=False)
    save_adapter(wrapped, tmp_path / "adapter", facts)
    adapter = resolve_model(str(tmp_path / "adapter"))
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(gpt2), adapter)
    torch.testing.assert_close(logits(loaded), trained, atol=1e-4, rtol=1e-4)
    merged = merged_into_base(loaded, adapter)
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)


def test_the_directions_of_layers_that_store_in_by_out_are_those_of_their_outputs(gpt2, tmp_path):
    basis = basis_of(gpt2, "c_attn", "output", tmp_path)
    weight = AutoModelForCausalLM.from_pretrained(gpt2).transformer.h[0].attn.c_attn.weight.T.double()
    u = torch.linalg.svd(weight).U[:, :4]
    found = basis.for_module("transformer.h.0.attn.c_attn", 4, 48).double()
    assert torch.linalg.matrix_norm(found - u @ (u.T @ found), 2) < 1e-5


def test_an_adapter_of_such_layers_gives_the_weights_that_it_is_merged_to(gpt2, tmp_path):
    wrapped = install_adapter(
        AutoModelForCausalLM.from_pretrained(gpt2), plan_of("lora", **SETTINGS, target_modules=("c_attn",)), None
    )
    moved(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = str(gpt2)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload().transformer.h[1].attn.c_attn.weight.T.double()
    found = open_source(resolve_model(str(tmp_path))).read("transformer.h.1.attn.c_attn")
    torch.testing.assert_close(found, merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["lora", "fb"])
def test_only_the_language_model_of_an_image_model_is_adapted(mode, gemma3, tmp_path):
    plan = plan_of(mode, **SETTINGS, target_modules=("q_proj", "v_proj"))
    choices = BasisChoices(rank=4, target_modules=("q_proj", "v_proj"))
    extract_basis([resolve_model(str(gemma3))], tmp_path / "basis.safetensors", choices, None, torch.device("cpu"))
    basis = read_basis(tmp_path / "basis.safetensors") if mode == "fb" else None
    wrapped = install_adapter(AutoModelForCausalLM.from_pretrained(gemma3), plan, basis)
    names = [name for name, _ in adapted_layers(wrapped)]
    assert len(names) == 4
    assert all(name.startswith("model.language_model.layers.") for name in names)
    facts = AdapterFacts(plan, str(gemma3), None, "0" * 64, basis and str(basis.path), basis and basis.sha256, compact=False)
    moved(wrapped)
    save_adapter(wrapped, tmp_path / "adapter", facts)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(gemma3), resolve_model(str(tmp_path / "adapter")))
    assert [name for name, _ in adapted_layers(loaded)] == names
    torch.testing.assert_close(logits(loaded), logits(wrapped.eval()), atol=1e-5, rtol=1e-5)


def test_a_module_of_the_images_alone_is_no_target(gemma3):
    with pytest.raises(CoraError, match="target module 'out_proj' matches nothing in this model"):
        target_linears(AutoModelForCausalLM.from_pretrained(gemma3), ("out_proj",))


def test_a_method_that_peft_starts_the_wrong_way_round_is_refused(gpt2):
    with pytest.raises(CoraError, match=r"mode olora does not apply to transformer.h.0.attn.c_attn"):
        install_adapter(
            AutoModelForCausalLM.from_pretrained(gpt2), plan_of("olora", **SETTINGS, target_modules=("c_attn",)), None
        )


def test_fused_experts_are_named_as_not_adapted():
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(
        CoraError, match=r"'w1' matches nothing .* experts are fused tensors such as model.layers.0.mlp.experts"
    ):
        target_linears(model, ("w1",))
    wrapped = install_adapter(model, plan_of("lora", **SETTINGS, target_modules=("q_proj",)), None)
    assert [name for name, _ in adapted_layers(wrapped)] == ["model.layers.0.self_attn.q_proj"]


def test_targets_that_peft_extends_to_fused_experts_are_refused():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = DeepseekV3Config(**shape, **latent, **experts, num_key_value_heads=2, first_k_dense_replace=1)
    for targets in (("gate_proj",), ("gate_proj", "up_proj")):
        with pytest.raises(
            CoraError, match=r"PEFT applies --target-modules gate_proj.* to the fused experts of this model too"
        ):
            install_adapter(AutoModelForCausalLM.from_config(config), plan_of("lora", **SETTINGS, target_modules=targets), None)


@pytest.mark.parametrize(("family", "named"), [("mamba", "dt_proj"), ("falcon_mamba", "dt_proj"), ("jamba", "dt_proj")])
def test_a_target_whose_layers_are_never_called_is_refused_by_name(family, named):
    model = AutoModelForCausalLM.from_config(build(family)).eval()
    with pytest.raises(CoraError, match=f"target module '{named}' would train nothing: .* leave it out of --target-modules"):
        check_applied(model, ("in_proj", named), [1, 5, 7])
    check_applied(model, ("in_proj", "x_proj"), [1, 5, 7])


def test_a_forward_pass_that_takes_no_cache_is_not_asked_to_leave_it_out(monkeypatch) -> None:
    """As those of models with their own code may be."""
    model = AutoModelForCausalLM.from_config(build("llama"))
    given = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids=None, attention_mask=None, labels=None: given(input_ids, attention_mask, labels=labels),
    )
    check_applied(model, ("q_proj",), [1, 5, 7])


def test_a_target_that_no_gradient_reaches_is_refused_by_name() -> None:
    big_bird = AutoModelForCausalLM.from_config(build("big_bird")).eval()
    with pytest.raises(
        CoraError, match="'pooler' would train nothing: BigBirdForCausalLM computes no gradient of what such layers"
    ):
        check_applied(big_bird, ("query", "pooler"), [1, 5, 7])
    assert all(weight.requires_grad for weight in big_bird.parameters())
    assert not big_bird.training
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8, "feed_forward_size": 48}
    reformer = ReformerConfig(is_decoder=True, attn_layers=["local"], axial_pos_embds=False, **sizes)
    with pytest.raises(CoraError, match="'query' would train nothing: ReformerModelWithLMHead computes no gradient"):
        check_applied(AutoModelForCausalLM.from_config(reformer), ("query",), [1, 5, 7])


def test_a_router_which_returns_more_than_its_product_counts_as_reached() -> None:
    check_applied(AutoModelForCausalLM.from_config(build("llama4_text")).eval(), ("q_proj", "router"), [1, 5, 7])


def test_a_linear_layer_whose_output_is_of_another_shape_is_refused_by_name() -> None:
    """As DeepSeek-V4's o_a_proj, which divides its input and its output into groups."""

    class Grouped(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).unflatten(-1, (2, -1))

    model: Any = AutoModelForCausalLM.from_config(build("llama"))
    attention = model.model.layers[0].self_attn
    sizes = attention.o_proj.in_features, attention.o_proj.out_features
    attention.o_proj = torch.nn.Sequential(Grouped(*sizes, bias=False), torch.nn.Flatten(-2))
    with pytest.raises(
        CoraError, match=r"self_attn\.o_proj\.0 is a Grouped, whose output is .*; leave o_proj\.0 out of --target"
    ):
        check_applied(model, ("q_proj", "o_proj.0"), [1, 5, 7])


def test_a_family_that_computes_a_part_in_float32_is_tried_as_it_is_trained_in_bf16() -> None:
    model: Any = AutoModelForCausalLM.from_config(build("llama")).to(torch.bfloat16)
    model.model.norm.register_forward_hook(lambda *given: given[-1].float())
    with pytest.raises(CoraError, match="ends in RuntimeError"):
        check_applied(model, ("q_proj",), [1, 5, 7])
    check_applied(model, ("q_proj",), [1, 5, 7], torch.bfloat16)


def test_a_target_that_is_called_in_evaluation_only_is_refused_by_name() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": [48], "num_attention_heads": 4}
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 4, "num_kv_shared_layers": 0}
    config = Gemma3nTextConfig(**sizes, **own, layer_types=["full_attention"], activation_sparsity_pattern=[0.0], head_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    frozen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: frozen.append(not any(each.requires_grad for each in model.parameters())))
    check_applied(model, ("q_proj",), [1, 5, 7])
    assert frozen == [True]  # as with the adapter that it will get
    hook.remove()
    with pytest.raises(CoraError, match=r"'correction_coefs' would train nothing: .* without calling them"):
        check_applied(model, ("q_proj", "correction_coefs"), [1, 5, 7])


def test_a_model_whose_forward_pass_fails_is_refused_with_what_it_raised():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**latent, num_hidden_layers=1, hidden_size=16, vocab_size=32))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]  # as where the configuration has two lengths for it
    with pytest.raises(
        CoraError,
        match="DeepseekV3ForCausalLM cannot be trained: its forward pass on the token ids of an example ends in RuntimeError",
    ):
        check_applied(model, ("q_a_proj",), [1, 5, 7])


def test_a_target_that_peft_does_not_adapt_is_refused_in_one_sentence():
    model = AutoModelForCausalLM.from_config(build("mamba"))
    plan = plan_of("lora", rank=2, alpha=2.0, rslora=False, dropout=0.0, seed=0, target_modules=("out_proj",))
    with pytest.raises(CoraError, match=r"--target-modules out_proj cannot be adapted: .*out_proj"):
        install_adapter(model, plan, None)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "mamba"])
def test_default_targets_that_a_family_lacks_are_refused_with_its_linear_layers(family):
    model = AutoModelForCausalLM.from_config(build(family))
    known = "in_proj" if family == "mamba" else "kv_a_proj_with_mqa, kv_b_proj"
    with pytest.raises(
        CoraError, match=f"target module '[qk]_proj' matches nothing in this model; its linear layers are .*{known}"
    ):
        target_linears(model, DEFAULT_TARGET_MODULES)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, ""),
        ({"use_rslora": True}, ""),
        ({"alpha_pattern": {r"layers\.1\..*": 16}}, ""),
        ({"rank_pattern": {r".*experts\.1\..*": 3}}, ""),
        ({"layers_to_transform": [1], "lora_dropout": 0.05}, ""),
        ({"target_modules": r".*\.experts\.\d+\.\w+"}, ""),
        ({}, r"^1\."),
        ({}, "gate"),
        ({"rank_pattern": {r".*experts\.1\..*": 3}}, r"^1\.(up|down)"),
        ({"target_modules": r".*\.experts\.\d+\.\w+"}, "gate"),
    ],
    ids=[
        "plain",
        "rslora",
        "alphas",
        "ranks",
        "one layer",
        "pattern",
        "one expert",
        "gate alone",
        "up and down of one",
        "pattern of gate alone",
    ],
)
@pytest.mark.parametrize(
    ("model_type", "layer", "gate_up_down"),
    [("mixtral", "block_sparse_moe", ("w1", "w3", "w2")), ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"))],
)
def test_adapters_of_single_experts_change_the_experts_that_transformers_fuses(
    model_type: str, layer: str, gate_up_down: tuple[str, str, str], settings: dict[str, Any], changed: str, tmp_path: Path
) -> None:
    """Each by its own scale: PEFT has that of rsLoRA wrong for the joined ones, and passes over patterns; it refuses gate without up and some experts."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(build(model_type))
    base.save_pretrained(tmp_path / "base")
    wanted = copy.deepcopy(base)
    targets = dict(zip(("gate", "up", "down"), gate_up_down, strict=True))
    state: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, block in enumerate(wanted.model.layers):
            if number not in settings.get("layers_to_transform", [number]):
                continue
            experts = block.mlp.experts
            for expert in range(len(experts.down_proj)):
                halves = experts.gate_up_proj[expert].chunk(2)
                for part, weight in (("gate", halves[0]), ("up", halves[1]), ("down", experts.down_proj[expert])):
                    if not re.search(changed, f"{expert}.{part}"):
                        continue
                    rank = 3 if expert == 1 and "rank_pattern" in settings else 2
                    alpha = 16 if number == 1 and "alpha_pattern" in settings else 4
                    a, b = 0.3 * torch.randn(rank, weight.shape[1]), 0.3 * torch.randn(len(weight), rank)
                    key = f"base_model.model.model.layers.{number}.{layer}.experts.{expert}.{targets[part]}"
                    state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                    weight.add_(alpha / (rank**0.5 if settings.get("use_rslora") else rank) * b @ a)
    adapter = tmp_path / "adapter"
    adapted = {"target_modules": [targets[part] for part in targets if re.search(changed, f"1.{part}")]}
    config = LoraConfig(r=2, lora_alpha=4, base_model_name_or_path=str(tmp_path / "base"), **(adapted | settings))
    config.save_pretrained(str(adapter))
    save_file(state, adapter / "adapter_model.safetensors")
    wrapped = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), resolve_model(str(adapter)))
    assert torch.allclose(logits(wrapped), logits(wanted.eval()), atol=1e-4)
    export_adapter(resolve_model(str(adapter)), tmp_path / "exported")
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "exported"))
    assert torch.allclose(logits(exported.eval()), logits(wanted), atol=1e-4)
    source, query = open_source(resolve_model(str(adapter))), base.model.layers[0].self_attn.q_proj
    assert torch.equal(source.read("model.layers.0.self_attn.q_proj"), query.weight.double())
    assert not any(".experts." in module for module in source.shapes)


@pytest.mark.parametrize(
    ("model_type", "dense", "lost", "said"),
    [
        ("qwen3_moe", False, "experts.1.down_proj.lora_B.weight", r"experts\.1\.down_proj\.lora_B\.weight is missing"),
        (
            "deepseek_v3",
            True,
            None,
            r"shared_experts\.down_proj\.lora_A\.weight, is of a layer that is called as experts are, which PEFT leaves out",
        ),
        (
            "qwen2_moe",
            False,
            None,
            r"experts\.0\.down_proj\.lora_A\.weight, is of a single expert, which PEFT does not join with the others for Qwen2Moe",
        ),
        (
            "phimoe",
            False,
            None,
            r"experts\.0\.down_proj\.lora_A\.weight is of a single expert, which PEFT does not join with the others for Phimoe",
        ),
    ],
    ids=[
        "a factor is lost",
        "a dense layer of the same name",
        "a family that PEFT passes over",
        "a family without such targets",
    ],
)
def test_adapters_of_single_experts_that_peft_loads_in_part_are_refused(
    model_type: str, dense: bool, lost: str | None, said: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_config(build(model_type))
    base.save_pretrained(tmp_path / "base")
    number, block = next((number, layer.mlp) for number, layer in enumerate(base.model.layers) if hasattr(layer.mlp, "experts"))
    shapes = {f"experts.{expert}.down_proj": weight.shape for expert, weight in enumerate(block.experts.down_proj)}
    if dense:
        shapes["shared_experts.down_proj"] = block.shared_experts.down_proj.weight.shape
    state = {}
    for name, (outputs, inputs) in shapes.items():
        state[f"base_model.model.model.layers.{number}.mlp.{name}.lora_A.weight"] = torch.randn(2, inputs)
        state[f"base_model.model.model.layers.{number}.mlp.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    state = {key: tensor for key, tensor in state.items() if lost is None or not key.endswith(lost)}
    adapter = tmp_path / "adapter"
    LoraConfig(r=2, target_modules=["down_proj"], base_model_name_or_path=str(tmp_path / "base")).save_pretrained(str(adapter))
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(CoraError, match=said):
        load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), resolve_model(str(adapter)))
