"""Full fine-tuning: every weight is trained and there is no adapter."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cora_cli.methods.method import Method, Shapes


class Full(Method):
    """The reference that adapters are compared with."""

    name = "full"
    paper = "–"
    summary = "no adapter"
    is_adapter = False
    takes = frozenset()
    b_init, a_init = "none", "none"
    trained: ClassVar[Shapes] = {}
    stored_as = "a complete model"
    lora_rank = None

    def starts_at_base(self, plan: Mapping[str, Any]) -> bool:
        """Always."""
        return True
