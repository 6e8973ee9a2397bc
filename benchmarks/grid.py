"""Seconds per row of a grid of twelve LoRA runs: `cora ablate` compared with a plain PEFT script that is run twelve times.

Both train LoRA on q, k, v of the embedded model with six seeds at two learning rates, on the same records, for as many steps of as many
examples, and measure the held-out loss on the same records. The peer, plain_peft.py, is one script with the stock Trainer: a process for each row loads
the model, trains and evaluates. The seconds of `cora ablate` are those of the complete command, with its planning and its manifest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import record

RATES, SEEDS = (3e-4, 1e-3), range(6)
ROWS = len(RATES) * len(SEEDS)
TARGET = 1.0
PEER = Path(__file__).with_name("plain_peft.py")


def run_cora(directory: Path, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of `cora ablate` for all rows, and the held-out loss of each."""
    train = {
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "max_steps": options.steps,
        "batch_size": options.batch_size,
        "eval_limit": options.records,
    }
    grid = {
        "name": "grid",
        "model": "builtin:smollm2",
        "datasets": {"code": "builtin:code"},
        "defaults": {"train": train, "evaluate": False},
        "grid": [{"mode": "lora", "learning_rate": list(RATES), "seed": list(SEEDS)}],
    }
    file, out = directory / "grid.yaml", directory / "runs"
    file.write_text(json.dumps(grid), encoding="utf-8")  # JSON is YAML
    seconds = timed([sys.executable, "-P", "-m", "cora_cli", "ablate", str(file), "-o", str(out), "--dtype", options.dtype])[0]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.rglob("run.json"))]
    return seconds, [found["heldout"]["after"]["loss"] for found in records]


def run_plain(directory: Path, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of the plain script for all rows, and the held-out loss of each."""
    from cora_cli.data.builtin import load_builtin
    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model

    data = load_builtin("code")
    file = directory / "data.json"
    file.write_text(json.dumps({"train": data.train, "test": data.test[: options.records]}), encoding="utf-8")
    total, losses = 0.0, []
    for rate in RATES:
        for seed in SEEDS:
            command = [sys.executable, str(PEER), str(resolve_model(EMBEDDED_MODEL).path), str(file)]
            command += ["--seed", str(seed), "--learning-rate", str(rate), "--rank", str(options.rank)]
            command += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
            command += ["--bf16"] if options.dtype == "bf16" else []
            seconds, output = timed(command)
            total += seconds
            losses.append(json.loads(output.strip().splitlines()[-1])["loss"])
    return total, losses


def timed(command: list[str]) -> tuple[float, str]:
    """Wall-clock seconds of a process, which must succeed, and what it printed."""
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - began, output


def main() -> None:
    """Run both sides in turn, print the table and add it to the results."""
    from cora_cli.render.markdown_table import markdown_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often both sides are measured")
    parser.add_argument("--steps", type=int, default=8, help="training steps of a row")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a step")
    parser.add_argument("--records", type=int, default=24, help="held-out records of a row")
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sides = {"cora ablate": run_cora, "plain PEFT script, a process for each row": run_plain}
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as directory:
                found[name].append(side(Path(directory), options))
            print(f"{name}: {found[name][-1][0] / ROWS:.1f} s per row", file=sys.stderr)
    ours, theirs = found.values()
    ratios = [peer[0] / mine[0] for mine, peer in zip(ours, theirs, strict=True)]
    ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    reached = f"{TARGET:g} {'reached' if statistics.median(ratios) >= TARGET else 'missed'}"
    rows: list[list[Any]] = []
    for name, runs in found.items():
        seconds = [total / ROWS for total, _ in runs]
        spread = f"{statistics.median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}]"
        rows.append([name, spread, *(("", "") if runs is ours else (ratio, reached)), f"{statistics.fmean(runs[-1][1]):.4f}"])
    headers = ["grid", "seconds per row, median [min, max]", "this ÷ ours, time", "target", "mean held-out loss"]
    notes = (
        f"{options.rounds} rounds in turn, {os.cpu_count()} cores; {ROWS} rows, one at a time, of {options.steps} steps of {options.batch_size} "
        f"examples of builtin:code and {options.records} held-out records, {options.dtype}, LoRA r = {options.rank} on q, k, v."
    )
    text = markdown_table(headers, rows) + f"\n\n{notes}"
    print(text)
    summary = [["grid", PEER.name, ratio, reached, ""]]
    values = {name: [{"seconds": seconds, "losses": losses} for seconds, losses in runs] for name, runs in found.items()}
    record("grid", {"markdown": text, "summary": summary, "options": vars(options), "rounds": values})


if __name__ == "__main__":
    main()
