"""What the starts of some methods are computed from: gradients of W, or inputs of the layers, over the first examples of the training data.

The examples go through the model as in training, packed where it allows that; `adapters.install` hands the results to the method, and `probe`
measures with the same gradients.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from cora_cli import rundir
from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import linear_weight
from cora_cli.progress import progress
from cora_cli.training.heldout import row_losses, rows_of


@dataclasses.dataclass(frozen=True)
class Observation:
    """`layers` has what was observed, by layer and by the name it has in `Observed`; the rest says over what, and what it cost."""

    layers: dict[str, dict[str, Any]]
    examples: int
    tokens: int
    seconds: float
    sha256: str

    def record(self) -> dict[str, Any]:
        """Everything but the matrices, for `run.json`."""
        return {key: value for key, value in vars(self).items() if key != "layers"}


def observe(
    model: Any,
    kind: Literal["gradient", "inputs"],
    layers: Sequence[str],
    examples: Sequence[Example],
    hardware: Hardware,
    form: BatchForm,
) -> Observation:
    """Run the examples through the base model and collect `kind` of the `layers`.

    The gradient is that of the mean loss of a response token. It is taken to the CPU layer by layer, so that the device holds those of one
    pass at most. Raises `CoraError` for a layer in which everything is zero or anything is not finite.
    """
    began = time.monotonic()
    tokens = sum(len(example.input_ids) for example in examples)
    label = "start of the adapter"
    if kind == "gradient":
        sums = weight_gradients(model, layers, examples, hardware, form, label)
    else:
        with _inputs(model, layers) as sums, progress(label, len(examples), "examples") as shown:
            # One example at a time: without padding, and without prefixes that stand for several tokens.
            for example in sorted(examples, key=lambda example: len(example.input_ids)):
                row_losses(model, [example], hardware, form)
                shown.advance()
    for name in layers:
        if name not in sums or not sums[name].any():
            raise CoraError(
                f"the {kind} of {name} is zero in all {len(examples)} examples of the start; raise --start-examples, or leave the layer out of "
                "--target-modules"
            )
        if not sums[name].isfinite().all():
            raise CoraError(f"the {kind} of {name} in the examples of the start is not finite; --dtype fp32 may help")
    found: dict[str, dict[str, Any]] = {
        name: {kind: sums[name] if kind == "gradient" else sums[name] / tokens} for name in layers
    }
    return Observation(found, len(examples), tokens, round(time.monotonic() - began, 3), tokens_hash(examples))


def tokens_hash(examples: Sequence[Example]) -> str:
    """The SHA-256 of the tokens of the examples."""
    return rundir.sha256_json([list(example.input_ids) for example in examples])


def mean_loss(
    model: Any, examples: Sequence[Example], hardware: Hardware, form: BatchForm
) -> Iterator[tuple[torch.Tensor, int]]:
    """The mean loss of a response token, as one summand for each forward pass, with the number of its examples."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    responses = sum(len(example.input_ids) - example.prompt_length for example in examples)
    for row in rows_of(examples, order):
        for members in form.passes([examples[index] for index in row]):
            losses = row_losses(model, [examples[row[member]] for member in members], hardware, form)
            yield losses.sum() / responses, len(members)


def weight_gradients(
    model: Any, layers: Sequence[str], examples: Sequence[Example], hardware: Hardware, form: BatchForm, label: str
) -> dict[str, torch.Tensor]:
    """∂L/∂W (out, in) float32 on the CPU of the mean loss of a response token, by layer; none for a layer without a gradient."""
    with _gradients(model, layers) as sums, progress(label, len(examples), "examples") as shown:
        for part, count in mean_loss(model, examples, hardware, form):
            part.backward()
            shown.advance(count)
    return sums


@contextlib.contextmanager
def _gradients(model: Any, layers: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of ∂L/∂W (out, in) of all backward passes in the block, by layer."""
    sums: dict[str, torch.Tensor] = {}
    wanted = {id(model.get_submodule(name).weight) for name in layers}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    with contextlib.ExitStack() as hooks:
        for name in layers:
            weight = model.get_submodule(name).weight
            hooks.callback(weight.register_post_accumulate_grad_hook(_taking(name, model, sums)).remove)
        training = model.training
        model.eval()
        with torch.enable_grad():
            yield sums
        model.train(training)
    for parameter, required in before:
        parameter.requires_grad_(required)


def _taking(name: str, model: Any, sums: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    linear = linear_weight(model.get_submodule(name))
    assert linear is not None

    def take(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float().cpu()
        weight.grad = None
        _add(sums, name, gradient.T.contiguous() if linear.transposed else gradient)

    return take


@contextlib.contextmanager
def _inputs(model: Any, layers: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of x·xᵀ (in, in) over the tokens of all forward passes in the block, by layer."""
    sums: dict[str, torch.Tensor] = {}

    def seeing(name: str) -> Callable[..., None]:
        def see(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):  # in the forward pass of a bf16 run it would round the product
                _add(sums, name, (x.T @ x).cpu())

        return see

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name in layers:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(seeing(name)).remove)
        training = model.training
        model.eval()
        yield sums
        model.train(training)


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = value if name not in sums else sums[name].add_(value)
