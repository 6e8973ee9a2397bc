"""Installs an adapter in a model: PEFT's layers with A and B started by the method, which also names the tensors that train.

The forward pass of every method is PEFT's own; where A or B is not simply a matrix, only the linear map in its place is ours. `storage` reads
and writes adapters.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import _register_frozen_peft_weight
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cora_cli.adapters.names import feedforward_among
from cora_cli.basis.artifact import Basis
from cora_cli.basis.choices import is_target
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.methods.parts.layers import (
    ADAPTER,
    LinearWeight,
    Observed,
    adapted_layers,
    factors_of,
    linear_weight,
    lora_layers,
    stores_transposed,
    transformers_model,
    without_cache,
)
from cora_cli.methods.parts.mean_change import add_mean_change, put_means, take_means
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.fused import VIEWS, split_projections, unknown_fused
from cora_cli.models.precision import UNSUPPORTED
from cora_cli.models.skeleton import fused_experts, other_modalities


def target_linears(model: torch.nn.Module, target_modules: tuple[str, ...]) -> dict[str, LinearWeight]:
    """The linear layers that `target_modules` names (full names, or their last parts as in PEFT), by full name.

    Of a model that also takes images or sound, these are layers of the language model only. Raises `CoraError` for a target that
    matches nothing, for one that is not linear, and for one whose weight is shared with another module: merging the adapter would
    change both.
    """
    found: dict[str, LinearWeight] = {}
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    others = other_modalities(model)
    modules = {name: module for name, module in model.named_modules() if name not in others}
    for target in target_modules:
        matches = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        linears = {name: weight for name, module in matches.items() if (weight := linear_weight(module)) is not None}
        if not linears:
            known = sorted({name.rpartition(".")[2] for name, module in modules.items() if linear_weight(module) is not None})
            experts = fused_experts(model)
            fused = f"; its experts are fused tensors such as {experts[0]}, which are not adapted" if experts else ""
            problem = (
                f"is a {type(next(iter(matches.values()))).__name__}, not a linear layer" if matches else "matches nothing"
            )
            if target.rpartition(".")[2] in VIEWS and (unknown := unknown_fused(model)):
                fused += f"; how {unknown.rpartition('.')[2]} holds queries, keys and values is not known, so only the complete layer can be adapted"
            raise CoraError(
                f"target module {target!r} {problem} in this model; its linear layers are {', '.join(known)}{fused}"
            )
        for name in linears:
            sharing = shared.get(id(model.get_submodule(name).weight), ())
            if also := [other for other in sharing if other != f"{name}.weight"]:
                instead = _with_own_weights(modules, shared)
                raise CoraError(
                    f"target module {target!r}: {name} shares its weight with {also[0]}, so it cannot be adapted alone{instead}"
                )
        found |= linears
    return {name: found[name] for name in modules if name in found}


def _with_own_weights(modules: Mapping[str, torch.nn.Module], shared: Mapping[int, Sequence[str]]) -> str:
    """The end of a sentence that names the linear layers whose weights are in no other place; empty if there are none."""
    places = {
        name: len(shared.get(id(module.weight), ())) for name, module in modules.items() if linear_weight(module) is not None
    }
    elsewhere = {name.rpartition(".")[2] for name, count in places.items() if count != 1}
    kinds = sorted({name.rpartition(".")[2] for name in places} - elsewhere)
    return f"; layers with weights of their own are {', '.join(kinds)}: name them with --target-modules" if kinds else ""


def check_applied(
    model: Any, target_modules: tuple[str, ...], tokens: Sequence[int], dtype: torch.dtype = torch.float32
) -> None:
    """Pass `tokens` through `model` forward and backward, as in training with an adapter in `dtype`, whether it has its adapter already or not.

    Raises `CoraError` for a target whose layers the pass never calls, as with Mamba's dt_proj: their weights are applied in another way, which
    would leave out the adapter; for one that no gradient reaches; for one that is a subclass of a linear layer with an output of another shape, as
    DeepSeek-V4's o_a_proj is; and for a model that computes no logits from token ids alone.
    """
    called: dict[str, torch.Tensor | None] = {}
    misshapen: dict[str, str] = {}

    def tap(name: str) -> Callable[..., Any]:
        def add_zero(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            called[name] = None
            if not isinstance(output, torch.Tensor):  # a router's
                return output
            if (linear := linear_weight(module)) and output.shape[-1] != linear.out_features:
                misshapen[name] = type(module).__name__
            zero = called[name] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output + zero

        return add_zero

    inner, training = transformers_model(model), model.training
    names = target_linears(model, target_modules) if inner is model else [name for name, _ in adapted_layers(model)]
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for name in names:
            undo.callback(inner.get_submodule(name).register_forward_hook(tap(name)).remove)
        # An adapter in the model has frozen the others, and those of a model that is divided among processes must not be changed.
        for weight in [each for each in model.parameters() if each.requires_grad and inner is model]:
            undo.callback(weight.requires_grad_(False).requires_grad_, True)
        undo.callback(model.train, training)
        model.train()
        way = "forward"
        try:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = model(input_ids=torch.tensor([list(tokens)], device=model.device), **without_cache(inner))
            if (logits := getattr(output, "logits", None)) is None:
                raise CoraError(f"{type(inner).__name__} cannot be trained: it computes no logits of next tokens")
            way = "backward"
            zeros = {name: zero for name, zero in called.items() if zero is not None and logits.requires_grad}
            gradients = torch.autograd.grad(logits.sum(), list(zeros.values()), allow_unused=True) if zeros else ()
        except UNSUPPORTED as error:
            if is_out_of_memory(error):
                raise
            raise CoraError(
                f"{type(inner).__name__} cannot be trained: its {way} pass on the token ids of an example ends in {type(error).__name__} "
                f"({reason(error)})"
            ) from error
    if misshapen:
        name, kind = next(iter(misshapen.items()))
        raise CoraError(
            f"{name} is a {kind}, whose output is not that of a linear layer, so it cannot be adapted; leave "
            f"{next(target for target in target_modules if is_target(name, target))} out of --target-modules"
        )
    reached = {name for name, zero in called.items() if zero is None}
    reached.update(name for name, gradient in zip(zeros, gradients, strict=True) if gradient is not None)
    for target in target_modules:
        if not any(is_target(name, target) for name in reached):
            why = (
                "computes no gradient of what such layers return"
                if any(is_target(name, target) for name in called)
                else "applies the weight of such layers without calling them, which leaves out an adapter"
            )
            raise CoraError(
                f"target module {target!r} would train nothing: {type(inner).__name__} {why}; leave it out of --target-modules"
            )


def install_adapter(
    model: PreTrainedModel, plan: AdapterPlan, basis: Basis | None, observed: Mapping[str, Observed] | None = None
) -> PeftModel:
    """Wrap `model` with an adapter that follows `plan`, in float32 on any base precision. Fused projections of which the plan names the
    views q_proj, k_proj and v_proj are split first.

    `observed` has what the starts of a method with `start_from`, or of a plan with `start`, are computed from, by layer. Raises `CoraError`
    where the targets match nothing, the method cannot adapt one of them, or the basis does not fit (see `Basis.for_module`).
    """
    split_projections(model, plan.target_modules)
    linears, method = target_linears(model, plan.target_modules), method_of(plan.mode)
    method.check_layers(plan, linears)
    known = {name: (observed or {}).get(name, Observed()) for name in linears}
    means = put_means(model, known) if plan.own.get("start") and method.reads_weights else []
    linears = target_linears(model, plan.target_modules)
    linears = {name: dataclasses.replace(one, observed=known[name]) for name, one in linears.items()}
    ranks = method.ranks(plan, linears)
    linears = {name: dataclasses.replace(one, rank=ranks.get(name)) for name, one in linears.items()}
    starts = {name: one.observed.start or method.starts(plan, basis, name, one) for name, one in linears.items()}
    config: Any = method.configuration(plan)
    _name_targets(config, model, plan.target_modules, linears)
    experts = fused_experts(model)
    try:
        wrapped = get_peft_model(model, config)
    except (TypeError, ValueError, AssertionError, NotImplementedError, ImportError) as error:
        if (explained := method.install_error(plan, error)) is None and experts:
            explained = _reaches_experts(plan, experts[0])
        if explained is None and isinstance(error, ValueError) and "incompatible with" in str(error):  # Mamba's out_proj
            explained = CoraError(f"--target-modules {','.join(plan.target_modules)} cannot be adapted: {reason(error)}")
        if explained is None:
            raise
        raise explained from error
    # For some families PEFT extends the names of layers to the tensors in which transformers fuses the experts.
    if experts and {name for name, _ in adapted_layers(wrapped)} - linears.keys():
        raise _reaches_experts(plan, experts[0])
    # PEFT itself subtracts the starts that it computes.
    take_means(means, subtracted=method.subtracts_start and not any(starts.values()))
    if isinstance(config, LoraConfig):
        # PEFT computes its own starts once; loading the adapter must not compute them again.
        config.init_lora_weights = True
    if isinstance(config, IA3Config):
        _name_feedforward(config, linears)
    with torch.no_grad():
        for name, layer in lora_layers(wrapped):
            _start(layer, plan, starts[name])
            if plan.own.get("start"):
                add_mean_change(layer, linears[name].observed.sources)
        method.after_install(wrapped, plan)
    apply_trained_set(wrapped, plan)
    return wrapped


def _reaches_experts(plan: AdapterPlan, expert: str) -> CoraError:
    return CoraError(
        f"PEFT applies --target-modules {','.join(plan.target_modules)} to the fused experts of this model too, such as {expert}, which "
        "are not adapted here; name layers of the attention only"
    )


def _name_targets(config: Any, model: PreTrainedModel, targets: tuple[str, ...], linears: Collection[str]) -> None:
    """Tell PEFT the layers to adapt by full name where `targets` also match others, and whether they store W as (in, out)."""
    matched = {name for name, _ in model.named_modules() if any(name == one or name.endswith(f".{one}") for one in targets)}
    if matched != set(linears):
        config.target_modules = set(linears)
    if any(isinstance(model.get_submodule(name), Conv1D) for name in linears) and "fan_in_fan_out" in vars(config):
        config.fan_in_fan_out = True


def _name_feedforward(config: Any, linears: Collection[str]) -> None:
    """Have an installed IA3 stored with settings that PEFT reads; see `feedforward_among`."""
    if not isinstance(config.feedforward_modules, str):
        for setting, names in feedforward_among(config.feedforward_modules, config.target_modules, linears).items():
            setattr(config, setting, {*names})


def _start(
    layer: LoraLayer, plan: AdapterPlan, starts: tuple[torch.Tensor | torch.nn.Module, torch.Tensor | torch.nn.Module] | None
) -> None:
    """Put the starts into a layer. Where the method subtracts them from W, do that and keep them as buffers `start` of A and B, so
    that checkpoints contain them."""
    for factors, start in zip((layer.lora_A, layer.lora_B), starts or (None, None), strict=True):
        linear: Any = factors[ADAPTER]
        if isinstance(start, torch.nn.Module):
            factors[ADAPTER] = start.to(linear.weight.device)
        elif start is not None:
            linear.weight.copy_(start)
    if not method_of(plan.mode).subtracts_start:
        return
    a, b = factors_of(layer)
    if starts is not None:
        weight = layer.get_base_layer().get_parameter("weight")
        change = plan.scaling * b @ a
        weight.copy_(weight.float() - (change.T if stores_transposed(layer) else change))
    for linear, value in ((layer.lora_A[ADAPTER], a), (layer.lora_B[ADAPTER], b)):
        linear.register_buffer("start", value.detach().clone())


def apply_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Freeze A or B where the method freezes it, then verify the complete trained set.

    PEFT turns `requires_grad` of all adapter weights back on in `set_adapter`, in `disable_adapter` and when it loads for training.
    Registering a factor as a frozen weight, as PEFT's MiCA variant does with B, survives the first two; after a load, call this again.
    """
    method = method_of(plan.mode)
    for _, layer in lora_layers(model):
        for factor in ("lora_A", "lora_B"):
            if method.freezes(factor):
                _register_frozen_peft_weight(layer, ADAPTER, factor)
    check_trained_set(model, plan)


def check_trained_set(model: PeftModel, plan: AdapterPlan) -> None:
    """Raise `CoraError` unless exactly the method's tensors of every layer require gradients, and nothing else does."""
    expected = method_of(plan.mode).trained_names([name for name, _ in adapted_layers(model)], ADAPTER)
    # Under every name of a parameter that layers share.
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    if not expected and method_of(plan.mode).can_train(plan):
        base: Any = model.base_model
        others = {name for name in trained if base.prefix not in name}
        if not trained:
            raise CoraError("--peft-config: nothing is trained")
        if others:
            bias = plan.own.get("peft", {}).get("bias", "none")
            remedy = f', because of "bias": "{bias}"; "bias": "none" leaves them out' if bias != "none" else ""
            raise CoraError(
                f"--peft-config: {len(others)} parameters next to the adapter would be trained too, such as {min(others)}, which `cora train` does not do{remedy}"
            )
        return
    if wrong := sorted(expected ^ trained):
        raise CoraError(
            f"mode {plan.mode} does not train the parameters it should: {len(wrong)} differ, such as {wrong[0]} "
            f"({'trained' if wrong[0] in trained else 'frozen'})"
        )


class AngleMeter:
    """Measures how far a trained B has turned from its start, as the largest principal angle over all layers."""

    def __init__(self, model: PeftModel) -> None:
        """Remember an orthonormal frame of every B. Raises `CoraError` where a B has dependent columns, and so no frame."""
        self._frames: list[tuple[LoraLayer, torch.Tensor]] = []
        for name, layer in lora_layers(model):
            start = factors_of(layer)[1].detach().double()
            frame, triangle = torch.linalg.qr(start)
            if triangle.diagonal().abs().min() <= 1e-9 * triangle.diagonal().abs().max():
                raise CoraError(f"B of {name} starts with linearly dependent columns, so no angle to it is defined")
            self._frames.append((layer, frame))

    @staticmethod
    def applies(plan: AdapterPlan | None) -> bool:
        """Whether B trains from a start that spans a subspace."""
        if plan is None or not plan.trains_b:
            return False
        chosen = plan.b_init == "gradient" and method_of(plan.mode).b_init_is_free
        return chosen or plan.b_init in ("basis", "orthonormal", "random")

    def largest(self) -> float:
        """Largest principal angle in radians between span(B) now and at the start: arcsin ‖(I − QQᵀ)orth(B)‖₂."""
        sines = []
        for layer, frame in self._frames:
            now, _ = torch.linalg.qr(factors_of(layer)[1].detach().double())
            outside = now - frame @ (frame.T @ now)
            sines.append(torch.linalg.matrix_norm(outside, 2))
        return float(torch.stack(sines).max().clamp(max=1.0).arcsin())
