"""EigenLoRAx: A and B stay in the principal directions of the factors of earlier adapters."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import A_INNER, B_INNER, Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.factored import Factored
    from cora_cli.methods.parts.layers import LinearWeight


class EigenLoraX(Method):
    """Aᵀ = P·L (in, r) and B = P'·L' (out, r) with L, L' (K, r) trained, and P, P' orthonormal and frozen.

    The first columns of P are the principal directions of all rows of the earlier adapters' A, centred; those of P' of all columns of
    their B. The others are random.
    """

    name = "eigenlorax"
    paper = "2502.04700"
    summary = (
        "outer A and outer B: principal directions of the start models' factors, and random ones, frozen; inner A and B random"
    )
    takes = frozenset()
    DEFAULT_COUNT = 32
    """Both kinds of directions in the authors' scripts."""
    settings = (
        MethodSetting(
            "eigen_directions", int, f"Mode eigenlorax: principal directions of the start models; default {DEFAULT_COUNT}."
        ),
        MethodSetting("eigen_random", int, f"Mode eigenlorax: random directions next to them; default {DEFAULT_COUNT}."),
        MethodSetting("eigen_init", float, "Mode eigenlorax: c in the start U(±c) of the coefficients; default 0.5."),
    )
    b_init, a_init = "adapters", "adapters"
    trained: ClassVar[Shapes] = {A_INNER: ("r", "K"), B_INNER: ("K", "r")}
    start_from = "adapters"
    step_0_is_base = "no: inner A and B are random"
    notes = (
        "`--start-models` are LoRA adapters on the base model. K is `--eigen-directions` plus `--eigen-random`, whose columns are made orthogonal to the first. The "
        "centring, the start U(±½) of the coefficients and the missing scale (s = 1) are those of the authors' code (toshi2k2/EigenLoRA), which does not add the mean "
        "back. With U(±½), step 0 is far from the base model; `--eigen-init` makes the start smaller. The run records the adapters and their hashes."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Counts and the start are positive."""
        found = []
        for name, least in (("eigen_directions", 1), ("eigen_random", 0)):
            if (value := settings[name]) is not None and value < least:
                found.append(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if (bound := settings["eigen_init"]) is not None and not bound > 0:
            found.append(f"--eigen-init must be positive, not {bound}")
        return found

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1, and both counts are 32 unless they are given."""
        counts = {"eigen_directions": self.DEFAULT_COUNT, "eigen_random": self.DEFAULT_COUNT}
        return dataclasses.replace(request, alpha=float(request.rank), own={**counts, **request.own})

    def symbols(self, plan: AdapterPlan) -> dict[str, int]:
        """K."""
        return {"K": plan.own["eigen_directions"] + plan.own["eigen_random"]}

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """K directions exist on both sides, and r of them are enough."""
        super().check_layer(plan, name, linear)
        count, smaller = self.symbols(plan)["K"], min(linear.in_features, linear.out_features)
        if count > smaller:
            raise CoraError(
                f"--eigen-directions and --eigen-random ask for {count} directions, but {name} has {smaller} dimensions on its smaller side"
            )
        if plan.rank > count:
            raise CoraError(f"mode eigenlorax needs --rank ≤ {count}, its number of directions, not {plan.rank}")

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[Factored, Factored]":
        """Both factors as products."""
        from cora_cli.methods.parts.factored import Factored
        from cora_cli.methods.parts.starts import uniform

        sources = linear.observed.sources
        outer_a = self._directions(plan, name, "A", [a.T for _, a in sources])
        outer_b = self._directions(plan, name, "B", [b for b, _ in sources])
        bound, count = plan.own.get("eigen_init", 0.5), self.symbols(plan)["K"]
        a = Factored(uniform(plan, name, "A", (plan.rank, count), bound), outer_a.T.contiguous(), outer_first=True)
        return a, Factored(uniform(plan, name, "B", (count, plan.rank), bound), outer_b, outer_first=False)

    def _directions(self, plan: AdapterPlan, name: str, factor: str, found: "list[torch.Tensor]") -> "torch.Tensor":
        """P (features, K) from columns (features, r) of every source."""
        import torch

        from cora_cli.methods.parts.starts import gaussian

        columns = torch.cat(found, dim=1).double()
        u, values, _ = torch.linalg.svd(columns - columns.mean(dim=1, keepdim=True), full_matrices=False)
        wanted, known = plan.own["eigen_directions"], int((values > 1e-6 * values[:1]).sum())
        if wanted > known:
            raise CoraError(
                f"--eigen-directions {wanted} is more than the {known} directions that the {factor} of {name} has in the start models; use "
                f"--eigen-directions {known} or less, or more models"
            )
        others = gaussian(plan, name, f"{factor} directions", (len(columns), plan.own["eigen_random"])).double()
        frame, _ = torch.linalg.qr(torch.cat([u[:, :wanted], others], dim=1))
        return torch.cat([u[:, :wanted], frame[:, wanted:]], dim=1).float()

    def start_directions(self, plan: AdapterPlan, basis: Any, name: str, features: int, side: Side) -> None:
        """None: they come from other adapters."""
