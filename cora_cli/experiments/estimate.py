"""Estimates time and memory of each step on this machine, from shapes, record lengths and a measured rate of matrix products.

Estimates are right within a factor of about two, enough to tell minutes from weeks. They are displayed, and
decide how many steps share a GPU with `--jobs-per-gpu auto`.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cora_cli.basis.choices import DEFAULT_TARGET_MODULES, BasisChoices, Share
from cora_cli.evaluation.config import DEFAULT_DRAWS
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.experiments.inputs import DataFacts, Inputs, ModelFacts, data_key, split_settings
from cora_cli.experiments.rows import Row
from cora_cli.experiments.steps import Plan, Step
from cora_cli.experiments.values import Values
from cora_cli.methods.registry import METHODS, method_of
from cora_cli.planning.four_bit import HELD_BYTES
from cora_cli.training.config import TrainConfig
from cora_cli.training.proposal import EXAMPLES, PRODUCTS

CHARACTERS_PER_TOKEN = 3.6
TEMPLATE_TOKENS = 35
# Share of the measured rate that complete steps reach, and fixed costs of a process; measured on two CPU cores with
# SmolLM2-135M.
TRAINING_SHARE, DECODING_SHARE, WIDE_SHARE = 0.35, 0.1, 0.1
START_SECONDS = {"model": 12.0, "train": 12.0, "proposal": 12.0, "laplace": 12.0, "basis": 5.0, "evaluate": 14.0, "judge": 12.0}
PROCESS_BYTES = 0.8e9
# A judge's instructions and its reply, and how long an endpoint takes for one.
RUBRIC_TOKENS, REPLY_TOKENS, ENDPOINT_SECONDS = 300, 40, 2.0
# How much of a GPU's free memory the estimates of the steps that share it may add up to, since they can be half of the truth.
SHARED_PART = 0.5
# Bytes kept for the backward pass per token, layer and hidden unit in 16-bit precision, without attention.
ACTIVATION_BYTES = 34
ESTIMATE_NOTE = (
    "estimates: per parameter and token, 4 FLOPs to train an adapter, 6 to train all weights and 2 for a forward pass, at the "
    "rate of matrix products measured on this machine"
)

NO_TIME_NOTE = "no time: the plan is for a CUDA GPU, and there is none here whose rate of matrix products could be measured"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Approximate run time in seconds, None where no rate is known, and peak memory in bytes."""

    seconds: float | None
    bytes: float


def matmul_rate(device: str, seconds: float = 0.5) -> tuple[float, str]:
    """FLOPs per second of a matrix product in the precision of runs on `device`, and a description. Takes about `seconds`.

    Raises `CoraError` for a device that this machine does not have.

    The rate is that of the fastest product, on a CPU of one thread times the number of threads, so that other load at this
    moment matters little.
    """
    import torch

    from cora_cli.device import select_hardware

    hardware = select_hardware(device, "auto")
    a, b = (torch.randn(1024, 1024, device=hardware.device).to(hardware.dtype) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (a @ b).sum().item()
    end, fastest = time.perf_counter() + seconds, math.inf
    while (began := time.perf_counter()) < end:
        (a @ b).sum().item()
        fastest = min(fastest, time.perf_counter() - began)
    torch.set_num_threads(threads)
    rate = (threads if hardware.device.type == "cpu" else 1) * 2 * 1024**3 / fastest
    return rate, f"{rate / 1e12:.2g} TFLOP/s in {hardware.dtype_name} on {hardware.device}"


def planned_rate(device: str) -> tuple[float | None, str]:
    """As `matmul_rate`, but None and no description for a GPU where this machine has none."""
    import torch

    return (None, "") if device == "cuda" and not torch.cuda.is_available() else matmul_rate(device)


def trained_parameters(row: Row, model: ModelFacts | None) -> int | None:
    """Number of parameters that the row trains; None if the model is missing or a PEFT configuration determines it."""
    if row.mode in ("base", "basis"):
        return 0
    if model is None:
        return None
    one = _trained(row.training, model)
    return one and one * len(row.members())


def _trained(config: TrainConfig, model: ModelFacts) -> int | None:
    plan, method = config.adapter_plan(), method_of(config.mode)
    if plan is None:
        return model.parameters
    plan = method.for_model(plan, model.heads)
    return method.parameters(model.targets(plan.target_modules), plan) if method.can_train(plan) else 0


def seconds_of(estimates: Mapping[str, Estimate], names: Iterable[str]) -> float | None:
    """The time of these steps together, None where that of one of them is not known."""
    total = 0.0
    for name in names:
        if name not in estimates or (seconds := estimates[name].seconds) is None:
            return None
        total += seconds
    return total


def estimate_steps(plan: Plan, inputs: Inputs, rate: float | None) -> dict[str, Estimate]:
    """Estimates by step name, for every step whose model and data are available. `rate` is in FLOPs per second."""
    if rate is None:
        return {name: dataclasses.replace(one, seconds=None) for name, one in _estimates(plan, inputs, 1.0).items()}
    return _estimates(plan, inputs, rate)


def _estimates(plan: Plan, inputs: Inputs, rate: float) -> dict[str, Estimate]:
    model = inputs.models.get(plan.grid.model)
    if model is None or not model.shapes:
        return {}
    found: dict[str, Estimate] = {}
    for row in plan.grid.rows:
        split = split_settings(plan.grid, row)
        data = inputs.datasets.get(data_key(plan.grid.datasets[row.dataset], split)) if row.dataset else None
        for name in plan.steps_of[row.name]:
            if name not in found and (estimate := _of_row(plan, model, data, row, plan.steps[name], rate)) is not None:
                found[name] = estimate
    for dataset, reference in plan.grid.datasets.items():
        judging = plan.steps.get(f"judge-{dataset}")
        if judging is not None and all(need in found for need in judging.needs):
            row = next(row for row in plan.grid.rows if row.dataset == dataset)
            data = inputs.datasets[data_key(reference, split_settings(plan.grid, row))]
            found[judging.name] = _judging(model, data, plan, judging, rate)
    for name, settings in plan.grid.models.items():
        steps = [step for step in plan.steps.values() if step.name.rpartition("-")[0] == f"model-{name}"]
        if steps and not isinstance(settings, str) and (data := inputs.datasets.get(data_key(settings["dataset"], settings))):
            processes = plan.grid.resources["model"].processes
            found[steps[0].name] = _training(model, data, _source_config(settings), rate, processes)
    return found


def _of_row(plan: Plan, model: ModelFacts, data: DataFacts | None, row: Row, step: Step, rate: float) -> Estimate | None:
    """The estimate of one of a row's steps; None where its data set is missing."""
    if step.kind == "basis":
        return _basis(model, row, plan, step, rate)
    if data is None:
        return None
    if step.kind == "proposal":
        return _proposal(model, data, row.training, rate)
    if step.kind == "train":
        return _training(model, data, _as_far_as(row), rate, plan.grid.resources["train"].processes)
    if step.kind == "laplace":
        return _laplace(model, data, row, rate)
    processes, models = plan.grid.resources["evaluate"].processes, _averaged(plan, row)
    return _evaluation(model, data, plan.grid.evaluate or {}, rate, processes, models)


def steps_that_fit(estimates: Iterable[Estimate], gpu_bytes: float) -> int:
    """How many steps can share a GPU with `gpu_bytes` of free memory, if all were as large as the largest; at least 1."""
    return max(1, int(gpu_bytes * SHARED_PART / max(estimate.bytes for estimate in estimates)))


def _as_far_as(row: Row) -> TrainConfig:
    """The training of a row, up to the step at which it stops."""
    return dataclasses.replace(row.training, max_steps=row.stop_at) if row.stop_at else row.training


def _source_config(settings: Values) -> TrainConfig:
    return TrainConfig(model="m", output_dir="o", **settings)


def _training(model: ModelFacts, data: DataFacts, config: TrainConfig, rate: float, processes: int) -> Estimate:
    """One of the processes, which compute at the same time."""
    per_example = min(data.characters / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS, config.max_length)
    examples = min(data.train, config.limit or data.train)
    per_step = config.batch_size * config.gradient_accumulation
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(examples / (per_step * processes)))
    adapter = config.adapter_plan()
    measured = 2 * min(len(data.test), config.eval_limit or len(data.test)) + (
        (config.validation_size or 0) if config.validation_loss else 0
    )
    measured = math.ceil(measured / processes)
    body = model.parameters - model.embedded
    flops = (
        body
        * per_example
        * (steps * per_step * (6 if adapter is None else 4) * (4 / 3 if config.gradient_checkpointing else 1))
    )
    method = method_of(config.mode)
    if adapter is not None and not method.can_train(adapter):
        flops = 0.0
    flops += 2 * body * per_example * measured
    layers, hidden, vocabulary = model.sizes
    layers_of = {} if adapter is None else Counter(model.targets(adapter.target_modules).values())
    trained = _trained(config, model)
    if trained is None:
        trained = config.rank * sum(sum(shape) * count for shape, count in layers_of.items())
    # No pass has more tokens than `tokens_per_row`, unless one example has.
    together = min(config.batch_size, max(1.0, (config.tokens_per_row or math.inf) / per_example))
    kept = together * per_example * hidden * layers * (ACTIVATION_BYTES if not config.gradient_checkpointing else 2)
    kept += together * data.response_characters / CHARACTERS_PER_TOKEN * vocabulary * 12
    seconds = START_SECONDS["train"] + flops / (rate * TRAINING_SHARE)
    if adapter is not None:
        seconds += sum(method.start_flops(*shape, adapter) * count for shape, count in layers_of.items()) / (rate * WIDE_SHARE)
    return Estimate(seconds, PROCESS_BYTES + _held(model, config, trained, processes) + kept)


def _proposal(model: ModelFacts, data: DataFacts, config: TrainConfig, rate: float) -> Estimate:
    """Gradients of a few examples in float32: half the rate, and twice the bytes, of 16-bit precision."""
    gradients = dataclasses.replace(
        config, max_steps=2 * PRODUCTS + 1, batch_size=EXAMPLES, gradient_accumulation=1, learning_rate=config.peak_rate
    )
    none = dataclasses.replace(data, test=[])
    one = _training(model, none, dataclasses.replace(gradients, validation_loss=False), rate / 2, 1)
    assert one.seconds is not None
    return Estimate(one.seconds, PROCESS_BYTES + 2 * (one.bytes - PROCESS_BYTES))


def _held(model: ModelFacts, config: TrainConfig, trained: int, processes: int) -> float:
    """Bytes of the weights, the gradients and AdamW's moments that one process keeps."""
    full = config.adapter_plan() is None
    weights, states = (0.0, 16.0 * trained) if full else (2.0 * model.parameters, 16.0 * trained)
    layers = [math.prod(shape) for name, shape in model.shapes.items() if any(part.isdigit() for part in name.split("."))]
    if config.load_in_4bit:
        weights += (HELD_BYTES - 2) * sum(layers) + 2 * max(layers, default=0)
    if config.shard == "none":
        return weights + states + (4 * trained if processes > 1 else 0)
    largest = max(sum(layers) / model.sizes[0], model.embedded)
    gathered = 2 * (4 if full else 2) * largest
    return gathered + ((weights + states) / processes if full else weights / processes + states)


def _averaged(plan: Plan, row: Row) -> int:
    """How many models answer together."""
    if row.laplace is None and not (row.mode in METHODS and METHODS[row.mode].learns_distribution):
        return row.ensemble or 1
    draws = (plan.grid.evaluate or {}).get("draws")
    return max(1, DEFAULT_DRAWS if draws is None else draws)


def _laplace(model: ModelFacts, data: DataFacts, row: Row, rate: float) -> Estimate:
    """One forward and one backward pass for each record, one at a time, and the eigenvectors of the curvature of both sides of each matrix."""
    assert row.laplace is not None
    config = row.training
    per_example = min(data.characters / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS, config.max_length)
    records = min(data.train, config.limit or data.train, row.laplace.get("limit") or data.train)
    plan = config.adapter_plan()
    assert plan is not None
    sides = [side for shape in model.targets(plan.target_modules).values() for side in shape]
    flops = 4 * (model.parameters - model.embedded) * per_example * records
    seconds = flops / (rate * TRAINING_SHARE) + sum(9 * side**3 for side in sides) / (rate * WIDE_SHARE)
    return Estimate(
        START_SECONDS["laplace"] + seconds, PROCESS_BYTES + 2 * model.parameters + sum(4 * side**2 for side in sides)
    )


def _evaluation(model: ModelFacts, data: DataFacts, evaluate: Values, rate: float, processes: int, models: int) -> Estimate:
    """Of so many `models` together."""
    prompts = math.ceil(min(len(data.test), evaluate.get("limit") or len(data.test)) / processes)
    new = evaluate.get("max_new_tokens", 256)
    # Most answers end before the limit.
    answered = min(new, 1.2 * data.response_characters / CHARACTERS_PER_TOKEN)
    prompt = data.characters / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
    body = 2 * (model.parameters - model.embedded)
    seconds = models * prompts * body * (answered / DECODING_SHARE + prompt / TRAINING_SHARE) / rate
    layers, hidden, _ = model.sizes
    batch = min(prompts, evaluate.get("batch_size", 48))
    cache = batch * (prompt + new) * layers * hidden * 4
    return Estimate(START_SECONDS["evaluate"] + seconds, PROCESS_BYTES + 2 * model.parameters + cache)


def _judging(model: ModelFacts, data: DataFacts, plan: Plan, step: Step, rate: float) -> Estimate:
    """Each answer and each anchor is judged once or twice by each rubric. A local judge counts as being of the base model's size."""
    judge, evaluate = plan.grid.judge or {}, plan.grid.evaluate or {}
    records = min(len(data.test), evaluate.get("limit") or len(data.test), judge.get("limit") or len(data.test))
    judgments = records * (len(step.needs) + 2) * len(step.facts["rubrics"]) * (2 if judge.get("retest", True) else 1)
    if "endpoint" in judge:
        seconds = judgments * ENDPOINT_SECONDS / judge.get("concurrency", JudgeConfig.concurrency)
        return Estimate(START_SECONDS["judge"] + seconds, PROCESS_BYTES / 2)
    question = (data.characters + data.response_characters) / CHARACTERS_PER_TOKEN + RUBRIC_TOKENS
    body = 2 * (model.parameters - model.embedded)
    flops = judgments * body * (question / TRAINING_SHARE + REPLY_TOKENS / DECODING_SHARE)
    return Estimate(START_SECONDS["judge"] + flops / rate, PROCESS_BYTES + 2 * model.parameters)


def _basis(model: ModelFacts, row: Row, plan: Plan, step: Step, rate: float) -> Estimate:
    assert row.basis is not None
    targets = model.targets(row.basis.get("target_modules") or DEFAULT_TARGET_MODULES)
    share: Share = row.basis.get("share", "module")
    groups, weights = _groups(targets, share), list(targets.values())
    if row.basis.get("side") == "input":
        groups, weights = ([(inside, out) for out, inside in shapes] for shapes in (groups, weights))
    read = 2 * max(1, len(row.sources)) * sum(out * inside for out, inside in weights)
    decomposed = list(groups)
    if len(groups) < len(weights):  # what a pooled basis keeps of each weight is measured in a second pass
        read *= 2
        decomposed += weights
    flops = sum(2 * out * out * inside + 9 * out**3 for out, inside in decomposed)
    # Reading, hashing and adding in float64 run at about 0.3 GB/s together; float64 products are much slower than 16-bit ones.
    seconds = START_SECONDS["basis"] + read / 3e8 + flops / (rate * WIDE_SHARE)
    rank = int(step.facts["rank"])
    kept = sum(4 * out * rank for out, _ in groups) + max(out * inside + 2 * out * out for out, inside in groups) * 8
    return Estimate(seconds, PROCESS_BYTES / 2 + kept)


def _groups(targets: Mapping[str, tuple[int, int]], share: Share) -> Sequence[tuple[int, int]]:
    mapping = BasisChoices(share=share).mapping
    return list({mapping.group_of(name): shape for name, shape in targets.items()}.values())
