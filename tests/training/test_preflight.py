"""The plan of a run: its memory is that of the real one, its counts are those of the record, and nothing is needed but the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cora_cli.training import run as training
from cora_cli.training.memory import StorageMeter, follow_training
from cora_cli.training.preflight import Measured, Preflight, preflight
from tests.training.helpers import config_for, record_of


class _Metered(training.CoraTrainer):
    """A Trainer that counts the storages of a real run."""

    meter: StorageMeter

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        follow_training(self.meter, self.model, optimizer)
        return optimizer

    def train(self, **arguments: Any) -> Any:
        with self.meter:
            return super().train(**arguments)


def real_peak(config: Any, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr(_Metered, "meter", StorageMeter(vocabulary), raising=False)
    monkeypatch.setattr(training, "CoraTrainer", _Metered)
    training.train(config)
    return _Metered.meter.peak


def measured(plan: Preflight) -> Measured:
    assert isinstance(plan.measured, Measured), plan.measured
    return plan.measured


SETTINGS: dict[str, dict[str, Any]] = {
    "lora in bf16": {"mode": "lora", "dtype": "bf16", "batch_size": 16},
    "frozen B with checkpointing and accumulation": {
        "mode": "fb",
        "b_init": "random",
        "gradient_checkpointing": True,
        "gradient_accumulation": 2,
    },
    "all weights in rows": {"mode": "full", "dtype": "bf16", "tokens_per_row": 150, "batch_size": 16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_that_of_the_real_training(
    name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", **SETTINGS[name], eval_limit=1)
    plan = preflight(config)
    memory = measured(plan).memory
    peak = real_peak(config, 49152, monkeypatch)
    print({k: (memory.parts[k], peak[k]) for k in peak}, memory.stage)
    assert memory.stage == "a training step"
    assert memory.total == pytest.approx(sum(peak.values()), rel=0.1)
    assert measured(plan).parameters == record_of(tmp_path / "run")["parameters"]
