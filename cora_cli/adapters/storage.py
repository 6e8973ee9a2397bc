"""Reads and writes adapters: standard PEFT directories with a side file of `cora`'s own facts, and the compact form.

After every load it is verified that all keys arrived and that an adapter which was trained changes the model. Starting values
and trained sets are `install`.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cora_cli import rundir
from cora_cli.adapters.install import ADAPTER, apply_trained_set, factors_of, lora_layers, start_b
from cora_cli.adapters.plan import AdapterPlan
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.errors import CoraError, reason
from cora_cli.models.references import ModelPath, resolve_model

SIDE_FILE = "cora.json"
COMPACT_FILE = rundir.COMPACT_ADAPTER
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """What `cora` knows of an adapter beyond PEFT's configuration (`cora.json` in its directory)."""

    plan: AdapterPlan
    base: str
    base_revision: str | None
    base_sha256: str
    basis: str | None
    basis_sha256: str | None
    compact: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "plan": self.plan.as_dict()}


def read_facts(directory: Path) -> AdapterFacts | None:
    """Read `cora.json`; None where the adapter was made by something else. Raises `CoraError` where it is damaged."""
    path = directory / SIDE_FILE
    if not path.exists():
        return None
    values = rundir.read_json(path)
    try:
        return AdapterFacts(**{**values, "plan": AdapterPlan.from_dict(values["plan"])})
    except (KeyError, TypeError) as error:
        raise CoraError(f"{path} is not a record of a cora adapter: {error}") from error


def save_adapter(model: PeftModel, directory: Path, facts: AdapterFacts) -> None:
    """Write the adapter of `model` to `directory` in one step.

    The standard form is what PEFT and others load unchanged: A and B, with products carried out; a mode that took its start out of W is
    stored as its difference from that start, a LoRA of twice the rank on W itself. The compact form (`facts.compact`) holds A alone,
    and B is had again from the basis file or the seed. Raises `CoraError` for the compact form of a trained B.
    """
    if facts.compact and facts.plan.trains_b:
        raise CoraError(f"mode {facts.plan.mode} trains B, which the compact form would lose; leave out --compact")
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    config: Any = copy.copy(model.peft_config[ADAPTER])
    if facts.plan.spec.stored_otherwise:
        state = _plain_state(model)
    if facts.plan.spec.changes_base:
        config.r, config.lora_alpha, config.use_rslora = 2 * facts.plan.rank, 2 * facts.plan.rank * facts.plan.scaling, False
    if isinstance(config, LoraConfig) and float(config.lora_alpha).is_integer():
        config.lora_alpha = int(config.lora_alpha)  # what PEFT's field is, and what others' readers may insist on
    # Copies, since a safetensors file takes no two names of one tensor, as the random matrices are that layers share.
    state = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
    config.base_model_name_or_path = facts.base.partition("@")[0] if facts.base_revision else facts.base
    config.revision = facts.base_revision
    config.inference_mode = True
    name = WEIGHTS_FILE
    if facts.compact:
        name, state = COMPACT_FILE, {key: tensor for key, tensor in state.items() if ".lora_A." in key}
    try:
        with rundir.atomic_path(directory) as temporary:
            config.save_pretrained(str(temporary))
            save_file(state, temporary / name, metadata={"format": "pt"})
            rundir.write_json(temporary / SIDE_FILE, facts.as_dict())
    except SafetensorError as error:
        raise CoraError(f"{directory} cannot be written: {error}") from error


def _plain_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A (r, in) and B (out, r) of every layer with the products carried out; where the start was taken out of W, A' (2r, in) and
    B' (out, 2r) with B'·A' = B·A − B₀·A₀, as PEFT converts its own adapters of this kind (`LoraModel.subtract_mutated_init`)."""
    state = {}
    for name, layer in lora_layers(model):
        starts = [dict(linear.named_buffers()).get("start") for linear in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]
        a, b = factors_of(layer)
        if starts[0] is not None and starts[1] is not None:
            a, b = torch.cat([a, starts[0]], dim=0), torch.cat([b, -starts[1]], dim=1)
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
    return state


def load_adapter(
    model: PreTrainedModel, adapter: ModelPath, basis_path: Path | None = None, trainable: bool = False
) -> PeftModel:
    """Wrap `model` with the adapter at `adapter`, standard or compact, its B frozen again where its mode freezes it.

    Raises `CoraError` where keys are missing or foreign, where a basis is needed and differs from the recorded one, where an
    adapter of a training mode turns out to change nothing, and where what is stored is not what is to be trained on.
    """
    facts = read_facts(adapter.path)
    if trainable and facts is not None and facts.plan.spec.stored_otherwise:
        raise CoraError(
            f"adapter {adapter.path} of mode {facts.plan.mode} is stored as a plain LoRA of equal effect, not as it was trained; the run's "
            "checkpoints are"
        )
    try:
        with warnings.catch_warnings():
            # PEFT only warns of missing keys; `_check_arrived` turns that into an error.
            warnings.simplefilter("ignore")
            if facts is not None and facts.compact:
                wrapped = _load_compact(model, adapter, facts, basis_path, trainable)
            else:
                adapter.weight_files()  # PEFT would look for missing ones on the hub
                wrapped = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=trainable)
                _check_arrived(wrapped, load_peft_weights(str(adapter.path), device="cpu"), adapter)
    except CoraError:
        raise
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CoraError(f"adapter {adapter.path} cannot be loaded: {reason(error)}") from error
    if facts is not None:
        if trainable:
            apply_trained_set(wrapped, facts.plan)
        if not facts.plan.cannot_train and not changes_model(wrapped):
            raise CoraError(f"adapter {adapter.path} was trained, but changes no weight: B·A is zero in every layer")
    return wrapped.eval()


def base_of(adapter: ModelPath) -> ModelPath:
    """The base model that an adapter names. Raises `CoraError` where it names none, or that is not to be had."""
    config = adapter.adapter_config()
    reference, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not reference:
        raise CoraError(f"adapter {adapter.path} does not say what its base model is")
    return resolve_model(f"{reference}@{revision}" if revision else reference)


def check_base(adapter: ModelPath, base: ModelPath) -> None:
    """Raise `CoraError` where `base` is not the model that a `cora` adapter was trained on; others do not record it."""
    facts = read_facts(adapter.path)
    if facts is not None and facts.base_sha256 != (found := base.content_hash()):
        raise CoraError(
            f"{adapter.reference} was trained on {facts.base} with content hash {facts.base_sha256}, but {base.path} has {found}: "
            "it is another model, or it has changed"
        )


def changes_model(model: PeftModel) -> bool:
    """Whether any layer's ΔW = s·B·A is non-zero; a method of PEFT that has no such factors is taken at its word."""
    pairs = [factors_of(layer) for _, layer in lora_layers(model)]
    return not pairs or any(bool((b.detach().float() @ a.detach().float()).any()) for a, b in pairs)


def _check_arrived(wrapped: PeftModel, state: dict[str, torch.Tensor], adapter: ModelPath) -> None:
    expected = set(get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False))
    if lost := sorted(expected ^ set(state)):
        kind = "is missing" if lost[0] in expected else "belongs to no layer of this model"
        raise CoraError(f"adapter {adapter.path}: {len(lost)} keys do not fit the model, the first, {lost[0]}, {kind}")


def starting_b(
    adapter: ModelPath, facts: AdapterFacts, basis_path: Path | None = None, remedy: str = "name it with --basis"
) -> Callable[[str, int], torch.Tensor]:
    """The B, (out, r) float32, of a compact adapter by a layer's name and out-dimension: from the basis or the seed on record.

    Raises `CoraError` where the basis is not where it was and not at `basis_path` (the message ends with `remedy`), or is another one.
    """
    basis = _recorded_basis(facts, basis_path, adapter, remedy) if facts.plan.needs_basis else None
    return lambda name, out_features: start_b(facts.plan, basis, name, out_features)


def _load_compact(
    model: PreTrainedModel, adapter: ModelPath, facts: AdapterFacts, basis_path: Path | None, trainable: bool
) -> PeftModel:
    b_of = starting_b(adapter, facts, basis_path)
    factors = load_file(adapter.path / COMPACT_FILE)
    full = dict(factors)
    outputs = {name: module.out_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for key in factors:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name not in outputs:
            raise CoraError(f"adapter {adapter.path}: the key {key} belongs to no linear layer of this model")
        full[key.replace(".lora_A.", ".lora_B.")] = b_of(name, outputs[name])
    config = LoraConfig.from_pretrained(str(adapter.path))
    config.inference_mode = not trainable
    wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, full)
    _check_arrived(wrapped, full, adapter)
    return wrapped


def _recorded_basis(facts: AdapterFacts, basis_path: Path | None, adapter: ModelPath, remedy: str) -> Basis:
    path = basis_path or (Path(facts.basis) if facts.basis else None)
    if path is None or not path.exists():
        raise CoraError(f"adapter {adapter.path} is compact: its B is in the basis {path}, which is not there; {remedy}")
    basis = read_basis(path)
    if basis.sha256 != facts.basis_sha256:
        raise CoraError(f"adapter {adapter.path} was trained with the basis {facts.basis_sha256}, but {path} is {basis.sha256}")
    return basis
