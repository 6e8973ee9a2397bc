from pathlib import Path
from typing import Any

import pytest

from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.reporting.helpers import Made, ladder, make_grid, plan_entry, write_plan

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"},
    "fb": {"mode": "fb"},
    "fb orthonormal": {"mode": "fb", "b_init": "orthonormal"},
}


@pytest.fixture(scope="session")
def trained_grid(tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid as `cora ablate` leaves it: base, lora, fb and its random control, two seeds each, really trained and evaluated."""
    root = tmp_path_factory.mktemp("trained") / "grid"
    common: dict[str, Any] = {"metrics": ("rouge", "bleu"), "bootstrap": 100, "max_new_tokens": 4, "limit": 6}
    common |= {"device": "cpu", "dtype": "fp32"}
    basis = root / "bases" / "tiny.safetensors"
    basis.parent.mkdir(parents=True)
    basis.write_bytes(tiny_basis.read_bytes())
    entries = []
    for seed in (0, 1):
        for label, settings in KINDS.items():
            needs_basis = label == "fb"
            entry = plan_entry(Made(label, settings["mode"], seed, n_models=1 if needs_basis else None, rate=0.03))
            entry |= {"model": str(tiny_model), "dataset": str(tiny_data)}
            entry |= {"basis": "bases/tiny.safetensors"} if needs_basis else {}
            config = TrainConfig(
                model=str(tiny_model),
                dataset=str(tiny_data),
                output_dir=str(root / entry["run"]),
                basis=str(basis) if needs_basis else None,
                rank=4,
                test_size=8,
                max_steps=4,
                eval_steps=2,
                batch_size=8,
                learning_rate=0.03,
                seed=seed,
                device="cpu",
                dtype="fp32",
                **settings,
            )
            train(config)
            evaluate(EvaluateConfig(runs=(str(root / entry["run"]),), output_dir=str(root / entry["evaluation"]), **common))
            entries.append(entry)
    base = plan_entry(Made("base", "base", rank=None, rate=None)) | {"model": str(tiny_model), "dataset": str(tiny_data)}
    records = root / entries[0]["run"] / "test.jsonl"
    evaluate(EvaluateConfig(model=str(tiny_model), dataset=str(records), output_dir=str(root / base["evaluation"]), **common))
    write_plan(root, [base, *entries])
    return root


@pytest.fixture(scope="session")
def made_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ladder()` on disk; tests that damage it copy it first."""
    return make_grid(tmp_path_factory.mktemp("made") / "grid", ladder())
