"""Writes adapters: standard PEFT directories with `cora.json` next to PEFT's files, and the compact form. `loading` reads them."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from cora_cli import rundir, writing
from cora_cli.adapters.facts import COMPACT_FILE, SIDE_FILE, AdapterFacts
from cora_cli.adapters.posterior import write_row_noise
from cora_cli.errors import CoraError
from cora_cli.methods.parts.computed import Computed
from cora_cli.methods.parts.layers import ADAPTER, factors_of, lora_layers
from cora_cli.methods.parts.mean_change import with_mean_change
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.fused import split_parts
from cora_cli.models.model_path import OWN_TYPE, ModelPath
from cora_cli.models.references import location
from cora_cli.models.tokenizer import save_tokenizer
from cora_cli.records import read_run

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: PeftModel, directory: Path, facts: AdapterFacts, tokenizer: Any = None) -> None:
    """Write the adapter of `model` to `directory` in one step, with a `tokenizer` if there is one.

    PEFT and others load the standard form unchanged: A and B, with computed factors as matrices. A method that subtracted its start
    from W is stored as the difference from that start, a LoRA of twice the rank on W itself. A method without an equivalent LoRA is
    stored as its trained tensors, which only `load_adapter` reads. The compact form (`facts.compact`) holds A alone;
    B is rebuilt from the basis file or the seed. Raises `CoraError` for the compact form of a trained B.
    """
    method = method_of(facts.plan.mode)
    if facts.compact and facts.plan.trains_b:
        raise CoraError(f"mode {facts.plan.mode} trains B, which the compact form would lose; leave out --compact")
    state, rank = stored_state(model, facts.plan, facts.compact)
    config: Any = copy.copy(model.peft_config[ADAPTER])
    if rank is not None and rank != config.r:
        scaling = next(layer.scaling[ADAPTER] for _, layer in lora_layers(model))
        config.r, config.lora_alpha, config.use_rslora = rank, rank * scaling, False
    if not method.plain_peft_loads:
        # A type that PEFT does not know: it would load a LoRA with foreign names as one without effect.
        config.peft_type = f"{OWN_TYPE}{facts.plan.mode}"
    elif split_parts(model):
        # PEFT passes over views of projections, which the model has as one, if it finds any other target.
        config.peft_type = f"{OWN_TYPE}{config.peft_type.value}"
    order_names(config)
    if isinstance(config, LoraConfig) and float(config.lora_alpha).is_integer():
        config.lora_alpha = int(config.lora_alpha)  # the type of PEFT's field, which other readers may require
    # Copies, since safetensors refuses one tensor under two names, and layers may share matrices.
    state = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
    config.base_model_name_or_path = facts.base.partition("@")[0] if facts.base_revision else location(facts.base)
    config.revision = facts.base_revision
    config.inference_mode = True
    name = COMPACT_FILE if facts.compact else WEIGHTS_FILE
    posterior = method.posterior(model, facts.plan)
    if posterior is not None and rank is not None:  # the rows of a mean have no distribution
        posterior = {name: pad(one, (0, rank - len(one))) for name, one in posterior.items()}
    try:
        with writing.atomic_path(directory) as temporary:
            config.save_pretrained(str(temporary))
            save_file(state, temporary / name, metadata={"format": "pt"})
            if posterior is not None:
                write_row_noise(temporary, posterior)
            if tokenizer is not None:
                save_tokenizer(tokenizer, temporary, directory)
            writing.write_json(temporary / SIDE_FILE, dataclasses.replace(facts, views=bool(split_parts(model))).as_dict())
    except SafetensorError as error:
        raise CoraError(f"{directory} cannot be written: {error}") from error


def stored_state(model: PeftModel, plan: AdapterPlan, compact: bool) -> tuple[dict[str, torch.Tensor], int | None]:
    """The tensors that `save_adapter` writes, by name, and the rank of the plain LoRA that they are; None where they are the trained ones."""
    if stores_trained(plan):
        state, rank = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False), None
    else:
        state, rank = _plain_state(model, plan)
    return {key: tensor for key, tensor in state.items() if not compact or ".lora_A." in key}, rank


def stores_trained(plan: AdapterPlan) -> bool:
    """Whether the stored tensors are the trained ones: the method's are, and no mean of earlier changes stands next to them."""
    return method_of(plan.mode).stored_as_trained and not plan.own.get("start")


def check_is_complete(adapter: ModelPath) -> None:
    """Raise `CoraError` for a checkpoint of a run whose trained tensors are not all of the adapter, such as one next to a frozen mean."""
    place = writing.absolute(adapter.path)
    run = rundir.RunDirectory(place.parent.parent)
    if place.parent != run.checkpoints or not run.exists() or (plan := read_run(run)["plan"]) is None:
        return
    method_of(plan["mode"], run.record)
    if not stores_trained(AdapterPlan.from_dict(plan)):
        start = f" with --start {plan['start']}" if plan.get("start") else ""
        raise CoraError(
            f"{adapter.reference} is a checkpoint of a run of mode {plan['mode']}{start}, which holds only what is trained and not all that the "
            f"adapter adds; complete the run with --resume, and name {run.root}"
        )


def order_names(config: Any) -> None:
    """Sort the sets of names in a configuration, which PEFT would write in the order of Python's hash seed."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _plain_state(model: PeftModel, plan: AdapterPlan) -> tuple[dict[str, torch.Tensor], int]:
    """A (k, in) and B (out, k) of every layer with computed factors as matrices, and their rank k, the largest of any layer.

    Where the start was subtracted from W, they are A' (2r, in) and B' (out, 2r) with B'·A' = B·A − B₀·A₀, as PEFT converts its own
    adapters of this kind (`LoraModel.subtract_mutated_init`). A mean of earlier changes makes up further pairs; a method that trains nothing
    has no others.
    """
    factors = {}
    for name, layer in lora_layers(model):
        starts = [dict(linear.named_buffers()).get("start") for linear in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]
        a, b = factors_of(layer)
        if starts[0] is not None and starts[1] is not None:
            a, b = torch.cat([a, starts[0]], dim=0), torch.cat([b, -starts[1]], dim=1)
        if not method_of(plan.mode).can_train(plan):
            a, b = a[:0], b[:, :0]
        factors[name] = with_mean_change(layer, a, b)
    return plain_factors(factors)


def plain_factors(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], int]:
    """A (k, in) and B (out, k) of every layer by PEFT's names, and k. Zeros beyond a layer's own rank change nothing."""
    rank = max(len(a) for a, _ in factors.values())
    state = {}
    for name, (a, b) in factors.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = pad(a, (0, 0, 0, rank - len(a)))
        state[f"{PREFIX}{name}.lora_B.weight"] = pad(b, (0, rank - len(a)))
    return state, rank


def make_room(model: PeftModel, checkpoint: Path) -> None:
    """Give the adapter's tensors the shapes that they have in the directory `checkpoint`, where a method changes them in training."""
    found = [
        (f"{PREFIX}{name}.{factor}.", module)
        for name, layer in lora_layers(model)
        for factor in ("lora_A", "lora_B")
        if isinstance(module := getattr(layer, factor)[ADAPTER], Computed)
    ]
    if not found:
        return
    with safe_open(checkpoint / WEIGHTS_FILE, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dictionary
    for prefix, module in found:
        module.resize({key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)})


def starts_in(checkpoint: Path | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The A and B that were subtracted from W, by layer, in the directory `checkpoint`; empty for a method that subtracts none.

    A start from gradients need not be the same when it is computed again.
    """
    if checkpoint is None:
        return {}
    state = load_file(checkpoint / WEIGHTS_FILE)
    ends = (PREFIX, ".lora_A.start")
    names = [key.removeprefix(ends[0]).removesuffix(ends[1]) for key in state if key.endswith(ends[1])]
    return {name: (state[f"{ends[0]}{name}{ends[1]}"], state[f"{ends[0]}{name}.lora_B.start"]) for name in names}
