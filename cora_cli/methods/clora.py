"""CLoRA: LoRA with a loss that keeps A and B away from fixed random directions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.methods.method import A_AND_B, Method, MethodSetting
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

DIRECTIONS = "clora_directions"
"""The buffer that holds V (in, k) next to A and U (out, k) next to B. It is drawn from the seed and not stored."""


class Clora(Method):
    """LoRA whose loss has the term λ·Σ(½‖A·V‖² + ½‖Bᵀ·U‖²) over all layers, with V (in, k) and U (out, k) random orthonormal and fixed.

    The paper's λ and k are not established; the defaults are those of others' implementations. Where a layer has fewer than k inputs
    or outputs, V or U spans all of them.
    """

    name = "clora"
    paper = "2410.16801"
    summary = "as lora, with a loss on what A and B do in random directions"
    DEFAULT_WEIGHT, DEFAULT_RANK = 1.0, 128
    settings = (
        MethodSetting("clora_weight", float, f"Mode clora: weight λ of the added loss; default {DEFAULT_WEIGHT:g}."),
        MethodSetting("clora_rank", int, f"Mode clora: number k of random directions on each side; default {DEFAULT_RANK}."),
    )
    b_init, a_init, trained = "zeros", "kaiming", A_AND_B
    notes = (
        "The loss has the term λ·Σ(½‖A·V‖² + ½‖Bᵀ·U‖²) over all layers, with V (in, k) and U (out, k) random orthonormal. λ "
        "is `--clora-weight` and k is `--clora-rank`. The paper's λ and k, and whether it has the ½, are not established; λ = "
        "1 and k = 128 are those of others' implementations. In a layer with fewer than k inputs or outputs, V or U spans all "
        "of them."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """λ is not negative and there is a direction."""
        weight, rank = settings["clora_weight"], settings["clora_rank"]
        found = [f"--clora-weight must be at least 0, not {weight}"] if weight is not None and weight < 0 else []
        return found + ([f"--clora-rank must be at least 1, not {rank}"] if rank is not None and rank < 1 else [])

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Draw U and V of every layer from the seed."""
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers
        from cora_cli.methods.parts.starts import orthonormal

        rank = plan.own.get("clora_rank", self.DEFAULT_RANK)
        for name, layer in lora_layers(model):
            for factor, linear, features in (
                ("A", layer.lora_A[ADAPTER], layer.in_features),
                ("B", layer.lora_B[ADAPTER], layer.out_features),
            ):
                directions = orthonormal(plan, f"{name}/clora", factor, features, min(rank, features))
                linear.register_buffer(DIRECTIONS, directions.to(linear.weight.device), persistent=False)

    def added_loss(self, model: "torch.nn.Module", plan: AdapterPlan) -> "torch.Tensor":
        """λ·Σ(½‖A·V‖² + ½‖Bᵀ·U‖²), in float32."""
        import torch

        total: Any = 0.0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                directions = model.get_buffer(name.rpartition(".")[0] + f".{DIRECTIONS}")
                with torch.autocast(parameter.device.type, enabled=False):
                    product = (parameter if ".lora_A." in name else parameter.T) @ directions
                    total = total + product.square().sum() / 2
        return plan.own.get("clora_weight", self.DEFAULT_WEIGHT) * total
