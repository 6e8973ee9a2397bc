"""What starts are computed from: gradients against autograd, and inputs against those of single forward passes."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cora_cli import hashing
from cora_cli.adapters.install import target_linears
from cora_cli.data.batches import BatchForm
from cora_cli.errors import CoraError
from cora_cli.methods.registry import method_of
from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import training_arguments
from cora_cli.training.assemble import assemble
from cora_cli.training.observe import observe
from cora_cli.training.prepare import prepare
from cora_cli.training.run import train
from tests.methods.helpers import plan_of

from .helpers import config_for, record_of, run_together

PLAN = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj",), "dropout": 0.0, "seed": 0}
SINGLE = BatchForm("padded", arguments=frozenset({"input_ids", "attention_mask", "position_ids"}))


@pytest.fixture
def prepared(tiny_model, tiny_data, tmp_path):
    """A run of mode lora-one, and its base model with the batches that it chose."""
    found = prepare(config_for(tiny_model, tiny_data, tmp_path / "run", mode="lora-one", start_examples=5))
    return found, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def looked_at(prepared, kind, form):
    found, model = prepared
    examples = found.start_examples
    assert len(examples) == 5
    return observe(model, kind, found.layers, examples, found.hardware, form)


def test_the_gradient_is_that_of_the_mean_loss_of_a_response_token(prepared):
    found, model = prepared
    seen = looked_at(prepared, "gradient", SINGLE)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    losses, tokens = 0.0, 0
    for example in found.start_examples:
        ids = torch.tensor([example.input_ids])
        logits = model(ids).logits[0, example.prompt_length - 1 : -1]
        targets = ids[0, example.prompt_length :]
        losses = losses + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        tokens += len(targets)
    (losses / tokens).backward()
    for name, linear in target_linears(model, found.plan.target_modules).items():
        wanted = linear.weight.grad
        assert torch.allclose(seen.layers[name]["gradient"], wanted, atol=1e-4 * wanted.abs().max())
    assert seen.tokens == sum(len(example.input_ids) for example in found.start_examples)


def test_the_inputs_are_those_of_every_token_once_without_padding_and_shared_prefixes(prepared):
    found, model = prepared
    sums = {}

    def see(name):
        return lambda _, given: sums.__setitem__(name, sums.get(name, 0) + given[0][0].T @ given[0][0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in found.layers]
    with torch.no_grad():
        for example in found.start_examples:
            model(torch.tensor([example.input_ids]))
    for hook in hooks:
        hook.remove()
    seen = looked_at(prepared, "inputs", SINGLE)
    for name in found.layers:
        wanted = sums[name] / seen.tokens
        assert torch.allclose(seen.layers[name]["inputs"], wanted, atol=1e-4 * wanted.abs().max())


def test_scaled_inputs_are_the_covariance_of_pefts_corda(prepared):
    found, model = prepared
    config = LoraConfig(
        target_modules=list(found.plan.target_modules),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm", prune_temporary_fields=False),
    )
    settings = (found.layers, found.start_examples, found.hardware, SINGLE)
    seen = observe(model, "inputs", *settings, scaled=True)
    ids = [torch.tensor([example.input_ids]) for example in found.start_examples]
    preprocess_corda(model, config, run_model=lambda: [model(one) for one in ids])
    for name in found.layers:
        wanted = model.get_submodule(name).covariance_matrix
        assert torch.allclose(seen.layers[name]["inputs"], wanted, atol=1e-4 * wanted.abs().max())
    assert method_of("corda").scales_inputs(plan_of("corda", **PLAN, corda_inputs="scaled"))
    assert not method_of("corda").scales_inputs(plan_of("corda", **PLAN))


def test_the_inputs_of_a_bf16_run_are_summed_in_float32(tiny_model, tiny_data, tmp_path):
    found = prepare(config_for(tiny_model, tiny_data, tmp_path / "run", mode="eva", start_examples=1, dtype="bf16"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    inputs = {}

    def see(name):
        return lambda _, given: inputs.__setitem__(name, given[0].flatten(0, -2).double())

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in found.layers]
    seen = observe(model, "inputs", found.layers, found.start_examples, found.hardware, SINGLE)
    for hook in hooks:
        hook.remove()
    for name, x in inputs.items():
        matrix = seen.layers[name]["inputs"]
        assert matrix.dtype == torch.float32
        wanted = x.T @ x / len(x)
        assert torch.allclose(matrix.double(), wanted, atol=1e-6 * wanted.abs().max())


def test_packed_rows_give_the_same_start(prepared, tiny_model, tiny_data, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "packed", mode="lora-one", start_examples=5)
    found = prepare(config)
    run = RunDirectory(tmp_path / "packed")
    _, batching, observation = assemble(
        config, found, training_arguments(config, found.hardware, len(found.train.examples), run), run
    )
    assert batching.form.kind == "packed"
    assert observation.layers == {}, "a run would hold its matrices to its end"
    single = looked_at(prepared, "gradient", SINGLE)
    prepared[1].set_attn_implementation(batching.attention)
    packed = looked_at(prepared, "gradient", batching.form)
    assert packed.sha256 == observation.sha256
    for name, one in packed.layers.items():
        assert torch.allclose(one["gradient"], single.layers[name]["gradient"], atol=1e-4 * one["gradient"].abs().max())


def test_checkpointing_gives_the_same_gradient_and_leaves_the_model_as_it_was(prepared):
    found, model = prepared
    model.train()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(model.model.layers[0].mlp.training))
    settings = (found.layers, found.start_examples, found.hardware, SINGLE)
    usual = observe(model, "gradient", *settings)
    passes = len(calls)
    checkpointed = observe(model, "gradient", *settings, checkpointing=True)
    assert len(calls) == 3 * passes, "every layer is computed a second time"
    assert not any(calls)
    assert all(module.training for module in model.modules())
    assert not model.is_activation_checkpointing
    for name, one in checkpointed.layers.items():
        wanted = usual.layers[name]["gradient"]
        assert torch.allclose(one["gradient"], wanted, rtol=0, atol=1e-6 * wanted.abs().max())


def test_the_time_of_a_start_is_that_of_its_decompositions_too(tiny_model, tiny_data, tmp_path, monkeypatch):
    from cora_cli.methods.parts import gradient

    now = [0.0]
    complete = gradient.descent_factors

    def slow(*values):
        now[0] += 100.0
        return complete(*values)

    monkeypatch.setattr(gradient, "descent_factors", slow)
    monkeypatch.setattr("cora_cli.training.assemble.time.monotonic", lambda: now[0])
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="lora-one", start_examples=2)
    run, found = RunDirectory(tmp_path / "run"), prepare(config)
    _, _, observation = assemble(config, found, training_arguments(config, found.hardware, len(found.train.examples), run), run)
    assert observation.seconds == 600.0  # six layers


def test_a_layer_whose_gradient_is_zero_is_refused(prepared):
    _, model = prepared
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter.zero_()
    with pytest.raises(
        CoraError, match=r"the gradient of .*q_proj is zero in all 5 examples of the start; raise --start-examples"
    ):
        looked_at(prepared, "gradient", SINGLE)


def test_a_b_from_the_gradient_is_recorded_stored_and_the_same_after_a_resumption(tiny_model, tiny_data, tmp_path):
    settings = {"mode": "fb", "b_init": "gradient", "start_examples": 5, "max_steps": 4, "save_steps": 2}
    config = config_for(tiny_model, tiny_data, tmp_path / "run", **settings)
    train(config)
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    first, record = adapter.read_bytes(), record_of(tmp_path / "run")
    prepared = prepare(config)
    assert record["start"] == {
        **{"examples": 5, "tokens": sum(len(example.input_ids) for example in prepared.start_examples)},
        **{"seconds": record["start"]["seconds"]},
        "sha256": hashing.sha256_json([list(example.input_ids) for example in prepared.start_examples]),
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    gradients = observe(model, "gradient", prepared.layers, prepared.start_examples, prepared.hardware, SINGLE)
    for name, one in gradients.layers.items():
        b = load_file(adapter)[f"base_model.model.{name}.lora_B.weight"].double()
        u, _, _ = torch.linalg.svd(one["gradient"].double())
        assert torch.allclose((u[:, :4].T @ b).abs(), torch.eye(4, dtype=torch.float64), atol=1e-3)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    train(dataclasses.replace(config, resume=True))
    assert adapter.read_bytes() == first


@pytest.mark.slow
def test_two_processes_start_from_the_same_gradient_as_one(tiny_model, tiny_data, tmp_path):
    one = config_for(tiny_model, tiny_data, tmp_path / "one", mode="fb", b_init="gradient", start_examples=5)
    train(one)
    two = dataclasses.replace(one, output_dir=str(tmp_path / "two"), batch_size=4)
    assert run_together(two) == [(0, ""), (0, "")]
    ours, theirs = record_of(tmp_path / "two")["start"], record_of(tmp_path / "one")["start"]
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    states = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) if "lora_B" in key else torch.allclose(value, states[1][key], atol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_start_that_it_subtracted_from_w(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Gradients of a GPU differ in the last bits, and with them singular vectors in more than that."""
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="lora-ga", max_steps=4, save_steps=2, learning_rate=1e-3)
    train(config)
    first = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    from cora_cli.methods.parts import gradient

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "adapter")
    record = record_of(tmp_path / "run")
    assert record["start"]["examples"] == 36
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    complete = gradient.approximation_factors
    monkeypatch.setattr(gradient, "approximation_factors", lambda *values: (-complete(*values)[0], complete(*values)[1]))
    train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == first
