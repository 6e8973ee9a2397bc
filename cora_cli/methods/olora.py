"""OLoRA: A and B start as the QR decomposition of W."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cora_cli.methods.method import A_AND_B, Method


class Olora(Method):
    """B·A = the first r columns of Q times the first r rows of R; PEFT computes them and subtracts s·B·A from W."""

    name = "olora"
    paper = "2406.01775"
    summary = "B·A = Q·R of W, first r; s·B·A is subtracted from W"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "qr", "qr", A_AND_B
    peft_options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "olora"}
    reads_weights = True
    takes_transposed = False  # PEFT decomposes the stored matrix, whichever way round it is
    subtracts_start = True
    step_0_is_base = "up to rounding"
    lora_rank = "2r"

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""
