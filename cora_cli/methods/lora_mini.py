"""LoRA-Mini: frozen outer factors, here optionally a basis, around small trained inner ones."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import UsageError
from cora_cli.methods.method import A_INNER, B_INNER, Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.factored import Factored
    from cora_cli.methods.parts.layers import LinearWeight


class LoraMini(Method):
    """ΔW = s·(outer B)(inner B)(inner A)(outer A) with outer factors (out, k) and (k, in) frozen, inner ones (k, r) and (r, k) trained.

    The paper does not state its starts; orthonormal outer factors and inner B = 0 begin at the base model.
    """

    name = "lora-mini"
    paper = "2411.15804"
    summary = "outer A and outer B random orthonormal, or outer B = basis, frozen; inner A random, inner B = 0"
    takes = frozenset({"alpha", "rslora"})
    settings = (
        MethodSetting("outer_rank", int, "Mode lora-mini: rank k of the frozen outer factors, at least r; default 2 r."),
    )
    uses_basis_if_given = True
    b_init, a_init = "orthonormal", "kaiming"
    trained: ClassVar[Shapes] = {A_INNER: ("r", "k"), B_INNER: ("k", "r")}
    notes = (
        "The paper's starts and its s are not established, and its code could not be obtained. Here the outer factors are orthonormal, or the "
        "outer B is the basis; inner A starts as LoRA's A does and inner B at zero, so that step 0 is the base model; s = alpha / r. Both outer "
        "factors have the same rank, `--outer-rank`, where the paper allows two."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The outer rank is positive."""
        outer = settings["outer_rank"]
        return [f"--outer-rank must be at least 1, not {outer}"] if outer is not None and outer < 1 else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """k is 2 r unless it is given."""
        outer = request.own.get("outer_rank") or 2 * request.rank
        if outer < request.rank:
            raise UsageError(
                f"--outer-rank must be at least --rank {request.rank}, not {outer}: the product cannot have a higher rank than k"
            )
        return dataclasses.replace(request, own={"outer_rank": outer})

    def b_width(self, plan: AdapterPlan) -> int:
        """k."""
        return int(plan.own["outer_rank"])

    @property
    def width_flag(self) -> str:
        """The flag of k."""
        return "--outer-rank"

    def bounded_sides(self, plan: AdapterPlan) -> tuple[int, ...]:
        """Both outer factors are orthonormal."""
        return (0, 1)

    def symbols(self, plan: AdapterPlan) -> dict[str, int]:
        """k."""
        return {"k": self.b_width(plan)}

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[Factored, Factored]":
        """Both factors as products."""
        import torch

        from cora_cli.methods.parts.factored import Factored
        from cora_cli.methods.parts.starts import orthonormal, start_a, start_b

        width = self.b_width(plan)
        outer_b = start_b(plan, basis, name, linear.out_features, width, self.width_flag)
        outer_a = orthonormal(plan, name, "A", linear.in_features, width, self.width_flag).T.contiguous()
        inner_a = start_a(plan, name, width)
        return Factored(inner_a, outer_a, outer_first=True), Factored(torch.zeros(width, plan.rank), outer_b, outer_first=False)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """The frozen outer factors."""
        from cora_cli.methods.parts.starts import orthonormal

        if side == "output":
            return super().start_directions(plan, basis, name, features, side)
        return orthonormal(plan, name, "A", features, self.b_width(plan), self.width_flag)
