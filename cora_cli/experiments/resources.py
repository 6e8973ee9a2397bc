"""The cluster resources of a step, read from a grid file and converted to parameters of submitit.

Nothing is submitted here; see `slurm`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cora_cli.experiments.values import Values, fields_of, typed, unknown_key

KINDS = ("model", "basis", "train", "evaluate", "judge")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one job. None means the cluster's default.

    A job runs up to `steps_per_job` steps one after the other, which import the libraries once; `timeout_min` is for all of them. `sbatch` has further options of sbatch by their long names; `setup` has shell lines to run before the step, such as
    `module load`.
    """

    timeout_min: int = 1440
    cpus: int | None = None
    mem_gb: float | None = None
    gpus: int | None = None
    steps_per_job: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: dict[str, Any] = dataclasses.field(default_factory=dict)

    def executor_parameters(self, setup: list[str]) -> dict[str, Any]:
        """Parameters for submitit's `AutoExecutor`; `setup` has further shell lines."""
        parameters = {
            "timeout_min": self.timeout_min,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem_gb,
            "gpus_per_node": self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": [*self.setup, *setup],
            "slurm_additional_parameters": self.sbatch or None,
        }
        return {name: value for name, value in parameters.items() if value is not None}


def read_resources(values: object, problems: list[str]) -> dict[str, Resources]:
    """Resources for each kind of step: the kind's own settings, then those of `all`.

    Invalid values are reported in `problems`.
    """
    if not isinstance(values, Mapping | None):
        problems.append(f"resources must hold {', '.join(('all', *KINDS))}, not {values!r}")
        values = None
    given = dict(values or {})
    hints = fields_of(Resources)
    problems += [unknown_key(key, ("all", *KINDS), "resources") for key in given if key not in ("all", *KINDS)]
    read: dict[str, Values] = {kind: typed(given.get(kind), hints, f"resources: {kind}", problems) for kind in ("all", *KINDS)}
    for kind, settings in read.items():
        problems += [
            f"resources: {kind}: {name} must be {need}, not {settings[name]}"
            for name, fits, need in (
                ("timeout_min", settings.get("timeout_min", 1) >= 1, "at least 1"),
                ("steps_per_job", settings.get("steps_per_job", 1) >= 1, "at least 1"),
                ("cpus", settings.get("cpus") is None or settings["cpus"] >= 1, "at least 1"),
                ("mem_gb", settings.get("mem_gb") is None or settings["mem_gb"] > 0, "positive"),
                ("gpus", settings.get("gpus") in (None, 0, 1), "0 or 1, because a step is one process"),
            )
            if not fits
        ]
    return {kind: Resources(**{**read["all"], **read[kind]}) for kind in KINDS}
