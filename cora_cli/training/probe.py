"""What a run begins with, measured without a step of training: the gradient's energy inside the start of A and B, and the loss's curvature.

It needs what the run needs, and goes through the model as training does. `cora train --probe FILE` writes the record, and `--learning-rate auto`
takes its learning rate from the curvature (`proposal`).
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import method_of
from cora_cli.progress import progress, say
from cora_cli.records import write_sealed
from cora_cli.rundir import RunDirectory
from cora_cli.scratch import temporary_directory
from cora_cli.training import proposal
from cora_cli.training.arguments import number_of_processes, training_arguments
from cora_cli.training.assemble import assemble
from cora_cli.training.config import TrainConfig
from cora_cli.training.curvature import Hessian, largest_eigenvalue
from cora_cli.training.observe import mean_loss, tokens_hash, weight_gradients
from cora_cli.training.prepare import Prepared, prepare
from cora_cli.training.proposal import AUTO, proposal_from
from cora_cli.training.record import first_record

EXAMPLES = 32
PRODUCTS, TOLERANCE = 20, 0.02
"""The most products of the Hessian with a vector, and the relative error of the eigenvalue at which they end."""
_AUTO = "--learning-rate auto"
_OF_A_RUN = ("status", "sealed_checkpoints")


@dataclasses.dataclass(frozen=True)
class Start:
    """A run before its first step: the model with its adapter, in float32 and without dropout, the examples to measure it on, and `record`, what
    `run.json` would say of it."""

    config: TrainConfig
    prepared: Prepared
    model: Any
    form: BatchForm
    examples: Sequence[Example]
    record: dict[str, Any]


def begin(config: TrainConfig, flag: str = "--probe") -> Start:
    """Assemble the run of `config` and write nothing. Raises `CoraError` as the run would, and where nothing can train.

    All in float32, in which differences of gradients have enough digits. `flag` is what asks for the measure, for the errors.
    """
    require_alone(config, flag)
    config = dataclasses.replace(config, dtype="fp32")
    prepared = prepare(config)
    plan = prepared.plan
    if plan is not None and not method_of(plan.mode).can_train(plan):
        raise CoraError(f"{flag} has nothing to measure: a frozen factor is zero, so all gradients are zero")
    examples = probe_examples(prepared, config.probe_examples) if flag == "--probe" else examples_of_proposal(prepared)
    with temporary_directory("probe") as place:
        # Nothing is written or resumed there.
        run = RunDirectory(place)
        model, batching, observation = assemble(
            config, prepared, training_arguments(config, prepared.hardware, len(prepared.train.examples), run), run
        )
    model.eval()
    record = first_record(config, prepared, prepared.fingerprint(config), model, batching, observation)
    return Start(config, prepared, model, batching.form, examples, record)


def probe(config: TrainConfig, most_products: int = PRODUCTS, flag: str = "--probe") -> dict[str, Any]:
    """Measure the run of `config` before its first step. Returns the record of `records.Probe`, and writes nothing.

    Raises `CoraError` as `begin` does.
    """
    start = begin(config, flag)
    model, examples, prepared, plan = start.model, start.examples, start.prepared, start.prepared.plan
    energy: dict[str, Any] | None = None
    seconds: dict[str, float] = {}
    if plan is not None and method_of(plan.mode).lora_rank is not None:
        began = time.monotonic()
        energy = gradient_energy(model, examples, prepared, start.form)
        seconds["gradient"] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    curvature = largest_curvature(model, examples, prepared, start.form, most_products, seed=start.config.seed)
    seconds["curvature"] = round(time.monotonic() - began, 3)
    return {
        **{key: value for key, value in start.record.items() if key not in _OF_A_RUN},
        "probe": {
            "examples": len(examples),
            "tokens": sum(len(example.input_ids) for example in examples),
            "sha256": tokens_hash(examples),
            "seconds": seconds,
            "energy": energy,
            "curvature": curvature,
        },
    }


def require_alone(config: TrainConfig, flag: str = _AUTO) -> None:
    """Raise `CoraError` where several processes would measure; `flag` is what asks for it."""
    if number_of_processes(config) > 1:
        raise CoraError(f"{flag} measures in one process, not in {number_of_processes(config)}")


def examples_of_proposal(prepared: Prepared) -> Sequence[Example]:
    """What `--learning-rate auto` measures on. Raises `CoraError` where there are too few examples."""
    return probe_examples(prepared, proposal.EXAMPLES, f"{_AUTO}, which measures {proposal.EXAMPLES},")


def probe_examples(prepared: Prepared, count: int | None, asked: str | None = None) -> Sequence[Example]:
    """The last training examples: the same for all methods, and others than those that a start is computed from.

    Without a `count`, as many as there are, up to `EXAMPLES`. Energy inside a B that was computed from the same examples would say nothing about others. Raises `CoraError` where there are too few,
    which says what `asked` for them, by default --probe-examples.
    """
    examples, plan = prepared.train.examples, prepared.plan
    observed = plan is not None and method_of(plan.mode).observes(plan.b_init) is not None
    used = len(prepared.start_examples) if observed else 0
    if count is None:
        count = max(1, min(EXAMPLES, len(examples) - used))
    if len(examples) < used + count:
        also = f" apart from the {used} that the start is computed from (--start-examples)" if used else ""
        raise CoraError(
            f"{asked or f'--probe-examples {count}'} needs as many training examples{also}, and there are {len(examples)}"
        )
    return examples[len(examples) - count :]


def gradient_energy(model: Any, examples: Sequence[Example], prepared: Prepared, form: BatchForm) -> dict[str, Any] | None:
    """The share of ‖∂L/∂W‖² in the span of B (output) and in that of A's rows (input), of each matrix and of all together.

    `chance` is what random directions of as many dimensions expect. A side is None where its factor is zero, and everything where PEFT keeps
    the adapter in other layers than LoRA's. Only for methods that equal a LoRA.
    """
    factors = {name: factors_of(layer) for name, layer in lora_layers(model)}
    if not factors:
        return None
    places = {name: f"base_model.model.{name}.base_layer" for name in factors}
    found = weight_gradients(model, list(places.values()), examples, prepared.hardware, form, "gradient of W")
    gradients = {name: found[place].double() for name, place in places.items() if place in found}
    norms = {name: float(gradient.square().sum()) for name, gradient in gradients.items()}
    if not sum(norms.values()):
        raise CoraError(f"the gradient of W is zero in all {len(examples)} examples of the probe; raise --probe-examples")
    output = {name: (gradient, factors[name][1]) for name, gradient in gradients.items()}
    inside = {name: (gradient.T, factors[name][0].T) for name, gradient in gradients.items()}
    return {"norms_squared": norms, "output": energy_inside(output), "input": energy_inside(inside)}


def energy_inside(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any] | None:
    """The share of the energy of gradients (features, k) in the span of factors (features, r); None where all factors are zero."""
    norms = {name: float(gradient.square().sum()) for name, (gradient, _) in pairs.items()}
    frames = {name: span(factor) for name, (_, factor) in pairs.items()}
    if not any(frame.shape[1] for frame in frames.values()):
        return None
    held = {name: float((frames[name].T @ gradient).square().sum()) for name, (gradient, _) in pairs.items()}
    expected = {name: norms[name] * frame.shape[1] / frame.shape[0] for name, frame in frames.items()}
    total = sum(norms.values())
    return {
        "total": sum(held.values()) / total,
        "chance": sum(expected.values()) / total,
        "matrices": {name: held[name] / norm if norm else None for name, norm in norms.items()},
    }


def span(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns (features, k) float64 that span those of `factor` (features, r)."""
    vectors, values, _ = torch.linalg.svd(factor.detach().double().cpu(), full_matrices=False)
    floor = max(factor.shape) * torch.finfo(factor.dtype).eps * values[0]
    return vectors[:, values > floor]


def loss_hessian(
    model: Any, examples: Sequence[Example], prepared: Prepared, form: BatchForm, seen: Callable[[], None] = lambda: None
) -> Hessian:
    """The Hessian of the training loss over the examples in the trained parameters; `seen` is called after each gradient."""
    plan = prepared.plan
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient() -> torch.Tensor:
        sums = [torch.zeros_like(parameter) for parameter in trained]
        added = method_of(plan.mode).added_loss(model, plan) if plan is not None else None
        parts = (part for part, _ in mean_loss(model, examples, prepared.hardware, form))
        for part in itertools.chain(parts, () if added is None else (added,)):
            # A part of the loss need not depend on every parameter.
            for total, one in zip(sums, torch.autograd.grad(part, trained, allow_unused=True), strict=True):
                if one is not None:
                    total.add_(one)
        seen()
        return torch.cat([total.flatten() for total in sums])

    return Hessian(trained, gradient)


def largest_curvature(
    model: Any,
    examples: Sequence[Example],
    prepared: Prepared,
    form: BatchForm,
    most: int = PRODUCTS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """λmax of the training loss over the examples in the trained parameters, and the norm of its gradient there."""
    with progress("curvature", 2 * most + 1, "gradients") as shown:
        hessian = loss_hessian(model, examples, prepared, form, shown.advance)
        gradient = hessian.at_start
        norm = float(gradient.norm())
        if not 0 < norm < math.inf:
            raise CoraError(
                f"the gradient of the trained parameters has norm {norm} over the {len(examples)} examples that it is measured on"
            )
        drawn = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed)).to(gradient)
        # The gradient lies mostly along the directions of large curvature; a random part reaches all others.
        found = largest_eigenvalue(hessian.product, gradient / norm + drawn / drawn.norm(), most, tolerance)
    return {
        "largest_eigenvalue": found.value,
        "error": found.error,
        "products": found.products,
        "by": "central differences of gradients",
        "parameters": len(gradient),
        "gradient_norm": norm,
    }


def describe(record: Mapping[str, Any]) -> str:
    """The measures of a probe in a few lines."""
    found, lines = record["probe"], []
    energy, curvature = found["energy"], found["curvature"]
    lines.append(
        f"mode {record['mode']} before its first step, over {found['examples']} training examples ({found['tokens']:,} tokens):"
    )
    for side, span_of in (("output", "B"), ("input", "A's rows")):
        if energy is not None and (one := energy[side]) is not None:
            lines.append(
                f"gradient energy in the span of {span_of}: {one['total']:.4f} of ‖∂L/∂W‖² in {len(one['matrices'])} matrices; random directions "
                f"expect {one['chance']:.4f}"
            )
    lines.append(
        f"largest Hessian eigenvalue in {curvature['parameters']:,} trained parameters: {curvature['largest_eigenvalue']:.4g}, an eigenvalue "
        f"within {curvature['error']:.2g} ({curvature['products']} Hessian-vector products by {curvature['by']})"
    )
    return "\n".join(lines)


def write_probe(config: TrainConfig) -> dict[str, Any]:
    """As `probe`, with its record in the file of `--probe`."""
    assert config.probe is not None
    record = probe(config)
    write_sealed(Path(config.probe), record)
    return record


def propose(config: TrainConfig) -> dict[str, Any]:
    """Measure the run of `config` before its first step; returns the proposed learning rate as `run.json` keeps it.

    The measure is in float32, whatever the run is in. Raises `CoraError` as the run would.
    """
    start = begin(_measuring(config, dtype="fp32", resume=False, stop_at=None), _AUTO)
    return proposal_from(
        largest_curvature(start.model, start.examples, start.prepared, start.form, proposal.PRODUCTS, seed=config.seed)
    )


def write_proposal(config: TrainConfig) -> dict[str, Any]:
    """As `write_probe`, on the examples of a proposal, and with the proposal in the record."""
    assert config.probe is not None
    record = probe(_measuring(config), proposal.PRODUCTS, _AUTO)
    found = proposal_from(record["probe"]["curvature"])
    settings = {**record["fingerprint"]["settings"], "learning_rate": found["learning_rate"]}
    record = {**record, "fingerprint": {**record["fingerprint"], "settings": settings}, "proposal": found}
    write_sealed(Path(config.probe), record)
    return record


def _measuring(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The settings of a probe that measures what a proposal follows from; the rate has no part in it."""
    own: dict[str, Any] = {
        "probe": config.probe or "none",
        "probe_examples": proposal.EXAMPLES,
        "learning_rate": config.peak_rate,
    }
    return dataclasses.replace(config, **own, **changes)


def with_rate(config: TrainConfig, record: Mapping[str, Any] | None) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The settings with a number in place of `auto`, and the proposal; `record` is the run's own where it is resumed, which keeps its rate.

    Raises `CoraError` where that run was begun with a number.
    """
    if config.learning_rate != AUTO:
        return config, (record or {}).get("proposal")  # of the same number, or the run is not resumed
    found: dict[str, Any] | None = record.get("proposal") if record else propose(config)
    if found is None:
        assert record is not None
        rate = record["fingerprint"]["settings"]["learning_rate"]
        raise CoraError(f"{config.output_dir} was begun with --learning-rate {rate:g}, not auto; resume it with that")
    if record is None:
        say(proposal.describe(found, config.mode))
    return dataclasses.replace(config, learning_rate=found["learning_rate"]), found
