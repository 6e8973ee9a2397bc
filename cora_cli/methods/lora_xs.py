"""LoRA-XS: A and B are frozen singular directions of W with a small trained matrix between them."""

from typing import TYPE_CHECKING, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.methods.method import B_INNER, Method, Shapes
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.factored import Factored
    from cora_cli.methods.parts.layers import LinearWeight


class LoraXs(Method):
    """A = Σ_r V_rᵀ and B = U_r R of W, with R (r, r) trained: ΔW = s·U_r R Σ_r V_rᵀ, as in the authors' code.

    The paper starts R at N(0, 10⁻⁵), which Adam's first step outweighs; from R = 0 training begins at the base model.
    """

    name = "lora-xs"
    paper = "2405.17604"
    summary = "A = Σ_r V_rᵀ and U_r of W, frozen; B = U_r R with R = 0"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init = "principal", "principal"
    trained: ClassVar[Shapes] = {B_INNER: ("r", "r")}
    reads_weights = True

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, Factored]":
        """Σ_r V_rᵀ, and the product of U_r with R = 0."""
        import torch

        from cora_cli.methods.parts.factored import Factored
        from cora_cli.methods.parts.singular import principal_factors

        a, outer_b = principal_factors(linear.weight, plan.rank)
        return a, Factored(torch.zeros(plan.rank, plan.rank), outer_b, outer_first=False)

    def holds_start(self, side: Side) -> bool:
        """The stored B = U_r R spans what U_r does."""
        return True

    def start_flops(self, out: int, inside: int) -> float:
        """One SVD of W."""
        return svd_flops(out, inside)
