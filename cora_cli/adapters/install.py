"""Puts an adapter plan into a model: PEFT's LoRA with B and A started as the plan says, and exactly the planned tensors trained.

The forward of every mode is PEFT's own: where A or B is a product, only the linear map in its place is ours. Reading and writing
adapters is `storage`.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import _register_frozen_peft_weight
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from cora_cli.adapters.factored import Factored, minor_factors, principal_factors
from cora_cli.adapters.foreign import foreign_configuration, refused
from cora_cli.adapters.plan import AdapterPlan
from cora_cli.basis.artifact import Basis
from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError

ADAPTER = "default"


def target_linears(model: torch.nn.Module, target_modules: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    """The linear layers that `target_modules` names (whole names, or their last parts as in PEFT), by full name.

    Raises `CoraError` for a target that matches nothing, saying what exists, for one that is no `nn.Linear`, and for one whose weight is
    another module's too: merged into that, the adapter would change both.
    """
    found: dict[str, torch.nn.Linear] = {}
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    for target in target_modules:
        matches = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        linears = {name: module for name, module in matches.items() if isinstance(module, torch.nn.Linear)}
        if not linears:
            known = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)})
            problem = f"is a {type(next(iter(matches.values()))).__name__}, not an nn.Linear" if matches else "matches nothing"
            raise CoraError(f"target module {target!r} {problem} in this model; its linear layers are {', '.join(known)}")
        for name, linear in linears.items():
            if others := [other for other in shared.get(id(linear.weight), ()) if other != f"{name}.weight"]:
                raise CoraError(
                    f"target module {target!r}: the weight of {name} is that of {others[0]} too, so it cannot be adapted alone"
                )
        found |= linears
    return {name: found[name] for name in modules if name in found}


def install_adapter(model: PreTrainedModel, plan: AdapterPlan, basis: Basis | None) -> PeftModel:
    """Wrap `model` with an adapter that follows `plan`, in float32 on any base precision.

    Raises `CoraError` where the targets match nothing, or the basis does not fit (see `Basis.for_module`).
    """
    linears = target_linears(model, plan.target_modules)
    starts = {name: _starts(plan, basis, name, linear) for name, linear in linears.items()}
    config = configuration_of(plan)
    try:
        wrapped = get_peft_model(model, config)
    except (TypeError, ValueError, AssertionError, NotImplementedError, ImportError) as error:
        if plan.peft is None:
            raise
        # Each of these is how some method of PEFT says that a value or a layer does not suit it.
        raise refused(str(plan.peft["peft_type"]).upper(), error) from error
    if isinstance(config, LoraConfig):
        # A start of PEFT's own is made once: whoever loads the adapter must not make it again.
        config.init_lora_weights = True
    with torch.no_grad():
        for name, layer in lora_layers(wrapped):
            _start(layer, plan, starts[name])
    apply_trained_set(wrapped, plan)
    return wrapped


def configuration_of(plan: AdapterPlan) -> PeftConfig:
    """What PEFT is told. Raises `CoraError` where a file describes what cannot be trained here."""
    if plan.peft is not None:
        return foreign_configuration(plan.peft, plan.rank)
    common: dict[str, Any] = {"r": plan.rank, "target_modules": list(plan.target_modules), "task_type": "CAUSAL_LM"}
    if plan.spec.peft.get("peft_type") == "VERA":
        return VeraConfig(**common, vera_dropout=plan.dropout, projection_prng_key=plan.seed)
    options = {"lora_alpha": plan.alpha, "lora_dropout": plan.dropout, "use_rslora": plan.rslora}
    return LoraConfig(**{**common, **options, **plan.spec.peft})


def _starts(
    plan: AdapterPlan, basis: Basis | None, name: str, linear: torch.nn.Linear
) -> tuple[torch.Tensor | Factored, torch.Tensor | Factored] | None:
    """A (r, in) and B (out, r) at the start; None where PEFT makes them. Raises `CoraError` where there are none of that rank."""
    spec, smaller = plan.spec, min(linear.in_features, linear.out_features)
    if spec.reads_weights and plan.rank > smaller:
        raise CoraError(
            f"{name} has only {smaller} singular directions, fewer than --rank {plan.rank}, which mode {plan.mode} takes"
        )
    if spec.starts_in_peft:
        return None
    if spec.b_init == "minor":
        return minor_factors(linear.weight, plan.rank, plan.scaling)
    if spec.b_init == "principal":
        a, outer_b = principal_factors(linear.weight, plan.rank)
        return a, Factored(torch.zeros(plan.rank, plan.rank), outer_b, outer_first=False)
    b = start_b(plan, basis, name, linear.out_features)
    if plan.outer_rank is None:
        return start_a(plan, name, linear.in_features, basis), b
    outer_a = _orthonormal(plan, name, "A", linear.in_features).T.contiguous()
    inner_a = start_a(plan, name, plan.outer_rank)
    return Factored(inner_a, outer_a, outer_first=True), Factored(torch.zeros(plan.outer_rank, plan.rank), b, outer_first=False)


def _start(layer: LoraLayer, plan: AdapterPlan, starts: tuple[torch.Tensor | Factored, torch.Tensor | Factored] | None) -> None:
    """Put the starts into a layer; where the mode takes them out of W, do that, and keep them beside A and B as buffers `start`, which
    checkpoints hold too."""
    for factors, start in zip((layer.lora_A, layer.lora_B), starts or (None, None), strict=True):
        linear: Any = factors[ADAPTER]
        if isinstance(start, Factored):
            factors[ADAPTER] = start.to(linear.weight.device)
        elif start is not None:
            linear.weight.copy_(start)
    if not plan.spec.changes_base:
        return
    a, b = factors_of(layer)
    if starts is not None:
        weight = layer.get_base_layer().get_parameter("weight")
        weight.copy_(weight.float() - plan.scaling * b @ a)
    for linear, value in ((layer.lora_A[ADAPTER], a), (layer.lora_B[ADAPTER], b)):
        linear.register_buffer("start", value.detach().clone())


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer that any of PEFT's methods adapts, with the name that it has in the base model."""
    base: torch.nn.Module = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer with the name its linear layer has in the base model."""
    for name, module in adapted_layers(model):
        if isinstance(module, LoraLayer):
            yield name, module


def factors_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a LoRA layer: the parameters themselves, or the product where a factor is one."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight, b.weight


def apply_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Freeze A or B where the mode freezes it, then verify the whole trained set.

    PEFT turns `requires_grad` of all adapter weights back on in `set_adapter`, `disable_adapter` and when it loads for training;
    registering a factor as a frozen weight (as its MiCA variant does with B) survives the first two, and the loaders here call this
    again.
    """
    for _, layer in lora_layers(model):
        for factor in ("lora_A", "lora_B"):
            if plan.spec.trained and not any(key.startswith(factor) for key in plan.spec.trained):
                _register_frozen_peft_weight(layer, ADAPTER, factor)
    check_trained_set(model, plan)


def check_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Raise `CoraError` unless exactly the mode's tensors of every layer require gradients, and nothing else does."""
    keys = [key.partition(".") for key in plan.spec.trained]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not keys:
        base: Any = model.base_model
        if not trained or not all(base.prefix in name for name in trained):
            raise CoraError(
                f"the method of --peft-config trains {min(trained, default='nothing')}, not only tensors of its own"
            )
        return
    expected = {
        f"base_model.model.{name}.{first}.{ADAPTER}{dot}{rest}"
        for name, _ in adapted_layers(model)
        for first, dot, rest in keys
    }
    if wrong := sorted(expected ^ trained):
        raise CoraError(
            f"the trained set is not that of mode {plan.mode}: {len(wrong)} parameters differ, such as {wrong[0]} "
            f"({'trained' if wrong[0] in trained else 'frozen'})"
        )


def start_b(plan: AdapterPlan, basis: Basis | None, name: str, out_features: int) -> torch.Tensor:
    """B (out, r) float32 at the start, or the outer B (out, k) where B is a product, for the linear layer `name`.

    `random` is Kaiming uniform as PEFT starts A; `orthonormal` is uniform over orthonormal frames (QR of a Gaussian matrix).
    """
    shape = (out_features, plan.b_width)
    if plan.b_init == "basis":
        if basis is None:
            raise CoraError(f"mode {plan.mode} needs a basis to start B with")
        return basis.for_module(name, plan.b_width, out_features)
    if plan.b_init in ("zeros", "ones"):
        return torch.full(shape, float(plan.b_init == "ones"))
    if plan.b_init == "random":
        return _kaiming_uniform(shape, _generator(plan.seed, name, "B"))
    return _orthonormal(plan, name, "B", out_features)


def start_a(plan: AdapterPlan, name: str, in_features: int, basis: Basis | None = None) -> torch.Tensor:
    """A (r, in) float32 at the start: zeros, N(0, 1/r²) as PEFT's `gaussian`, PEFT's Kaiming uniform, or a basis of the input side."""
    shape = (plan.rank, in_features)
    if plan.a_init == "basis":
        if basis is None:
            raise CoraError(f"mode {plan.mode} needs a basis to start A with")
        return basis.for_module(name, plan.rank, in_features, "input").T.contiguous()
    generator = _generator(plan.seed, name, "A")
    if plan.a_init == "zeros":
        return torch.zeros(shape)
    if plan.a_init == "gaussian":
        return torch.randn(shape, generator=generator) / plan.rank
    return _kaiming_uniform(shape, generator)


def start_directions(plan: AdapterPlan, basis: Basis | None, name: str, features: int, side: Side) -> torch.Tensor | None:
    """What spans the start of B, or of Aᵀ for the input side: (features, r), or (features, k) of the outer part of a product, as drawn.

    None where that factor starts at zero, or as W or a file has it.
    """
    if side == "output":
        drawn = plan.b_init in ("basis", "ones", "random", "orthonormal")
        return start_b(plan, basis, name, features) if drawn else None
    if plan.outer_rank is not None:
        return _orthonormal(plan, name, "A", features)
    return start_a(plan, name, features, basis).T if plan.a_init in ("basis", "gaussian", "kaiming") else None


def _orthonormal(plan: AdapterPlan, name: str, factor: str, features: int) -> torch.Tensor:
    """Orthonormal columns (features, r or k) for B or Aᵀ. Raises `CoraError` where there are not so many."""
    if plan.b_width > features:
        side, flag = ("outputs" if factor == "B" else "inputs"), ("outer-rank" if plan.outer_rank else "rank")
        raise CoraError(
            f"{name} has {features} {side}, fewer than --{flag} {plan.b_width}: no orthonormal {factor} of that rank exists"
        )
    gaussian = torch.randn((features, plan.b_width), generator=_generator(plan.seed, name, factor), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


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
        self._frames: list[tuple[LoraLayer, torch.Tensor]] = []
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
