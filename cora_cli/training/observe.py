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

from cora_cli import hashing
from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import linear_weight, transformers_model
from cora_cli.progress import progress
from cora_cli.training.heldout import row_losses, rows_of


@dataclasses.dataclass(frozen=True)
class Observation:
    """`layers` has what was observed, by layer and by the name it has in `Observed`; the rest says over what, and how long the passes took, or
    the complete start where it has been computed."""

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
    checkpointing: bool = False,
    scaled: bool = False,
) -> Observation:
    """Run the examples through the base model and collect `kind` of the `layers`.

    The gradient is that of the mean loss of a response token, with `checkpointing` of activations or without. It is taken to the CPU layer by
    layer, so that the device holds those of one pass at most. Inputs are a mean over tokens, or, `scaled`, over examples, each divided by its
    largest entry. Raises `CoraError` for a layer in which everything is zero or anything is not
    finite.
    """
    began = time.monotonic()
    tokens = sum(len(example.input_ids) for example in examples)
    label = "start of the adapter"
    if kind == "gradient":
        sums = weight_gradients(model, layers, examples, hardware, form, label, checkpointing)
    else:
        sums = _inputs(model, layers, examples, hardware, form, label, scaled)
    for name in layers:
        if name not in sums or not sums[name].any():
            raise CoraError(
                f"the {kind} of {name} is zero in all {len(examples)} examples of the start; raise --start-examples, or leave the layer out of "
                "--target-modules"
            )
        if not sums[name].isfinite().all():
            raise CoraError(f"the {kind} of {name} in the examples of the start is not finite; --dtype fp32 may help")
    number = 1 if kind == "gradient" else len(examples) if scaled else tokens
    found: dict[str, dict[str, Any]] = {name: {kind: sums[name] / number} for name in layers}
    return Observation(found, len(examples), tokens, round(time.monotonic() - began, 3), tokens_hash(examples))


def tokens_hash(examples: Sequence[Example]) -> str:
    """The SHA-256 of the tokens of the examples."""
    return hashing.sha256_json([list(example.input_ids) for example in examples])


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
    model: Any,
    layers: Sequence[str],
    examples: Sequence[Example],
    hardware: Hardware,
    form: BatchForm,
    label: str,
    checkpointing: bool = False,
) -> dict[str, torch.Tensor]:
    """∂L/∂W (out, in) float32 on the CPU of the mean loss of a response token, by layer; none for a layer without a gradient."""
    sums: dict[str, torch.Tensor] = {}

    def take(name: str, gradient: torch.Tensor) -> None:
        linear = linear_weight(model.get_submodule(name))
        assert linear is not None
        gradient = gradient.float().cpu()
        _add(sums, name, gradient.T.contiguous() if linear.transposed else gradient)

    with gradients_taken(model, layers, take, checkpointing), progress(label, len(examples), "examples") as shown:
        for part, count in mean_loss(model, examples, hardware, form):
            part.backward()
            shown.advance(count)
    return sums


@contextlib.contextmanager
def gradients_taken(
    model: Any, layers: Sequence[str], take: Callable[[str, torch.Tensor], None], checkpointing: bool
) -> Iterator[None]:
    """Hand ∂L/∂W of every backward pass in the block to `take`, layer by layer, as the layer stores W; it is freed afterwards."""
    wanted = {id(model.get_submodule(name).weight) for name in layers}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)

    def hand_over(name: str) -> Callable[[torch.Tensor], None]:
        def taken(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            take(name, weight.grad)
            weight.grad = None

        return taken

    with contextlib.ExitStack() as stack:
        for name in layers:
            weight = model.get_submodule(name).weight
            stack.callback(weight.register_post_accumulate_grad_hook(hand_over(name)).remove)
        training = model.training
        model.eval()
        if checkpointing:
            stack.enter_context(_checkpointed(transformers_model(model)))
        with torch.enable_grad():
            yield
    model.train(training)
    for parameter, required in before:
        parameter.requires_grad_(required)


@contextlib.contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """Let each layer compute its activations again in the backward pass, as in training.

    Layers of transformers do so in training mode only. What they consist of stays in evaluation mode.
    """
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _inputs(
    model: Any,
    layers: Sequence[str],
    examples: Sequence[Example],
    hardware: Hardware,
    form: BatchForm,
    label: str,
    scaled: bool,
) -> dict[str, torch.Tensor]:
    """Sums of x·xᵀ (in, in) float32 on the CPU over the tokens of the examples, by layer."""
    sums: dict[str, torch.Tensor] = {}
    taken = inputs_taken(model, layers, lambda name, product: _add(sums, name, product.cpu()), scaled)
    with taken, progress(label, len(examples), "examples") as shown:
        # One example at a time: without padding, and without prefixes that stand for several tokens.
        for example in sorted(examples, key=lambda example: len(example.input_ids)):
            row_losses(model, [example], hardware, form)
            shown.advance()
    return sums


@contextlib.contextmanager
def inputs_taken(
    model: Any, layers: Sequence[str], take: Callable[[str, torch.Tensor], None], scaled: bool = False
) -> Iterator[None]:
    """Hand the sum of x·xᵀ (in, in) over the tokens of every forward pass in the block to `take`, layer by layer.

    `scaled` inputs are divided by the absolute value of the largest one of their pass, as CorDA's authors do.
    """

    def seeing(name: str) -> Callable[..., None]:
        def see(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            x = x / x.max().abs() if scaled else x
            with torch.autocast(x.device.type, enabled=False):  # in the forward pass of a bf16 run it would round the product
                take(name, x.T @ x)

        return see

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name in layers:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(seeing(name)).remove)
        training = model.training
        model.eval()
        yield
        model.train(training)


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = value if name not in sums else sums[name].add_(value)
