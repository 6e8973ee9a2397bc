import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cora_cli.data.encode import Example
from cora_cli.device import select_packed_attention
from cora_cli.errors import CoraError
from cora_cli.models import precision
from cora_cli.training import batching
from cora_cli.training.batching import Batching, choose_batching, make_probes

from .families import HARDWARE, build

EXAMPLES = [Example(list(range(3, 3 + tokens)), 2) for tokens in (5, 40, 60)]


def choose(family: str, examples: list[Example], **settings: int) -> Batching:
    torch.manual_seed(0)
    config = build(family)
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    return choose_batching(model, select_packed_attention("cpu"), examples, HARDWARE, trains=True)


def test_probes_lie_on_both_sides_of_every_limit_that_the_data_reach() -> None:
    lengths = [len(probe.input_ids) for probe in make_probes(EXAMPLES, {30, 70})]
    assert lengths == [5, 29, 60, 60]
    assert make_probes([], {30}) == []
    assert len(make_probes([Example(list(range(300)), 1)], set(), longest_too=True)[-1].input_ids) == 300
    assert all(0 < probe.prompt_length < len(probe.input_ids) for probe in make_probes([Example([1, 2], 1)], {1}))


def test_a_family_that_loses_its_window_in_packed_rows_is_padded_where_examples_are_longer_than_the_window() -> None:
    found = choose("qwen2_moe", EXAMPLES)
    assert found.form.kind == "padded"
    assert "padded batches with the model's own attention (sdpa), because a packed row has other losses" in found.describe()
    assert choose("qwen2_moe", [Example([5, 6, 7, 8], 1)]).form.kind == "packed"


@pytest.mark.parametrize(("quantized", "kind"), [(False, "single"), (True, "packed")])
def test_quantized_weights_on_a_gpu_are_compared_in_the_precision_of_their_products(
    quantized: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build("llama")).eval()
    monkeypatch.setattr(precision, "rounds_by_rows", lambda model: quantized)

    def rounds_differently(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2e-3 * (output.shape[1] % 5))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(rounds_differently)
    assert choose_batching(model, select_packed_attention("cpu"), EXAMPLES, HARDWARE).form.kind == kind


def test_a_class_that_computes_attention_by_itself_is_padded() -> None:
    found = choose("bloom", EXAMPLES)
    assert (found.form.kind, found.reason) == ("padded", "BloomForCausalLM computes attention by itself")


def test_attention_that_depends_on_the_length_of_the_batch_gets_one_example_at_a_time() -> None:
    assert choose("big_bird", EXAMPLES).describe().startswith("one example at a time with the model's own attention (eager)")


def test_other_losses_in_training_than_in_evaluation_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    choose("phimoe", EXAMPLES)  # whose routers a run sets, so that they draw no experts at random
    assert "PhimoeForCausalLM computes other losses in training than in evaluation (by " in capfd.readouterr().err
    choose("mixtral", EXAMPLES)
    # The longest probe lies beyond the window, and is not compared.
    choose("phi3", [*EXAMPLES, Example([3 + token % 90 for token in range(150)], 2)], sliding_window=100)
    assert "in training" not in capfd.readouterr().err


def test_no_probe_goes_alone_through_the_model_twice_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(build("llama")).eval()
    own, passes = model.forward, []

    def forward(*arguments: Any, **named: Any) -> Any:
        if not model.training and "logits_to_keep" in named and "position_ids" not in named:
            passes.append(tuple(named["input_ids"][0].tolist()))
        return own(*arguments, **named)

    monkeypatch.setattr(model, "forward", functools.wraps(own)(forward))
    choose_batching(model, select_packed_attention("cpu"), EXAMPLES, HARDWARE, trains=True)
    assert 0 < len(passes) == len(set(passes))


def test_a_model_that_computes_nothing_in_training_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(build("llama")).eval()
    own = model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if model.training:
            raise ValueError("If training, the length has to be a multiple of 64")
        return own(*arguments, **named)

    model.forward = forward
    message = (
        r"LlamaForCausalLM cannot be trained: in training, its forward pass .* ends in ValueError \(If training, the length"
    )
    with pytest.raises(CoraError, match=message):
        choose_batching(model, select_packed_attention("cpu"), EXAMPLES, HARDWARE, trains=True)
    assert not model.training
    assert (
        choose_batching(model, select_packed_attention("cpu"), EXAMPLES, HARDWARE).form.kind == "padded"
    )  # as it names no arguments


def failing(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward


def choose_for(forward: Callable[..., Any]) -> Batching:
    """The batching of a model whose forward pass is `forward`."""
    model = AutoModelForCausalLM.from_config(build("llama")).eval()
    model.forward = forward
    return choose_batching(model, select_packed_attention("cpu"), EXAMPLES, HARDWARE)


def test_a_model_that_needs_more_than_token_ids_is_refused_with_what_it_raised() -> None:
    message = r"LlamaForCausalLM cannot be trained: its forward pass on the \d+ token ids of an example ends in TypeError \(no pixels\)"
    with pytest.raises(CoraError, match=message):
        choose_for(failing(TypeError("no pixels")))
    with pytest.raises(
        CoraError, match=r"ends in IndexError \(list index out of range\)"
    ):  # a cache of fewer layers than the model
        choose_for(failing(IndexError("list index out of range")))
    with pytest.raises(CoraError, match="LlamaForCausalLM cannot be trained: it computes no logits of next tokens"):
        choose_for(lambda *_, **__: object())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_fault_of_the_model(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        choose_for(failing(error))


def test_a_fault_of_this_program_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "token_losses", failing(TypeError("ours")))
    with pytest.raises(TypeError, match="ours"):
        choose("llama", EXAMPLES)
