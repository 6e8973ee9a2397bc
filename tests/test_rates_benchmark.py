"""`benchmarks/rates.py`, which reads the sweep of a grid: which methods it measures, and what it proposes for them."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cora_cli.errors import CoraError
from cora_cli.training.config import TrainConfig

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rates.py"
RATES = [1e-4, 1e-3, 1e-2]


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def write_grid(place: Path, methods: dict[str, dict[str, Any]]) -> Path:
    """A grid whose sweep of these methods, each with settings of its runs, has chosen the middle rate."""
    rows, sweeps = [], []
    for mode, settings in methods.items():
        outcome = {"planned": RATES, "chosen": 1e-3, "losses": {}, "dropped": {}, "added": None}
        sweeps.append({"method": ["data", mode, None, mode, 4, None], **outcome})
        for rate in RATES:
            name = f"{mode}_lr{rate:g}"
            config = TrainConfig(model="m", dataset="d", output_dir="o", mode=mode, rank=4, learning_rate=rate, **settings)
            (place / name).mkdir(parents=True)
            (place / name / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
            shown = {"name": name, "group": "data", "label": mode, "mode": mode, "model": "m", "dataset": "d", "run": name}
            numbers = {"rank": 4, "n_models": None, "learning_rate": rate, "seed": 0, "sources": [], "stage": "sweep"}
            rows.append({**shown, **numbers, "printed": None, "evaluation": None, "basis": None})
    plan = {"format_version": 1, "name": "g", "title": "g", "paper_table": None, "preset": None, "conditions": []}
    (place / "plan.json").write_text(json.dumps({**plan, "margin": None, "rows": rows, "steps": [], "sweeps": sweeps}))
    return place


def test_a_method_that_trains_nothing_has_no_best_rate_and_is_left_out(script, tmp_path, capsys):
    methods = {"lora": {}, "fb": {"basis": "b"}, "mean-delta": {"start_models": ("a",)}, "full": {}}
    found = script.swept_methods(write_grid(tmp_path, methods))
    assert [one.label for one in found] == ["lora", "fb", "full"]
    assert all((one.planned, one.best) == (tuple(RATES), 1e-3) for one in found)
    assert found[0].step == pytest.approx(10)
    assert "mean-delta trains nothing, so that it has no best rate; it is left out" in capsys.readouterr().err
    with pytest.raises(CoraError, match="has 2 methods with a finished sweep; leaving one out needs at least 3"):
        script.swept_methods(write_grid(tmp_path / "few", {"lora": {}, "full": {}}))


def test_rates_that_follow_the_curvature_are_proposed_exactly(script):
    curvatures = [1.0, 4.0, 100.0]
    for power in (0.5, 1.0):
        rates = [0.3 / curvature**power for curvature in curvatures]
        assert script.proposals(rates, curvatures, power) == pytest.approx(rates)
    assert script.proposals([1e-2, 1e-2, 1e-4], curvatures, 0.0) == pytest.approx([1e-3, 1e-3, 1e-2])
