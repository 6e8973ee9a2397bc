"""Plain LoRA and its scalings: LoRA, rsLoRA (s = alpha / √r) and LoRA+ (two learning rates)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.methods.method import A_AND_B, Method, MethodSetting
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class Lora(Method):
    """W' = W + s·B·A with B = 0 and A random, both trained."""

    name = "lora"
    paper = "2106.09685"
    summary = "B = 0, A random"
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B


class RsLora(Method):
    """LoRA with rank-stabilised scaling."""

    name = "rslora"
    paper = "2312.03732"
    summary = "as lora, with s = alpha / √r"
    takes = frozenset({"alpha", "a_init"})
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    peft_options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


class LoraPlus(Method):
    """LoRA with a higher learning rate for B than for A."""

    name = "lora+"
    paper = "2402.12354"
    summary = "as lora, B with a higher learning rate"
    DEFAULT_RATIO = 16.0
    """The 2⁴ that the paper recommends."""
    settings = (
        MethodSetting("lora_plus_ratio", float, f"Mode lora+: B's learning rate divided by A's; default {DEFAULT_RATIO:g}."),
    )
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The ratio is positive."""
        ratio = settings["lora_plus_ratio"]
        return [f"--lora-plus-ratio must be positive, not {ratio}"] if ratio is not None and not ratio > 0 else []

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer":
        """PEFT's LoRA+ parameter groups, on the optimizer that all methods share."""
        from peft.optimizers import create_loraplus_optimizer

        ratio = plan.own.get("lora_plus_ratio") or self.DEFAULT_RATIO
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **options)
