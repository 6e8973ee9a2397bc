"""VeRA: random A and B shared by all layers, with trained scaling vectors."""

from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.methods.method import Method, Shapes, common_options
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import PeftConfig


class Vera(Method):
    """W' = W + diag(b)·B·diag(d)·A; PEFT draws A and B from the seed."""

    name = "vera"
    paper = "2310.11454"
    summary = "A and B random, frozen, the same in every layer; trained vectors scale their rows"
    takes = frozenset()
    b_init, a_init = "zeros", "kaiming"
    trained: ClassVar[Shapes] = {"vera_lambda_b": ("out",), "vera_lambda_d": ("r",)}
    stored_as = "VeRA"

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's VeRA with this run's seed."""
        from peft import VeraConfig

        return VeraConfig(**common_options(plan), vera_dropout=plan.dropout, projection_prng_key=plan.seed)

    def starts(self, *_: Any) -> None:
        """Left to PEFT."""
