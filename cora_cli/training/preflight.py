"""What a training run will take, measured before it: its largest step is taken on fake tensors, which need neither weights nor a GPU.

Model class, row, loss, backward pass, optimizer and the Trainer's loop are those of the run, apart from what `stand_ins` has. `planning.memory`
counts the bytes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from transformers import AttentionInterface, PrinterCallback, TrainerCallback

from cora_cli.adapters.install import AngleMeter, install_adapter, target_linears
from cora_cli.adapters.storage import stored_state
from cora_cli.data.batches import BatchForm
from cora_cli.device import planned_hardware
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import Observed, factors_of, lora_layers
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.fused import split_projections
from cora_cli.planning.four_bit import hold_in_four_bit
from cora_cli.planning.memory import Part, StorageMeter, fake_model, fakes, follow_training, follow_weights
from cora_cli.progress import note
from cora_cli.rundir import RunDirectory
from cora_cli.scratch import temporary_directory
from cora_cli.training.arguments import number_of_processes, total_steps, training_arguments
from cora_cli.training.config import TrainConfig
from cora_cli.training.directory import refuse_occupied
from cora_cli.training.heldout import row_losses
from cora_cli.training.notices import notices_on_records
from cora_cli.training.observe import gradients_taken, inputs_taken
from cora_cli.training.prepare import Prepared, prepare
from cora_cli.training.probe import examples_of_proposal, require_alone
from cora_cli.training.proposal import AUTO, EXAMPLES, VECTORS
from cora_cli.training.rate import Rate, rate_of
from cora_cli.training.record import parameter_counts
from cora_cli.training.sharding import planned_mesh, shard
from cora_cli.training.stand_ins import WideLayerNorm, cpu_attention, gpu_attention, gpu_chunks
from cora_cli.training.trainer import CoraTrainer
from cora_cli.training.work import Work, planned_form, responses

_STAND_IN = "cora_planned"
_NEED_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What fake tensors raise where the computation depends on numbers."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes of each part at the peak, and the stage that reaches it. `total` is their sum.

    `tokens` are those of the stage's largest pass, where it is another than that of a training step.
    """

    parts: dict[Part, int]
    stage: str
    tokens: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the fake run has: parameters as in `run.json`, the bytes of the stored adapter (None in mode full), and its memory."""

    parameters: dict[str, int]
    adapter_bytes: int | None
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The plan of a run. `tokens` and `labels` are those of all its steps, `largest` and `largest_labels` those of its largest pass.

    `measured` is a sentence where memory cannot be measured without values, and `rate` that of the run of `--rate-from`. `proposing` is the peak in
    bytes of what `--learning-rate auto` does before the first step, None where it is not known or nothing is proposed.
    """

    config: TrainConfig
    prepared: Prepared
    form: BatchForm
    steps: int
    processes: int
    tokens: int
    labels: int
    largest: int
    largest_labels: int
    measured: Measured | str
    rate: Rate | None = None
    proposing: int | None = None


def preflight(config: TrainConfig) -> Preflight:
    """Check the inputs of a run and measure what it will take. Writes nothing. Raises `CoraError` as the run would.

    A directory that is taken is no reason to keep its plan back, as the plan may be about the run in it.
    """
    try:
        refuse_occupied(RunDirectory(Path(config.output_dir)), config.resume)
    except CoraError as error:
        note(f"this is a plan only, and the command without --dry-run is refused: {error}")
    prepared = prepare(config, planned=planned_hardware(config.device, config.dtype))
    for notice in notices_on_records(config, prepared):
        note(notice)
    rate = rate_of(config.rate_from, config, prepared) if config.rate_from is not None else None
    return dataclasses.replace(plan_run(config, prepared), rate=rate, proposing=_proposing(config, prepared))


def _proposing(config: TrainConfig, prepared: Prepared) -> int | None:
    """The peak of measuring curvature: that of a training step on its examples in float32, and the vectors that are held with it.

    Raises `CoraError` where the run could not measure it.
    """
    if config.learning_rate != AUTO:
        return None
    require_alone(config)
    examples_of_proposal(prepared)
    changes: dict[str, Any] = {
        "batch_size": EXAMPLES,
        "gradient_accumulation": 1,
        "tokens_per_row": None,
        "max_steps": 1,
        "dtype": "fp32",
    }
    alone = dataclasses.replace(config, learning_rate=config.peak_rate, processes=None, stop_at=None, **changes)
    again = dataclasses.replace(prepared, hardware=planned_hardware(alone.device, alone.dtype))
    measured = plan_run(alone, again).measured
    if not isinstance(measured, Measured):
        return None
    return measured.memory.total + VECTORS * measured.parameters["trained"] * torch.float32.itemsize


def plan_run(config: TrainConfig, prepared: Prepared, seeds: Collection[int] = ()) -> Preflight:
    """As `preflight`, from inputs that are already checked.

    The memory is that of the largest micro-batch of this run and of those that differ from it in their seed only, which is one of `seeds`.
    """
    processes, examples = number_of_processes(config), prepared.train.examples
    steps = total_steps(config, len(examples))
    form = planned_form(config, prepared)
    work = Work(config, prepared, form, steps, processes, seeds)
    counts = (steps, processes, work.tokens, work.labels, work.largest, work.largest_labels)
    if config.shard != "none" and torch.distributed.is_initialized():
        why = "only `cora train --dry-run` measures a divided model, not a run among other processes"
        return Preflight(config, prepared, form, *counts, why)
    with _alone() as place:
        try:
            measured: Measured | str = _measure(config, prepared, form, work, processes, place)
        except _NEED_VALUES as error:
            measured = f"the memory of {config.model} in mode {config.mode} depends on its numbers ({type(error).__name__})"
    return Preflight(config, prepared, form, *counts, measured)


class _FakeTrainer(CoraTrainer):
    """A Trainer of one step on fake tensors, which have no values to check or log."""

    def __init__(self, meter: StorageMeter, batches: list[dict[str, Any]], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._meter, self._fake_batches = meter, batches

    def get_train_dataloader(self) -> Any:
        return self._fake_batches

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the state that it has after its first step."""
        optimizer = super().create_optimizer(model)
        follow_training(self._meter, self.model, optimizer)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._meter.assign([parameter.grad for parameter in trained], "gradients")
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def _require_usable(self, value: torch.Tensor, what: str) -> None:
        pass

    def _most_passes(self, count: int) -> int:
        return count

    def _maybe_log_save_evaluate(self, *_: Any, **__: Any) -> None:
        pass

    def _finalize_training(self, *_: Any) -> None:
        pass


class _AroundSteps(TrainerCallback):
    """What the method does around an optimizer step."""

    def __init__(self, trainer: CoraTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.before_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer.after_step()


def _measure(config: TrainConfig, prepared: Prepared, form: BatchForm, work: Work, processes: int, place: Path) -> Measured:
    """Train one step on fake tensors, then measure a held-out loss on them. `place` is an empty directory."""
    plan = prepared.plan
    # Without a device index, all tensors are a CPU's.
    hardware = dataclasses.replace(prepared.hardware, device=torch.device("cpu"))
    accumulation = min(2, config.gradient_accumulation)
    arguments = training_arguments(config, hardware, len(prepared.train.examples), RunDirectory(place))
    arguments.max_steps, arguments.gradient_accumulation_steps, arguments.report_to = 1, accumulation, []
    arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs, arguments.warmup_steps = "constant", None, 0
    sources = prepared.start_models.observed() if prepared.start_models else {}
    meter = StorageMeter(int(prepared.model_config.get_text_config(decoder=True).vocab_size))
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(planned_mesh(processes)) if config.shard != "none" else None
        stack.enter_context(fakes())
        stack.enter_context(meter)
        model = _planned_model(config, prepared, form, meter, stack)
        found = _starting(config, prepared, form, work, model, meter)
        if plan is not None:
            observed = _observed(model, plan)
            both = {
                name: dataclasses.replace(observed.get(name, Observed()), sources=one.sources) for name, one in sources.items()
            }
            model = install_adapter(model, plan, prepared.basis, {**observed, **both})
        parameters = parameter_counts(model, plan)
        stored, frozen = None, 0
        if plan is not None:
            trained = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
            frozen = method_of(plan.mode).finished_links(plan) * trained
            stored = frozen + sum(t.nbytes for t in stored_state(model, plan, config.compact)[0].values())
        if mesh is not None:
            shard(model, mesh, hardware.device)
            follow_weights(meter, model)
        meter.restart()
        found.append(Memory(dict(meter.peak), "holding the model"))
        frames: list[torch.Tensor] = []
        trains = plan is None or method_of(plan.mode).can_train(plan)
        if trains:
            trainer = _FakeTrainer(
                meter,
                [work.batch] * accumulation,
                *(model, arguments, prepared.train.examples, plan, RunDirectory(place).checkpoints, 1, form, 1),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_AroundSteps(trainer))
            with meter.creating("optimizer"):
                frames = _frames(model, plan)
            trainer.train()
            copied = parameters["trained"] if mesh is None and processes > 1 else 0
            found.append(Memory(_with_copies(meter.peak, copied, frozen), "a training step"))
        for members in work.held_out(prepared.test.examples, prepared.validation.examples):
            # A forward pass alone takes less than a training step with as many tokens.
            if trains and form.tokens(members) <= work.largest and sum(map(responses, members)) <= work.largest_labels:
                continue
            meter.restart()
            model.eval()
            with torch.inference_mode():
                row_losses(model, members, hardware, form)
            found.append(Memory(dict(meter.peak), "measuring the held-out loss"))
        del frames
    return Measured(parameters, stored, max(found, key=lambda memory: memory.total))


def _planned_model(
    config: TrainConfig,
    prepared: Prepared,
    form: BatchForm,
    meter: StorageMeter,
    stack: contextlib.ExitStack,
) -> Any:
    """The base model of the run on fake tensors. `stack` ends what stands in for a GPU's own code."""
    on_gpu, plan = prepared.hardware.device.type == "cuda", prepared.plan
    dtype = torch.float32 if plan is None else prepared.hardware.dtype
    model = fake_model(prepared.model_config, config.trust_remote_code, dtype)
    if config.load_in_4bit:
        hold_in_four_bit(model, dtype)
    if plan is not None:
        split_projections(model, plan.target_modules)
    meter.assign((*model.parameters(), *model.buffers()), "weights")
    if on_gpu:
        stack.enter_context(gpu_chunks())
    if on_gpu and any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()):
        stack.enter_context(WideLayerNorm())
    if form.kind == "packed":
        AttentionInterface.register(_STAND_IN, gpu_attention(prepared.attention.name) if on_gpu else cpu_attention())
        model.set_attn_implementation(_STAND_IN)
    return model


def _starting(
    config: TrainConfig, prepared: Prepared, form: BatchForm, work: Work, model: Any, meter: StorageMeter
) -> list[Memory]:
    """The memory of the largest pass over the examples that a start is computed from; nothing where it needs none."""
    plan = prepared.plan
    kind = method_of(plan.mode).observes(plan.b_init) if plan is not None else None
    if kind is None:
        return []
    hardware, on_gpu = (
        dataclasses.replace(prepared.hardware, device=torch.device("cpu")),
        prepared.hardware.device.type == "cuda",
    )
    sums: dict[str, torch.Tensor] = {}

    def take(name: str, value: torch.Tensor) -> None:
        value = value.float()
        if not on_gpu:  # which gives them to the host
            meter.assign([value], "gradients" if kind == "gradient" else "activations")
            sums[name] = value if name not in sums else sums[name].add_(value)

    meter.restart()
    if kind == "gradient":
        passes = work.start(prepared.start_examples)
        with gradients_taken(model, prepared.layers, take, config.gradient_checkpointing):
            for members in passes:
                row_losses(model, members, hardware, form).sum().backward()
    else:
        passes = [[max(prepared.start_examples, key=lambda example: len(example.input_ids))]]
        with inputs_taken(model, prepared.layers, take):
            row_losses(model, passes[0], hardware, form)
    return [Memory(dict(meter.peak), "computing the start", form.tokens(passes[0]))]


def _observed(model: Any, plan: AdapterPlan) -> dict[str, Observed]:
    """Fake matrices in place of what a start is computed from on data."""
    sides = {
        name: (linear.out_features, linear.in_features) for name, linear in target_linears(model, plan.target_modules).items()
    }
    method = method_of(plan.mode)
    kind = method.observes(plan.b_init)
    if (kind == "gradient" and method.b_init_is_free) or (kind == "inputs" and method.reads_weights):
        # A numerical rank or an inverse is checked, and fake values have none.
        return {
            name: Observed(start=(torch.zeros(plan.rank, inside), torch.zeros(out, plan.rank)))
            for name, (out, inside) in sides.items()
        }
    if kind == "gradient":
        return {name: Observed(gradient=torch.zeros(out, inside)) for name, (out, inside) in sides.items()}
    return (
        {name: Observed(inputs=torch.zeros(inside, inside)) for name, (_, inside) in sides.items()} if kind == "inputs" else {}
    )


def _frames(model: Any, plan: AdapterPlan | None) -> list[torch.Tensor]:
    """What `AngleMeter` keeps of every B."""
    return [factors_of(layer)[1].detach().double() for _, layer in lora_layers(model)] if AngleMeter.applies(plan) else []


def _with_copies(peak: dict[Part, int], copied: int, frozen: int) -> dict[Part, int]:
    """With the copy of so many gradients that DistributedDataParallel keeps to exchange them, and the bytes of frozen links."""
    return {**peak, "gradients": peak["gradients"] + 4 * copied, "adapter": peak["adapter"] + frozen}


@contextlib.contextmanager
def _alone() -> Iterator[Path]:
    """An empty directory, and accelerate's state of a single process on a CPU, whatever a launcher or an earlier training set up."""
    launcher = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        with temporary_directory("plan") as place:
            yield place
    finally:
        os.environ.update(launcher)
        for state, saved in zip(states, before, strict=True):
            state.clear()
            state.update(saved)
