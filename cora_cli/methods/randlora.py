"""RandLoRA: a change of full rank from several frozen random LoRAs, of which only scaling vectors are trained."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, Shapes, common_options
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import PeftConfig

    from cora_cli.methods.parts.layers import LinearWeight


class RandLora(Method):
    """ΔW = s·Σ_j B_j·diag(λ_j)·A_j·diag(γ_j) over n = ⌈m / r⌉ random pairs, m the smaller dimension of W; λ = 0 and γ are trained. PEFT's."""

    name = "randlora"
    paper = "2502.00987"
    summary = (
        "n = ⌈m/r⌉ random pairs B_j, A_j, frozen, the same in every layer; λ = 0 and γ scale them (m: smaller dimension of W)"
    )
    takes = frozenset({"alpha"})
    b_init, a_init = "random", "zeros"
    trained: ClassVar[Shapes] = {"randlora_lambda": ("r", "n"), "randlora_gamma": ("n", "m")}
    trained_in_words = "λ r·n + γ n·m"
    stored_as = "RandLoRA"
    lora_rank = None
    notes = (
        "A lower rank trains more parameters, n·(r + m). s = alpha / r, as in PEFT; the authors' code (PaulAlbert31/RandLoRA) has alpha / (r·√n), "
        "which is `--alpha` divided by √n here where all adapted layers have the same m, and so the same n = ⌈m/r⌉; where grouped queries give them different "
        "ones, no one number does. Their alpha is 20 r. PEFT numbers the columns of all B_j by j and then by rank, and the rows of all A_j the other way round, which pairs them otherwise than the "
        "paper, but as randomly. It draws the pairs from the seed in half precision, and the stored adapter holds them, since that depends on the machine."
    )

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """The rank is at most m."""
        super().check_layer(plan, name, linear)
        if plan.rank > (smaller := min(linear.in_features, linear.out_features)):
            raise CoraError(f"mode randlora needs --rank ≤ {smaller} for {name}, its smaller dimension, not {plan.rank}")

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int:
        """n·(r + m)."""
        smaller = min(out, inside)
        return math.ceil(smaller / plan.rank) * (plan.rank + smaller)

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's RandLoRA with this run's seed."""
        from peft import RandLoraConfig

        alpha: Any = plan.alpha
        return RandLoraConfig(
            **common_options(plan),
            randlora_alpha=alpha,
            randlora_dropout=plan.dropout,
            projection_prng_key=plan.seed,
            save_projection=True,
        )

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""

    def start_directions(self, *_: Any) -> None:
        """None: the pairs together span everything."""
