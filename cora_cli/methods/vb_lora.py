"""VB-LoRA: A and B of all layers are put together from the vectors of one bank."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.vector_bank import MixedVectors


class VbLora(Method):
    """Each piece of length b of A and B is Σ softmax(top k of its h logits)·bank[h], with bank (h, b) and all logits trained; no scale."""

    name = "vb-lora"
    paper = "2405.15179"
    summary = "pieces of A and B mix the k vectors of a shared random bank with the largest logits; logits random"
    takes = frozenset()
    DEFAULT_COUNT, DEFAULT_LENGTH, DEFAULT_TOP, DEFAULT_RATIO = 90, 256, 2, 0.1
    BANK_BOUND, LOGIT_DEVIATION = 0.02, 0.1
    settings = (
        MethodSetting("bank_vectors", int, f"Mode vb-lora: number h of vectors in the bank; default {DEFAULT_COUNT}."),
        MethodSetting(
            "bank_length", int, f"Mode vb-lora: their length b, a divisor of the inputs and outputs; default {DEFAULT_LENGTH}."
        ),
        MethodSetting("bank_top", int, f"Mode vb-lora: number k of vectors in each piece; default {DEFAULT_TOP}."),
        MethodSetting(
            "bank_ratio", float, f"Mode vb-lora: the bank's learning rate divided by the logits'; default {DEFAULT_RATIO:g}."
        ),
    )
    b_init, a_init = "vectors", "vectors"
    trained: ClassVar[Shapes] = {
        "lora_A.bank": ("h", "b"),
        "lora_A.logits": ("r·in/b", "h"),
        "lora_B.bank": ("h", "b"),
        "lora_B.logits": ("r·out/b", "h"),
    }
    trained_in_words = "bank h·b (once) + logits r·h·(in + out)/b"
    step_0_is_base = "no: A and B are random, but small"
    notes = (
        "As in PEFT's `VBLoRAConfig` and the authors' code (leo-yangli/VB-LoRA): bank U(±0.02), logits N(0, 0.1²), k = 2, no scale (`--alpha` does not apply). Their "
        "learning rates are 1e-2 for the logits, which is `--learning-rate` here, and 1e-3 for the bank, which is `--bank-ratio` times it. Logits that are not "
        "among the k largest have the gradient zero. The stored adapter is the LoRA itself, not the bank; the paper counts the bank and the k indices and weights of each piece."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Counts and the ratio are positive."""
        named = ("bank_vectors", "bank_length", "bank_top")
        found = [
            f"--{name.replace('_', '-')} must be at least 1, not {settings[name]}"
            for name in named
            if settings[name] is not None and settings[name] < 1
        ]
        if (ratio := settings["bank_ratio"]) is not None and not ratio > 0:
            found.append(f"--bank-ratio must be positive, not {ratio}")
        vectors, top = settings["bank_vectors"] or self.DEFAULT_COUNT, settings["bank_top"] or self.DEFAULT_TOP
        return found + ([f"--bank-top must be at most the {vectors} vectors of the bank, not {top}"] if top > vectors else [])

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1, and the authors' sizes unless they are given."""
        sizes = {"bank_vectors": self.DEFAULT_COUNT, "bank_length": self.DEFAULT_LENGTH, "bank_top": self.DEFAULT_TOP}
        return dataclasses.replace(request, alpha=float(request.rank), own={**sizes, **request.own})

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """b divides both dimensions."""
        super().check_layer(plan, name, linear)
        length = plan.own["bank_length"]
        if linear.in_features % length or linear.out_features % length:
            raise CoraError(
                f"mode vb-lora needs --bank-length to divide the {linear.in_features} inputs and {linear.out_features} outputs of {name}, which "
                f"{length} does not"
            )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[MixedVectors, MixedVectors]":
        """Random logits, with the same bank in every layer; `after_install` makes it one parameter."""
        import torch

        from cora_cli.methods.parts.starts import gaussian, uniform
        from cora_cli.methods.parts.vector_bank import MixedVectors

        vectors, length, top = (plan.own[key] for key in ("bank_vectors", "bank_length", "bank_top"))

        def factor(label: str, features: int) -> MixedVectors:
            bank = torch.nn.Parameter(uniform(plan, "all layers", "bank", (vectors, length), self.BANK_BOUND))
            logits = self.LOGIT_DEVIATION * gaussian(plan, name, label, (plan.rank * features // length, vectors))
            return MixedVectors(bank, logits, plan.rank, top, label == "A")

        return factor("A", linear.in_features), factor("B", linear.out_features)

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Let all factors hold the same bank."""
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        factors: list[Any] = [one[ADAPTER] for _, layer in lora_layers(model) for one in (layer.lora_A, layer.lora_B)]
        for factor in factors:
            factor.bank = factors[0].bank

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int:
        """h·b + Σ r·h·(out + in) / b."""
        vectors, length = plan.own["bank_vectors"], plan.own["bank_length"]
        return int(vectors * length + sum(plan.rank * vectors * (out + inside) // length for out, inside in shapes.values()))

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer":
        """The optimizer of all methods, with a lower rate for the bank."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        rate = options["lr"] * plan.own.get("bank_ratio", self.DEFAULT_RATIO)
        groups = [
            {"params": [parameter for name, parameter in trained.items() if name.endswith(".logits")]},
            {"params": [parameter for name, parameter in trained.items() if name.endswith(".bank")], "lr": rate},
        ]
        found: torch.optim.Optimizer = kind(groups, weight_decay=weight_decay, **options)
        return found
