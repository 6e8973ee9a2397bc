"""CoRA (arXiv 2409.02119) and its mirror: one factor starts as the common subspace of fine-tuned models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.methods.method import A_ALONE, A_AND_B, B_ALONE, START_EXAMPLES, Method
from cora_cli.methods.parts.costs import svd_flops
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class _Basis(Method):
    """What fb and tb have in common: B starts as the basis or as `--b-init` says, A at zero."""

    b_init, a_init = "basis", "zeros"
    b_init_is_free = True
    settings = (START_EXAMPLES,)

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Examples go with one start of B only."""
        start, found = settings["b_init"] or self.b_init, []
        if settings["start_examples"] is not None and start != "gradient":
            found.append(f"--start-examples has no effect where B starts as {start}; it goes with --b-init gradient")
        return found

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor | torch.nn.Module, torch.Tensor | torch.nn.Module] | None":
        """As any LoRA's, or B from the gradient: its first r left singular vectors."""
        if plan.b_init != "gradient":
            return super().starts(plan, basis, name, linear)
        from cora_cli.methods.parts.gradient import left_directions
        from cora_cli.methods.parts.starts import start_a

        assert linear.observed.gradient is not None
        return start_a(plan, name, linear.in_features), left_directions(linear.observed.gradient, plan.rank, name)

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """One SVD of the gradient, where B starts from it."""
        return svd_flops(out, inside) if plan.b_init == "gradient" else 0.0


class FrozenBasis(_Basis):
    """FB: B is the basis and stays frozen; A starts at zero and is trained (equation 6). `--b-init` gives its ablations."""

    name = "fb"
    prefix = "cora-"
    paper = "2409.02119"
    summary = "B = basis, frozen; A = 0"
    has_compact_form = True
    trained = A_ALONE
    notes = (
        "With `--b-init gradient`, B has the first r left singular vectors of ∂L/∂W, the gradient of the mean loss over the first 64 training "
        "examples (`--start-examples`), with the signs of a basis file: the start of LoRA-One and LoRA-SB for a frozen B. W and A are as with a "
        "basis, so training begins at the base model. `tb` takes it too. It costs what the gradient costs in `lora-sb`, and "
        "`--load-in-4bit`, `--shard` and `--compact` are refused."
    )


class TrainableBasis(_Basis):
    """TB: B starts as the basis; A and B are trained."""

    name = "tb"
    prefix = "cora-"
    paper = "2409.02119"
    summary = "B = basis, A = 0"
    trained = A_AND_B


class FrozenInputBasis(Method):
    """The mirror of FB: A is a basis of the input side and stays frozen; B is trained."""

    name = "fa-basis"
    paper = "none: the mirror of fb"
    summary = "A = basis of the input side, frozen; B = 0"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "zeros", "basis", B_ALONE
