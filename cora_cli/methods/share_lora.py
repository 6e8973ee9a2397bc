"""ShareLoRA-A: one A is shared by all layers of a projection."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.basis.choices import Side
from cora_cli.methods.method import A_AND_B, Method
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class ShareLoraA(Method):
    """LoRA in which every layer of a projection (all `q_proj`, all `k_proj`, …) has its own B and the same trained A.

    The gradient of A is the sum over its layers. It is stored as an ordinary LoRA with A repeated, which PEFT loads unchanged.
    """

    name = "sharelora-a"
    paper = "2406.10785"
    summary = "as lora, with one A for all layers of a projection"
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    trained_in_words = "A r·in (once per projection) + B out·r"

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """A drawn from the seed and the projection's name, so that it is the same in each layer; B = 0."""
        from cora_cli.methods.parts.starts import start_a, start_b

        return start_a(plan, _projection(name), linear.in_features), start_b(plan, None, name, linear.out_features, plan.rank)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """The projection's A."""
        return super().start_directions(plan, basis, _projection(name), features, side)

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Let all layers of a projection hold the same parameter A."""
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        shared: dict[tuple[str, int], torch.nn.Parameter] = {}
        for name, layer in lora_layers(model):
            linear: Any = layer.lora_A[ADAPTER]
            linear.weight = shared.setdefault((_projection(name), linear.in_features), linear.weight)

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int:
        """r·in once for each projection and r·out for each of its layers."""
        inputs = {(_projection(name), inside) for name, (_, inside) in shapes.items()}
        return plan.rank * (sum(inside for _, inside in inputs) + sum(out for out, _ in shapes.values()))


def _projection(name: str) -> str:
    return name.rpartition(".")[2]
