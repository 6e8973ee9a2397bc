"""Which models predict the next token from earlier ones alone."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cora_cli.errors import CoraError
from cora_cli.models.causality import require_causal, require_causal_pass
from tests.training.families import FAMILIES, build


def causal_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["bart", "bert", "roformer", "gemma", "gpt_neox", "llama", "mamba", "trocr", "whisper"])
def test_causal_families_are_accepted(family: str) -> None:
    require_causal(causal_model(build(family)), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted_as_causal(family: str) -> None:
    require_causal(causal_model(build(family)), family)
    require_causal_pass(AutoModelForCausalLM.from_config(build(family)).eval(), range(3, 27))


@pytest.mark.parametrize("family", ["git", "gpt_neox_japanese"])
def test_encoders_of_images_and_settings_without_a_use_do_not_make_a_model_one_that_is_not_causal(family: str) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    require_causal(causal_model(config), family)


@pytest.mark.parametrize("family", ["bert", "electra", "rembert", "roberta", "roformer"])
def test_an_encoder_is_refused_by_name_and_setting(family: str) -> None:
    config = build(family)
    config.is_decoder = False
    with pytest.raises(
        CoraError, match=f"m is a {family} model whose tokens attend to later ones.*set is_decoder to true in its config"
    ):
        require_causal(causal_model(config), "m")


def test_bidirectional_attention_is_refused_by_its_setting() -> None:
    config = build("gemma3_text")
    config.use_bidirectional_attention = True
    with pytest.raises(CoraError, match="set use_bidirectional_attention to false"):
        require_causal(causal_model(config), "m")


def test_a_model_without_attention_is_causal() -> None:
    require_causal(causal_model(AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=1, vocab_size=9)), "m")


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
XLM = {**SMALL, "emb_dim": 32, "n_layers": 2, "n_heads": 4}


def test_a_setting_that_lets_tokens_attend_to_later_ones_is_named() -> None:
    with pytest.raises(
        CoraError, match=r"m is a xlm model whose tokens attend to later ones.*set causal to true in its config"
    ):
        require_causal(causal_model(AutoConfig.for_model("xlm", **XLM)), "m")
    require_causal(causal_model(AutoConfig.for_model("xlm", **XLM, causal=True)), "m")


def test_a_model_that_no_setting_tells_from_a_causal_one_is_refused_by_its_forward_pass() -> None:
    config = AutoConfig.for_model("cpmant", **SMALL, dim_head=8, dim_ff=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    require_causal(model, "m")
    with pytest.raises(CoraError, match="tokens of this model, a cpmant model, attend to later ones"):
        require_causal_pass(model, [5, 6, 7, 8])
    require_causal_pass(AutoModelForCausalLM.from_config(build("gpt2")).eval(), [5, 6, 7, 8])


def test_embeddings_in_the_order_of_tokens_first_are_judged_too() -> None:
    """As of XLNet, whose embedding returns (tokens, batch, hidden size)."""
    config = AutoConfig.for_model("xlnet", vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48)
    with pytest.raises(CoraError, match="a xlnet model, attend to later ones"):
        require_causal_pass(AutoModelForCausalLM.from_config(config).eval(), range(3, 27))


def test_a_model_divided_among_processes_can_be_called_again_after_a_pass_that_computes_no_gradient() -> None:
    model: Any = AutoModelForCausalLM.from_config(build("gpt2")).eval()
    calls: list[str] = []
    model.forward = lambda **_: calls.append("pass") or torch.ones(1).backward()
    model.reset_iter_state = lambda: calls.append("forgotten")
    require_causal_pass(model, [5, 6, 7, 8])
    assert calls == ["pass", "forgotten"]
