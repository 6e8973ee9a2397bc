"""What `prediction.py` measures of a run before its first step, each measure in a file of its own that is named by the hash of what it depends on.

A file is written once it is complete, so that an interrupted measurement goes on, and one of other inputs is never taken for it.
"""

import dataclasses
import functools
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.methods.registry import BASELINE
from cora_cli.progress import say
from cora_cli.reading import read_json
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import config_of_run

Measured = dict[str, Any]
OF_THE_SEED = ("orthonormal", "random")
"""The starts of B that are drawn with the seed of the run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the measures depend on apart from the grid. `until` is the time after which no further one is begun."""

    examples: int
    curvature_examples: int
    products: int
    lora_steps: int
    lora_rate: float
    lora_seed: int
    until: float


@dataclasses.dataclass(frozen=True)
class Begun:
    """A confirmed run whose B starts in directions of its own: its data set, mode, basis and seed, its rate and its held-out loss."""

    group: str
    mode: str
    basis: str
    seed: int
    rate: float
    loss: float
    start: str
    run: RunDirectory

    @property
    def stratum(self) -> str:
        """Runs of one stratum are compared with each other."""
        return f"{self.group}, {self.mode}"


def end_with_parent() -> None:
    """Let a worker end when the process that started it was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def kept(probes: Path, what: str, inputs: Mapping[str, Any], measure: Callable[[], Measured], until: float) -> Measured | None:
    """What was measured of the same inputs before, or now; None where it would begin after `until`."""
    path = probes / f"{what}-{hashing.sha256_json(inputs)[:16]}.json"
    if not path.exists():
        if time.time() > until:
            return None
        began = time.process_time()
        found = measure()
        writing.write_json(path, {**found, "inputs": inputs, "processor_seconds": time.process_time() - began})
    return read_json(path, Measured)


def fingerprint(run: Begun, *without: str) -> Measured:
    """The settings and hashes that determine a run, without some of its settings."""
    found = read_json(run.run.record, Measured)["fingerprint"]
    return {**found, "settings": {name: value for name, value in found["settings"].items() if name not in without}}


def target_of(like: Begun, probes: Path, settings: Settings) -> Measured | None:
    """The LoRA that is trained for a few steps on the data set of `like`, and the losses on the validation records without and with its ΔW.

    The held-out records have no part in it. None where it would begin too late.
    """
    changes: Measured = {
        **{"mode": BASELINE, "basis": None, "b_init": None, "start_examples": None, "eval_limit": 1},
        **{"max_steps": settings.lora_steps, "learning_rate": settings.lora_rate, "seed": settings.lora_seed},
    }
    inputs = {**fingerprint(like, *changes), "basis_sha256": None, "lora": changes}
    run = RunDirectory(probes / f"lora-{like.group}-{hashing.sha256_json(inputs)[:16]}")

    def measure() -> Measured:
        # A worker that finds everything measured needs no torch.
        from cora_cli.inspection.own_change import gain_of, read_changes
        from cora_cli.models.references import resolve_model
        from cora_cli.training.probe import begin
        from cora_cli.training.run import train

        say(f"training LoRA on {like.group} for {settings.lora_steps} steps")
        config = config_of_run(like.run, **changes, output_dir=str(run.root), save_steps=settings.lora_steps, resume=True)
        train(config)
        start = begin(dataclasses.replace(config, resume=False, probe_examples=1, probe="none"))
        gain = gain_of(start, read_changes(resolve_model(str(run.root)), start.prepared.model_path))
        return {"path": str(run.root), "sha256": run.result_hash(), **dataclasses.asdict(gain)}

    return kept(probes, f"target-{like.group}", inputs, measure, settings.until)


def measured(run: Begun, target: Mapping[str, Any] | None, probes: Path, settings: Settings) -> dict[str, Measured] | None:
    """What B holds of the `target` and of the gradient, which no mode changes, and the curvature; None where one of them would begin too late."""
    if target is None:
        return None

    @functools.cache
    def start() -> Any:
        from cora_cli.training.probe import begin

        say(f"measuring {run.basis} with {run.stratum}, seed {run.seed}")
        return begin(config_of_run(run.run, probe="none", probe_examples=settings.examples, resume=False))

    def inside() -> Measured:
        from cora_cli.inspection.own_change import Gain, held_by, read_changes
        from cora_cli.models.references import resolve_model
        from cora_cli.training.probe import gradient_energy

        changes = read_changes(resolve_model(target["path"]), start().prepared.model_path)
        held = held_by(start(), changes, Gain(target["nothing"], target["itself"]))
        energy = gradient_energy(start().model, start().examples, start().prepared, start().form)
        assert energy is not None
        return {"held": dataclasses.asdict(held), "gradient": {name: energy["output"][name] for name in ("total", "chance")}}

    def curvature() -> Measured:
        from cora_cli.training.probe import largest_curvature, probe_examples

        examples = probe_examples(start().prepared, settings.curvature_examples)
        return largest_curvature(start().model, examples, start().prepared, start().form, settings.products, seed=run.seed)

    # The rate takes no part in what a run begins with.
    no_part = ["learning_rate", *(() if run.start in OF_THE_SEED else ("seed",))]
    of_b = {"run": fingerprint(run, "mode", *no_part), "lora": target["sha256"], "examples": settings.examples}
    of_loss = {"run": fingerprint(run, *no_part), "examples": settings.curvature_examples, "products": settings.products}
    first = kept(probes, "inside", of_b, inside, settings.until)
    second = kept(probes, "curvature", of_loss, curvature, settings.until)
    return {"inside": first, "curvature": second} if first and second else None
