"""PRoLoRA: most ranks of A and B repeat one small chunk, each copy rotated along the rank."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.rotated_chunks import RotatedChunks


class ProLora(Method):
    """Of the r ranks, u are those of a LoRA. The rows of A for the others are m copies of a chunk (r − u, ⌈in/m⌉) side by side, and the
    columns of B are n copies of a chunk (⌈out/n⌉, r − u) on top of one another, each copy rolled along the rank and the last one cut."""

    name = "prolora"
    paper = "2402.16902"
    summary = "as lora, but of r ranks all but u repeat a chunk of A and one of B, rolled along the rank"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_COPIES = 2
    settings = (
        MethodSetting(
            "unshared_rank", int, "Mode prolora: ranks u of --rank that repeat nothing; default r / 4, rounded down."
        ),
        MethodSetting("a_copies", int, f"Mode prolora: copies m of the shared chunk in A; default {DEFAULT_COPIES}."),
        MethodSetting("b_copies", int, f"Mode prolora: copies n of the shared chunk in B; default {DEFAULT_COPIES}."),
    )
    b_init, a_init = "zeros", "kaiming"
    trained: ClassVar[Shapes] = {
        "lora_A.own": ("u", "in"),
        "lora_A.chunk": ("(r − u)", "⌈in/m⌉"),
        "lora_B.own": ("out", "u"),
        "lora_B.chunk": ("⌈out/n⌉", "(r − u)"),
    }
    notes = (
        "`--unshared-rank` is u, `--a-copies` is m and `--b-copies` is n. The authors' scripts take all three from the command line, so that "
        "their defaults are not established; ours are r / 4 and two copies. Each copy is rolled by max(⌊(r − u) / m⌋, 1) ranks more than the "
        "one before it, and chunks start at U(±1/√in), the full width's range, as in the authors' code (Forence1999/PRoLoRA). They train on a "
        "4-bit base, which is `--load-in-4bit` here."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """u is not negative, m and n are positive."""
        return [
            f"--{name.replace('_', '-')} must be at least {least}, not {settings[name]}"
            for name, least in (("unshared_rank", 0), ("a_copies", 1), ("b_copies", 1))
            if settings[name] is not None and settings[name] < least
        ]

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """The three settings with their defaults. Raises `UsageError` where no rank is shared."""
        unshared = request.own.get("unshared_rank", request.rank // 4)
        if unshared >= request.rank >= 1:
            raise UsageError(
                f"--unshared-rank must be below --rank {request.rank}, not {unshared}: with all ranks unshared, use mode lora"
            )
        copies = {name: request.own.get(name, self.DEFAULT_COPIES) for name in ("a_copies", "b_copies")}
        return dataclasses.replace(request, own={"unshared_rank": unshared, **copies})

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """Every copy has a part of the layer, of ⌈features / copies⌉ columns or rows each."""
        sides = (("a_copies", linear.in_features, "inputs"), ("b_copies", linear.out_features, "outputs"))
        for setting, features, what in sides:
            copies = plan.own[setting]
            if (copies - 1) * math.ceil(features / copies) >= features:
                raise CoraError(
                    f"--{setting.replace('_', '-')} {copies} leaves no part of the {features} {what} of {name} for the last copy; choose fewer"
                )

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int:
        """u(out + in) + (r − u)(⌈in/m⌉ + ⌈out/n⌉)."""
        unshared = plan.own["unshared_rank"]
        chunks = math.ceil(inside / plan.own["a_copies"]) + math.ceil(out / plan.own["b_copies"])
        return unshared * (out + inside) + (plan.rank - unshared) * chunks

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[RotatedChunks, RotatedChunks]":
        """Both parts of A random, both parts of B zero."""
        import torch

        from cora_cli.methods.parts.rotated_chunks import RotatedChunks

        unshared, copies, out = plan.own["unshared_rank"], plan.own["b_copies"], linear.out_features
        own, chunk = torch.zeros(out, unshared), torch.zeros(math.ceil(out / copies), plan.rank - unshared)
        return self._a(plan, name, linear.in_features), RotatedChunks(own, chunk, copies, rank_dim=1)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """Columns of Aᵀ with its copies."""
        return self._a(plan, name, features).weight.T if side == "input" else None

    def _a(self, plan: AdapterPlan, name: str, in_features: int) -> "RotatedChunks":
        from cora_cli.methods.parts.rotated_chunks import RotatedChunks
        from cora_cli.methods.parts.starts import kaiming_uniform

        # Cut from one draw of the full width, whose range both parts have.
        drawn, unshared, copies = (
            kaiming_uniform(plan, name, "A", (plan.rank, in_features)),
            plan.own["unshared_rank"],
            plan.own["a_copies"],
        )
        own, chunk = drawn[:unshared].clone(), drawn[unshared:, : math.ceil(in_features / copies)].clone()
        return RotatedChunks(own, chunk, copies, rank_dim=0)
