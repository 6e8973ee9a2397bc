"""LoRI: a frozen random A, and a B that is first trained densely and then anew in its largest entries alone."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cora_cli.errors import CoraError
from cora_cli.methods.method import B_ALONE, Method, MethodSetting, Step
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.masked import Masked


class Lori(Method):
    """ΔW = s·B·A with A frozen. LoRI-D trains B; then the largest entries of all |B| are chosen, and LoRI-S trains these from zero."""

    name = "lori"
    paper = "2504.07448"
    summary = "A random, frozen; B = 0; midway B is set to 0 again, and only what were its largest entries is trained"
    DEFAULT_KEPT = 0.1
    settings = (
        MethodSetting(
            "lori_dense_steps", int, "Mode lori: steps of the first stage, which trains all of B; default: half of the run."
        ),
        MethodSetting(
            "lori_kept", float, f"Mode lori: share of B's entries that the second stage trains; default {DEFAULT_KEPT:g}."
        ),
    )
    b_init, a_init, trained = "zeros", "kaiming", B_ALONE
    trained_in_words = "B out·r, then a tenth of its entries"
    notes = (
        "Both stages are one run. The first is LoRI-D and trains B; after `--lori-dense-steps`, the `--lori-kept` share of the entries with the largest |B| of all "
        "layers together stays trainable, B is 0 again, the optimizer forgets its moments, and the second stage is LoRI-S. Entries that are not kept stay 0. "
        "The authors (juzhengz/LoRI) run the stages one after the other for two epochs each, with the learning rates 5e-5 and 5e-4; whether the second has the "
        "first one's A is not established. Here A is the same, and one learning-rate schedule goes on over both stages. `run.json` counts all of B as "
        "trained. Their r is 32, alpha 64."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """The share is one, and there is a first stage."""
        found, kept, dense = [], settings["lori_kept"], settings["lori_dense_steps"]
        if kept is not None and not 0 < kept <= 1:
            found.append(f"--lori-kept must be above 0 and at most 1, not {kept}")
        if dense is not None and dense < 1:
            found.append(f"--lori-dense-steps must be at least 1, not {dense}")
        return found

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """Both stages have a step."""
        dense = _dense_steps(plan, steps)
        if not 1 <= dense < steps:
            raise CoraError(
                f"mode lori needs a step for each of its stages: {dense} of {steps} steps would be the first one's; change --lori-dense-steps or "
                "the length of the run"
            )

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor, Masked]":
        """A random, and B = 0 with every entry in use."""
        import torch

        from cora_cli.methods.parts.masked import Masked
        from cora_cli.methods.parts.starts import start_a

        return start_a(plan, name, linear.in_features), Masked(torch.zeros(linear.out_features, plan.rank))

    @property
    def stored_as_trained(self) -> bool:
        """The mask is not stored."""
        return False

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Choose the entries and start B again where the first stage ends."""
        import torch

        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        if step.number != _dense_steps(plan, step.total):
            return
        factors = [layer.lora_B[ADAPTER] for _, layer in lora_layers(model)]
        with torch.no_grad():
            sizes = torch.cat([b.weight.abs().flatten() for b in factors])
            kept = max(1, round(plan.own.get("lori_kept", self.DEFAULT_KEPT) * len(sizes)))
            chosen = torch.zeros_like(sizes, dtype=torch.bool)
            chosen[sizes.topk(kept).indices] = True
            for b, part in zip(factors, chosen.split([b.weight.numel() for b in factors]), strict=True):
                b.mask.copy_(part.view_as(b.mask))
                b.weight.zero_()
        step.optimizer.state.clear()


def _dense_steps(plan: AdapterPlan, steps: int) -> int:
    return int(plan.own.get("lori_dense_steps", steps // 2))
