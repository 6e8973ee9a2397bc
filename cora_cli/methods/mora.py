"""MoRA: one trained square matrix per layer between fixed maps that compress the inputs and expand to the outputs."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.square import Compression, Expansion

_NOTES = (
    "W gets one trained matrix M of q × q numbers, q = ⌊√((out + in)·r) + ½⌋, about as many as a LoRA of rank r has. There is no scale: s = 1, "
    "and `--alpha` does not apply. Inputs that do not fill the last block are padded with the first inputs, as in the authors' code "
    "(kongds/MoRA). A rank with q above the inputs or outputs is refused, since M would have rows or columns without effect. ReMoRA, which "
    "merges and restarts every 2000 steps, is not included."
)


class _Mora(Method):
    """What both types have in common: M = 0 at the start, no scale, q² trained numbers."""

    paper = "2405.12130"
    takes = frozenset()
    b_init, a_init = "zeros", "fixed"
    trained: ClassVar[Shapes] = {"lora_B.square": ("q", "q")}
    rotates: ClassVar[bool]
    """Whether M acts on each block of q inputs, rotated by the block's number, instead of on their sum."""

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """s = 1."""
        return dataclasses.replace(request, alpha=float(request.rank))

    def size(self, plan: AdapterPlan, out: int, inside: int) -> int:
        """q, even where blocks are rotated, since a rotation takes pairs."""
        q = int(math.sqrt((out + inside) * plan.rank) + 0.5)
        return q - q % 2 if self.rotates else q

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """M is no larger than W."""
        q = self.size(plan, linear.out_features, linear.in_features)
        if q > (smaller := min(linear.in_features, linear.out_features)):
            raise CoraError(
                f"--rank {plan.rank} gives mode {self.name} a matrix of {q} × {q} for {name}, whose smaller dimension is {smaller}; choose a "
                "lower rank"
            )

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int:
        """q²."""
        return self.size(plan, out, inside) ** 2

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[Compression, Expansion]":
        """The fixed compression, and M = 0 with its expansion."""
        import torch

        from cora_cli.methods.parts.square import Compression, Expansion

        q = self.size(plan, linear.out_features, linear.in_features)
        compression = Compression(linear.in_features, q, self.rotates)
        return compression, Expansion(torch.zeros(q, q), compression.blocks, linear.out_features)

    def start_directions(self, *_: Any) -> "torch.Tensor | None":
        """None: nothing is drawn."""
        return None


class MoraOne(_Mora):
    """Type 1: inputs whose numbers agree modulo q are summed, M multiplies the sums, and its output is repeated."""

    name = "mora-1"
    summary = "A sums inputs equal modulo q, frozen; B repeats the rows of M, with M = 0"
    rotates = False
    lora_rank = "q"
    notes = f"Type 1 of the paper (sharing). {_NOTES}"


class MoraSix(_Mora):
    """Type 6: each block of q inputs is rotated by its number, as positions are in RoPE; M multiplies each, side by side.

    The change of W has no low rank. It is stored as M alone.
    """

    name = "mora-6"
    summary = "M = 0 acts on each rotated block of q inputs; the outputs are set side by side, repeated or cut"
    rotates = True
    stored_as = "its own form, which plain PEFT refuses"
    plain_peft_loads = False
    lora_rank = None
    notes = (
        "Type 6 of the paper (RoPE with base 10,000), the type of the authors' scripts. q is rounded down to an even number. Where "
        "in > out, the outputs of the later blocks are cut, so that inputs past ⌈out / q⌉·q have no effect: so it is in the authors' code. "
        "Otherwise as `mora-1`."
    )
