"""Flat-LoRA: every step is taken at randomly perturbed weights, which leads to flat minima of the complete weights."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.methods.method import A_AND_B, Method, MethodSetting, Step
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import PeftModel

KEPT = "flat_lora_kept"
"""The attribute of a layer that holds W while the noise is in its place."""


class FlatLora(Method):
    """LoRA whose gradients are those at W + s·B·A + ε, with ε_jk ~ N(0, σ_t²‖(W + s·B·A)_j‖² / in) for row j of W (out, in).

    σ_t rises from 0 to σ: σ·½(1 − cos(π t / T)) at step t of T. All micro-batches of a step and all processes have the same ε, which
    is drawn from the seed, the step and the layer's name. The authors subtract ε again, which changes W by rounding; here W itself
    comes back, at the price of a copy of the adapted layers' weights during a step.
    """

    name = "flat-lora"
    paper = "2409.14396"
    summary = "as lora, with random noise on W in each step"
    DEFAULT_SIGMA = 0.05
    """The authors' value for language models."""
    settings = (
        MethodSetting("flat_sigma", float, f"Mode flat-lora: final strength σ of the noise; default {DEFAULT_SIGMA:g}."),
    )
    needs_complete_base = True
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    notes = (
        "The gradients of step t of T are those at W + s·B·A + ε, where row j of ε has the standard deviation σ_t‖(W + "
        "s·B·A)_j‖ / √in and σ_t = σ·½(1 − cos(π t / T)). All micro-batches of a step have the same ε. The authors add ε to W "
        "and subtract it again, which changes W by rounding, and draw it from a seed that the clock gives. Here W itself "
        "comes back after the step, at the price of a copy of the adapted layers' weights, and ε comes from the run's seed. "
        "It needs W as numbers, so `--load-in-4bit` and `--shard` are refused."
    )

    @property
    def trains_on_four_bit(self) -> bool:
        """The noise needs weights that it can be added to."""
        return False

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """σ is not negative."""
        sigma = settings["flat_sigma"]
        return [f"--flat-sigma must be at least 0, not {sigma}"] if sigma is not None and sigma < 0 else []

    def before_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Put W + ε in the place of W."""
        import torch

        from cora_cli.methods.parts.layers import factors_of, linear_weight, lora_layers
        from cora_cli.methods.parts.mean_change import mean_matrix
        from cora_cli.methods.parts.starts import seeded

        sigma = plan.own.get("flat_sigma", self.DEFAULT_SIGMA) * (1 - math.cos(math.pi * step.number / step.total)) / 2
        if not sigma:
            return
        with torch.no_grad():
            for name, layer in lora_layers(model):
                base: Any = layer.get_base_layer()
                linear = linear_weight(base)
                assert linear is not None
                w = linear.weight.float()
                a, b = factors_of(layer)
                adapted, mean = w + plan.scaling * b @ a, mean_matrix(layer)
                if mean is not None:
                    adapted += mean
                scale = sigma * adapted.norm(dim=1, keepdim=True) / math.sqrt(linear.in_features)
                generator = seeded(plan.seed, name, f"noise {step.number}", w.device)
                noisy = (w + scale * torch.randn(w.shape, generator=generator, device=w.device)).to(linear.weight.dtype)
                setattr(layer, KEPT, base.weight.data)
                base.weight.data = noisy.T.contiguous() if linear.transposed else noisy

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Put W back."""
        from cora_cli.methods.parts.layers import lora_layers

        for _, layer in lora_layers(model):
            if hasattr(layer, KEPT):
                layer.get_base_layer().weight.data = getattr(layer, KEPT)
                delattr(layer, KEPT)
