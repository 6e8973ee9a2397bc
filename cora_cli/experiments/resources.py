"""The cluster resources of a step, read from a grid file and converted to parameters of submitit.

Nothing is submitted here; see `slurm`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cora_cli.experiments.spread import Spread
from cora_cli.experiments.values import Values, fields_of, typed, unknown_key

KINDS = ("model", "basis", "proposal", "train", "laplace", "evaluate", "judge")
SPREAD = ("model", "train", "evaluate")
"""Kinds of step that several processes can run together."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one job. None means the cluster's default.

    `gpus` are those of each of the `nodes`; a step has one process per GPU, and at least one per node. A job runs up to `steps_per_job` steps
    one after the other, which import the libraries once; `timeout_min` is for all of them. `sbatch` has further options of sbatch by
    their long names; `setup` has shell lines to run before the step, such as
    `module load`.
    """

    timeout_min: int = 1440
    cpus: int | None = None
    mem_gb: float | None = None
    nodes: int | None = None
    gpus: int | None = None
    steps_per_job: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """The processes of a step."""
        return Spread(self.nodes or 1, max(1, self.gpus or 1))

    @property
    def processes(self) -> int:
        """The number of them."""
        return self.spread.nodes * self.spread.per_node

    def executor_parameters(self, setup: list[str]) -> dict[str, Any]:
        """Parameters for submitit's `AutoExecutor`; `setup` has further shell lines. On each of several nodes, one task starts the processes."""
        several = self.nodes is not None and self.nodes > 1
        parameters = {
            "timeout_min": self.timeout_min,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem_gb,
            "nodes": self.nodes if several else None,
            "tasks_per_node": 1 if several else None,
            # Otherwise the other nodes would wait for the one that failed.
            "slurm_srun_args": ["--kill-on-bad-exit=1"] if several else None,
            "gpus_per_node": self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": [*self.setup, *setup],
            "slurm_additional_parameters": self.sbatch or None,
        }
        return {name: value for name, value in parameters.items() if value is not None}


_AT_MOST_ONE = f"at most 1 here, because only the steps {', '.join(SPREAD)} run in several processes"


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
                ("nodes", settings.get("nodes") is None or settings["nodes"] >= 1, "at least 1"),
                ("gpus", settings.get("gpus") is None or settings["gpus"] >= 0, "at least 0"),
                *((name, kind in SPREAD or (settings.get(name) or 0) <= 1, _AT_MOST_ONE) for name in ("nodes", "gpus")),
            )
            if not fits
        ]
    # What is proposed for a training needs the same machine, in one process.
    alone = {
        name: min(1, value) if name in ("nodes", "gpus") and value is not None else value
        for name, value in read["train"].items()
    }
    read["proposal"] = {**alone, **read["proposal"]}
    found = {kind: Resources(**{**read["all"], **read[kind]}) for kind in KINDS}
    problems += [
        f"resources: {kind}: steps_per_job must be 1 where a step has several processes, not {resources.steps_per_job}"
        for kind, resources in found.items()
        if kind in SPREAD and resources.processes > 1 and resources.steps_per_job > 1
    ]
    return found
