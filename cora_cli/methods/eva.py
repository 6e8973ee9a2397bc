"""EVA: A starts as the principal directions of each layer's inputs, and layers whose inputs vary along more directions get more ranks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import START_EXAMPLES, Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class Eva(Method):
    """A = the first r_l eigenvectors of C = E[x·xᵀ], B = 0, s = alpha / r in every layer.

    Of all layers' eigenvalues, each divided by the trace of its C, the r·(number of layers) largest are kept, at most ρ·r of a layer;
    r_l is the number that a layer keeps.
    """

    name = "eva"
    paper = "2410.07170"
    summary = "A = principal directions of the layer's inputs, B = 0; ranks r_l shared out by explained variance"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_RHO = 2.0
    settings = (
        START_EXAMPLES,
        MethodSetting(
            "eva_rho",
            float,
            f"Mode eva: ρ; a layer has at most ρ times --rank ranks, 1 gives every layer the same; default {DEFAULT_RHO:g}.",
        ),
    )
    b_init, a_init = "zeros", "inputs"
    trained: ClassVar[Shapes] = {"lora_A.values": ("r_l", "in"), "lora_B.values": ("out", "r_l")}
    trained_in_words = "A r_l·in + B out·r_l, with r the mean of the layers' r_l"
    start_from = "inputs"
    DEFAULT_EXAMPLES = 256
    lora_rank = "largest r_l"
    notes = (
        "C is the mean of x·xᵀ over all tokens of the first 256 training examples (`--start-examples`), and its eigenvectors are exact and those of "
        "inputs that are not centred. The authors and PEFT estimate them batch by batch until they stop turning, centre the inputs and use "
        "only tokens of responses. A layer has at most ρ·r ranks, rounded as there. `--rank` is the mean of the ranks r_l, and `run.json` has the number of parameters that train. s = alpha / r whatever r_l is, "
        "as with PEFT's `adjust_scaling_factors`. The stored LoRA has the largest r_l of any layer, with zeros in the others. `--eva-rho 1` "
        "gives every layer r. It costs a forward pass, the memory of an in × in matrix for each adapted layer, and its eigenvectors. `run.json` records the number of examples, the hash of their tokens and the time."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """ρ is at least 1."""
        rho = settings.get("eva_rho")
        return [f"--eva-rho must be at least 1, not {rho:g}"] if rho is not None and not rho >= 1 else []

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """The inputs have `--rank` directions."""
        super().check_layer(plan, name, linear)
        if plan.rank > linear.in_features:
            raise CoraError(
                f"mode eva needs --rank ≤ {linear.in_features} for {name}, the number of its inputs, not {plan.rank}"
            )

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int | None:
        """Known in advance only where every layer has r."""
        return None if self.shares_out_ranks(plan) else plan.rank * (out + inside)

    def ranks(self, plan: AdapterPlan, linears: "Mapping[str, LinearWeight]") -> dict[str, int]:
        """r_l of each layer."""
        from torch._subclasses.fake_tensor import is_fake

        from cora_cli.methods.parts.input_directions import shared_out

        inputs = {name: linear.observed.inputs for name, linear in linears.items() if linear.observed.inputs is not None}
        # The plan of a run has matrices without values, and counts every layer with r.
        shared = self.shares_out_ranks(plan) and not any(map(is_fake, inputs.values()))
        return shared_out(inputs, plan.rank, _most(plan)) if shared else {}

    def shares_out_ranks(self, plan: AdapterPlan) -> bool:
        """Unless ρ allows no layer more than r."""
        return _most(plan) != plan.rank

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """The layer's r_l principal directions, and zeros."""
        import torch

        from cora_cli.methods.parts.input_directions import OwnRank, principal_directions

        assert linear.observed.inputs is not None
        rank = plan.rank if linear.rank is None else linear.rank
        return (
            OwnRank(principal_directions(linear.observed.inputs, rank)),
            OwnRank(torch.zeros(linear.out_features, rank)),
        )

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """The eigenvalues of C, and its eigenvectors."""
        return 12.0 * inside**3


def _most(plan: AdapterPlan) -> int:
    """The most ranks of a layer, rounded as PEFT does."""
    rho: float = plan.own.get("eva_rho", Eva.DEFAULT_RHO)
    return round(rho * plan.rank)
