"""Chain of LoRA: several LoRAs one after the other, each on top of those before it."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.errors import CoraError
from cora_cli.methods.method import LINKS, Method, MethodSetting, Step
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class Cola(Method):
    """M links: W + s·B₁·A₁ + … + s·B_M·A_M. At a knot, the link is frozen, a new one starts with B = 0 and a random A, and the
    optimizer forgets its moments.

    The knots divide the steps evenly, and the learning-rate schedule goes on over all links. The paper's knots and schedules are not
    established, and its option to lower the rank after the first link is left out.
    """

    name = "cola"
    paper = "2401.04151"
    summary = "as lora, M times; each link is frozen before the next one starts"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_LENGTH = 3
    """The longest chain of the paper."""
    settings = (MethodSetting("chain_length", int, f"Mode cola: number of links M; default {DEFAULT_LENGTH}."),)
    b_init, a_init, trained = "zeros", "kaiming", LINKS
    lora_rank = "M·r"
    notes = (
        "M links of rank r one after the other, divided evenly over the steps; M is `--chain-length`. At a knot, the "
        "optimizer forgets its moments, A is drawn anew and B is 0. A finished link is not added to W but kept next to it, "
        "which is the same function without rounding; it gets no dropout, as if it were in W. The stored adapter is the links "
        "side by side, a plain LoRA of rank M·r. The authors' code is not available. Where their knots are and whether the "
        "schedule restarts is not established: here the learning-rate schedule goes on over all links. The paper's option of "
        "a lower rank after the first link is left out."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """There is a link."""
        length = settings["chain_length"]
        return [f"--chain-length must be at least 1, not {length}"] if length is not None and length < 1 else []

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """Every link has a step."""
        if (length := _length(plan)) > steps:
            raise CoraError(
                f"--chain-length {length} is more than the {steps} steps of the run: each link needs at least one step"
            )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """The first link, which is a plain LoRA."""
        import torch

        from cora_cli.methods.parts.links import Links
        from cora_cli.methods.parts.starts import start_a

        return Links(start_a(plan, name, linear.in_features), 0), Links(torch.zeros(linear.out_features, plan.rank), 1)

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Earlier links have no dropout."""
        from cora_cli.methods.parts.layers import lora_layers
        from cora_cli.methods.parts.links import take_dropout

        for _, layer in lora_layers(model):
            take_dropout(layer)

    def finished_links(self, plan: AdapterPlan) -> int:
        """All links but the last."""
        return _length(plan) - 1

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Tie a knot where a link ends."""
        from cora_cli.methods.parts.layers import lora_layers
        from cora_cli.methods.parts.links import extend
        from cora_cli.methods.parts.starts import start_a

        length = _length(plan)
        finished = next((link for link in range(1, length) if step.number == step.total * link // length), None)
        if finished is None:
            return
        for name, layer in lora_layers(model):
            extend(layer, start_a(plan, f"{name}/link {finished + 1}", layer.in_features))
        step.optimizer.state.clear()


def _length(plan: AdapterPlan) -> int:
    return int(plan.own.get("chain_length", Cola.DEFAULT_LENGTH))
