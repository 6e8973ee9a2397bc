"""Builds the model of a run: the base model with its adapter, complete in every process or divided among them, and how examples go through it.

`run` calls this once all inputs are checked; `adapters.install` creates the adapter.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from cora_cli.adapters.install import apply_trained_set, check_applied, install_adapter
from cora_cli.adapters.storage import starts_in
from cora_cli.data.batches import BatchForm
from cora_cli.errors import CoraError, reason
from cora_cli.methods.parts.layers import Observed, adapted_layers
from cora_cli.methods.parts.mean_change import mean_changes_added
from cora_cli.methods.registry import method_of
from cora_cli.models.configuration import length_limits, route_as_evaluated
from cora_cli.models.fused import split_projections, wanted_views
from cora_cli.models.loading import hides_context, load_model
from cora_cli.models.quantized import PLAIN_COPY, is_held_quantized, kind_stated
from cora_cli.models.skeleton import fused_experts
from cora_cli.progress import note, say
from cora_cli.rundir import RunDirectory
from cora_cli.training.batching import Batching, choose_batching, make_probes
from cora_cli.training.checkpoints import checkpoint_to_resume
from cora_cli.training.config import TrainConfig
from cora_cli.training.fast_paths import compile_layers, use_liger
from cora_cli.training.observe import Observation, observe
from cora_cli.training.prepare import Prepared
from cora_cli.training.proposal import AUTO
from cora_cli.training.sharding import process_mesh, shard, share_adapter


def assemble(
    config: TrainConfig, prepared: Prepared, arguments: TrainingArguments, run: RunDirectory
) -> tuple[torch.nn.Module, Batching, Observation | None]:
    """The model to train, how examples go through it, and what its start was computed from: its cost, without the matrices."""
    say(prepared.hardware.describe())
    device = prepared.hardware.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # a process may train several times
    if config.shard == "none":
        with _in_turn(arguments):
            loaded = _load_base(config, prepared, device)
            batching = _check_passes(config, prepared, loaded)
            probes = make_probes(
                prepared.train.examples, length_limits(prepared.model_config), hides_context(prepared.model_config)
            )
            began = time.monotonic()
            sources = prepared.start_models.observed() if prepared.start_models else {}
            with mean_changes_added(loaded, sources if config.start else {}):
                observation = _observation(loaded, config, prepared, batching.form)
            model = _install(config, prepared, loaded, run, sources, observation)
            if observation is not None:
                # Its matrices, which are as large as the adapted weights, are of no more use.
                observation = dataclasses.replace(observation, layers={}, seconds=round(time.monotonic() - began, 3))
                say(
                    f"the start was computed from the first {observation.examples} training examples in {observation.seconds:.1f} s"
                )
            if config.liger:
                use_liger(model, probes, batching.form, prepared.hardware)
            if config.compile:
                compile_layers(model, probes, batching.form, prepared.hardware)
            return model, batching, observation
    mesh = process_mesh(device, arguments.world_size)
    with _in_turn(arguments):
        # The host holds one complete model at a time, and the device none, which may be too small for it.
        sources = prepared.start_models.observed() if prepared.start_models else {}
        model = _install(config, prepared, _load_base(config, prepared, torch.device("cpu")), run, sources, None)
        shard(model, mesh, device)
    share_adapter(model)
    batching = _check_passes(config, prepared, model)
    if prepared.plan is not None:
        apply_trained_set(model, prepared.plan)
    return model, batching, None


def _load_base(config: TrainConfig, prepared: Prepared, device: torch.device) -> Any:
    dtype = torch.float32 if prepared.plan is None else prepared.hardware.dtype
    loaded = load_model(
        prepared.model_path,
        dtype,
        device,
        None,
        config.trust_remote_code,
        config.load_in_4bit,
        prepared.model_config,
    )
    route_as_evaluated(loaded)
    if is_held_quantized(loaded):
        _check_quantized(config, prepared, loaded)
    if prepared.plan is not None:
        split_projections(loaded, prepared.plan.target_modules)
    return loaded


def _check_quantized(config: TrainConfig, prepared: Prepared, model: Any) -> None:
    """Raise `CoraError` for what cannot be trained on weights that are held quantised."""
    method, kind = method_of(config.mode), kind_stated(prepared.model_path) or "4 bits"
    fused = next(iter(wanted_views(model, prepared.plan.target_modules)), None) if prepared.plan is not None else None
    reasons = {
        f"mode {config.mode} needs the weights themselves": not method.trains_on_four_bit
        or method.observes(config.b_init) == "gradient",
        "--probe and --learning-rate auto take a gradient of the weights": config.probe is not None
        or config.learning_rate == AUTO,
        "--shard divides weights that are stored as numbers": config.shard != "none",
        f"the rows of {fused} that q_proj, k_proj and v_proj name cannot be taken apart": fused is not None,
        "transformers trains no adapters on such models": not model.hf_quantizer.is_trainable,
    }
    if why := next((why for why, holds in reasons.items() if holds), None):
        raise CoraError(f"{config.model} is held quantised ({kind}), and {why}; use {PLAIN_COPY}, or change that setting")
    note(f"{config.model} is held quantised ({kind}): the losses, and what is trained, are those of the quantised weights")


def _check_passes(config: TrainConfig, prepared: Prepared, model: Any) -> Batching:
    """How examples go through the model. Raises `CoraError` where it does not call the layers to adapt."""
    sets = (prepared.train, prepared.test, prepared.validation)
    examples = [example for encoded in sets for example in encoded.examples]
    if prepared.plan is not None:
        check_applied(model, prepared.plan.target_modules, prepared.train.examples[0].input_ids[:8], prepared.hardware.dtype)
    batching = choose_batching(model, prepared.attention, examples, prepared.hardware, trains=True)
    if config.attention != "auto" and batching.form.kind != "packed":
        raise CoraError(f"--attention {config.attention} cannot be used with {config.model}: {batching.reason}")
    batching = dataclasses.replace(batching, form=dataclasses.replace(batching.form, tokens_per_row=config.tokens_per_row))
    say(batching.describe())
    return batching


def _install(
    config: TrainConfig,
    prepared: Prepared,
    loaded: Any,
    run: RunDirectory,
    sources: Mapping[str, Observed],
    observation: Observation | None,
) -> Any:
    """The model to train, with the adapter if it gets one; `sources` has what start models changed."""
    # Starts are seeded by module name; this seeds dropout.
    set_seed(config.seed)
    if prepared.plan is None:
        return loaded
    if experts := fused_experts(loaded):
        note(f"the experts of {config.model} are not adapted: they are fused tensors such as {experts[0]}")
    observed = dict(sources)
    if observation is not None:
        kept = starts_in(checkpoint_to_resume(run))
        for name, one in observation.layers.items():
            seen: dict[str, Any] = {**one, "start": kept.get(name)}
            observed[name] = dataclasses.replace(observed.get(name, Observed()), **seen)
    try:
        model = install_adapter(loaded, prepared.plan, prepared.basis, observed)
        if is_held_quantized(loaded):
            _try_layer(model, prepared)
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        # What PEFT raises for a kind of adapter that it does not know on layers of bitsandbytes depends on the kind.
        if not is_held_quantized(loaded):
            raise
        raise CoraError(
            f"PEFT cannot adapt {config.model} in mode {config.mode}, as its weights are held quantised ({reason(error)}); use {PLAIN_COPY}, or "
            "another mode such as lora"
        ) from error
    return model


@torch.no_grad()
def _try_layer(model: Any, prepared: Prepared) -> None:
    """Pass zeros through one adapted layer, the second time with what bitsandbytes keeps of the first."""
    layer: Any
    _, layer = next(adapted_layers(model))
    for _ in range(2):
        layer(torch.zeros(1, layer.in_features, dtype=prepared.hardware.dtype, device=prepared.hardware.device))


def _observation(loaded: Any, config: TrainConfig, prepared: Prepared, form: BatchForm) -> Observation | None:
    """What the start is computed from, where the method needs data for it."""
    kind = method_of(config.mode).observes(config.b_init)
    if kind is None:
        return None
    assert prepared.plan is not None
    scaled = method_of(config.mode).scales_inputs(prepared.plan)
    examples, hardware = prepared.start_examples, prepared.hardware
    return observe(loaded, kind, prepared.layers, examples, hardware, form, config.gradient_checkpointing, scaled)


def share_start(model: torch.nn.Module, arguments: TrainingArguments, observation: Observation | None) -> None:
    """Give all processes the start that the first one computed from data: on a GPU, gradients may differ in the last bits."""
    if observation is None or arguments.world_size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.data, 0)


def barrier(arguments: TrainingArguments) -> None:
    """Wait for the other processes, where there are any."""
    if arguments.world_size > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def _in_turn(arguments: TrainingArguments) -> Iterator[None]:
    """Let the processes of a host enter one after the other, also where one of them fails: together they would take several times its memory."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", str(arguments.world_size)))
    for _ in range(arguments.local_process_index):
        barrier(arguments)
    try:
        yield
    finally:
        for _ in range(arguments.local_process_index, together):
            barrier(arguments)
