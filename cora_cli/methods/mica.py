"""MiCA: B is the minor left singular vectors of W, frozen."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cora_cli.methods.method import A_ALONE, Method
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan


class Mica(Method):
    """The nearest relative of FB: a frozen orthonormal B from the model's own least singular directions. PEFT computes the start."""

    name = "mica"
    paper = "2604.01694"
    summary = "B = W's last left singular vectors, frozen; A = 0"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "minor", "zeros", A_ALONE
    peft_options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "mica"}
    reads_weights = True

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of W."""
        return svd_flops(out, inside)
