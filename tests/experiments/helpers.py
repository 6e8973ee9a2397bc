"""A small grid, and a launcher that pretends to run its steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cora_cli import rundir
from cora_cli.experiments.grid import Grid, build_grid
from cora_cli.experiments.inputs import DataFacts, Inputs, ModelFacts
from cora_cli.experiments.steps import Plan, make_plan

BASE: dict[str, Any] = {
    "name": "tiny",
    "model": "base",
    "models": {"a": "org/a", "b": "org/b", "c": {"dataset": "tasks", "max_steps": 2}},
    "datasets": {"data": "records"},
    "defaults": {"train": {"max_steps": 4, "rank": 4}, "evaluate": {"limit": 3, "metrics": ["rouge"]}},
}
SHAPES = {f"model.layers.{n}.self_attn.{kind}_proj": (32 if kind != "q" else 64, 64) for n in range(2) for kind in "qkv"}


def grid_of(*blocks: Any, **changes: Any) -> Grid:
    return build_grid({**BASE, **changes, "grid": list(blocks)}, "tiny.yaml")


def inputs_of(**hashes: str) -> Inputs:
    """Facts of a model and data sets that do not exist; `hashes` replaces some content hashes."""
    models = {
        name: ModelFacts(name, hashes.get(name, f"hash of {name}"), SHAPES, 10**6, 10**5) for name in ("base", "org/a", "org/b")
    }
    test = [{"instruction": "Count.", "input": "", "output": "1 2 3"}] * 4
    data = {
        name: DataFacts(name, hashes.get(name, f"hash of {name}"), "alpaca", 100, test, 80.0, 40.0)
        for name in ("records", "tasks")
    }
    return Inputs(models, data, {})


def plan_of(grid: Grid, out: Path = Path("out"), **hashes: str) -> Plan:
    return make_plan(grid, out, inputs_of(**hashes), "cpu", "fp32")


class PretendLauncher:
    """Completes every step at once, with the files that the real command writes; steps whose command contains `fails` fail."""

    how = "started"

    def __init__(self, slots: int = 1, fails: Callable[[Sequence[str]], str | None] = lambda argv: None) -> None:
        self.slots, self._fails = slots, fails
        self.submitted: list[tuple[str, ...]] = []
        self.content = "made"
        self.running = self.most = 0

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "PretendJob":
        self.submitted.append(tuple(argv))
        self.running += 1
        self.most = max(self.most, self.running)
        log.parent.mkdir(parents=True, exist_ok=True)
        complaint = self._fails(argv)
        log.write_text(f"$ cora\n{'cora: error: ' + complaint if complaint else 'fine'}\n")
        if not complaint:
            self._make(argv)
        return PretendJob(self, 1 if complaint else 0)

    def _make(self, argv: Sequence[str]) -> None:
        flag = "--output" if argv[0] == "extract-basis" else "--output-dir"
        place = Path(argv[argv.index(flag) + 1])
        if argv[0] == "extract-basis":
            rundir.write_text(place, self.content)
            return
        of_run = ("config.yaml", "log.jsonl", "test.jsonl", "heldout.jsonl", "adapter/adapter_model.safetensors")
        names = {
            "train": of_run,
            "laplace": of_run,
            "evaluate": ("predictions.jsonl", "generation.json", "scores.jsonl"),
        }[argv[0]]
        for name in names:
            rundir.write_text(place / name, self.content)
        if argv[0] in ("train", "laplace"):
            rundir.write_json(place / "run.json", {"status": "finished"})
        else:
            rundir.write_json(place / "metrics.json", {"metrics": {"rouge1": {"value": 0.5}}})


class PretendJob:
    pid = 1

    def __init__(self, launcher: PretendLauncher, code: int) -> None:
        self._launcher, self._code, self._asked = launcher, code, 0

    def ended(self) -> int | None:
        self._asked += 1
        if self._asked == 1:
            return None
        self._launcher.running -= 1
        return self._code

    def stop(self) -> None:
        self._launcher.running -= 1
