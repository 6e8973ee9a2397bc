"""HiRA: a product of low rank multiplies W entry by entry, which makes a change of high rank."""

from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.methods.method import Method, Shapes, common_options
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class Hira(Method):
    """ΔW = W ⊙ (B·A) with B (out, r) = 0 and A (r, in) random, both trained; no scale. The forward pass is that of PEFT's HiRA."""

    name = "hira"
    paper = "ICLR 2025 (HiRA)"
    summary = "ΔW = W ⊙ (B·A): B = 0, A random"
    takes = frozenset()
    b_init, a_init = "zeros", "kaiming"
    trained: ClassVar[Shapes] = {"hira_A": ("r", "in"), "hira_B": ("out", "r")}
    stored_as = "HiRA"
    lora_rank = None
    notes = (
        "There is no scale: `--alpha` does not apply, as in the authors' code (hqsiswiliam/hira), which reads it but does not use it. Their scripts have r = 32 "
        "and a learning rate of 1e-3. ΔW is computed at each pass as a matrix of W's size. A zero of W stays zero."
    )

    @property
    def trains_on_four_bit(self) -> bool:
        """ΔW needs the numbers of W."""
        return False

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's HiRA."""
        from peft import HiraConfig

        return HiraConfig(**common_options(plan), hira_dropout=plan.dropout)

    def starts(self, *_: Any) -> None:
        """None: `after_install` starts A, and PEFT B."""

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Draw each A from the seed and the layer's name, as LoRA's."""
        from cora_cli.methods.parts.layers import ADAPTER, adapted_layers
        from cora_cli.methods.parts.starts import start_a

        layers: Any = adapted_layers(model)
        for name, layer in layers:
            layer.hira_A[ADAPTER].copy_(start_a(plan, name, layer.in_features))
