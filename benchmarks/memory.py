"""The peak memory that `cora train --dry-run` computes, compared with the growth of a real training on the processor as the system counts it.

Every setting is a process of its own, in which each tensor of 64 KiB or more has pages of its own (glibc's mmap threshold), so that what is
freed leaves the process at once. The real peak is what loading leaves, in anonymous pages and in those of the mapped files of weights, and
from there the growth of the largest resident size while the steps run. A training of a tiny model goes before, so that what libraries take once is
not counted. The rest contains what the plan does not count: work space of matrix products, and small objects.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from growth import tiny_model
from harness import GIB, record

SETTINGS: dict[str, dict[str, Any]] = {
    "lora, r = 8, fp32": {"mode": "lora", "rank": 8, "dtype": "fp32", "batch_size": 4},
    "fb, r = 48, bf16, gradient checkpointing": {
        **{"mode": "fb", "b_init": "random", "rank": 48, "dtype": "bf16", "batch_size": 8},
        "gradient_checkpointing": True,
    },
    "full, fp32": {"mode": "full", "dtype": "fp32", "batch_size": 2},
}
COMMON: dict[str, Any] = {
    "model": "builtin:smollm2",
    "dataset": "builtin:code",
    "max_steps": 2,
    "eval_limit": 1,
    "device": "cpu",
}
RESET_PEAK = "5"
"""What /proc/self/clear_refs takes for VmHWM."""
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """The planned and the real peak of a training in this process, in bytes."""
    from cora_cli.training import run as training
    from cora_cli.training.config import TrainConfig
    from cora_cli.training.preflight import Measured, preflight
    from cora_cli.training.trainer import CoraTrainer

    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig(**COMMON, **settings, output_dir=f"{place}/run")
        # First, so that both have imported what they need.
        plan = preflight(config)
        if not isinstance(plan.measured, Measured):
            raise SystemExit(plan.measured)
        training.train(dataclasses.replace(config, model=str(tiny_model(Path(place))), output_dir=f"{place}/first"))
        marks: dict[str, int] = {}

        class Watched(CoraTrainer):
            def train(self, *arguments: Any, **named: Any) -> Any:
                _settle()
                marks["held"], marks["resident"] = _held(), _status("VmRSS")
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)
                found = super().train(*arguments, **named)
                marks["peak"] = _status("VmHWM")
                return found

        setattr(training, CoraTrainer.__name__, Watched)
        _settle()
        before = _held()
        training.train(config)
    held, growth = marks["held"] - before, marks["peak"] - marks["resident"]
    memory = plan.measured.memory
    return {"planned": memory.total, "parts": memory.parts, "real": held + growth, "held": held, "growth": growth}


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _held() -> int:
    """Bytes of anonymous pages, and of resident pages of weights in mapped files."""
    mapped, of_weights = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line[:1].isupper():
            of_weights = line.endswith(".safetensors")
        elif of_weights and line.startswith("Rss:"):
            mapped += 1024 * int(line.split()[1])
    return _status("RssAnon") + mapped


def _status(field: str) -> int:
    """A size of this process in bytes, from /proc."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Compare every setting and print the table."""
    from cora_cli.render.markdown_table import markdown_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS), metavar="SETTING")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(compare(json.loads(options.cell))))
        return
    rows, cells = [], {}
    for name in options.settings:
        command = [sys.executable, __file__, "--cell", json.dumps(SETTINGS[name])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **PAGES}).stdout
        found = cells[name] = json.loads(output.strip().splitlines()[-1])
        rows.append(
            [name, *(f"{found[one] / GIB:.3f}" for one in ("planned", "real")), f"{found['planned'] / found['real']:.3f}"]
        )
        print(f"{name}: {found}", file=sys.stderr)
    table = markdown_table(["training", "planned, GiB", "real, GiB", "planned ÷ real"], rows)
    print(table)
    record("memory", {"markdown": table, "summary": [], "options": {"settings": list(options.settings)}, "cells": cells})


if __name__ == "__main__":
    main()
