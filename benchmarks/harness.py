"""What all benchmarks share: sides that run in turn, each in its own process; medians, ranges and ratios; one file of results.

A benchmark script calls `run` with a function that measures one side and a function that checks that the sides agree.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
OURS = "ours"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Stage:
    """One benchmark: its sides (name → description), the unit of its rates, and the target ratio for each peer.

    A peer is compared with the side that `against` names for it, or with `ours`. `needs` names the requirement (`package==version`) of a side
    that is not measured where its package is missing.
    """

    name: str
    script: str
    sides: Mapping[str, str]
    unit: str
    targets: Mapping[str, float]
    memory_targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    against: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounds: int = 3

    def can_run(self, side: str) -> bool:
        """Whether the package that the side needs, if any, is installed."""
        return side not in self.needs or importlib.util.find_spec(self.needs[side].partition("==")[0]) is not None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One check that both sides compute the same: the largest difference found, and the largest one allowed."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed. NaN is not."""
        return self.found <= self.allowed


def peak_bytes(device: Any = None) -> int:
    """Largest memory of this process so far: on `device` if that is a GPU, otherwise resident."""
    import torch

    from cora_cli.training.record import peak_memory_bytes

    return peak_memory_bytes(torch.device("cpu") if device is None else device)


def matmul_rate(dtype: Any, rows: int, inner: int, columns: int, device: Any = "cpu") -> float:
    """Operations per second of this machine's product of (rows, inner) and (inner, columns) matrices: the best of many."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    left, right = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, columns))
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def run(
    stage: Stage,
    measure: Callable[[str, argparse.Namespace], dict[str, Any]],
    agreement: Callable[[argparse.Namespace], Sequence[Agreement]],
    parser: argparse.ArgumentParser,
    notes: Callable[[Mapping[str, list[dict[str, Any]]], argparse.Namespace], Sequence[str]] = lambda rounds, options: (),
) -> None:
    """Run the sides in turn, `--rounds` times, print the table and add it to `results.json`; exit 1 where the sides disagree.

    `measure` runs in its own process, with `options.round` counted from 0. It returns `rate` (in stage.unit), `peak_bytes` and anything
    else worth recording. `notes` returns the lines under the table.
    """
    parser.add_argument("--rounds", type=int, default=stage.rounds, help="how often every side is measured")
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=tuple(stage.sides), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in stage.sides if stage.can_run(side)}
    for number in range(options.rounds):
        for side, results in rounds.items():
            command = [sys.executable, stage.script, "--side", side, "--round", str(number), *sys.argv[1:]]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
            print(f"round {number + 1}, {stage.sides[side]}: {results[-1]['rate']:.4g} {stage.unit}", file=sys.stderr)
    checks = list(agreement(options))
    _report(stage, rounds, checks, list(notes(rounds, options)), options)
    if not all(check.holds for check in checks):
        sys.exit(f"{stage.name}: the sides do not agree")


def _report(
    stage: Stage,
    rounds: Mapping[str, list[dict[str, Any]]],
    checks: Sequence[Agreement],
    notes: Sequence[str],
    options: argparse.Namespace,
) -> None:
    from cora_cli.render.markdown_table import markdown_table

    memory = {side: statistics.median(result["peak_bytes"] for result in results) for side, results in rounds.items()}
    rows, summary = [], []
    for side, results in rounds.items():
        rates = [result["rate"] for result in results]
        row = [stage.sides[side], _spread(rates, "4g")]
        ratio = reached = share = ""
        if side in stage.targets:
            ours = stage.against.get(side, OURS)
            ratios = [mine["rate"] / theirs for mine, theirs in zip(rounds[ours], rates, strict=True)]
            ratio, target = _spread(ratios, "2f"), stage.targets[side]
            reached = _verdict(target, statistics.median(ratios) >= target)
            of_memory, limit = memory[ours] / memory[side], stage.memory_targets.get(side)
            share = f"{of_memory:.2f}" + ("" if limit is None else f" ({_verdict(limit, of_memory <= limit)})")
            summary.append([stage.name, stage.sides[side], ratio, reached, share])
        rows.append([*row, ratio, reached, f"{memory[side] / GIB:.2f}", share])
    missing = [side for side in stage.sides if side not in rounds]
    rows += [[stage.sides[side], f"not installed: pip install {stage.needs[side]}", "", "", "", ""] for side in missing]
    headers = [stage.name, f"{stage.unit}, median [min, max]", "ours ÷ this", "target", "peak GiB", "ours ÷ this, memory"]
    lines = [
        markdown_table(headers, rows),
        "",
        *(f"{'agrees' if c.holds else 'DISAGREES'}: {c.what}: {c.found:.1e} (allowed {c.allowed:.0e})" for c in checks),
        f"{options.rounds} rounds, {os.cpu_count()} cores; each ratio is the median of the ratios of the rounds.",
        *notes,
    ]
    text = "\n".join(lines)
    print(text)
    record(
        stage.name,
        {
            "markdown": text,
            "summary": summary,
            "options": {key: value for key, value in vars(options).items() if key not in ("side", "round")},
            "rounds": rounds,
            "agreement": [dataclasses.asdict(check) | {"holds": check.holds} for check in checks],
        },
    )


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):.{form}} [{min(values):.{form}}, {max(values):.{form}}]"


def _verdict(target: float, reached: bool) -> str:
    return f"{target:g} {'reached' if reached else 'missed'}"


def record(name: str, result: dict[str, Any]) -> None:
    """Store one stage in the file of results and keep the other stages."""
    from cora_cli.reading import read_json
    from cora_cli.writing import write_json

    existing = read_json(RESULTS) if RESULTS.exists() else {}
    write_json(RESULTS, {**existing, "machine": machine(), name: result})


def machine() -> dict[str, Any]:
    """The machine of the measurement: processor, cores, versions."""
    import importlib.metadata

    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
