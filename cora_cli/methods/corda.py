"""CorDA: A and B start from the singular directions of W weighted by how its inputs vary."""

from typing import TYPE_CHECKING, ClassVar, Literal

from cora_cli.methods.method import A_AND_B, START_EXAMPLES, Method, MethodSetting, Shapes
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class Corda(Method):
    """With W·C = U·Σ·Vᵀ and C = E[x·xᵀ], damped: B = U_r √(Σ_r / s), A = √(Σ_r / s) V_rᵀ C⁻¹; s·B·A is subtracted from W."""

    name = "corda"
    paper = "2406.05223"
    summary = "s·B·A = r singular directions of W·C, times C⁻¹, subtracted from W; C = E[x·xᵀ]"
    takes = frozenset({"alpha", "rslora"})
    settings = (
        START_EXAMPLES,
        MethodSetting(
            "corda_part",
            Literal["first", "last"],
            "Mode corda: which directions: first (for the new task, the authors' IPM; the default), or last (to keep knowledge, KPM).",
        ),
        MethodSetting(
            "corda_inputs",
            Literal["plain", "scaled"],
            "Mode corda: plain inputs (the default), or scaled: those of each example divided by their largest entry, as in the authors' code.",
        ),
    )
    b_init, a_init = "context", "context"
    trained: ClassVar[Shapes] = A_AND_B
    reads_weights = True
    start_from = "inputs"
    DEFAULT_EXAMPLES = 256
    subtracts_start = True
    step_0_is_base = "up to rounding"
    lora_rank = "2r"
    notes = (
        "C is the mean of x·xᵀ over all tokens of the first 256 training examples (`--start-examples`), plus 0.01 of its mean diagonal, which is "
        "doubled until C·C⁻¹ is the identity to 0.05, as in the authors' code (iboing/CorDA). `--corda-part first` is their instruction-previewed mode, "
        "`last` their knowledge-preserved mode; there, C comes from other data than the task's, which `last` here does not have. Theirs has s = 1, which is "
        "`--alpha` equal to `--rank` here; s·B·A is the same for every s. PEFT's `corda` and the authors' code divide each batch of inputs by its largest "
        "entry and take the mean over batches, not over tokens. A factor c of C cancels in B·A but makes B √c times and A 1/√c times as large, and so changes how fast each learns; "
        "where batches differ, B·A changes too. `--corda-inputs scaled` does as they do, with each example as a batch. It costs a forward pass, the CPU's memory of an "
        "in × in matrix for each adapted layer, and an SVD of each weight. `run.json` records the number of examples, the hash of their tokens and the time."
    )

    def scales_inputs(self, plan: AdapterPlan) -> bool:
        """As `--corda-inputs` says."""
        return plan.own.get("corda_inputs") == "scaled"

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """√(Σ_r / s) V_rᵀ C⁻¹ and U_r √(Σ_r / s)."""
        from cora_cli.methods.parts.singular import context_factors

        assert linear.observed.inputs is not None
        last = plan.own.get("corda_part") == "last"
        return context_factors(linear.weight, linear.observed.inputs, plan.rank, plan.scaling, last)

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of W·C and one inverse of C."""
        return svd_flops(out, inside) + 2.0 * inside**3
