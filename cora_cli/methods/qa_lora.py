"""QA-LoRA: A sees the mean of each group of inputs, so that its change of W is constant within a group of quantisation."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.repeated_columns import RepeatedColumns


class QaLora(Method):
    """ΔW[:, j] = c·s·(B·A)[:, ⌊j/G⌋] with A (r, in/G) and B (out, r) trained, and c = 1/G for the mean of a group or 1 for its sum.

    Since the change is one number per output and group, it can be added to the zero points of a base that is quantised in groups of G.
    """

    name = "qa-lora"
    paper = "2309.14717"
    summary = "B = 0; A Xavier uniform, on the means of groups of G inputs"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_GROUP = 32
    settings = (
        MethodSetting(
            "group_size", int, f"Mode qa-lora: number G of inputs in a group, a divisor of the inputs; default {DEFAULT_GROUP}."
        ),
        MethodSetting("pooling", Literal["mean", "sum"], "Mode qa-lora: what A sees of a group; default mean."),
    )
    b_init, a_init = "zeros", "xavier"
    trained: ClassVar[Shapes] = {"lora_A.columns": ("r", "in/G"), "lora_B.weight": ("out", "r")}
    notes = (
        "`--group-size` is G, 32 as in the authors' code (yuhuixu1993/qa-lora), which pools by the mean; its README describes a sum, which is "
        "`--pooling sum`. PEFT's `use_qalora` multiplies the mean by in / G instead, starts A as plain LoRA does, and cannot merge. The "
        "authors train on a GPTQ base of 4 bits and add the change to its zero points. This mode trains on any base, also with "
        "`--load-in-4bit`, whose NF4 has no zero points; the stored LoRA has A's columns repeated, and can be added to the zero points of a "
        "base that is quantised in groups of G. Dropout acts before the pooling, not after it as in the authors' code."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """G is positive."""
        group = settings["group_size"]
        return [f"--group-size must be at least 1, not {group}"] if group is not None and group < 1 else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """G is 32 and the pooling the mean unless they are given."""
        own = {"group_size": self.DEFAULT_GROUP, "pooling": "mean", **request.own}
        return dataclasses.replace(request, own=own)

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """G divides the inputs."""
        group = plan.own["group_size"]
        if linear.in_features % group:
            raise CoraError(
                f"mode qa-lora needs --group-size to divide the {linear.in_features} inputs of {name}, which {group} does not"
            )

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int:
        """r(in/G + out)."""
        return plan.rank * (inside // plan.own["group_size"] + out)

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[RepeatedColumns, torch.Tensor]":
        """A with repeated columns, and B = 0."""
        import torch

        return self._a(plan, name, linear.in_features), torch.zeros(linear.out_features, plan.rank)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """Columns of Aᵀ with its rows repeated."""
        return self._a(plan, name, features).weight.T if side == "input" else None

    def _a(self, plan: AdapterPlan, name: str, in_features: int) -> "RepeatedColumns":
        from cora_cli.methods.parts.repeated_columns import RepeatedColumns
        from cora_cli.methods.parts.starts import xavier_uniform

        group = plan.own["group_size"]
        columns = xavier_uniform(plan, name, "A", (plan.rank, in_features // group))
        return RepeatedColumns(columns, group, 1 / group if plan.own["pooling"] == "mean" else 1.0)
