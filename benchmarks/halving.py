"""Replays the sweep of `cora ablate` on complete logs: how often it drops the learning rate that would have won, and what it saves.

    python benchmarks/halving.py --out halving        # trains every rate of every sweep to the end, then replays; continues when cut off
    python benchmarks/halving.py --out halving --replay-only -o docs/results/halving.json

A sweep is one method on one data set with one seed. Each of its rates is trained to the end, with the validation loss at every rung; the winner is the
rate with the least loss at the end. The rule of `cora_cli.experiments.sweep` then decides from the same losses.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from cora_cli import writing
from cora_cli.experiments.sweep import SweepRule, sweep
from cora_cli.render.markdown_table import markdown_table
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from cora_cli.training.trainer import Diverged

RUNGS, STEPS, VALIDATION = (4, 8), 16, 32
DATASETS = ("builtin:code", "builtin:instruct", "builtin:task-sql", "builtin:task-json")
# Four rates a method, in steps of about three, around the best ones of configs/honest.yaml and configs/baselines.yaml.
METHODS = {
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "fb": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora-fa": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
    "pissa": (1e-4, 3e-4, 1e-3, 3e-3),
}
Losses = dict[str, dict[str, float]]
"""The validation loss of a sweep by learning rate and step, as text; infinite where training diverged."""


def measure(mode: str, dataset: str, seed: int, schedule: Any, out: Path) -> Losses:
    """Train every rate of a sweep to the end, or read what an earlier call has measured."""
    kept = out / f"{mode}-{dataset.partition(':')[2]}-{seed}-{schedule}"
    found: Losses = {}
    for rate in METHODS[mode]:
        place = kept / f"{rate:g}"
        config = TrainConfig(
            model="builtin:smollm2",
            dataset=dataset,
            output_dir=str(place),
            mode=mode,
            b_init="orthonormal" if mode == "fb" else None,
            rank=16,
            learning_rate=rate,
            lr_schedule=schedule,
            max_steps=STEPS,
            batch_size=4,
            validation_size=VALIDATION,
            eval_limit=1,
            save_steps=STEPS,
            seed=seed,
            resume=True,
        )
        found[repr(rate)] = {}
        for step in (*RUNGS, STEPS):
            stopped = dataclasses.replace(config, stop_at=step if step < STEPS else None)
            try:
                loss = train(stopped)["validation"]["loss"] if step == STEPS else _loss_at(stopped, place, step)
            except Diverged:
                loss = math.inf
            found[repr(rate)][str(step)] = loss
    return found


def _loss_at(config: TrainConfig, place: Path, step: int) -> float:
    path = place / "stops" / f"{step}.json"
    if not path.exists():
        train(config)
    loss: float = json.loads(path.read_text())["validation"]["loss"]
    return loss


def replay(losses: Losses, rule: SweepRule) -> tuple[bool, float, float]:
    """Whether the rule ends with another rate than the winner, the loss (nats) that this costs, and the share of all steps that it trains."""
    at_end = {float(rate): by_step[str(STEPS)] for rate, by_step in losses.items()}
    winner = min(at_end, key=at_end.__getitem__)
    state = sweep(list(at_end), STEPS, rule, lambda rate, step: losses[repr(rate)][str(step)])
    assert state.chosen is not None
    trained = sum(max(by_step) for by_step in state.losses.values())
    return state.chosen != winner, at_end[state.chosen] - at_end[winner], trained / STEPS / len(at_end)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1), help="seeds; each is a sweep of its own")
    parser.add_argument("--schedules", nargs="+", default=("constant-decay", "linear"), help="learning-rate schedules")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), help="methods")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, help="data sets")
    parser.add_argument("--replay-only", action="store_true", help="train nothing, and replay the sweeps that are complete")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of all losses and the table")
    options = parser.parse_args()
    logs: dict[str, dict[str, Losses]] = {}
    for schedule in options.schedules:
        for seed in options.seeds:
            for dataset in options.datasets:
                for mode in options.methods:
                    record = options.out / f"{mode}-{dataset.partition(':')[2]}-{seed}-{schedule}.json"
                    if not record.exists() and not options.replay_only:
                        record.parent.mkdir(parents=True, exist_ok=True)
                        record.write_text(json.dumps(measure(mode, dataset, seed, schedule, options.out)))
                    if record.exists():
                        logs.setdefault(schedule, {})[record.stem] = json.loads(record.read_text())
    rows = []
    for schedule, sweeps in logs.items():
        for rungs in ((*RUNGS, STEPS), (RUNGS[1], STEPS), RUNGS, RUNGS[1:], RUNGS[:1]):
            for slack in (0.0, 0.02, 0.1):
                rule = SweepRule((0,), rungs, slack, widen=False)
                found = [replay(losses, rule) for losses in sweeps.values()]
                missed = sum(wrong for wrong, _, _ in found)
                costs = [cost for wrong, cost, _ in found if wrong]
                share = sum(trained for _, _, trained in found) / len(found)
                interval = binomtest(missed, len(sweeps)).proportion_ci(method="exact")
                rows.append(
                    [
                        schedule,
                        ", ".join(map(str, rungs)),
                        f"{slack:g}",
                        f"{missed} of {len(sweeps)}",
                        f"{100 * interval.low:.0f} to {100 * interval.high:.0f} %",
                        f"{max(costs, default=0.0):.4f}",
                        f"{100 * share:.0f} %",
                    ]
                )
    headers = [
        "schedule",
        "rungs",
        "slack",
        "winner not chosen",
        "95 % interval",
        "largest loss given up (nats)",
        "steps trained",
    ]
    text = markdown_table(headers, rows)
    print(text)
    if options.output:
        writing.write_text(options.output, json.dumps({"markdown": text, "losses": logs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
