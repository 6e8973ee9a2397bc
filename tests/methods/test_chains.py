"""Methods that freeze one LoRA and start the next: Chain of LoRA, and XGBLoRA on random blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import ADAPTER, factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.methods.xgblora import drawn_layers
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for

COMMON: dict[str, Any] = {
    **{"rank": 2, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0},
}
SEED = 5
"""The two blocks are drawn once and three times."""
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@pytest.fixture
def load(tiny_model: Path):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


class Loop:
    """The parts of a training loop that a method sees: steps of AdamW on one batch, and the method's hooks."""

    def __init__(self, model: Any, plan: Any, total: int) -> None:
        self.model, self.plan, self.total = model, plan, total
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        self.number = 0

    def descend(self) -> None:
        self.optimizer.zero_grad()
        self.model(IDS, labels=IDS).loss.backward()
        self.optimizer.step()
        self.number += 1

    def end_step(self) -> None:
        METHODS[self.plan.mode].after_step(self.model, self.plan, Step(self.number, self.total, self.optimizer))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_a_knot_changes_no_output_and_empties_the_optimizer(load):
    made = plan_of("cola", **COMMON, chain_length=3)
    loop = Loop(install_adapter(load(), made, None), made, 7)
    knots = []
    for _ in range(7):
        loop.descend()
        before = logits(loop.model)
        loop.end_step()
        assert torch.allclose(logits(loop.model), before, rtol=1e-5, atol=1e-5)
        if not loop.optimizer.state:
            knots.append(loop.number)
            assert all(layer.lora_A[ADAPTER].link.any() for _, layer in lora_layers(loop.model))
            assert not any(layer.lora_B[ADAPTER].link.any() for _, layer in lora_layers(loop.model))
    assert knots == [2, 4]
    a, b = factors_of(next(layer for _, layer in lora_layers(loop.model)))
    assert (len(a), b.shape[1]) == (6, 6)
    assert torch.linalg.matrix_rank(a) == 6


def test_a_second_link_learns_as_a_lora_of_its_own_on_the_merged_weights(load):
    """W₁ = W + s·B₁·A₁ in float64, then plain LoRA with the same start and a new AdamW."""
    made = plan_of("cola", **COMMON, chain_length=2)
    chain = Loop(install_adapter(load(), made, None), made, 6)
    for _ in range(3):
        chain.descend()
    merged = load()
    for name, layer in lora_layers(chain.model):
        a, b = (factor.detach().double() for factor in factors_of(layer))
        weight = merged.get_parameter(f"{name}.weight")
        weight.data = (weight.detach().double() + made.scaling * b @ a).float()
    chain.end_step()
    plain = plan_of("lora", **COMMON)
    reference = Loop(install_adapter(merged, plain, None), plain, 3)
    for (_, link), (_, layer) in zip(lora_layers(chain.model), lora_layers(reference.model), strict=True):
        assert not torch.equal(link.lora_A[ADAPTER].link, link.lora_A[ADAPTER].earlier)
        layer.lora_A[ADAPTER].weight.data = link.lora_A[ADAPTER].link.detach().clone()
    for _ in range(3):
        chain.descend()
        reference.descend()
    assert torch.allclose(logits(chain.model), logits(reference.model), rtol=1e-3, atol=1e-3)


def test_finished_links_have_no_dropout(load):
    made = plan_of("cola", **{**COMMON, "dropout": 0.999}, chain_length=2)
    wrapped = install_adapter(load(), made, None).train()
    x = torch.randn(5, 64)
    for _, layer in lora_layers(wrapped):
        torch.nn.init.normal_(layer.lora_B[ADAPTER].link)
        assert not torch.allclose(layer(x), layer.eval()(x), atol=1e-3)
        layer.train()
    METHODS["cola"].after_step(wrapped, made, Step(1, 2, torch.optim.AdamW([torch.nn.Parameter(x)])))
    for _, layer in lora_layers(wrapped):
        a, b = factors_of(layer)
        assert torch.allclose(layer.train()(x), layer.get_base_layer()(x) + made.scaling * x @ (b @ a).T, atol=1e-4)


def test_blocks_that_are_not_drawn_keep_their_bits_and_the_rank_is_that_of_the_draws(load):
    made = plan_of("xgblora", **{**COMMON, "seed": SEED}, booster_steps=2, booster_blocks=1)
    loop = Loop(install_adapter(load(), made, None), made, 8)
    layers = [name for name, _ in lora_layers(loop.model)]
    draws = dict.fromkeys(layers, 0)
    for number in range(4):
        drawn = drawn_layers(made, layers, number)
        assert len({name.split(".")[2] for name in drawn}) == 1
        assert len(drawn) == 2
        before = {name: [factor.clone() for factor in factors_of(layer)] for name, layer in lora_layers(loop.model)}
        for index in range(2):
            loop.descend()
            if index == 0:
                loop.end_step()
        for name, layer in lora_layers(loop.model):
            same = [torch.equal(one, other) for one, other in zip(before[name], factors_of(layer), strict=True)]
            assert same == ([False, False] if name in drawn else [True, True])
            draws[name] += name in drawn
        at_end = logits(loop.model)
        loop.end_step()
        assert torch.allclose(logits(loop.model), at_end, rtol=1e-5, atol=1e-5)
        assert (not loop.optimizer.state) == (number < 3)
    assert len(set(draws.values())) == 2
    for name, layer in lora_layers(loop.model):
        a, b = factors_of(layer)
        assert torch.linalg.matrix_rank(b @ a, rtol=1e-5) == 2 * draws[name]


def test_the_draws_are_those_of_the_seed_and_reach_every_block():
    layers = [f"model.layers.{block}.self_attn.{name}" for block in range(9) for name in ("q_proj", "v_proj")] + ["lm_head"]
    made, other = (plan_of("xgblora", **{**COMMON, "seed": seed}) for seed in (0, 1))
    drawn = [drawn_layers(made, layers, number) for number in range(20)]
    assert {len({name.rpartition(".self")[0] for name in each}) for each in drawn} == {4}, "a third of ten blocks, rounded up"
    assert set().union(*drawn) == set(layers)
    assert drawn == [drawn_layers(made, layers, number) for number in range(20)]
    assert drawn != [drawn_layers(other, layers, number) for number in range(20)]


def test_the_penalty_is_the_square_of_the_booster(load):
    made = plan_of("xgblora", **COMMON, booster_blocks=1, booster_penalty=0.3)
    wrapped = install_adapter(load(), made, None)
    loss = METHODS["xgblora"].added_loss(wrapped, made)
    loss.backward()
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert loss.item() == pytest.approx(0.3 * sum(parameter.double().square().sum().item() for parameter in parameters))
    assert all(torch.allclose(parameter.grad, 0.6 * parameter) for parameter in parameters)
    assert METHODS["xgblora"].added_loss(wrapped, plan_of("xgblora", **COMMON)) is None


def test_a_stored_chain_is_a_plain_lora_that_merges_to_the_same_model(load, tiny_model, tiny_data, tmp_path):
    """Layers of different ranks: [B₁ B₂ …]·[A₁; A₂; …] filled up with zeros, with the scaling of a booster."""
    settings = {"mode": "xgblora", "rank": 1, "max_steps": 5, "booster_steps": 1, "booster_blocks": 1, "learning_rate": 0.03}
    record = train(config_for(tiny_model, tiny_data, tmp_path / "run", **settings))
    state = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {len(tensor) for key, tensor in state.items() if ".lora_A." in key} == {3}
    ranks = {key.split(".")[4]: int(tensor.any(dim=1).sum()) for key, tensor in state.items() if ".lora_A." in key}
    assert sorted(ranks.values()) == [2, 3], "the number of draws of each of the two blocks"
    model = load()
    for key in (key for key in state if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = model.get_parameter(f"{name}.weight")
        weight.data = (weight.double() + 2 * state[key.replace("_A", "_B")].double() @ state[key].double()).float()
    plain = PeftModel.from_pretrained(load(), str(tmp_path / "run/adapter")).eval()
    assert torch.allclose(logits(plain), logits(model.eval()), rtol=1e-4, atol=1e-3)
    merge_adapter(resolve_model(str(tmp_path / "run")), tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), logits(model), rtol=1e-4, atol=1e-3)
    assert record["heldout"]["change"]["value"] < 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "cola", "chain_length": 4}, "--chain-length 4 is more than the 3 steps of the run: each link needs"),
        ({"mode": "xgblora"}, "--booster-steps 20 is more than the 3 steps of the run"),
        ({"mode": "xgblora", "booster_steps": 1, "booster_blocks": 3}, "--booster-blocks 3 is more than the 2 blocks"),
    ],
)
def test_what_a_run_has_too_few_of_is_named_before_it_starts(settings, said, tiny_model, tiny_data, tmp_path):
    with pytest.raises(CoraError, match=said):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "cola", "chain_length": 0}, "--chain-length must be at least 1, not 0"),
        ({"mode": "lora", "chain_length": 2}, "--chain-length does not apply to mode lora"),
        ({"mode": "cola", "a_init": "zeros"}, "--a-init does not apply to mode cola"),
        ({"mode": "xgblora", "booster_steps": 0}, "--booster-steps must be at least 1, not 0"),
        ({"mode": "xgblora", "booster_blocks": 0}, "--booster-blocks must be at least 1, not 0"),
        ({"mode": "xgblora", "booster_penalty": -1.0}, "--booster-penalty must be at least 0, not -1.0"),
        ({"mode": "cola", "booster_steps": 2}, "--booster-steps does not apply to mode cola"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(model="m", dataset="d", output_dir="o", **settings)
