"""How long a planned run will train, by the tokens per second of a finished one."""

import dataclasses
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.models.references import absolute
from cora_cli.records import read_run
from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import number_of_processes
from cora_cli.training.config import TrainConfig
from cora_cli.training.prepare import Prepared
from cora_cli.training.record import FINISHED, fast_path


@dataclasses.dataclass(frozen=True)
class Rate:
    """The rate of the finished run in `directory`, and in what that run differs from the planned one."""

    directory: str
    tokens_per_second: float
    differences: list[str]


def rate_of(directory: str, config: TrainConfig, prepared: Prepared) -> Rate:
    """The rate of a finished run. Raises `CoraError` where it has none."""
    record = read_run(RunDirectory(Path(directory)))
    if record["status"] != FINISHED or not record["speed"]["tokens_per_second"]:
        why = "it took no step" if record["status"] == FINISHED else f"it is {record['status']}"
        raise CoraError(f"--rate-from needs a finished run, and {directory} has no rate: {why}")
    theirs, ours = _conditions(record), _planned(config, prepared)
    differences = [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
    return Rate(directory, record["speed"]["tokens_per_second"], differences)


def _conditions(record: dict[str, Any]) -> dict[str, Any]:
    """What the rate of a run depends on most."""
    settings, hardware = record["fingerprint"]["settings"], record["hardware"]
    return {
        "model": record["model"]["reference"],
        "mode": record["mode"],
        "device": hardware["device"].partition(":")[0],
        "dtype": hardware["dtype"],
        "processes": hardware.get("processes", 1),
        "sharding": hardware.get("shard", "none"),
        "batch size": settings.get("batch_size"),
        "gradient checkpointing": settings.get("gradient_checkpointing"),
        "fast path": hardware.get("fast_path", "none"),
    }


def _planned(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    return {
        "model": absolute(config.model),
        "mode": config.mode,
        "device": prepared.hardware.device.type,
        "dtype": prepared.hardware.dtype_name,
        "processes": number_of_processes(config),
        "sharding": config.shard,
        "batch size": config.batch_size,
        "gradient checkpointing": config.gradient_checkpointing,
        "fast path": fast_path(config),
    }
