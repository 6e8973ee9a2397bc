"""IncreLoRA: its function, its scores against the authors' formulas in float64, and how it grows."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import ADAPTER, factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for

METHOD: Any = METHODS["increlora"]
COMMON: dict[str, Any] = {
    **{"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0},
}
SHAPES = {"q_proj": (64, 64), "v_proj": (32, 64)}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40], [4, 8, 15, 16, 23, 42, 99, 7]])


@pytest.fixture
def install(tiny_model: Path):
    return lambda made: install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), made, None)


class Loop:
    """Steps of AdamW with the method's hooks, in micro-batches of one row."""

    def __init__(self, model: Any, plan: Any, total: int = 100, rate: float = 0.01) -> None:
        self.model, self.plan, self.total = model, plan, total
        self.optimizer = METHOD.optimizer(model, torch.optim.AdamW, {"lr": rate}, 0.0, plan)
        self.number = 0

    def step(self) -> None:
        self.number += 1
        step = Step(self.number, self.total, self.optimizer)
        METHOD.before_step(self.model, self.plan, step)
        self.optimizer.zero_grad()
        for row in IDS.split(1):
            (self.model(row, labels=row).loss / 2).backward()
        self.optimizer.step()
        METHOD.after_step(self.model, self.plan, step)

    def ranks(self) -> list[int]:
        return [layer.lora_A[ADAPTER].rank for _, layer in lora_layers(self.model)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_the_start_is_the_formula_and_is_within_1e_5_of_the_base(install, tiny_model):
    made = plan_of("increlora", **COMMON)
    wrapped = install(made)
    base = logits(LlamaForCausalLM.from_pretrained(tiny_model))
    assert torch.allclose(logits(wrapped), base, atol=1e-4)
    assert not torch.equal(logits(wrapped), base)
    for _, layer in lora_layers(wrapped):
        chain_a, chain_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        rows, columns = (torch.cat(chain_a.listed("rows")).double(), torch.cat(chain_b.listed("columns"), 1).double())
        assert rows.shape == (3, 64), "a pair and a reserve of r / 2"
        assert rows.std().item() == pytest.approx(0.02, rel=0.3)
        e = torch.tensor([0.0, 1e-5, 1e-5], dtype=torch.float64)
        expected = 8.0 / (1 + 1e-5) * columns @ torch.diag(e) @ rows
        a, b = factors_of(layer)
        assert layer.scaling[ADAPTER] == 1.0
        assert torch.allclose((b @ a).double(), expected, rtol=1e-5, atol=1e-12)
        x = torch.randn(5, 64)
        assert torch.allclose(chain_b(chain_a(x)).double(), x.double() @ expected.T, rtol=1e-3, atol=1e-9)


def test_it_trains_what_the_table_counts_and_the_reserve_without_its_e(install):
    made = plan_of("increlora", **COMMON)
    wrapped = install(made)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    shapes = {f"{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    by_hand = 2 * sum(3 * (out + inside) + 1 for out, inside in SHAPES.values())
    assert sum(parameter.numel() for parameter in trained) == METHOD.parameters(shapes, made) == by_hand
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    wrapped(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_the_scores_are_moving_averages_of_the_change_times_its_gradient(install):
    """v = Σ|ΔW ⊙ ∂L/∂ΔW| / √(out·in), with ∂L/∂ΔW by autograd on a dense ΔW, over both micro-batches."""
    made = plan_of("increlora", **COMMON)
    loop = Loop(install(made), made)
    loop.step()  # E is no longer 0
    expected = {}
    for _ in range(3):
        layers = dict(lora_layers(loop.model))
        dense, handles = {}, []
        for name, layer in layers.items():
            a, b = factors_of(layer)
            dense[name] = (b @ a).detach().requires_grad_()
            handles.append(
                layer.register_forward_hook(lambda layer, x, y, w=dense[name]: layer.get_base_layer()(x[0]) + x[0] @ w.T)
            )
        loss = sum(loop.model(row, labels=row).loss / 2 for row in IDS.split(1))
        gradients = torch.autograd.grad(loss, list(dense.values()))
        for handle in handles:
            handle.remove()
        for (name, change), gradient in zip(dense.items(), gradients, strict=True):
            value = (change * gradient).abs().double().sum().item() / math.sqrt(change.numel())
            first, second = expected.get(name) or (float(layers[name].lora_A[ADAPTER].sensitivity), 0.0)
            if name not in expected:
                second = float(layers[name].lora_A[ADAPTER].uncertainty)
            first = 0.85 * first + 0.15 * value
            expected[name] = (first, 0.85 * second + 0.15 * abs(value - first))
        loop.step()
    for name, layer in lora_layers(loop.model):
        chain = layer.lora_A[ADAPTER]
        assert (float(chain.sensitivity), float(chain.uncertainty)) == pytest.approx(expected[name], rel=1e-3)


def test_the_most_important_layers_grow_until_the_ranks_add_up_to_the_target(install):
    made = plan_of("increlora", **{**COMMON, "rank": 3}, growth_warmup=2, growth_interval=2, growth_layers=2, growth_rank=3)
    loop = Loop(install(made), made)
    seen = []
    for number in range(1, 9):
        before = loop.ranks()
        loop.step()
        chains = [layer.lora_A[ADAPTER] for _, layer in lora_layers(loop.model)]
        scores = [float(chain.sensitivity * chain.uncertainty) for chain in chains]
        grown = [index for index, rank in enumerate(loop.ranks()) if rank > before[index]]
        assert bool(grown) == (number in (4, 6))
        if grown:
            most = 2 if number == 4 else 1  # the most important one takes the two that are left
            assert set(grown) == set(sorted(range(4), key=lambda index: -scores[index])[:most])
            seen.append(sum(loop.ranks()))
    assert seen == [10, 12], "the target 3 · 4"
    assert all(len(chain.born) == chain.rank for chain in chains), "no reserve is left"
    trained = sum(parameter.numel() for parameter in loop.model.parameters() if parameter.requires_grad)
    of_layer = [SHAPES[name.rpartition(".")[2]] for name, _ in lora_layers(loop.model)]
    assert trained == sum(rank * (out + inside + 1) for rank, (out, inside) in zip(loop.ranks(), of_layer, strict=True))
    listed = Counter(id(parameter) for group in loop.optimizer.param_groups for parameter in group["params"])
    assert listed == Counter(id(parameter) for parameter in loop.model.parameters() if parameter.requires_grad)
    assert set(map(id, loop.optimizer.state)) == set(listed)


def test_a_growth_takes_the_reserve_as_it_is_and_the_new_pairs_start_adams_count_anew(install):
    made = plan_of("increlora", **COMMON, growth_warmup=0, growth_interval=3, growth_layers=4, growth_rank=1)
    loop = Loop(install(made), made)
    for _ in range(2):
        loop.step()
    reserve = [layer.lora_A[ADAPTER].listed("rows")[1] for _, layer in lora_layers(loop.model)]
    loop.step()
    for one, (_, layer) in zip(reserve, lora_layers(loop.model), strict=True):
        chain = layer.lora_A[ADAPTER]
        assert chain.listed("rows")[1] is one
        assert chain.listed("values")[1].item() == pytest.approx(1e-5)
        assert torch.allclose(chain.weight[2], 8.0 / (2 + 1e-5) * 1e-5 * chain.listed("rows")[2][0])
    loop.step()
    counts = {name: int(loop.optimizer.state[p]["step"]) for name, p in loop.model.named_parameters() if p.requires_grad}
    assert {count for name, count in counts.items() if name.endswith(("rows_0", "rows_1", "values_0"))} == {4}
    assert {count for name, count in counts.items() if name.endswith(("rows_2", "columns_2", "values_1"))} == {1}


def test_a_layer_without_a_gradient_has_the_score_zero(install):
    made = plan_of("increlora", **COMMON)
    wrapped = install(made)
    METHOD.before_step(wrapped, made, Step(1, 9, torch.optim.SGD(wrapped.parameters())))
    METHOD.after_step(wrapped, made, Step(1, 9, torch.optim.SGD(wrapped.parameters())))
    assert all(float(layer.lora_A[ADAPTER].sensitivity) == 0 for _, layer in lora_layers(wrapped))


def test_the_added_loss_is_the_mean_distance_from_orthonormal_factors(install):
    made = plan_of("increlora", **COMMON, orthogonality=0.3)
    wrapped = install(made)
    distances = []
    for _, layer in lora_layers(wrapped):
        rows = torch.cat(layer.lora_A[ADAPTER].listed("rows")).detach().double()
        columns = torch.cat(layer.lora_B[ADAPTER].listed("columns"), 1).detach().double()
        distances += [torch.linalg.norm(p @ p.T - torch.eye(3)).item() for p in (rows, columns.T)]
    assert METHOD.added_loss(wrapped, made).item() == pytest.approx(0.3 * sum(distances) / 8, rel=1e-5)
    assert METHOD.added_loss(wrapped, plan_of("increlora", **COMMON, orthogonality=0.0)) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"a mean rank of 4 in 6 layers is reached at step 300, but the run has 3 steps: lower --rank, --growth-warmup"),
        ({"growth_layers": 7}, "--growth-layers 7 is more than the 6 layers that --target-modules adapts"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_before_the_run_starts(settings, said, tiny_model, tiny_data, tmp_path):
    with pytest.raises(CoraError, match=said):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="increlora", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "increlora", "growth_interval": 0}, "--growth-interval must be at least 1, not 0"),
        ({"mode": "increlora", "growth_warmup": -1}, "--growth-warmup must be at least 0, not -1"),
        ({"mode": "increlora", "growth_layers": 0}, "--growth-layers must be at least 1, not 0"),
        ({"mode": "increlora", "growth_rank": 0}, "--growth-rank must be at least 1, not 0"),
        ({"mode": "increlora", "orthogonality": -0.1}, "--orthogonality must be at least 0, not -0.1"),
        ({"mode": "lora", "growth_rank": 1}, "--growth-rank does not apply to mode lora"),
        ({"mode": "increlora", "rslora": True}, "--rslora does not apply to mode increlora"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(model="m", dataset="d", output_dir="o", **settings)
