"""Puts an adapter plan into a model: PEFT's LoRA with B and A started as the plan says, and exactly the planned factors trained.

CoRA's forward is LoRA's, so no layer of our own is needed. Reading and writing adapters is `storage`.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import _register_frozen_peft_weight
from transformers import PreTrainedModel

from cora_cli.adapters.modes import AdapterPlan
from cora_cli.basis.artifact import Basis
from cora_cli.errors import CoraError

ADAPTER = "default"


def target_linears(model: torch.nn.Module, target_modules: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    """The linear layers that `target_modules` names (whole names, or their last parts as in PEFT), by full name.

    Raises `CoraError` for a target that matches nothing, saying what exists, and for one that is no `nn.Linear`.
    """
    found: dict[str, torch.nn.Linear] = {}
    modules = dict(model.named_modules())
    for target in target_modules:
        matches = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        linears = {name: module for name, module in matches.items() if isinstance(module, torch.nn.Linear)}
        if not linears:
            known = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)})
            problem = f"is a {type(next(iter(matches.values()))).__name__}, not an nn.Linear" if matches else "matches nothing"
            raise CoraError(f"target module {target!r} {problem} in this model; its linear layers are {', '.join(known)}")
        found |= linears
    return {name: found[name] for name in modules if name in found}


def install_adapter(model: PreTrainedModel, plan: AdapterPlan, basis: Basis | None) -> PeftModel:
    """Wrap `model` with an adapter that follows `plan`, in float32 on any base precision.

    Raises `CoraError` where the targets match nothing, or the basis does not fit (see `Basis.for_module`).
    """
    linears = target_linears(model, plan.target_modules)
    starts = {name: start_b(plan, basis, name, linear.out_features) for name, linear in linears.items()}
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]  # annotated int, but only ever divided
        target_modules=list(plan.target_modules),
        lora_dropout=plan.dropout,
        use_rslora=plan.rslora,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in lora_layers(wrapped):
            a, b = factors_of(layer)
            b.copy_(starts[name])
            a.copy_(start_a(plan, name, a.shape[1]))
    apply_trained_set(wrapped, plan)
    return wrapped


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLinear]]:
    """Every LoRA layer with the name its linear layer has in the base model."""
    base: torch.nn.Module = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def factors_of(layer: LoraLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a LoRA layer, as the parameters that they are."""
    return layer.get_parameter(f"lora_A.{ADAPTER}.weight"), layer.get_parameter(f"lora_B.{ADAPTER}.weight")


def apply_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Freeze B where the plan freezes it, then verify the whole trained set.

    PEFT turns `requires_grad` of all adapter weights back on in `set_adapter`, `disable_adapter` and when it loads for training;
    registering B as a frozen weight (as its MiCA variant does) survives the first two, and the loaders here call this again.
    """
    for _, layer in lora_layers(model):
        if not plan.trains_b:
            _register_frozen_peft_weight(layer, ADAPTER, "lora_B")
    check_trained_set(model, plan)


def check_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Raise `CoraError` unless exactly the planned factors of every LoRA layer require gradients, and nothing else does."""
    factors = ("lora_A", "lora_B") if plan.trains_b else ("lora_A",)
    expected = {f"base_model.model.{name}.{factor}.{ADAPTER}.weight" for name, _ in lora_layers(model) for factor in factors}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted(expected ^ trained):
        raise CoraError(
            f"the trained set is not that of mode {plan.mode}: {len(wrong)} parameters differ, such as {wrong[0]} "
            f"({'trained' if wrong[0] in trained else 'frozen'})"
        )


def start_b(plan: AdapterPlan, basis: Basis | None, name: str, out_features: int) -> torch.Tensor:
    """B (out, r) float32 at the start, for the linear layer `name`.

    `random` is Kaiming uniform as PEFT starts A; `orthonormal` is uniform over orthonormal frames (QR of a Gaussian matrix).
    """
    shape = (out_features, plan.rank)
    if plan.b_init == "basis":
        if basis is None:
            raise CoraError(f"mode {plan.mode} needs a basis to start B with")
        return basis.for_module(name, plan.rank, out_features)
    if plan.b_init in ("zeros", "ones"):
        return torch.full(shape, float(plan.b_init == "ones"))
    if plan.b_init == "random":
        return _kaiming_uniform(shape, _generator(plan.seed, name, "B"))
    if plan.rank > out_features:
        raise CoraError(
            f"{name} has {out_features} outputs, fewer than --rank {plan.rank}: no orthonormal B of that rank exists"
        )
    gaussian = torch.randn(shape, generator=_generator(plan.seed, name, "B"), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def start_a(plan: AdapterPlan, name: str, in_features: int) -> torch.Tensor:
    """A (r, in) float32 at the start: zeros, N(0, 1/r²) as PEFT's `gaussian`, or PEFT's Kaiming uniform."""
    shape = (plan.rank, in_features)
    generator = _generator(plan.seed, name, "A")
    if plan.a_init == "zeros":
        return torch.zeros(shape)
    if plan.a_init == "gaussian":
        return torch.randn(shape, generator=generator) / plan.rank
    return _kaiming_uniform(shape, generator)


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape)
    return torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def _generator(seed: int, name: str, factor: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{factor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class AngleMeter:
    """Measures how far a trained B has turned from its start, as the largest principal angle over all layers."""

    def __init__(self, model: PeftModel) -> None:
        """Remember an orthonormal frame of every B. Raises `CoraError` where a B has dependent columns, and so no frame."""
        self._frames: list[tuple[LoraLinear, torch.Tensor]] = []
        for name, layer in lora_layers(model):
            start = factors_of(layer)[1].detach().double()
            frame, triangle = torch.linalg.qr(start)
            if triangle.diagonal().abs().min() <= 1e-9 * triangle.diagonal().abs().max():
                raise CoraError(f"B of {name} starts with dependent columns: no angle to it is defined")
            self._frames.append((layer, frame))

    def largest(self) -> float:
        """Largest principal angle in radians between span(B) now and at the start: arcsin ‖(I − QQᵀ)orth(B)‖₂."""
        sines = []
        for layer, frame in self._frames:
            now, _ = torch.linalg.qr(factors_of(layer)[1].detach().double())
            outside = now - frame @ (frame.T @ now)
            sines.append(torch.linalg.matrix_norm(outside, 2))
        return float(torch.stack(sines).max().clamp(max=1.0).arcsin())
