"""XGBLoRA: boosting with LoRAs of a low rank, each on a random subset of the model's blocks."""

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


class XgbLora(Method):
    """W + s·B₁·A₁ + s·B₂·A₂ + …: every κ steps the booster is frozen, L_s blocks of the model are drawn, and a new booster starts
    there with B = 0, a random A and an optimizer without moments.

    The paper's boosters have rank 1; here `--rank` is their rank. In a block that was not drawn A and B are 0, so that their gradients
    and their steps are 0. κ, s and the penalty of the objective are not established: the penalty is λ·Σ(‖A‖² + ‖B‖²) of the booster,
    without one by default, because Adam's first step would follow it alone in A. The learning-rate schedule goes on over all boosters.
    """

    name = "xgblora"
    paper = "2410.19694"
    summary = "as lora, in L_s random blocks for κ steps; then frozen, and again with new blocks"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_STEPS = 20
    settings = (
        MethodSetting("booster_steps", int, f"Mode xgblora: steps κ of a booster; default {DEFAULT_STEPS}."),
        MethodSetting("booster_blocks", int, "Mode xgblora: blocks L_s of the model in a booster; default: a third of them."),
        MethodSetting("booster_penalty", float, "Mode xgblora: weight λ of ‖A‖² + ‖B‖² in the loss; default 0."),
    )
    b_init, a_init, trained = "zeros", "kaiming", LINKS
    trained_in_words = "A r·in + B out·r, in L_s blocks at a time"
    lora_rank = "r for each draw of a layer"
    notes = (
        "Boosters in L_s random blocks for κ steps each, kept as `cola` keeps its links. The paper's boosters have rank 1; "
        "`--rank` is their rank here, so use `--rank 1` for the paper's method. A block is what shares a layer's name up to "
        "its first number, such as `model.layers.3`. In blocks that are not drawn, A and B are zero, so that their gradients "
        "and steps are zero: they count as trained parameters in `run.json`, since each is trained in turn. The authors' code "
        "is not available; κ, s, and the weight of the penalty on A and B are not established. The penalty is λ·Σ(‖A‖² + "
        "‖B‖²) of the booster and off by default: while B = 0, it alone would decide Adam's step of A. The paper's best L_s "
        "was 11 of 32. The stored LoRA has the largest rank of any layer's draws, with zeros in the others."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Counts are positive and the penalty is not negative."""
        counts = (setting for setting in self.settings if setting.type is int)
        found = [
            f"{count.flag} must be at least 1, not {value}"
            for count in counts
            if (value := settings[count.name]) is not None and value < 1
        ]
        penalty = settings["booster_penalty"]
        return found + ([f"--booster-penalty must be at least 0, not {penalty}"] if penalty is not None and penalty < 0 else [])

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """There are as many steps and blocks as a booster needs."""
        if (every := _steps(plan)) > steps:
            raise CoraError(f"--booster-steps {every} is more than the {steps} steps of the run")
        blocks = len(_blocks(layers))
        if (wanted := plan.own.get("booster_blocks", 1)) > blocks:
            raise CoraError(f"--booster-blocks {wanted} is more than the {blocks} blocks that --target-modules adapts")

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """The first booster, as if its block were drawn."""
        import torch

        from cora_cli.methods.parts.links import Links

        a = booster_a(plan, name, linear.in_features, 0)
        return Links(a, 0), Links(torch.zeros(linear.out_features, plan.rank), 1)

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """A = 0 where the first booster is not; earlier boosters have no dropout."""
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers
        from cora_cli.methods.parts.links import start_link, take_dropout

        layers = dict(lora_layers(model))
        drawn = drawn_layers(plan, layers, 0)
        for name, layer in layers.items():
            take_dropout(layer)
            if name not in drawn:
                for chain in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                    start_link(chain, None, used=False)

    def added_loss(self, model: "torch.nn.Module", plan: AdapterPlan) -> "torch.Tensor | None":
        """λ·Σ(‖A‖² + ‖B‖²) of the booster."""
        if not (weight := plan.own.get("booster_penalty")):
            return None
        squares: Any = sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad)
        return weight * squares

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Freeze the booster and start the next one where κ steps have been taken and there are more."""
        from cora_cli.methods.parts.layers import lora_layers
        from cora_cli.methods.parts.links import extend

        number, rest = divmod(step.number, _steps(plan))
        if rest or step.number == step.total:
            return
        layers = dict(lora_layers(model))
        drawn = drawn_layers(plan, layers, number)
        for name, layer in layers.items():
            extend(layer, booster_a(plan, name, layer.in_features, number) if name in drawn else None)
        step.optimizer.state.clear()


def booster_a(plan: AdapterPlan, name: str, in_features: int, number: int) -> "torch.Tensor":
    """A (r, in) at the start of booster `number`, from 0, in the layer `name`."""
    from cora_cli.methods.parts.starts import start_a

    return start_a(plan, f"{name}/booster {number}" if number else name, in_features)


def drawn_layers(plan: AdapterPlan, layers: Collection[str], number: int) -> set[str]:
    """The layers of booster `number`, from 0: those of L_s blocks, by the seed."""
    import torch

    from cora_cli.methods.parts.starts import seeded

    blocks = _blocks(layers)
    names = list(blocks)
    wanted = plan.own.get("booster_blocks", -(-len(names) // 3))
    order = torch.randperm(len(names), generator=seeded(plan.seed, "", f"blocks of booster {number}"))
    return {layer for index in order[:wanted].tolist() for layer in blocks[names[index]]}


def _blocks(layers: Collection[str]) -> dict[str, list[str]]:
    """The layers by block: by their name up to its first number, such as `model.layers.3`; a layer without one is its own block."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        parts = layer.split(".")
        depth = next((index + 1 for index, part in enumerate(parts) if part.isdecimal()), len(parts))
        found.setdefault(".".join(parts[:depth]), []).append(layer)
    return found


def _steps(plan: AdapterPlan) -> int:
    return int(plan.own.get("booster_steps", XgbLora.DEFAULT_STEPS))
