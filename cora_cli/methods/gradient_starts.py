"""LoRA-SB, LoRA-One and LoRA-GA: A and B start from singular directions of the gradient of W in the first training examples."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import A_AND_B, B_INNER, START_EXAMPLES, Method, MethodSetting, Shapes
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.factored import Factored
    from cora_cli.methods.parts.layers import LinearWeight

_COST = (
    "The gradient costs a forward and a backward pass over these examples, and the CPU's memory of one float32 copy of the adapted weights; the "
    "SVD of each is exact. `run.json` records the number of examples, the hash of their tokens and the time. `--load-in-4bit` is refused."
)
_GAMMA = MethodSetting("start_gamma", float, "Modes lora-one and lora-ga: γ, which divides the start; default 128 and 16.")


class _GradientStart(Method):
    """What the three have in common."""

    b_init, a_init = "gradient", "gradient"
    start_from = "gradient"

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """γ is positive."""
        gamma = settings["start_gamma"]
        return [f"--start-gamma must be positive, not {gamma}"] if gamma is not None and not gamma > 0 else []

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of the gradient."""
        return svd_flops(out, inside)

    def gradient(self, linear: "LinearWeight") -> "torch.Tensor":
        """∂L/∂W (out, in)."""
        assert linear.observed.gradient is not None
        return linear.observed.gradient


class LoraSb(_GradientStart):
    """ΔW = U_r·R·V_rᵀ with U_r and V_r of −η·sign(∂L/∂W), frozen, and R (r, r) trained from Σ_r: the best rank-r form of a step of size η."""

    name = "lora-sb"
    paper = "2411.19557"
    summary = "A = V_rᵀ and U_r of a step −η·sign(∂L/∂W), frozen; B = U_r R with R = Σ_r"
    takes = frozenset()
    settings = (
        START_EXAMPLES,
        MethodSetting("start_step", float, "Mode lora-sb: η, the size of that step; default: --learning-rate / warm-up steps."),
    )
    trained: ClassVar[Shapes] = {B_INNER: ("r", "r")}
    step_0_is_base = "no: a step of size η"
    notes = (
        "ΔW starts as the part of rank r of −η·sign(G), where G is the gradient of the mean loss over the first 64 training examples "
        "(`--start-examples`; the authors use 50 to 170). η is the learning rate divided by the number of warm-up steps, as in the authors' code "
        "(CERT-Lab/lora-sb), or `--start-step`. s = 1, and `--alpha` does not apply. Gradients reach R alone, through orthonormal factors, so "
        f"that Adam's steps are about those of the complete weights. {_COST}"
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """η is positive."""
        step = settings["start_step"]
        return [f"--start-step must be positive, not {step}"] if step is not None and not step > 0 else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1."""
        return dataclasses.replace(request, alpha=float(request.rank))

    def for_run(self, plan: AdapterPlan, learning_rate: float, warmup: int) -> AdapterPlan:
        """η is the learning rate over the steps of the warm-up unless it is given."""
        return dataclasses.replace(plan, own={"start_step": learning_rate / max(1, warmup), **plan.own})

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, Factored]":
        """V_rᵀ, and the product of U_r with R."""
        from cora_cli.methods.parts.factored import Factored
        from cora_cli.methods.parts.gradient import sign_factors

        a, outer, inner = sign_factors(self.gradient(linear), plan.rank, plan.own["start_step"])
        return a, Factored(inner, outer, outer_first=False)

    def holds_start(self, side: Side) -> bool:
        """The stored B = U_r R spans what U_r does."""
        return True


class LoraOne(_GradientStart):
    """s·B·A = (s / (γΣ₁))·(the part of rank r of −∂L/∂W); W stays as it is, so that training begins one step of gradient descent later."""

    name = "lora-one"
    paper = "2502.01235"
    summary = "B·A = U_r (Σ_r / (γΣ₁)) V_rᵀ of −∂L/∂W"
    takes = frozenset({"alpha"})
    settings = (START_EXAMPLES, _GAMMA)
    trained: ClassVar[Shapes] = A_AND_B
    DEFAULT_EXAMPLES = 8
    DEFAULT_GAMMA = 128.0
    peft_options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}
    step_0_is_base = "no: a step of gradient descent"
    notes = (
        "The gradient is that of the mean loss over the first 8 training examples (`--start-examples`), and γ is `--start-gamma`, 128, as in the "
        "authors' code (YuanheZ/LoRA-One), whose README leaves out √Σ and Σ₁. s = alpha / √r, as there; with the `--alpha` of their scripts, 16. The "
        f"preconditioner of their training is not released, so that training is plain LoRA's. {_COST}"
    )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """√(Σ_r / (γΣ₁)) V_rᵀ and U_r √(Σ_r / (γΣ₁))."""
        from cora_cli.methods.parts.gradient import descent_factors

        return descent_factors(self.gradient(linear), plan.rank, plan.own.get("start_gamma", self.DEFAULT_GAMMA))


class LoraGa(_GradientStart):
    """A = c·(first r right singular vectors of ∂L/∂W), B = c·(the next r left ones), c = out^¼ / √γ; s·B·A is subtracted from W."""

    name = "lora-ga"
    paper = "2407.05000"
    summary = "A and B from the first 2r singular vectors of ∂L/∂W; s·B·A is subtracted from W"
    takes = frozenset({"alpha", "rslora"})
    settings = (START_EXAMPLES, _GAMMA)
    trained: ClassVar[Shapes] = A_AND_B
    DEFAULT_GAMMA = 16.0
    subtracts_start = True
    step_0_is_base = "up to rounding"
    lora_rank = "2r"
    notes = (
        "The gradient is that of the mean loss over the first 64 training examples (`--start-examples`), and γ is `--start-gamma`, 16. A and B are "
        "those of the authors' code (Outsider565/LoRA-GA), with an exact SVD. PEFT's `lora_ga` differs: it also multiplies B by its singular "
        f"values, and scales B only. {_COST}"
    )

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """The gradient has 2r singular vectors."""
        super().check_layer(plan, name, linear)
        if 2 * plan.rank > (smaller := min(linear.in_features, linear.out_features)):
            raise CoraError(
                f"mode lora-ga needs --rank ≤ {smaller // 2} for {name}, half of its smaller dimension, not {plan.rank}"
            )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """c·V[:, :r]ᵀ and c·U[:, r:2r]."""
        from cora_cli.methods.parts.gradient import approximation_factors

        return approximation_factors(self.gradient(linear), plan.rank, plan.own.get("start_gamma", self.DEFAULT_GAMMA))
