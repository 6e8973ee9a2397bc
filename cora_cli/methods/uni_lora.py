"""Uni-LoRA: all entries of all A and B are those of one trained vector."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    from peft import PeftModel

    from cora_cli.methods.parts.layers import LinearWeight


class UniLora(Method):
    """Every entry of A and B of every layer is θ_j / √(number of entries that are θ_j), with the j drawn at random and θ (d,) trained.

    The map from θ to all entries is an isometry: ‖(A, B)‖ = ‖θ‖. There is no scale.
    """

    name = "uni-lora"
    paper = "2506.00799"
    summary = "all entries of A and B are entries of one random vector θ of d numbers"
    takes = frozenset()
    DEFAULT_LENGTH, BOUND = 23_040, 0.02
    settings = (
        MethodSetting("theta_length", int, f"Mode uni-lora: d, the numbers in the trained vector; default {DEFAULT_LENGTH}."),
    )
    b_init, a_init = "vector", "vector"
    trained: ClassVar[Shapes] = {"lora_A.vector": ("d", "1"), "lora_B.vector": ("d", "1")}
    trained_in_words = "θ d, for all layers"
    step_0_is_base = "no: A and B are random, but small"
    notes = (
        "θ starts as U(±0.02), and s = 1 (`--alpha` does not apply), as in the authors' code (KaiyangLi1992/Uni-LoRA). Every θ_j is used equally often up to one, as "
        "in PEFT's `UniLoraConfig`; their code draws independently. d is theirs for RoBERTa with r = 4. The stored adapter is the LoRA itself; θ and the seed would be enough."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """d is positive."""
        length = settings["theta_length"]
        return [f"--theta-length must be at least 1, not {length}"] if length is not None and length < 1 else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1, and d is 23,040 unless it is given."""
        own = {"theta_length": self.DEFAULT_LENGTH, **request.own}
        return dataclasses.replace(request, alpha=float(request.rank), own=own)

    def check_layers(self, plan: AdapterPlan, linears: "Mapping[str, LinearWeight]") -> None:
        """d is at most the numbers in all A and B."""
        super().check_layers(plan, linears)
        total = plan.rank * sum(linear.in_features + linear.out_features for linear in linears.values())
        if (length := plan.own["theta_length"]) > total:
            raise CoraError(f"--theta-length must be at most {total}, the numbers in all A and B, not {length}")

    def starts(self, *_: Any) -> None:
        """None: `after_install` starts all layers together."""

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Share out θ among the entries of all factors."""
        import torch

        from cora_cli.methods.parts.layers import ADAPTER, lora_layers
        from cora_cli.methods.parts.starts import seeded, uniform
        from cora_cli.methods.parts.vector_bank import SharedEntries

        factors: list[Any] = [one for _, layer in lora_layers(model) for one in (layer.lora_A, layer.lora_B)]
        shapes = [one[ADAPTER].weight.shape for one in factors]
        length, total = plan.own["theta_length"], sum(shape.numel() for shape in shapes)
        order = torch.randperm(total, generator=seeded(plan.seed, "all layers", "places"))
        places = (torch.arange(total) % length)[order]
        shares = torch.bincount(places, minlength=length).float().rsqrt()
        vector = torch.nn.Parameter(
            uniform(plan, "all layers", "theta", (length, 1), self.BOUND).to(factors[0][ADAPTER].weight.device)
        )
        for one, shape, part in zip(factors, shapes, places.split([shape.numel() for shape in shapes]), strict=True):
            entries = SharedEntries(vector, part.view(shape), shares[part].view(shape))
            one[ADAPTER] = entries.to(one[ADAPTER].weight.device)

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int:
        """d."""
        return int(plan.own["theta_length"])
