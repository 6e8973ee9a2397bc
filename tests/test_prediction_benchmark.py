"""`benchmarks/prediction.py`, which fills docs/prediction.md, on grids whose truth is planted, and on a small one that is trained."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cora_cli.errors import CoraError
from cora_cli.rundir import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "prediction.py"
BASES = ["source=delta n=1", "source=delta n=5", "source=weights n=0", "orthonormal", "gradient", "share=projection n=5"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def planted(script: SimpleNamespace, shuffled: str | None = None) -> tuple[list[Any], dict[Path, dict[str, float]]]:
    """Runs whose loss falls with all measures except λmax, with which it rises; the measure `shuffled` is in no order."""
    generator = np.random.default_rng(0)
    runs, values = [], {}
    for group in ("code", "sql"):
        for mode in ("fb", "tb"):
            held, other = generator.permutation(len(BASES)) / 10, generator.permutation(len(BASES)) / 10
            for place, basis in enumerate(BASES):
                for seed in (0, 1):
                    root = Path(f"{group}-{mode}-{place}-{seed}")
                    loss = 3.0 - held[place] + 0.3 * seed
                    start = basis if basis in ("orthonormal", "gradient") else "basis"
                    runs.append(script.Begun(group, mode, basis, seed, 1e-3, loss, start, RunDirectory(root)))
                    of = {name: held[place] if name != "curvature" else -held[place] for name in script.PREDICTORS}
                    values[root] = {**of, **({shuffled: other[place]} if shuffled else {})}
    return runs, values


def test_a_measure_that_orders_the_bases_as_the_loss_does_is_earned_and_one_in_the_other_order_is_not(script, tmp_path):
    result = script.summary(*planted(script))
    assert result["rule"] == {"correlation": 0.8, "lower_end": 0.5}
    for name in ("energy", "function", "gradient"):
        assert result["correlations"][name]["rho"] == pytest.approx(1)
        assert result["correlations"][name]["interval"] == pytest.approx((1, 1))
        assert result["correlations"][name]["is_earned"]
    assert result["correlations"]["curvature"]["rho"] == pytest.approx(-1)
    text = re.sub(" +", " ", script.tables(json.loads(json.dumps(result))))
    assert "| captured energy of ΔW | +1.00 [+1.00, +1.00] | +1.00 | +1.00 | +1.00 | +1.00 |" in text
    assert "over 6 bases, mean over 4 strata, with its 95 % interval over bases and 2 seeds" in text
    assert (
        "Measures with a correlation of at least 0.8 whose interval lies above 0.5: captured energy of ΔW, captured function of ΔW, "
        "gradient energy inside B." in text
    )
    assert text.count("held-out loss |") == 4
    script.plot(result, tmp_path)
    assert (tmp_path / "prediction.svg").read_text().startswith("<svg")


def test_a_measure_in_no_order_predicts_nothing(script):
    result = script.summary(*planted(script, shuffled="energy"))
    low, high = result["correlations"]["energy"]["interval"]
    assert low < 0 < high
    assert not result["correlations"]["energy"]["is_earned"]
    alone = {**result, "correlations": {"energy": result["correlations"]["energy"]}}
    assert "None of the measures has a correlation of at least 0.8" in script.verdict(alone)


def test_a_random_b_is_measured_for_each_seed_and_others_once(script):
    runs, _ = planted(script)
    by = {(one.basis, one.seed): script.measured_on(one, runs).seed for one in runs if one.stratum == "sql, tb"}
    assert by["orthonormal", 1] == 1
    assert by["gradient", 1] == by["source=delta n=5", 1] == 0


GRID = """
name: small
model: {model}
models: {{a: {source}}}
datasets: {{notes: {data}}}
defaults:
  train: {{rank: 4, max_steps: 2, batch_size: 8, test_size: 4, validation_size: 8, save_steps: 2, lr_schedule: constant-decay}}
  evaluate: false
conditions: [A test.]
sweep: {{seeds: [100], rungs: [1], widen: false}}
confirm: {{seeds: [0, 1, 2]}}
grid:
  - {{mode: fb, learning_rate: [1.0e-3, 1.0e-2], rows: [{{source: weights, n_models: 0}}, {{source: delta}}]}}
  - {{mode: fb, learning_rate: [1.0e-3, 1.0e-2], rows: [{{b_init: orthonormal}}, {{b_init: gradient, start_examples: 8}}]}}
"""


@pytest.mark.slow
def test_a_trained_grid_is_measured_to_its_end_and_goes_on_where_it_was(tmp_path, tiny_model, tiny_sources, tiny_data):
    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def measure(*options: str) -> str:
        places = (str(tmp_path / "grid"), "--probes", str(tmp_path / "probes"), "-o", str(tmp_path / "found.json"))
        return run(str(SCRIPT), *places, "--examples", "4", "--products", "2", "--lora-rate", "1e-2", *options)

    (tmp_path / "small.yaml").write_text(GRID.format(model=tiny_model, source=tiny_sources[0], data=tiny_data))
    run("-m", "cora_cli", "ablate", str(tmp_path / "small.yaml"), "-o", str(tmp_path / "grid"), "--device", "cpu")
    assert "0 of 6 starts are measured; start it again to go on" in measure("--stop-after", "0")
    assert "Spearman's ρ over 4 bases, mean over 1 stratum" in measure()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").glob("*.json")}
    assert len(times) == 1 + 2 * 6, "the target, and three draws of the random B and one start of each other"
    first = (tmp_path / "found.json").read_text()
    measure("--jobs", "2")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (tmp_path / "found.json").read_text() == first
    measure("--products", "1")
    again = set((tmp_path / "probes").glob("*.json")) - times.keys()
    assert len(again) == 6, "λmax is measured again, and nothing else"
    assert all(path.name.startswith("curvature") for path in again)


def test_a_grid_in_which_a_run_is_missing_or_counts_twice_is_refused(script):
    runs, _ = planted(script)
    script.check_complete(runs)
    with pytest.raises(CoraError, match="the grid has 0 runs, not one, of B = source=delta n=1 with code, fb and seed 0"):
        script.check_complete(runs[1:])
    with pytest.raises(CoraError, match="the grid has 2 runs, not one"):
        script.check_complete([*runs, runs[3]])
