"""DyLoRA: one LoRA that is trained to work at every rank up to r."""

from typing import TYPE_CHECKING

from cora_cli.methods.method import A_AND_B, Method, MethodSetting, Step
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class DyLora(Method):
    """Each step draws a rank b from 1, …, r, the same for all layers, and uses the first b pairs of A and B with s = alpha / b.

    Only pair b learns, as in the authors' runs (their mode "frozen"); `--no-dylora-frozen` trains all b. The pairs that do not learn
    have the gradient zero, so AdamW moves them by their momentum, as it does in the authors' code. Everything outside of a step,
    and the stored adapter, has all r pairs; `cora export --rank b` and `cora evaluate --ranks` cut it.
    """

    name = "dylora"
    paper = "2210.07558"
    summary = "as lora; each step uses and trains it at a random rank b ≤ r, with s = alpha / b"
    takes = frozenset({"alpha", "a_init"})
    settings = (
        MethodSetting(
            "dylora_frozen", bool, "Mode dylora: a step trains only the last of the pairs that it uses; the default."
        ),
    )
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    nested_ranks = True
    notes = (
        "Each step draws b from 1, …, r for all layers, and s = alpha / b. By default only pair b learns, as in the authors' "
        "runs; `--no-dylora-frozen` trains the first b. The other pairs have the gradient zero, so that AdamW still moves "
        "them by their momentum, as in the authors' code. Held-out losses and the stored adapter are those of rank r. One run "
        "gives adapters of all lower ranks: `cora evaluate RUN --ranks 1,2,4,8` evaluates each, in eval-rank-1, eval-rank-2, "
        "…, and `cora export RUN --rank 2 -o DIR` writes one."
    )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """Plain LoRA's, as factors that can be used in part."""
        from cora_cli.methods.parts.leading import Leading
        from cora_cli.methods.parts.starts import start_a, start_b

        a, b = start_a(plan, name, linear.in_features), start_b(plan, None, name, linear.out_features, plan.rank)
        return Leading(a, 0), Leading(b, 1)

    def before_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Draw b."""
        self._use(model, plan, drawn_rank(plan, step.number))

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Use all pairs."""
        self._use(model, plan, None)

    def _use(self, model: "PeftModel", plan: AdapterPlan, first: int | None) -> None:
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        for _, layer in lora_layers(model):
            layer.scaling[ADAPTER] = plan.alpha / (first or plan.rank)
            for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                factor.first, factor.last_alone = first, plan.own.get("dylora_frozen", True)


def drawn_rank(plan: AdapterPlan, step: int) -> int:
    """The rank of optimizer step `step`: uniform on 1, …, r, by the seed."""
    import torch

    from cora_cli.methods.parts.starts import seeded

    return int(torch.randint(1, plan.rank + 1, (), generator=seeded(plan.seed, "", f"rank of step {step}")))
