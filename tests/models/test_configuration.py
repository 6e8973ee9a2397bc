import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV4Config,
    DeepseekV32Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen4ExpTextConfig,
    RobertaConfig,
    RwkvConfig,
    RwkvForCausalLM,
    WhisperConfig,
)
from transformers.models.auto import tokenization_auto
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from cora_cli.errors import CoraError
from cora_cli.models.configuration import (
    balances_experts,
    depends_on_batch,
    length_limits,
    load_configuration,
    remove_dropout,
    rope_switch,
    route_as_evaluated,
)
from cora_cli.models.loading import UNSTATED, context_length, hides_context, load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.skeleton import build_skeleton, skeleton_of
from cora_cli.models.tokenizer import load_tokenizer
from tests.training.families import build

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 40,
}


def test_dropout_is_removed_under_every_name_and_in_nested_configurations() -> None:
    gpt2 = GPT2Config()
    assert remove_dropout(gpt2) == dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.1)
    assert gpt2.attn_pdrop == 0
    assert remove_dropout(gpt2) == {}
    assert remove_dropout(Gemma3Config(text_config={"attention_dropout": 0.2})) == {"attention_dropout": 0.2}
    assert remove_dropout(MixtralConfig(router_jitter_noise=0.01)) == {"router_jitter_noise": 0.01}


def test_routers_whose_noise_is_a_threshold_of_evaluation_too_keep_it_and_draw_nothing() -> None:
    config = PhimoeConfig(input_jitter_noise=0.1)
    assert remove_dropout(config) == {"input_jitter_noise": 0.1}
    router = PhimoeTopKRouter(config).eval()
    torch.nn.init.normal_(router.weight)
    states = torch.randn(1, 500, config.hidden_size)
    evaluated, drawn = router(states), router.train()(states)
    assert not torch.equal(drawn[1], evaluated[1])
    route_as_evaluated(torch.nn.ModuleList([router]))
    for found, wanted in zip(router.train()(states), evaluated, strict=True):
        assert torch.equal(found, wanted)


def test_the_layers_of_rwkv_keep_their_weights_in_evaluation(tmp_path: Path) -> None:
    config = RwkvConfig(hidden_size=32, vocab_size=99, num_hidden_layers=3, context_length=32, rescale_every=1)
    plain = RwkvForCausalLM(config)
    plain.save_pretrained(tmp_path)
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    loaded = load_model(ModelPath("m", tmp_path, None), torch.float32, torch.device("cpu"), None)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, plain.train()(input_ids=ids).logits)
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_weights_of_mamba_are_those_of_the_file(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers divides them by the root of the number of layers once more as it loads them."""
    config = build(family)
    config.rescale_prenorm_residual = True
    stored_model = AutoModelForCausalLM.from_config(config)
    stored_model.save_pretrained(tmp_path)
    loaded = load_model(ModelPath("m", tmp_path, None), torch.float32, torch.device("cpu"), None)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in stored_model.state_dict().items())
    assert "set that to false" in capsys.readouterr().err


def test_a_loss_on_the_routing_of_experts_is_found(tmp_path: Path) -> None:
    assert balances_experts(stored(MixtralConfig(), tmp_path, output_router_logits=True).config())
    assert balances_experts({"text_config": {"output_router_logits": True}})
    assert not balances_experts(MixtralConfig().to_dict())


def test_lengths_at_which_attention_or_positions_change() -> None:
    assert length_limits(LlamaConfig()) == set()
    assert length_limits(MistralConfig(sliding_window=8)) == {8}
    assert length_limits(Gemma3Config(text_config={"sliding_window": 16})) == {16}
    assert length_limits(DeepseekV32Config(index_topk=24)) == {24}
    assert length_limits(DeepseekV4Config(sliding_window=8)) >= {8, 4, 128}
    assert length_limits(LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=LONGROPE)) == {40}


def test_attention_that_chooses_keys_by_content_depends_on_the_batch() -> None:
    assert depends_on_batch(DeepseekV32Config(index_topk=24))
    assert depends_on_batch(DeepseekV4Config(sliding_window=8))
    plain, indexed = Qwen4ExpTextConfig(), Qwen4ExpTextConfig()
    indexed.indexer_budget = 64
    assert depends_on_batch(indexed)
    assert not depends_on_batch(plain)
    assert not depends_on_batch(MistralConfig(sliding_window=8))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (MptConfig(max_seq_len=160), 160),
        (WhisperConfig(max_target_positions=48, max_source_positions=1500), 48),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=64), 64),
        (RwkvConfig(context_length=128), 128),
        (Gemma3Config(text_config={"max_position_embeddings": 256}), 256),
    ],
)
def test_the_context_length_under_the_names_of_several_families(config: Any, length: int) -> None:
    assert context_length(config) == length


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        # As on the cards of Qwen2.5, in the configuration of Vicuna 16k and in that of DeepSeek-V3, which states the scaled length.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 256}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 64),
        # Whether this is the scaled length is not said.
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            64,
        ),
        ({"max_sequence_length": 256}, 64),
    ],
)
def test_the_context_length_of_scaled_rotary_embeddings(changes: dict[str, Any], length: int) -> None:
    assert context_length(LlamaConfig(max_position_embeddings=64, **changes)) == length


def test_the_context_length_of_a_class_with_code_of_its_own_may_have_other_names() -> None:
    class Own(PreTrainedConfig):
        model_type = "own"

    assert context_length(Own(block_size=128)) == 128
    assert hides_context(Own())
    assert not hides_context(Own(n_ctx=64))
    assert not hides_context(BloomConfig(seq_length=64))
    assert context_length(BloomConfig(seq_length=64)) == UNSTATED  # what it was trained on; ALiBi reads more


def test_the_rotary_embedding_of_a_complete_pass_changes_where_the_configuration_says() -> None:
    assert rope_switch(LlamaConfig()) is None
    assert rope_switch(LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=LONGROPE)) == 40
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert rope_switch(LlamaConfig(max_position_embeddings=128, rope_parameters=dynamic)) == 128


def stored(config: Any, directory: Path, **changes: Any) -> ModelPath:
    """A directory with the configuration, as transformers writes it, and changes to its text as a user makes them."""
    config.save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return ModelPath(str(directory), directory, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "torch.float16"}, 'dtype "torch.float16"'),
        ({"dtype": None, "torch_dtype": "auto"}, 'torch_dtype "auto"'),
        ({"text_config": {"model_type": "llama", "dtype": "half precision"}}, 'dtype "half precision"'),
    ],
)
def test_a_type_of_numbers_that_torch_does_not_have_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match=f"config.json of .* has {said}, which is no type of torch"):
        load_configuration(stored(LlamaConfig(), tmp_path, **changes))


def test_a_stated_type_in_which_no_model_can_be_created_is_left_to_the_files(tiny_model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float8_e4m3fn"}))
    model = resolve_model(str(path))
    assert load_configuration(model).dtype is None
    assert load_model(model, torch.float32, torch.device("cpu"), None).dtype == torch.float32
    skeleton_of(model)


def test_a_value_that_transformers_looks_up_in_vain_is_named(tiny_model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": "wiggle"}))
    with pytest.raises(CoraError, match=r"its config\.json has hidden_act 'wiggle', which transformers does not know"):
        load_model(resolve_model(str(path)), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LlamaConfig(), {"rope_theta": 77.0}, r"rope_parameters has rope_theta 10000\.0, but next to it 77\.0"),
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            r"rope_parameters has rope_theta 1000000\.0, but rope_scaling has none",
        ),
        (
            LlamaConfig(),
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type 'default', .* 'linear'",
        ),
        (LlamaConfig(), {"is_encoder_decoder": True}, "is_encoder_decoder is true, but a llama model has no encoder"),
        (GPT2Config(), {"num_hidden_layers": 3}, "num_hidden_layers is 3, but n_layer, another name for it, is 12"),
        (
            Gemma3Config(text_config={"num_hidden_layers": 2}),
            {"text_config": {"model_type": "gemma3_text", "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}},
            r"rope_theta 6\.0, but next to it 5\.0",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    config: Any, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CoraError, match=f"config.json of .* contradicts itself: .*{said}; remove the wrong one"):
        load_configuration(stored(config, tmp_path, **changes))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LlamaConfig(), {"rope_theta": 10000.0}),
        (LlamaConfig(), {"rope_parameters": None, "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        (GPT2Config(), {"num_hidden_layers": 12}),
        (Gemma3Config(), {}),
    ],
)
def test_a_configuration_that_states_one_value_twice_is_read(config: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    assert load_configuration(stored(config, tmp_path, **changes)).model_type == config.model_type


@pytest.mark.parametrize(
    "uses",
    [
        {"return_dict": False},
        {"output_hidden_states": True, "output_attentions": True, "_attn_implementation": "eager"},
        {"_attn_implementation": "flash_attention_2"},
    ],
)
def test_what_a_configuration_says_about_the_use_of_a_model_is_left_out(uses: dict[str, Any], tmp_path: Path) -> None:
    found = load_configuration(stored(LlamaConfig(), tmp_path, **uses))
    assert (found.return_dict, found.output_hidden_states, found.output_attentions) == (True, False, False)
    assert found._attn_implementation in (None, "eager")


def test_a_fault_of_the_configuration_is_not_laid_on_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CoraError, match=r"^config.json of .* cannot be read: .*rms_norm_eps"):
        load_tokenizer(stored(LlamaConfig(), tmp_path, rms_norm_eps="1e-5"))


def test_special_tokens_that_two_files_state_differently_are_named(tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    own = json.loads((directory / "tokenizer_config.json").read_text())
    for text in (own["eos_token"], "<|endoftext|>"):
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": text}}))
        used = load_tokenizer(ModelPath(str(directory), directory, None)).eos_token
    said = f"eos_token is {own['eos_token']!r} in tokenizer_config.json, but '<|endoftext|>' in special_tokens_map.json; {used!r} is used"
    assert capfd.readouterr().err.count("eos_token is") == 1 or own["eos_token"] == "<|endoftext|>"
    load_tokenizer(ModelPath(str(directory), directory, None))
    assert said in capfd.readouterr().err


def test_a_tokenizer_of_the_package_of_mistral_is_not_taken_in_place_of_that_of_the_files(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers does so where the package is installed and the folder holds a tekken.json; it has no chat template, and no ids of added tokens."""
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(
        tokenization_auto, "_use_mistral_format", lambda *_, mistral_format=None, **__: mistral_format is not False
    )
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    found, expected = (load_tokenizer(ModelPath(str(place), place, None)) for place in (directory, tiny_model))
    assert found("a text").input_ids == expected("a text").input_ids


def test_a_chat_template_with_a_byte_order_mark_is_refused(tiny_model, tmp_path):
    directory = Path(shutil.copytree(tiny_model, tmp_path / "marked"))
    template = directory / "chat_template.jinja"
    template.write_bytes(b"\xef\xbb\xbf" + template.read_bytes())
    with pytest.raises(CoraError, match="marked starts with a byte order mark, which it would write into every prompt"):
        load_tokenizer(ModelPath(str(directory), directory, None))


def test_a_chat_template_that_is_not_used_next_to_another_or_for_processors_is_named(
    tiny_model: Path, tmp_path: Path, capfd: Any
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    own = template.read_text()
    for other, said in ((own, False), ("{{ messages }}", True)):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": other}))
        assert load_tokenizer(ModelPath(str(directory), directory, None)).chat_template == own
        words = "tokenizer_config.json holds another chat template than chat_template.jinja, which is used"
        assert (words in capfd.readouterr().err) == said
    template.unlink()
    settings.write_text(
        json.dumps({name: value for name, value in json.loads(settings.read_text()).items() if name != "chat_template"})
    )
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    load_tokenizer(ModelPath(str(directory), directory, None))
    assert "the chat template of chat_template.json is for processors, so it is not used; copy" in capfd.readouterr().err


def test_two_chat_templates_of_one_name_are_refused_and_named_ones_next_to_a_file_are_told(
    tiny_model: Path, tmp_path: Path, capfd: Any
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = directory / "tokenizer_config.json"

    def load(*names: str) -> Any:
        named = [{"name": name, "template": f"{place}{{{{ messages }}}}"} for place, name in enumerate(names)]
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": named}))
        return load_tokenizer(ModelPath(str(directory), directory, None))

    load("default", "tool_use")
    assert "tokenizer_config.json holds another chat template than chat_template.jinja, which is used" in capfd.readouterr().err
    (directory / "chat_template.jinja").unlink()
    assert load("default", "tool_use").chat_template["default"] == "0{{ messages }}"
    assert "another chat template" not in capfd.readouterr().err
    with pytest.raises(CoraError, match=r"tokenizer_config\.json has two chat templates of the name 'default'"):
        load("default", "tool_use", "default")


def test_a_package_that_a_family_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    config = load_configuration(resolve_model(str(tmp_path)))

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError(
            "TimmWrapperModel requires the timm library but it was not found in your environment. You can install it."
        )

    monkeypatch.setattr("cora_cli.models.skeleton.AutoModelForCausalLM.from_config", refuse)
    with pytest.raises(CoraError, match=r": transformers needs for llama models the package timm: pip install timm$"):
        build_skeleton(config)
