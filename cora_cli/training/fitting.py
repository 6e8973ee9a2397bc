"""Which GPUs a run fits, and which setting would make one fit that ran out of memory."""

import dataclasses
import math
from typing import Any

import torch

from cora_cli.errors import CoraError
from cora_cli.planning.page import fits
from cora_cli.progress import say
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, Preflight, plan_run
from cora_cli.training.prepare import Prepared, number_of_processes
from cora_cli.training.rough import rough_peak

ROUGHLY = 0.4
"""A run that takes less than this part of the GPU by a rough count fits, and needs no plan."""


def fit_rows(config: TrainConfig, prepared: Prepared) -> TrainConfig:
    """The settings with `tokens_per_row` where the rows of the run would not fit the GPU otherwise; it changes the result by rounding only.

    A run that fits no length of its rows stays as it is, since a plan may be wrong, and so does a divided one, which cannot be planned from
    inside. Takes as long as a few dry runs, unless a rough count shows that the run fits.
    """
    if config.tokens_per_row is not None or prepared.hardware.device.type != "cuda":
        return config
    capacity = _capacity(prepared.hardware.device)
    if rough_peak(config, prepared) < ROUGHLY * capacity:
        return config
    if config.shard != "none":
        processes = number_of_processes(config)
        say(
            "whether the rows of a divided run fit the GPU is not computed in it, because a plan needs a process group of its own and torch has one "
            f"per process, which this run uses; `cora train … --dry-run --processes {processes}` with the same settings computes it, and "
            "--tokens-per-row N makes the rows shorter"
        )
        return config
    plan = plan_run(config, prepared)
    if not isinstance(plan.measured, Measured) or fits(plan.measured.memory.total, capacity):
        return config
    for changes in _shorter_rows(plan):
        split = dataclasses.replace(config, **changes)
        found = plan_run(split, prepared).measured
        if isinstance(found, Measured) and fits(found.memory.total, capacity):
            say(
                f"a row of {plan.largest} tokens would take {_gib(plan.measured.memory.total)} of the GPU's {_gib(capacity)} (computed): "
                f"rows are split at {split.tokens_per_row} tokens, as with --tokens-per-row {split.tokens_per_row}"
            )
            return split
    return config


def out_of_memory(config: TrainConfig, prepared: Prepared) -> CoraError:
    """One sentence on a GPU that ran out of memory, with the setting that would fit; takes as long as a few dry runs."""
    capacity = _capacity(prepared.hardware.device)
    plan = plan_run(config, prepared)
    if not isinstance(plan.measured, Measured):
        rest = "" if config.gradient_checkpointing else ", --gradient-checkpointing"
        rows = f"--tokens-per-row below {plan.largest}"
        return CoraError(
            f"the GPU of {_gib(capacity)} ran out of memory, and how much this run takes cannot be computed ({plan.measured}); {rows}{rest} or a "
            "smaller --batch-size takes less"
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
    rows = _shorter_rows(plan)
    if plan.config.gradient_checkpointing:
        return rows
    return [*rows, *({"gradient_checkpointing": True, **row} for row in [{}, *rows])]


def _shorter_rows(plan: Preflight) -> list[dict[str, Any]]:
    """Lengths of rows below that of the longest row, each half of the one before, down to the longest example."""
    longest = max(len(example.input_ids) for example in plan.prepared.train.examples)
    shorter = []
    tokens = plan.largest // 2
    while tokens > longest:
        shorter.append(tokens)
        tokens //= 2
    return [{"tokens_per_row": tokens} for tokens in (*shorter, longest)] if longest < plan.largest else []


def _flag(name: str, value: int | bool) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _capacity(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
