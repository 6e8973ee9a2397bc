"""LoRA-RITE: LoRA trained by an optimizer whose steps do not depend on how B·A is divided into B and A."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.methods.method import A_AND_B, Method, MethodSetting
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class LoraRite(Method):
    """Plain LoRA with the optimizer of the paper, `parts.rite.Rite`, in place of AdamW.

    While B = 0, A has no direction to move in: its first step is 0.
    """

    name = "lora-rite"
    paper = "2410.20625"
    summary = "as lora, with an optimizer of its own"
    optimizer_name = "LoRA-RITE"
    DEFAULT_CLIP = 1.0
    settings = (
        MethodSetting(
            "rite_clip",
            float,
            f"Mode lora-rite: largest norm of all unmagnified gradients together; 0 disables it; default {DEFAULT_CLIP:g}.",
        ),
    )
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    notes = (
        "Plain LoRA, trained by an optimizer whose path of B·A does not depend on how B·A is divided. It follows the authors' "
        "code: the first moment averages the preconditioned gradient, a gradient with a root mean square above 1 counts as "
        "zero, and the term for mass that leaves the basis, off by default there, is left out. Eigenvalues that rounding "
        "makes negative count as zero; there, they would drop the step. `--rite-clip` bounds the norm of all unmagnified "
        "gradients, which is part of the method. `--max-grad-norm` clips the plain gradients before that, which does depend "
        "on the division; 0 disables it. While B = 0, A does not move."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The norm is not negative."""
        clip = settings["rite_clip"]
        return [f"--rite-clip must be at least 0, not {clip}"] if clip is not None and clip < 0 else []

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer":
        """The paper's optimizer with the learning rate and the β of all methods."""
        from cora_cli.methods.parts.layers import factors_of, lora_layers
        from cora_cli.methods.parts.rite import Rite

        pairs: Any = [factors_of(layer) for _, layer in lora_layers(model)]
        clip = plan.own.get("rite_clip", self.DEFAULT_CLIP)
        return Rite(pairs, options["lr"], options["betas"], weight_decay=weight_decay, clip=clip)
