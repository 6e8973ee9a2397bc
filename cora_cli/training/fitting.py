"""Which GPUs a run fits, and which setting would make one fit that ran out of memory."""

import dataclasses
import math
from typing import Any

import torch

from cora_cli.errors import CoraError
from cora_cli.planning.page import fits
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, Preflight, plan_run
from cora_cli.training.prepare import Prepared


def out_of_memory(config: TrainConfig, prepared: Prepared) -> CoraError:
    """One sentence on a GPU that ran out of memory, with the setting that would fit; takes as long as a few dry runs."""
    capacity = _capacity(prepared.hardware.device)
    plan = plan_run(config, prepared)
    if not isinstance(plan.measured, Measured):
        return CoraError(
            f"the GPU of {_gib(capacity)} ran out of memory; a smaller --batch-size or --gradient-checkpointing takes less"
        )
    needed = plan.measured.memory.total
    said = f"the GPU ran out of memory: this run takes {_gib(needed)} (computed), and the GPU has {_gib(capacity)}"
    if fits(needed, capacity):
        return CoraError(f"{said}; another program must be using it")
    *larger, smallest = _smaller(plan) or [{}]

    def peak(changes: dict[str, Any]) -> float:
        found = plan_run(dataclasses.replace(config, **changes), prepared).measured
        return found.memory.total if isinstance(found, Measured) else math.inf

    if fits(least := peak(smallest), capacity):
        sizes = ((changes, peak(changes)) for changes in larger)
        changes, size = next(((changes, size) for changes, size in sizes if fits(size, capacity)), (smallest, least))
        flags = " ".join(_flag(name, value) for name, value in changes.items())
        return CoraError(f"{said}; {flags} would fit with {_gib(size)}")
    return CoraError(f"{said}; no length of its rows fits, so use a larger GPU, a smaller model or --load-in-4bit")


def _smaller(plan: Preflight) -> list[dict[str, Any]]:
    """Settings that take less memory, those that cost least time first and the smallest last."""
    longest = max(len(example.input_ids) for example in plan.prepared.train.examples)
    shorter = []
    tokens = plan.largest // 2
    while tokens > longest:
        shorter.append(tokens)
        tokens //= 2
    rows = [{"tokens_per_row": tokens} for tokens in (*shorter, longest)] if longest < plan.largest else []
    if plan.config.gradient_checkpointing:
        return rows
    return [*rows, *({"gradient_checkpointing": True, **row} for row in [{}, *rows])]


def _flag(name: str, value: int | bool) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _capacity(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
