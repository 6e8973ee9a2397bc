"""What the tests of training share: small configurations, and runs in processes of their own that can be killed."""

import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cora_cli import writing
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.methods.registry import METHODS, Mode
from cora_cli.planning.memory import StorageMeter, follow_training
from cora_cli.rundir import RunDirectory
from cora_cli.training import run as training
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, Preflight
from tests.evaluation.helpers import unsealed
from tests.methods.helpers import SMALL

# The server imports everything once and computes nothing, so that its forks start at once and are safe.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["cora_cli.training.run", "transformers.models.llama.modeling_llama"])

DEVICE = os.environ.get("CORA_TEST_DEVICE", "cpu")
"""Where the tests of training compute: on a machine with a GPU, `CORA_TEST_DEVICE=cuda` runs them there."""
Config = TrainConfig | EvaluateConfig
KILLED = -signal.SIGKILL


def config_for(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Three steps of eight examples in float32, with a learning rate that moves the loss."""
    settings = {
        "model": str(model),
        "dataset": str(data),
        "output_dir": str(output),
        "mode": "lora",
        "rank": 4,
        "test_size": 4.0,
        "max_steps": 3,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "device": DEVICE,
        "dtype": "fp32",
    }
    return TrainConfig(**{**settings, **changes})


def settings_of(mode: Mode, basis: Path, input_basis: Path, loha: Path, sources: tuple[str, ...]) -> dict[str, Any]:
    """Settings with which `mode` learns something on the tiny model within a few steps; `loha` is the file of mode peft."""
    spec = METHODS[mode]
    if spec.start_from is not None or mode in SMALL:
        rates = {"lora-sb": 3e-2, "lora-ga": 3e-3, "corda": 1e-3, "uni-lora": 0.1}
        own = {"start_models": sources} if spec.start_from == "adapters" else {}
        return {"mode": mode, "learning_rate": rates.get(mode, 1e-2), **own, **SMALL.get(mode, {})}
    if mode == "peft":
        return {"mode": mode, "peft_config": str(loha), "dropout": 0.0}
    if mode == "increlora":
        return {"mode": mode, "growth_warmup": 0, "growth_interval": 1, "growth_layers": 6, "growth_rank": 2}
    if mode == "xgblora":
        return {"mode": mode, "booster_steps": 1, "booster_blocks": 1}
    return {"mode": mode, "basis": str(input_basis if spec.a_init == "basis" else basis) if spec.needs_basis() else None}


class Metered(training.CoraTrainer):
    """A Trainer that counts the storages of a real run."""

    meter: StorageMeter

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        follow_training(self.meter, self.model, optimizer)
        return optimizer

    def train(self, **arguments: Any) -> Any:
        with self.meter:
            return super().train(**arguments)


def real_peak(config: TrainConfig, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each part at the peak of a real training, apart from tensors that exist before it and are neither parameters nor buffers."""
    monkeypatch.setattr(Metered, "meter", StorageMeter(vocabulary), raising=False)
    monkeypatch.setattr(training, "CoraTrainer", Metered)
    training.train(config)
    return dict(Metered.meter.peak)


def record_result(output: Path) -> None:
    """Let the record of a run that a test has changed hold the hash of its result."""
    run = RunDirectory(output)
    writing.write_json(run.record, {**unsealed(run.record), "result_sha256": run.result_hash()})


def log_lines(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's `log.jsonl` without the time that each step took."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def losses(output: Path) -> list[float]:
    """The loss of every step, in the order of the log."""
    return [line["loss"] for line in log_lines(output) if "loss" in line]


def record_of(output: Path) -> dict[str, Any]:
    """A run's `run.json` without the hash of its contents, so that a changed one may be written back."""
    return unsealed(output / "run.json")


def checkpoint_names(output: Path) -> list[str]:
    """The whole checkpoints of a run, by name."""
    return sorted(path.name for path in RunDirectory(output).checkpoints.glob("checkpoint-*"))


def assert_b_is_basis(output: Path, basis: Path, rank: int = 4) -> None:
    """Every B of a finished run is, bit for bit, the first columns of its group in the basis file."""
    directions = load_file(basis)
    state = load_file(output / "adapter" / "adapter_model.safetensors")
    layers = [key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for key in state if ".lora_B." in key]
    assert len(layers) == 6
    for name in layers:
        assert torch.equal(state[f"base_model.model.{name}.lora_B.weight"], directions[f"basis/{name}"][:, :rank])


class RunProcess:
    """Trainings and evaluations by their configurations, one after the other, in a process of its own.

    `kill_at` (target, n) ends it with SIGKILL as the function `target` is entered for the nth time; `file_limit` is the longest file
    in bytes that the system lets it write; `before` is called first, in the process. With a `store` it is process `rank` of `world`, as torchrun would start it.
    """

    def __init__(
        self,
        configs: Config | Sequence[Config],
        kill_at: tuple[str, int] | None = None,
        file_limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        store: torch.distributed.TCPStore | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        environment = {}
        if store is not None:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        self._errors, theirs = _PROCESSES.Pipe(duplex=False)
        several = configs if isinstance(configs, Sequence) else [configs]
        self.process = _PROCESSES.Process(target=_run, args=(several, kill_at, file_limit, environment, before, theirs))
        self.process.start()
        theirs.close()

    def wait(self) -> tuple[int | None, str]:
        """Its exit code (negative: the signal that ended it) and the message of the error that it met."""
        try:
            message = self._errors.recv()
        except EOFError:
            message = ""
        self.process.join()
        return self.process.exitcode, message


def run_together(
    *configs: Config, kill_at: tuple[str, int] | None = None, before: Callable[[], None] | None = None, world: int = 2
) -> list[tuple[int | None, str]]:
    """Run `configs` in `world` processes that meet as under torchrun; `kill_at` ends the first, and the others are killed after it.

    `before` is called in each process first.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = [
        RunProcess(configs, kill_at if rank == 0 else None, rank=rank, world=world, store=store, before=before)
        for rank in range(world)
    ]
    first = processes[0].wait()
    if kill_at is not None:
        for other in processes[1:]:
            other.process.kill()
    return [first, *(other.wait() for other in processes[1:])]


def _run(
    configs: Sequence[Config],
    kill_at: tuple[str, int] | None,
    file_limit: int | None,
    environment: dict[str, str],
    before: Callable[[], None] | None,
    errors: Any,
) -> None:
    os.environ.update(environment)
    if before is not None:
        before()
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if kill_at is not None:
        _die_in(*kill_at)
    from cora_cli.evaluation.evaluate import evaluate
    from cora_cli.training.run import train

    try:
        for config in configs:
            if isinstance(config, EvaluateConfig):
                evaluate(config)
            else:
                train(config)
    except Exception as error:
        errors.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _die_in(target: str, call: int) -> None:
    owner = pkgutil.resolve_name(target.rpartition(".")[0])
    name = target.rpartition(".")[2]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def measured(plan: Preflight) -> Measured:
    """What was measured of a plan that could be measured."""
    assert isinstance(plan.measured, Measured), plan.measured
    return plan.measured
