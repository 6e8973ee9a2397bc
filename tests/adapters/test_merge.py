import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PeftType,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cora_cli.adapters.elsewhere import is_plain_lora
from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import CannotMerge, merge_adapter, merged_into_base
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import read_basis
from cora_cli.errors import CoraError
from cora_cli.models.loading import load_model, save_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.weights.sources import open_source
from tests.adapters.helpers import foreign, logits
from tests.methods.helpers import plan_of
from tests.training.families import build


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tiny_basis: Path, tmp_path_factory) -> dict[str, tuple[ModelPath, torch.Tensor]]:
    """A trained adapter in both forms, with the logits of base + adapter in float32."""
    basis, made = read_basis(tiny_basis), {}
    for form in ("standard", "compact"):
        plan = plan_of(
            "fb", rank=4, alpha=8.0, rslora=False, target_modules=("q_proj", "k_proj", "v_proj"), dropout=0.1, seed=0
        )
        wrapped = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), plan, basis).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        facts = AdapterFacts(
            plan,
            str(tiny_model),
            None,
            resolve_model(str(tiny_model)).content_hash(),
            str(tiny_basis),
            basis.sha256,
            compact=form == "compact",
        )
        directory = tmp_path_factory.mktemp("adapters") / form
        save_adapter(wrapped, directory, facts)
        made[form] = (resolve_model(str(directory)), logits(wrapped))
    return made


@pytest.mark.parametrize("form", ["standard", "compact"])
def test_the_merged_model_is_a_plain_one_with_the_logits_of_base_and_adapter(form, adapters, tiny_model, tmp_path):
    adapter, expected = adapters[form]
    assert merge_adapter(adapter, tmp_path / "merged") == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    found = logits(model)
    base = logits(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert (base - expected).abs().max() > 0.1, "the adapter must matter for this test to mean anything"
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert resolve_model(str(tmp_path / "merged")).is_adapter is False
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_fan_in_fan_out_of_an_adapter_follows_the_layer_and_not_the_configuration_as_in_peft(adapters, tmp_path):
    adapter, expected = adapters["standard"]
    copy = Path(shutil.copytree(adapter.path, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    merge_adapter(resolve_model(str(copy)), tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_an_adapter_of_another_program_ends_its_answers_as_its_chat_template_does(place, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    foreign(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.save_pretrained(tmp_path / place)
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|stop|>")]


def test_the_tokenizer_comes_along(adapters, tiny_model, tmp_path):
    merge_adapter(adapters["standard"][0], tmp_path / "merged")
    merged, base = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", tiny_model))
    assert merged("def f(x): return 1")["input_ids"] == base("def f(x): return 1")["input_ids"]
    assert merged.chat_template == base.chat_template


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("stored", torch.float32)])
def test_the_dtype_can_be_chosen(dtype, expected, adapters, tmp_path):
    merge_adapter(adapters["standard"][0], tmp_path / "merged", dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == expected


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_output_that_exists_is_refused_and_left_alone(make, adapters, tmp_path):
    make(tmp_path / "merged")
    with pytest.raises(CoraError, match="merged exists already; choose a new directory"):
        merge_adapter(adapters["standard"][0], tmp_path / "merged")
    assert [path.name for path in tmp_path.rglob("*")] == ["merged"]


def test_a_whole_model_is_refused(tiny_model, tmp_path):
    with pytest.raises(CoraError, match="is a complete model: there is nothing to merge"):
        merge_adapter(resolve_model(str(tiny_model)), tmp_path / "merged")


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], init_lora_weights=False
        ),
        VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"], save_only_topk_weights=True),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_of_peft_with_other_factors_than_a_and_b_is_merged(config, tiny_model, tmp_path):
    torch.manual_seed(0)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged", base=resolve_model(str(tiny_model)))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))).abs().max() > 1e-2


def test_an_adapter_of_adalora_is_exported_as_the_lora_that_its_triplets_are(tiny_model, tmp_path):
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj", "o_proj"])
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    pattern = {}
    with torch.no_grad():
        for place, (name, parameter) in enumerate(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "lora_E" in name:
                kept = [number < place % 4 for number in range(4)]
                parameter.mul_(torch.tensor(kept)[:, None])
                pattern[name.removeprefix("base_model.model.")] = kept
    wrapped.peft_config["default"].rank_pattern = pattern  # as PEFT's pruning leaves it
    wrapped.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    rank = export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported", base=resolve_model(str(tiny_model)))
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "exported").eval())
    assert rank == max(sum(kept) for kept in pattern.values())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))).abs().max() > 1e-2


def test_an_adapter_that_adds_to_the_attention_has_no_weights_to_merge(tiny_model, tmp_path):
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match="cannot be merged: ADAPTION_PROMPT adds to what layers give"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged", base=resolve_model(str(tiny_model)))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("method", ["BEFT", "LILY"])
def test_a_method_of_peft_that_has_no_weights_to_merge_is_refused_in_one_sentence(method, tiny_model, tmp_path):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match=rf"adapter {tmp_path}/adapter cannot be merged: .*(not supported|no bias)") as caught:
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_on_a_base_that_it_does_not_fit_is_refused_and_writes_nothing(adapters, tiny_multihead_model, tmp_path):
    with pytest.raises(CoraError, match="cannot be loaded"):
        merge_adapter(adapters["standard"][0], tmp_path / "merged", base=resolve_model(str(tiny_multihead_model)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left_out", ["tokenizer*", "chat_template*"])
def test_a_base_without_a_tokenizer_is_merged_without_one(left_out, adapters, tiny_model, tmp_path, capsys):
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", left_out)))
    merge_adapter(adapters["standard"][0], tmp_path / "merged", base=resolve_model(str(bare)))
    assert f"nor {bare} holds a tokenizer, and so none is written" in capsys.readouterr().err
    assert not list((tmp_path / "merged").glob("tokenizer*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(model), adapters["standard"][1], rtol=0, atol=1e-4)
    with pytest.raises(CoraError, match=f"^{bare} holds no tokenizer; copy the files of its tokenizer"):
        load_tokenizer(resolve_model(str(bare)))


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer", "BertTokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(kind, adapters, tiny_model, tmp_path):
    """transformers 5 gives one that knows special tokens only."""
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters["standard"][0].path, adapter)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "</s>"}))
    with pytest.raises(
        CoraError, match=r"knows no tokens but special ones: .* or remove tokenizer_config.json to have that of the base"
    ):
        merge_adapter(resolve_model(str(adapter)), tmp_path / "merged", base=resolve_model(str(tiny_model)))
    assert not (tmp_path / "merged").exists()


def test_a_tokenizer_of_an_adapter_that_lacks_the_chat_template_of_the_base_is_named(tiny_model, tmp_path, capsys):
    for place, template in (("base", "{{ messages[0].content }}"), ("adapter", None)):
        (shutil.copytree(tiny_model, tmp_path / place) if place == "base" else foreign(tmp_path / "base", tmp_path / place))
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / place)
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert "has no chat template, and that of its base" in capsys.readouterr().err


def test_only_the_file_of_the_usual_name_is_read_of_several(tiny_model, tmp_path, capsys):
    """As PEFT reads it; the others are a backup and a head that some program wrote."""
    expected = foreign(tiny_model, tmp_path / "adapter")
    backup = {key: tensor + 1 for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    save_file(backup, tmp_path / "adapter" / "adapter_model_old.safetensors")
    head = LlamaForCausalLM.from_pretrained(tiny_model).lm_head.weight.detach() + 1
    save_file({"base_model.model.lm_head.weight": head}, tmp_path / "adapter" / "adapter_head.safetensors")
    loaded = load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), resolve_model(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert "adapter_head.safetensors" in capsys.readouterr().err


def test_a_foreign_adapter_on_another_base_than_it_names_is_taken_and_said(tiny_model, tmp_path, capsys):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    said = "names {} as its base model; {} is taken in its place"
    for named, quiet in ((f"/elsewhere/{tiny_model.name}", True), (f"org/{tiny_model.name}", True), ("org/other-7b", False)):
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": named}))
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged", base=resolve_model(str(tiny_model)))
        assert (said.format(named, tiny_model) in capsys.readouterr().err) is not quiet
        shutil.rmtree(tmp_path / "merged")


def test_a_base_that_has_changed_since_training_is_refused_unless_it_is_named(adapters, tiny_model, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(adapters["standard"][0].path, directory)
    facts = json.loads((directory / "cora.json").read_text())
    (directory / "cora.json").write_text(json.dumps({**facts, "base_sha256": "0" * 64}))
    with pytest.raises(CoraError, match="another model, or it has changed"):
        merge_adapter(resolve_model(str(directory)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_adapter(resolve_model(str(directory)), tmp_path / "merged", base=resolve_model(str(tiny_model))) == 6


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(adapters, tmp_path, monkeypatch):
    def refuse(model, directory, **_):
        directory.mkdir()
        (directory / "half").write_text("a")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", refuse)
    with pytest.raises(CoraError, match=r"the disk is full: .*merged could not be written"):
        merge_adapter(adapters["standard"][0], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_of_one_of_two_tied_weights_changes_that_one_only(settings, tiny_model, tmp_path):
    expected = foreign(tiny_model, tmp_path / "adapter", **settings)
    if "modules_to_save" in settings:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.lm_head.weight"] *= 2
        save_file(tensors, file, metadata={"format": "pt"})
        expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter"))
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"layer_replication": [[0, 1], [0, 2]]}]
)
def test_each_of_two_updates_to_one_shared_weight_changes_its_own_layer_only(settings, tiny_model, tmp_path):
    expected = foreign(tiny_model, tmp_path / "adapter", **settings)
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def of_few_tokens(model) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 11)[None]).logits


@pytest.mark.parametrize("family", ["gpt2", "codegen", "roberta"])
@pytest.mark.parametrize("on_head", [False, True])
def test_trained_rows_of_tokens_reach_a_tied_head_merged_as_unmerged(family, on_head, tmp_path):
    """PEFT leaves out the bias of such a head; where a LoRA adapts it, too, it merges neither."""
    config = build(family)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = [next(name for name, module in model.named_modules() if name.endswith(("c_fc", "fc_in", "intermediate.dense")))]
    settings = {"target_modules": [*targets, *([head] if on_head else [])], "trainable_token_indices": [3, 5]}
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = of_few_tokens(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    )
    adapter = resolve_model(str(tmp_path / "adapter"))
    merge_adapter(adapter, tmp_path / "merged")
    found = of_few_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert head not in open_source(adapter).shapes  # whose weight is not W + s·B·A alone


@pytest.mark.parametrize("saved", ["lm_head", "word_embeddings"])
def test_a_merged_head_of_its_own_keeps_its_bias(saved, tmp_path):
    """Which BERT's kin tie to another one, but not where embedding and head are two weights."""
    AutoModelForCausalLM.from_config(build("roberta")).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=[saved], init_lora_weights=False)
    config.base_model_name_or_path = str(tmp_path / "base")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
        torch.nn.init.normal_(wrapped.get_base_model().get_output_embeddings().bias)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = of_few_tokens(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    )
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    torch.testing.assert_close(
        of_few_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, atol=1e-4, rtol=1e-4
    )
    open_source(resolve_model(str(tmp_path / "adapter")))


@pytest.mark.parametrize("start", ["pissa_niter_4", "lora_ga", "corda"])
def test_an_adapter_on_weights_that_cannot_be_computed_again_is_refused(start, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start}))
    with pytest.raises(CoraError, match=f"init_lora_weights '{start}': it applies to weights that its training had changed"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")


def test_what_peft_would_not_load_as_a_lora_is_not_exported(tmp_path):
    AutoModelForCausalLM.from_config(build("mamba")).save_pretrained(tmp_path / "base")
    config = LoHaConfig(r=2, target_modules=["out_proj"], init_weights=False, base_model_name_or_path=str(tmp_path / "base"))
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match=r"uses LOHA, which has no equivalent LoRA that PEFT takes: .*incompatible with Mamba"):
        export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layers\.1\.self_attn\.q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_a_start_that_is_subtracted_from_a_shared_weight_is_no_lora_on_the_base(settings, shared, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter", init_lora_weights="olora", **settings)
    with pytest.raises(
        CoraError, match=rf"subtracts its start \(olora\) from the weight of \S*{shared}, which other layers share"
    ):
        export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "bias": "all"},
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
        {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ],
)
def test_an_exported_lora_has_one_scale_and_stands_on_the_base_itself(settings, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter", **settings)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    moved = {key: tensor + 0.01 for key, tensor in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter"))
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    exported = resolve_model(str(tmp_path / "exported"))
    config = exported.adapter_config()
    assert (config["init_lora_weights"], config["rank_pattern"], config["alpha_pattern"]) == (True, {}, {})
    assert is_plain_lora(exported) is not ("bias" in settings or "lora_bias" in settings)
    found = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "exported"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_the_start_of_a_head_is_not_subtracted_twice_from_what_is_exported(tiny_model, tmp_path):
    """PEFT stores the head's weight without its start with the adapter, and would take it for that of the base."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "base")
    shutil.copyfile(tiny_model / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
    foreign(tmp_path / "base", tmp_path / "adapter", init_lora_weights="pissa", target_modules=["q_proj", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    moved = {key: tensor + 0.01 if ".lora_" in key else tensor for key, tensor in tensors.items()}
    save_file(moved, file, metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"))
    export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")
    found = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "exported"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_failure_of_peft_while_merging_is_one_sentence(tiny_model, tmp_path):
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CoraError, match=r"adapter .*adapter cannot be merged: .*; `cora evaluate`, on transformers, evaluates it as it is"
    ):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged", base=resolve_model(str(tiny_model)))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("write", [merge_adapter, export_adapter])
def test_an_output_that_is_an_input_is_refused_and_left_alone(write, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    with pytest.raises(CoraError, match="exists already; choose a new directory"):
        write(resolve_model(str(tmp_path / "adapter")), tmp_path / "adapter", base=resolve_model(str(tiny_model)))
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize("settings", [{"temperature": 0.5, "do_sample": False}, {"max_length": 64}])
def test_a_generation_configuration_that_transformers_would_not_write_is_merged(settings, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("stated", ["generation_config.json", "config.json"])
def test_a_generation_configuration_that_transformers_would_not_write_is_written_with_further_ends(
    stated, tiny_model, tmp_path
):
    # As of Llama 2 when it was published: settings of sampling for a model that does not sample.
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (base / "generation_config.json").unlink(missing_ok=True)
    own = json.loads((base / stated).read_text()) if (base / stated).exists() else {}
    (base / stated).write_text(json.dumps({**own, **settings}))
    source = resolve_model(str(base))
    save_model(load_model(source, torch.float32, torch.device("cpu"), None), source, tmp_path / "written", ends=[2, 5])
    written = json.loads((tmp_path / "written" / "generation_config.json").read_text())
    assert {name: written[name] for name in settings} == {**settings, "eos_token_id": [2, 5]}


def test_an_adapter_that_is_not_finite_is_refused_by_key(tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"lora_A\.weight holds values that are not finite"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")


def test_loftq_needs_the_gpu_on_which_peft_starts_it_again(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    foreign(tiny_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "loftq"}))
    with pytest.raises(CoraError, match="init_lora_weights 'loftq': it applies to weights that PEFT quantises again"):
        merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")


def test_how_images_become_the_input_of_a_model_stays_with_it(gemma3, tmp_path):
    shutil.copytree(gemma3, tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"image_processor_type": "Gemma3ImageProcessor"}'


def test_a_tokenizer_without_a_padding_token_is_written_without_one(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    foreign(base, tmp_path / "adapter")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(base).pad_token is AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token is None


def test_complete_weights_next_to_an_adapter_that_becomes_a_lora_are_not_lost(tiny_model, tmp_path):
    config = LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match="uses LOHA and also trained norm, which would be lost in a LoRA"):
        export_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "exported")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"trainable_token_indices": [5]}, "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ],
)
def test_a_saved_weight_that_the_configuration_names_and_no_file_holds_is_named(setting, key, tiny_model, tmp_path):
    foreign(tiny_model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(
        CoraError,
        match=f"its files hold no {re.escape(key)}, which its adapter_config.json names .*: the adapter is incomplete",
    ):
        merge_adapter(resolve_model(str(tmp_path / "a")), tmp_path / "m")


def test_weights_next_to_an_adapter_that_peft_does_not_read_are_named(tiny_model, tmp_path, capsys):
    foreign(tiny_model, tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / "optimizer.pt")
    save_file({}, tmp_path / "adapter" / "posterior.safetensors")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "merged")
    assert "does not read" not in capsys.readouterr().err
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "adapter" / "non_lora_trainables.bin")
    merge_adapter(resolve_model(str(tmp_path / "adapter")), tmp_path / "again")
    assert "also holds non_lora_trainables.bin, which PEFT does not read" in capsys.readouterr().err


class Normed(torch.nn.Embedding):
    """As Inkling's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = super().forward(input)
        return found / found.square().mean(-1, keepdim=True).sqrt()


def test_a_lora_behind_an_embedding_that_changes_what_it_looks_up_is_not_merged_into_it(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_input_embeddings().__class__ = Normed
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    with pytest.raises(CannotMerge, match="LlamaForCausalLM changes what it looks up in its embedding, such as by a norm"):
        merged_into_base(wrapped, resolve_model(str(tiny_model)))
