"""What a method may do around a step and to the loss, shown by one that does nothing else."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from cora_cli.methods.lora import Lora
from cora_cli.methods.method import Step
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import METHODS
from cora_cli.training.run import train

from .helpers import config_for, losses


class Nudged(Lora):
    """LoRA with the sum of all entries of A in its loss."""

    name = "nudged"
    seen: ClassVar[list[tuple[str, int, int]]] = []

    def added_loss(self, model: torch.nn.Module, plan: AdapterPlan) -> torch.Tensor:
        """Its gradient is 1 for every entry of A."""
        return torch.stack([p.sum() for name, p in model.named_parameters() if "lora_A" in name]).sum()

    def before_step(self, model: torch.nn.Module, plan: AdapterPlan, step: Step) -> None:
        """Note the step."""
        self.seen.append(("before", step.number, step.total))

    def after_step(self, model: torch.nn.Module, plan: AdapterPlan, step: Step) -> None:
        """Note the step."""
        assert step.optimizer.state
        self.seen.append(("after", step.number, step.total))


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_added_loss_counts_once_per_step_and_the_hooks_see_every_step(
    accumulation: int, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "nudged", Nudged())
    Nudged.seen.clear()
    settings: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.25, "warmup_ratio": 0.0, "max_grad_norm": 0.0}
    settings |= {"gradient_accumulation": accumulation, "batch_size": 4, "lr_schedule": "constant"}
    train(config_for(tiny_model, tiny_data, tmp_path / "plain", **{**settings, "mode": "lora", "learning_rate": 1e-30}))
    train(config_for(tiny_model, tiny_data, tmp_path / "nudged", mode="nudged", **settings))
    start, moved = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "nudged"))
    # B = 0, so that the response loss gives A no gradient: Adam's first step is the learning rate against the sign of the added one.
    for key in (key for key in start if "lora_A" in key):
        assert torch.allclose(moved[key], start[key] - 0.25, atol=1e-6)
    entries = sum(tensor.sum().item() for key, tensor in start.items() if "lora_A" in key)
    assert losses(tmp_path / "nudged")[0] - losses(tmp_path / "plain")[0] == pytest.approx(entries, rel=1e-4, abs=1e-4)
    assert Nudged.seen == [("before", 1, 1), ("after", 1, 1)]
