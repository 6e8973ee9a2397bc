"""AdaLoRA against PEFT's, step by step from the same start, and its settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import ADAPTER, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig
from tests.methods.helpers import plan_of

METHOD: Any = METHODS["adalora"]
COMMON: dict[str, Any] = {
    **{"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0},
}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40], [4, 8, 15, 16, 23, 42, 99, 7]])
STEPS = 20


def load(path: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("interval", [1, 3])
def test_twenty_steps_are_those_of_peft(interval: int, tiny_model: Path) -> None:
    plan = plan_of("adalora", **COMMON, ada_warmup=3, ada_final=6, ada_interval=interval)
    ours = install_adapter(load(tiny_model), plan, None)
    config = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", orth_reg_weight=0.1,
        tinit=3, tfinal=6, deltaT=interval, total_step=STEPS, beta1=0.85, beta2=0.85,
    )  # fmt: skip
    theirs = get_peft_model(load(tiny_model), config)
    modules = {name: module for name, module in theirs.get_base_model().named_modules() if hasattr(module, "lora_E")}
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            modules[name].lora_A[ADAPTER].copy_(layer.lora_A[ADAPTER].rows)
            modules[name].lora_B[ADAPTER].copy_(layer.lora_B[ADAPTER].columns)
            modules[name].lora_E[ADAPTER].zero_()
    options = {"lr": 0.02, "eps": 1e-6}
    mine = METHOD.optimizer(ours, torch.optim.AdamW, options, 0.0, plan)
    other = torch.optim.AdamW([one for one in theirs.parameters() if one.requires_grad], weight_decay=0.0, **options)
    for number in range(1, STEPS + 1):
        mine.zero_grad()
        (ours(IDS, labels=IDS).loss + METHOD.added_loss(ours, plan)).backward()
        mine.step()
        METHOD.after_step(ours, plan, Step(number, STEPS, mine))
        other.zero_grad()
        theirs(IDS, labels=IDS).loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(number)
        for name, layer in lora_layers(ours):
            expected = modules[name].get_delta_weight(ADAPTER)
            assert torch.allclose(layer.get_delta_weight(ADAPTER), expected, rtol=1e-3, atol=1e-5), (number, name)
        if number == STEPS - 6:
            # PEFT replaces its tensors here and loses the optimizer's state of them.
            break
    kept = [int(layer.lora_A[ADAPTER].kept.sum()) for _, layer in lora_layers(ours)]
    assert sum(kept) == 4 * len(kept)
    assert len(set(kept)) > 1
    for _ in range(2):
        mine.step()
        number += 1
        METHOD.after_step(ours, plan, Step(number, STEPS, mine))
    for _, layer in lora_layers(ours):
        a = layer.lora_A[ADAPTER]
        assert torch.equal(a.values != 0, a.kept)


def test_the_first_forward_pass_is_the_base_model(tiny_model: Path) -> None:
    wrapped = install_adapter(load(tiny_model), plan_of("adalora", **COMMON), None)
    assert torch.equal(wrapped(IDS).logits, load(tiny_model)(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ada_start_rank": 3}, "--ada-start-rank must be at least --rank 4, not 3"),
        ({"ada_interval": 0}, "--ada-interval must be at least 1, not 0"),
        ({"ada_orthogonality": -0.1}, r"--ada-orthogonality must be at least 0, not -0\.1"),
        ({"rslora": True}, "--rslora does not apply to mode adalora"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", "mode": "adalora", "rank": 4, **settings})


def test_a_run_without_steps_to_prune_in_is_refused() -> None:
    plan = plan_of("adalora", **COMMON, ada_warmup=5, ada_final=5)
    with pytest.raises(
        CoraError, match="between --ada-warmup 5 and the last --ada-final 5, of which a run of 10 steps has none"
    ):
        METHOD.check_run(plan, ["layer"], 10)
