"""LoRA-XS: A and B are frozen singular directions of W with a small trained matrix between them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.methods.method import B_INNER, Method, MethodSetting, Shapes
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.factored import Factored
    from cora_cli.methods.parts.layers import LinearWeight


class LoraXs(Method):
    """A = Σ_r V_rᵀ and B = U_r R of W, with R (r, r) trained: ΔW = s·U_r R Σ_r V_rᵀ, as in the authors' code.

    The authors start R at N(0, (10⁻⁵)²), which Adam's first step outweighs; from R = 0 training begins at the base model.
    """

    name = "lora-xs"
    paper = "2405.17604"
    summary = "A = Σ_r V_rᵀ and U_r of W, frozen; B = U_r R with R = 0"
    takes = frozenset({"alpha", "rslora"})
    settings = (
        MethodSetting("r_init_std", float, "Mode lora-xs: standard deviation of R at the start; default 0, the authors' 1e-5."),
    )
    b_init, a_init = "principal", "principal"
    trained: ClassVar[Shapes] = {B_INNER: ("r", "r")}
    reads_weights = True
    notes = (
        "`--r-init-std` is the standard deviation of R at the start: 1e-5 in the authors' code (MohammadrezaBanaei/LoRA-XS), so that its step 0 "
        "is the base model only to about that, and 0 by default here. They compute U_r, Σ_r and V_r by a randomised SVD of 10 iterations; "
        "ours is exact. PEFT's TinyLoRA has √Σ_r on both sides instead."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The standard deviation is not negative."""
        deviation = settings["r_init_std"]
        return [f"--r-init-std must be at least 0, not {deviation}"] if deviation is not None and deviation < 0 else []

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, Factored]":
        """Σ_r V_rᵀ, and the product of U_r with R."""
        import torch

        from cora_cli.methods.parts.factored import Factored
        from cora_cli.methods.parts.singular import principal_factors
        from cora_cli.methods.parts.starts import gaussian

        a, outer_b = principal_factors(linear.weight, plan.rank)
        deviation, shape = plan.own.get("r_init_std"), (plan.rank, plan.rank)
        inner = deviation * gaussian(plan, name, "R", shape) if deviation else torch.zeros(shape)
        return a, Factored(inner, outer_b, outer_first=False)

    def holds_start(self, side: Side) -> bool:
        """The stored B = U_r R spans what U_r does."""
        return True

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of W."""
        return svd_flops(out, inside)
