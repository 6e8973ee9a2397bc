"""MiSS: all inputs whose numbers agree modulo r share one trained column of ΔW."""

import dataclasses
from typing import TYPE_CHECKING

from cora_cli.errors import CoraError
from cora_cli.methods.method import B_ALONE, Method
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class Miss(Method):
    """ΔW[:, j] = D[j mod r]ᵀ with D (r, out) = 0 trained: a LoRA with B = Dᵀ, the frozen A = [I I …] cut to the inputs, and s = 1."""

    name = "miss"
    paper = "2409.15371"
    summary = "A = [I I …] cut to the inputs, frozen; B = 0"
    takes = frozenset()
    b_init, a_init, trained = "zeros", "repeated identity", B_ALONE
    notes = (
        "A adds up the inputs whose numbers agree modulo r, as in PEFT's `MissConfig`; s = 1, and `--alpha` does not apply. The variants `bat`, whose change "
        "depends on W, and `mini`, with a second rank, are those of `--mode peft`."
    )

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1."""
        return dataclasses.replace(request, alpha=float(request.rank))

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """Every row of A has an input."""
        super().check_layer(plan, name, linear)
        if plan.rank > linear.in_features:
            raise CoraError(f"mode miss needs --rank ≤ {linear.in_features} for {name}, not {plan.rank}")

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Identities side by side, and zero."""
        import torch

        places = torch.arange(linear.in_features) % plan.rank
        return torch.eye(plan.rank)[:, places].contiguous(), torch.zeros(linear.out_features, plan.rank)
