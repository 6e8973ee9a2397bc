"""Twenty training steps of a method and of PEFT's own class from the same start: the same losses, and at the end the same logits.

AdaLoRA, which PEFT allocates differently at its end, has a test of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import HiraConfig, LoraConfig, MissConfig, RandLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.registry import METHODS
from tests.methods.helpers import SMALL, plan_of

PLAN: dict[str, Any] = {
    **{"rank": 4, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0},
}
COMMON: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LORA = {**COMMON, "lora_alpha": 12}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40], [4, 8, 15, 16, 23, 42, 99, 7]])
RATE, STEPS = 3e-3, 20
Model = Any


def same_names(ours: Model, theirs: Model) -> None:
    """Start PEFT's numbers as ours, where both have the same names."""
    mine = {name: one for name, one in ours.named_parameters() if one.requires_grad}
    others = {name: one for name, one in theirs.named_parameters() if one.requires_grad}
    assert mine.keys() == others.keys()
    for name, one in others.items():
        one.copy_(mine[name])


def same_start(ours: Model, theirs: Model) -> None:
    """Nothing to copy: the start follows from the weights, and PEFT computes its own."""


def same_block(ours: Model, theirs: Model) -> None:
    for name, layer in lora_layers(ours):
        theirs.get_base_model().get_submodule(name).miss_block["default"].copy_(layer.lora_B["default"].weight.T)


def same_bank(ours: Model, theirs: Model) -> None:
    for name, layer in lora_layers(ours):
        other = theirs.get_base_model().get_submodule(name)
        theirs.base_model.vblora_vector_bank["default"].copy_(layer.lora_A["default"].bank)
        for factor in "AB":
            logits = getattr(other, f"vblora_logits_{factor}")["default"]
            logits.copy_(getattr(layer, f"lora_{factor}")["default"].logits.view(logits.shape))


def same_vector(ours: Model, theirs: Model) -> None:
    for name, layer in lora_layers(ours):
        other = theirs.get_base_model().get_submodule(name)
        theirs.base_model.unilora_theta_d["default"].copy_(layer.lora_A["default"].vector[:, 0])
        for factor in "AB":
            mine = getattr(layer, f"lora_{factor}")["default"]
            getattr(other, f"unilora_indices_{factor}")["default"] = mine.places.long()
            getattr(other, f"unilora_scales_{factor}")["default"] = mine.shares


def adamw(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE, weight_decay=0.0)


def plus(model: Model) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=16.0, lr=RATE)


def slow_bank(model: Model) -> torch.optim.Optimizer:
    """The bank at a tenth of the rate of the logits, as in the authors' scripts."""
    rates = {True: RATE / 10, False: RATE}
    groups = [
        {"params": [one], "lr": rates["vector_bank" in name]} for name, one in model.named_parameters() if one.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)


class Peer(NamedTuple):
    config: Any
    start: Callable[[Model, Model], None] = same_names
    optimizer: Callable[[Model], torch.optim.Optimizer] = adamw


PEERS: dict[str, Callable[[], Peer]] = {
    "lora": lambda: Peer(LoraConfig(**LORA)),
    "rslora": lambda: Peer(LoraConfig(**LORA, use_rslora=True)),
    "lora+": lambda: Peer(LoraConfig(**LORA), optimizer=plus),
    "dora": lambda: Peer(LoraConfig(**LORA, use_dora=True)),
    "pissa": lambda: Peer(LoraConfig(**LORA, init_lora_weights="pissa"), same_start),
    "olora": lambda: Peer(LoraConfig(**LORA, init_lora_weights="olora"), same_start),
    "vera": lambda: Peer(VeraConfig(**COMMON)),
    "randlora": lambda: Peer(RandLoraConfig(**COMMON, randlora_alpha=12)),
    "hira": lambda: Peer(HiraConfig(**COMMON)),
    "miss": lambda: Peer(MissConfig(**COMMON), same_block),
    "vb-lora": lambda: Peer(VBLoRAConfig(**COMMON, num_vectors=20, vector_length=16, topk=2), same_bank, slow_bank),
    "uni-lora": lambda: Peer(UniLoraConfig(**COMMON, theta_d_length=500), same_vector),
}


def load(path: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


def step(model: Model, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    return loss.item()


QUICK = ("lora", "lora+", "dora", "pissa", "vera", "vb-lora")


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow) for mode in PEERS])
def test_twenty_steps_are_those_of_peft(mode: str, tiny_model: Path) -> None:
    plan = plan_of(mode, **PLAN, **SMALL.get(mode, {}))
    ours = install_adapter(load(tiny_model), plan, None)
    peer = PEERS[mode]()
    theirs = get_peft_model(load(tiny_model), peer.config)
    with torch.no_grad():
        peer.start(ours, theirs)
    mine = METHODS[mode].optimizer(ours, torch.optim.AdamW, {"lr": RATE}, 0.0, plan) or adamw(ours)
    other = peer.optimizer(theirs)
    losses = [(step(ours, mine), step(theirs, other)) for _ in range(STEPS)]
    assert [one for one, _ in losses] == pytest.approx([one for _, one in losses], rel=1e-4)
    assert losses[-1][0] < losses[0][0] - 1e-3, "the steps changed too little to compare"
    with torch.no_grad():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=2e-3)
