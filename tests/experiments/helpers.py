"""Small grids, with stages and without, and launchers that pretend to run their steps."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.experiments.ablate import Request, run_stages
from cora_cli.experiments.execute import Execution, Outcome
from cora_cli.experiments.grid import Grid, build_grid
from cora_cli.experiments.inputs import DataFacts, Inputs, ModelFacts
from cora_cli.experiments.screen import Screen
from cora_cli.experiments.steps import Plan, StepFlags, make_plan
from cora_cli.lock import own_directory
from cora_cli.records import write_sealed

BASE: dict[str, Any] = {
    "name": "tiny",
    "model": "base",
    "models": {"a": "org/a", "b": "org/b", "c": {"dataset": "tasks", "max_steps": 2}},
    "datasets": {"data": "records"},
    "defaults": {"train": {"max_steps": 4, "rank": 4}, "evaluate": {"limit": 3, "metrics": ["rouge"]}},
}
ROWS = ({"mode": "base"}, {"mode": ["fb", "lora"]})
FB, LORA = "cora-fb_r4_n3_lr3e-4_seed0", "lora_r4_lr3e-4_seed0"
"""The names of the runs of `ROWS`."""
SHAPES = {f"model.layers.{n}.self_attn.{kind}_proj": (32 if kind != "q" else 64, 64) for n in range(2) for kind in "qkv"}

TRAIN = {"max_steps": 8, "rank": 4, "validation_size": 6}
SWEEP = {"seeds": [100], "rungs": [2, 4]}
CONFIRM = {"seeds": [0, 1, 2, 3, 4]}
RATES = [1e-3, 3e-3, 1e-2]

Loss = Callable[[str, float, int], float]
Asked = Mapping[tuple[object, ...], int]


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
    return make_plan(grid, out, inputs_of(**hashes), StepFlags("cpu", "fp32"))


class PretendLauncher:
    """Completes every step at once, with the files that the real command writes; steps whose command contains `fails` fail."""

    how = "started"

    def __init__(self, slots: int = 1, fails: Callable[[Sequence[str]], str | None] = lambda argv: None) -> None:
        self.slots, self._fails = slots, fails
        self.submitted: list[tuple[str, ...]] = []
        self.content = "made"
        self.judging: dict[str, Any] = {}
        self.said: Callable[[Sequence[str]], str] = lambda argv: "fine"
        self.running = self.most = 0

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "PretendJob":
        self.submitted.append(tuple(argv))
        self.running += 1
        self.most = max(self.most, self.running)
        log.parent.mkdir(parents=True, exist_ok=True)
        complaint = self._fails(argv)
        log.write_text(f"$ cora\n{'cora: error: ' + complaint if complaint else self.said(argv)}\n")
        if not complaint:
            self._make(argv)
        return PretendJob(self, 1 if complaint else 0)

    def _make(self, argv: Sequence[str]) -> None:
        flag = "--output" if argv[0] == "extract-basis" else "--output-dir"
        place = Path(argv[argv.index(flag) + 1])
        if argv[0] == "extract-basis":
            writing.write_text(place, self.content)
            return
        if argv[0] == "judge":
            write_sealed(place / "judge.json", self.judging)
            return
        of_run = ("config.yaml", "log.jsonl", "test.jsonl", "heldout.jsonl", "adapter/adapter_model.safetensors")
        names = {
            "train": of_run,
            "laplace": of_run,
            "evaluate": ("predictions.jsonl", "generation.json", "scores.jsonl"),
        }[argv[0]]
        for name in names:
            writing.write_text(place / name, self.content)
        if argv[0] in ("train", "laplace"):
            writing.write_json(place / "run.json", {"status": "finished"})
        else:
            writing.write_json(place / "metrics.json", {"metrics": {"rouge1": {"value": 0.5}}})


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


def run_plan(plan: Plan, launcher: PretendLauncher, rows: Sequence[str] = ()) -> Outcome:
    """Carry out a plan without stages, or what some of its rows need."""
    wanted = plan.needed_for(list(rows)) if rows else set(plan.steps)
    with own_directory(plan.out) as lock:
        return Execution(plan, wanted, launcher, Screen(plan, wanted, launcher.slots, {}), lock).run()


def staged_grid(*blocks: Any, **changes: Any) -> Grid:
    values: dict[str, Any] = {"sweep": SWEEP, "confirm": CONFIRM, "defaults": {"train": TRAIN, "evaluate": False}, **changes}
    return grid_of(*(blocks or ({"mode": "base"}, {"mode": ["lora", "dora"], "learning_rate": RATES})), **values)


def value_of(argv: Sequence[str], flag: str, default: str = "") -> str:
    return argv[argv.index(flag) + 1] if flag in argv else default


class SweepLauncher(PretendLauncher):
    """A pretended training has the validation loss `loss(mode, learning rate, step)`."""

    def __init__(self, loss: Loss, **options: Any) -> None:
        super().__init__(**options)
        self._loss = loss

    def _make(self, argv: Sequence[str]) -> None:
        super()._make(argv)
        place, rate = Path(value_of(argv, "--output-dir")), float(value_of(argv, "--learning-rate", "3e-4"))
        step = int(value_of(argv, "--stop-at", "8"))
        validation = {"loss": self._loss(value_of(argv, "--mode", "fb"), rate, step), "ci95": [0, 1], "tokens": 9, "n": 6}
        if "--stop-at" in argv:
            writing.write_json(place / "stops" / f"{step}.json", {"step": step, "validation": validation})
        status = "stopped" if "--stop-at" in argv else "finished"
        writing.write_json(place / "run.json", {"status": status, "validation": validation})

    def trained(self) -> list[tuple[str, str, str, str]]:
        """(mode, learning rate, seed, step at which it stops) of each training, in order."""
        return [
            (
                value_of(argv, "--mode"),
                value_of(argv, "--learning-rate"),
                value_of(argv, "--seed", "0"),
                value_of(argv, "--stop-at", "end"),
            )
            for argv in self.submitted
            if argv[0] == "train"
        ]


def run_staged(
    grid: Grid, out: Path, launcher: PretendLauncher, asked: Callable[[], Asked] = dict, overwrite: bool = False
) -> Outcome:
    request = Request(Path("tiny.yaml"), device="cpu", dtype="fp32", overwrite=overwrite)
    with own_directory(out) as held:
        return run_stages(request, grid, out, inputs_of(), launcher, held, lambda place, measures: asked())


def carry_out(plan: Plan, launcher: PretendLauncher | None = None, rows: list[str] | None = None) -> tuple[Outcome, list[str]]:
    """The outcome, and the names of the steps that were started."""
    launcher = launcher or PretendLauncher()
    outcome = run_plan(plan, launcher, rows or ())
    return outcome, [described(plan, argv) for argv in launcher.submitted]


def described(plan: Plan, argv: Sequence[str]) -> str:
    step = next(step for step in plan.steps.values() if step.argv == tuple(argv))
    return step.name if step.kind in ("train", "evaluate") and "base" not in step.name else step.name.rpartition("-")[0]
