"""MELoRA: n mini LoRAs on the diagonal of ΔW, each for its own slice of the inputs and of the outputs."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.block_diagonal import BlockDiagonal
    from cora_cli.methods.parts.layers import LinearWeight


class MeLora(Method):
    """ΔW = blockdiag(s·B_k·A_k) for k = 1 … n, with A_k (r, in/n) random, B_k (out/n, r) zero, and both trained.

    It trains as much as a LoRA of rank r and has rank n·r.
    """

    name = "melora"
    paper = "2402.17263"
    summary = "n LoRAs of rank r on the diagonal of ΔW: each B = 0, each A random"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_COUNT = 2
    """The n of the authors' GLUE scripts; their instruction tuning has 8 with r = 1."""
    settings = (
        MethodSetting(
            "mini_loras",
            int,
            f"Mode melora: number n of LoRAs of rank r on the diagonal, a divisor of the inputs and outputs; default {DEFAULT_COUNT}.",
        ),
    )
    b_init, a_init = "zeros", "kaiming"
    trained: ClassVar[Shapes] = {"lora_A.blocks": ("r", "in"), "lora_B.blocks": ("out", "r")}
    lora_rank = "n·r"
    notes = (
        "`--mini-loras` is n. As in the authors' code (ChasonShi/MELoRA), each mini LoRA has s = alpha / r and A ~ U(±√(n / in)). Their "
        "merging fails, so ours follows the forward pass."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """n is positive."""
        count = settings["mini_loras"]
        return [f"--mini-loras must be at least 1, not {count}"] if count is not None and count < 1 else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """n is 2 unless it is given."""
        return dataclasses.replace(request, own={"mini_loras": request.own.get("mini_loras") or self.DEFAULT_COUNT})

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """n divides both dimensions."""
        count = plan.own["mini_loras"]
        if linear.in_features % count or linear.out_features % count:
            raise CoraError(
                f"mode melora needs --mini-loras to divide the {linear.in_features} inputs and {linear.out_features} outputs of {name}, "
                f"which {count} does not"
            )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[BlockDiagonal, BlockDiagonal]":
        """n random blocks (r, in/n), and n zero blocks (out/n, r)."""
        import torch

        from cora_cli.methods.parts.block_diagonal import BlockDiagonal

        count = plan.own["mini_loras"]
        b = BlockDiagonal(torch.zeros(count, linear.out_features // count, plan.rank))
        return self._a(plan, name, linear.in_features), b

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """Columns of the block-diagonal Aᵀ."""
        return self._a(plan, name, features).weight.T if side == "input" else None

    def _a(self, plan: AdapterPlan, name: str, in_features: int) -> "BlockDiagonal":
        from cora_cli.methods.parts.block_diagonal import BlockDiagonal
        from cora_cli.methods.parts.starts import kaiming_uniform

        count = plan.own["mini_loras"]
        rows = kaiming_uniform(plan, name, "A", (count * plan.rank, in_features // count))
        return BlockDiagonal(rows.view(count, plan.rank, -1))
