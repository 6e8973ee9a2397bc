"""Which GPUs a run fits, and which setting would make one fit that ran out of memory."""

import dataclasses
import math
import os
import pickle
import subprocess
import sys
from typing import Any, Literal

import torch

from cora_cli.device import Hardware
from cora_cli.errors import CoraError, reason
from cora_cli.planning.page import fits
from cora_cli.progress import note
from cora_cli.scratch import temporary_directory
from cora_cli.training.arguments import number_of_processes
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, Preflight, plan_run
from cora_cli.training.prepare import Prepared
from cora_cli.training.rough import rough_peak

ROUGHLY = 0.4
"""A run that takes less than this part of the GPU by a rough count fits, and needs no plan."""
RUN, ANSWER = "run.pickle", "answer.pickle"
"""What `fit_alone` reads and writes."""
MORE = 4
"""How often the processes of a divided run are doubled to find a number that fits."""
Question = Literal["rows", "memory"]
"""What `fit_alone` answers: `shorter_rows` or `what_would_fit`."""
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
"""How the variables begin by which a process knows its group."""


def fit_rows(config: TrainConfig, prepared: Prepared) -> TrainConfig:
    """The settings with `tokens_per_row` where the rows of the run would not fit the GPU otherwise; it changes the result by rounding only.

    A run that fits no length of its rows stays as it is, since a plan may be wrong. Takes as long as a few dry runs, unless a rough count shows
    that the run fits. All processes of a divided run call this together, and get the same.
    """
    capacity = _capacity(prepared.hardware.device)
    if config.tokens_per_row is not None or capacity is None:
        return config
    tokens, said = (shorter_rows if config.shard == "none" else _shorter_rows_of_all)(config, prepared, capacity)
    if said:
        note(said)
    return config if tokens is None else dataclasses.replace(config, tokens_per_row=tokens)


def shorter_rows(config: TrainConfig, prepared: Prepared, capacity: int) -> tuple[int | None, str]:
    """The `tokens_per_row` with which the run fits a GPU of `capacity` bytes, and a sentence; None where its rows stay."""
    if rough_peak(config, prepared) < ROUGHLY * capacity:
        return None, ""
    plan = plan_run(config, prepared)
    if not isinstance(plan.measured, Measured) or fits(plan.measured.memory.total, capacity):
        return None, ""
    for changes in _shorter(plan):
        found = plan_run(dataclasses.replace(config, **changes), prepared).measured
        if isinstance(found, Measured) and fits(found.memory.total, capacity):
            tokens: int = changes["tokens_per_row"]
            return tokens, (
                f"a row of {plan.largest} tokens would take {_gib(plan.measured.memory.total)} of the GPU's {_gib(capacity)} (computed): "
                f"rows are split at {tokens} tokens, as with --tokens-per-row {tokens}"
            )
    return None, ""


def _shorter_rows_of_all(config: TrainConfig, prepared: Prepared, capacity: int) -> tuple[int | None, str]:
    """As `shorter_rows`, for the smallest GPU of all processes of a divided run. The first process decides, and the others wait for it.

    Its plan needs a process group of processes that do not exist, and torch has one group per process, which this run uses; so it is made in
    a process of its own.
    """
    processes = number_of_processes(config)
    together = torch.distributed.is_initialized()
    capacities: list[Any] = [capacity] * (torch.distributed.get_world_size() if together else 1)
    if together:
        torch.distributed.all_gather_object(capacities, capacity)
    found: list[tuple[int | None, str]] = [(None, "")]
    if not together or torch.distributed.get_rank() == 0:
        try:
            if rough_peak(config, prepared) >= ROUGHLY * (least := min(capacities)):
                found[0] = _planned_alone("rows", config, prepared.hardware, least, processes)
        except Exception as error:  # the other processes wait, and a run whose memory is not known may fit
            found[0] = (
                None,
                f"whether the rows of this divided run fit the GPU could not be computed ({reason(error)}); `cora train … --dry-run --processes {processes}` "
                "with the same settings computes it, and --tokens-per-row N makes the rows shorter",
            )
    if together:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _planned_alone(question: Question, config: TrainConfig, hardware: Hardware, capacity: int, processes: int) -> Any:
    """What the function that `Question` names answers for a run of so many processes on GPUs of `capacity` bytes.

    Raises `CoraError` where the process fails.
    """
    planned = dataclasses.replace(config, dry_run=True, processes=processes, resume=False)
    with temporary_directory("fit") as place:
        (place / RUN).write_bytes(pickle.dumps((question, planned, hardware, capacity)))
        found = subprocess.run(
            [sys.executable, "-P", "-m", "cora_cli.training.fit_alone", str(place)],
            env={name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if found.returncode:
            last = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
            raise CoraError(last[0])
        return pickle.loads((place / ANSWER).read_bytes())


def out_of_memory(config: TrainConfig, prepared: Prepared) -> CoraError:
    """One sentence on a GPU that ran out of memory, with the setting that would fit; takes as long as a few dry runs.

    Needs no other process of a divided run: they may wait for this one, which is about to end.
    """
    capacity = _capacity(prepared.hardware.device) or 0
    if config.shard == "none":
        return CoraError(what_would_fit(config, prepared, capacity))
    try:
        return CoraError(_planned_alone("memory", config, prepared.hardware, capacity, number_of_processes(config)))
    except Exception as error:  # that the memory ran out matters more
        longest = max(len(example.input_ids) for example in prepared.train.examples)
        return CoraError(_takes_less(config, capacity, reason(error), f"--tokens-per-row {longest}"))


def _takes_less(config: TrainConfig, capacity: int, why: str, rows: str) -> str:
    """What to do about a GPU that is full where nothing can be computed."""
    rest = "" if config.gradient_checkpointing else ", --gradient-checkpointing"
    more = "" if config.shard == "none" else ", more processes"
    return (
        f"the GPU of {_gib(capacity)} ran out of memory, and how much this run takes cannot be computed ({why}); {rows}{rest}{more} or a "
        "smaller --batch-size takes less"
    )


def what_would_fit(config: TrainConfig, prepared: Prepared, capacity: int) -> str:
    """One sentence on a GPU of `capacity` bytes that the run has filled, with the setting that would fit."""
    plan = plan_run(config, prepared)
    if not isinstance(plan.measured, Measured):
        return _takes_less(config, capacity, plan.measured, f"--tokens-per-row below {plan.largest}")
    needed = plan.measured.memory.total
    who = "this run" if config.shard == "none" else f"each of the {plan.processes} processes of this run"
    said = f"the GPU ran out of memory: {who} takes {_gib(needed)} (computed), and the GPU has {_gib(capacity)}"
    if fits(needed, capacity):
        return f"{said}; another program must be using it"
    *larger, smallest = _smaller(plan) or [{}]

    def peak(changes: dict[str, Any]) -> float:
        found = plan_run(dataclasses.replace(config, **changes), prepared).measured
        return found.memory.total if isinstance(found, Measured) else math.inf

    if fits(least := peak(smallest), capacity):
        sizes = ((changes, peak(changes)) for changes in larger)
        changes, size = next(((changes, size) for changes, size in sizes if fits(size, capacity)), (smallest, least))
        return f"{said}; {_flags(changes)} would fit with {_gib(size)}"
    if config.shard == "none":
        return f"{said}; no length of its rows fits, so use a larger GPU, a smaller model, --load-in-4bit or several GPUs with --shard fsdp"
    for processes in (plan.processes * 2**power for power in range(1, MORE + 1)):
        if fits(size := peak({**smallest, "processes": processes}), capacity):
            also = f" with {_flags(smallest)}" if smallest else ""
            return f"{said}; no length of its rows fits, and {processes} processes{also} would fit with {_gib(size)} each"
    return f"{said}; no length of its rows fits, nor do {processes} processes, so use a larger GPU or a smaller model"


def _smaller(plan: Preflight) -> list[dict[str, Any]]:
    """Settings that take less memory, those that cost least time first and the smallest last."""
    rows = _shorter(plan)
    if plan.config.gradient_checkpointing:
        return rows
    return [*rows, *({"gradient_checkpointing": True, **row} for row in [{}, *rows])]


def _shorter(plan: Preflight) -> list[dict[str, Any]]:
    """Lengths of rows below that of the longest row, each half of the one before, down to the longest example."""
    longest = max(len(example.input_ids) for example in plan.prepared.train.examples)
    shorter = []
    tokens = plan.largest // 2
    while tokens > longest:
        shorter.append(tokens)
        tokens //= 2
    return [{"tokens_per_row": tokens} for tokens in (*shorter, longest)] if longest < plan.largest else []


def _flags(changes: dict[str, Any]) -> str:
    flags = ((f"--{name.replace('_', '-')}", value) for name, value in changes.items())
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags)


def _capacity(device: torch.device) -> int | None:
    """The bytes of a GPU, None for a processor."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
