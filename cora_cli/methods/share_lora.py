"""ShareLoRA: one A, one B, or both are shared by all layers of a projection."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.methods.method import A_AND_B, Method
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class _ShareLora(Method):
    """LoRA in which all layers of a projection (all `q_proj`, all `k_proj`, …) have the same trained tensors in `shared`.

    The gradient of a shared factor is the sum over its layers. It is stored as an ordinary LoRA with the factor repeated, which PEFT loads
    unchanged.
    """

    paper = "2406.10785"
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    shared: ClassVar[tuple[str, ...]]
    """`lora_A`, `lora_B` or both."""

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """A drawn from the seed and the name of the layer, or that of the projection where it is shared; B = 0."""
        from cora_cli.methods.parts.starts import start_a, start_b

        return start_a(plan, self._drawn_for(name), linear.in_features), start_b(
            plan, None, name, linear.out_features, plan.rank
        )

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """Those of A."""
        return super().start_directions(plan, basis, self._drawn_for(name), features, side)

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Let all layers of a projection hold the same parameters."""
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        held: dict[tuple[str, str, tuple[int, ...]], torch.nn.Parameter] = {}
        for name, layer in lora_layers(model):
            for factor in self.shared:
                linear: Any = getattr(layer, factor)[ADAPTER]
                linear.weight = held.setdefault((factor, _place(name), tuple(linear.weight.shape)), linear.weight)

    @property
    def takes_laplace(self) -> bool:
        """Not: a factor of several layers would get the curvature of each, and be drawn anew in each."""
        return False

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int:
        """r·in and r·out of each layer, once for each projection where it is shared."""
        inputs = [(_place(name), inside) for name, (_, inside) in shapes.items()]
        outputs = [(_place(name), out) for name, (out, _) in shapes.items()]
        counted = (
            set(sides) if factor in self.shared else sides for factor, sides in (("lora_A", inputs), ("lora_B", outputs))
        )
        return plan.rank * sum(size for sides in counted for _, size in sides)

    def _drawn_for(self, name: str) -> str:
        return _projection(name) if "lora_A" in self.shared else name


class ShareLoraA(_ShareLora):
    """Every layer has its own B and the projection's A."""

    name = "sharelora-a"
    summary = "as lora, with one A for all layers of a projection"
    trained_in_words = "A r·in (once per projection) + B out·r"
    shared = ("lora_A",)


class ShareLoraB(_ShareLora):
    """Every layer has its own A and the projection's B."""

    name = "sharelora-b"
    summary = "as lora, with one B for all layers of a projection"
    trained_in_words = "A r·in + B out·r (once per projection)"
    shared = ("lora_B",)


class ShareLoraAb(_ShareLora):
    """All layers of a projection have the same ΔW."""

    name = "sharelora-ab"
    summary = "as lora, with one A and one B for all layers of a projection"
    trained_in_words = "A r·in + B out·r, once per projection"
    shared = ("lora_A", "lora_B")


def _projection(name: str) -> str:
    return name.rpartition(".")[2]


def _place(name: str) -> str:
    """The layer's name without numbers: GPT-2's attention and its feed-forward layers each have a `c_proj`, and these are two projections."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
