"""PiSSA and MiLoRA: A and B start as singular directions of W, which are subtracted from W."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.methods.method import A_AND_B, Method
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class Pissa(Method):
    """s·B·A = the r largest singular directions of W; PEFT computes them and subtracts them from W."""

    name = "pissa"
    paper = "2404.02948"
    summary = "s·B·A = W's first r singular directions, subtracted from W"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "principal", "principal", A_AND_B
    peft_options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "pissa"}
    reads_weights = True
    subtracts_start = True
    step_0_is_base = "up to rounding"
    lora_rank = "2r"

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of W."""
        return svd_flops(out, inside)


class Milora(Method):
    """s·B·A = the r smallest singular directions of W (section 3 of the paper), subtracted from W."""

    name = "milora"
    paper = "2406.09044"
    summary = "s·B·A = W's last r singular directions, subtracted from W"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "minor", "minor", A_AND_B
    reads_weights = True
    subtracts_start = True
    step_0_is_base = "up to rounding"
    lora_rank = "2r"

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """√(Σ_r / s) V_rᵀ and U_r √(Σ_r / s)."""
        from cora_cli.methods.parts.singular import minor_factors

        return minor_factors(linear.weight, plan.rank, plan.scaling)

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of W."""
        return svd_flops(out, inside)
