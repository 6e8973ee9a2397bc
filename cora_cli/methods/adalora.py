"""AdaLoRA: ΔW as triplets of a row, a value and a column; the least important ones are pruned until a budget is met."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes, Step, common_options
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.triplets import Columns, Values


class AdaLora(Method):
    """ΔW = s·B·diag(E)·A with r₀ triplets in every layer and s = alpha / (r₀ + 1e-5), as in the authors' code.

    A number's importance is (moving average of |w·∂L/∂w|)·(moving average of its distance from that average), a triplet's is that of E
    plus the means over its row and its column. After step t of T, all but b(t) triplets of the model have E set to zero: b is r₀ times the
    number of layers until t_i, falls to r times that number at T − t_f along (1 − (t − t_i) / (T − t_f − t_i))³, and from then on the
    triplets that are left are fixed. The loss has the term λ·mean‖P·Pᵀ − I‖ over all A and Bᵀ.
    """

    name = "adalora"
    paper = "2303.10512"
    summary = (
        "A, B random, E = 0 between them; the least important of r₀ pairs per layer are pruned until r are left on average"
    )
    takes = frozenset({"alpha"})
    DECAY, DEFAULT_INTERVAL, DEFAULT_ORTHOGONALITY = 0.85, 1, 0.1
    settings = (
        MethodSetting(
            "ada_start_rank", int, "Mode adalora: triplets r₀ of each layer at the start; default 1.5 r, rounded up."
        ),
        MethodSetting("ada_warmup", int, "Mode adalora: steps t_i before anything is pruned; default: a tenth of the run."),
        MethodSetting(
            "ada_final", int, "Mode adalora: last steps t_f, with a fixed choice of triplets; default: half of the run."
        ),
        MethodSetting("ada_interval", int, f"Mode adalora: steps from pruning to pruning; default {DEFAULT_INTERVAL}."),
        MethodSetting(
            "ada_orthogonality",
            float,
            f"Mode adalora: weight λ in the loss of how far A and B are from orthogonal; default {DEFAULT_ORTHOGONALITY:g}.",
        ),
    )
    b_init, a_init = "N(0, 0.02²)", "N(0, 0.02²)"
    trained: ClassVar[Shapes] = {"lora_A.values": ("r₀",), "lora_A.rows": ("r₀", "in"), "lora_B.columns": ("out", "r₀")}
    trained_in_words = "A r₀·in + E r₀ + B out·r₀, with r₀ = 1.5 r"
    lora_rank = "r₀"
    notes = (
        "ΔW = s·B·diag(E)·A with s = alpha / (r₀ + 1e-5), which pruning does not change. `--rank` is the mean rank r at the end, r₀ "
        "(`--ada-start-rank`) that at the start; the authors' 12 and 8 are the default's ratio. They prune between fixed numbers of steps; here the "
        "first tenth of a run prunes nothing, and its last half keeps the choice of triplets, as PEFT does, whose orthogonality weight is 0.5. A "
        "triplet that was pruned goes on training until the choice is fixed, and can come back where `--ada-interval` is more than 1. Importance is that of the "
        "complete, clipped gradient of a step and of the weights after it, as in the authors' code. The stored LoRA has E and s multiplied into A, and "
        "zeros in place of pruned rows."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Counts are positive and the weight is not negative."""
        found = []
        for setting in self.settings:
            least = 1 if setting.name in ("ada_interval", "ada_start_rank") else 0
            if (value := settings[setting.name]) is not None and value < least:
                found.append(f"{setting.flag} must be at least {least}, not {value:g}")
        start, rank = settings["ada_start_rank"], settings["rank"]
        if start is not None and start < rank:
            found.append(f"--ada-start-rank must be at least --rank {rank}, not {start}")
        return found

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """There are steps between the warm-up and the last ones."""
        warmup, final = _warmup(plan, steps), _final(plan, steps)
        if warmup + final >= steps and _start_rank(plan) > plan.rank:
            raise CoraError(
                f"mode adalora prunes in the steps between --ada-warmup {warmup} and the last --ada-final {final}, of which a run of {steps} steps has "
                "none; lower one of them"
            )

    def symbols(self, plan: AdapterPlan) -> dict[str, int]:
        """r₀."""
        return {"r₀": _start_rank(plan)}

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's LoRA of rank r₀ with the authors' s."""
        from peft import LoraConfig

        start = _start_rank(plan)
        options: dict[str, Any] = {**common_options(plan), "r": start, "lora_dropout": plan.dropout}
        options["lora_alpha"] = plan.alpha * start / (start + 1e-5)
        return LoraConfig(**options)

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """A and B drawn by the seed, E = 0."""
        import torch

        from cora_cli.methods.parts.starts import seeded
        from cora_cli.methods.parts.triplets import Columns, Values

        start, generator = _start_rank(plan), seeded(plan.seed, name, "triplets")
        rows = 0.02 * torch.randn(start, linear.in_features, generator=generator)
        columns = 0.02 * torch.randn(linear.out_features, start, generator=generator)
        return Values(rows), Columns(columns)

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer":
        """The optimizer of all methods, after whose steps the importance is measured, while the gradients are there."""

        def measure(*_: Any) -> None:
            for _name, a, b in _factors(model):
                a.measure(self.DECAY)
                b.measure(self.DECAY)

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made: torch.optim.Optimizer = kind(trained, weight_decay=weight_decay, **options)
        made.register_step_post_hook(measure)
        return made

    def added_loss(self, model: "torch.nn.Module", plan: AdapterPlan) -> "torch.Tensor | None":
        """λ·mean‖P·Pᵀ − I‖ (Frobenius) over P = A and P = Bᵀ of all layers."""
        import torch

        if not (weight := plan.own.get("ada_orthogonality", self.DEFAULT_ORTHOGONALITY)):
            return None
        distances = []
        for _, a, b in _factors(model):
            with torch.autocast(a.rows.device.type, enabled=False):
                for p in (a.rows, b.columns.T):
                    distances.append((p @ p.T - torch.eye(len(p), device=p.device)).norm())
        return weight * torch.stack(distances).mean()

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Choose triplets where it is time to, and set E of the others to zero."""
        import torch

        layers = list(_factors(model))
        warmup, last = _warmup(plan, step.total), step.total - _final(plan, step.total)
        interval = plan.own.get("ada_interval", self.DEFAULT_INTERVAL)
        chooses = warmup < step.number <= last and (step.number % interval == 0 or step.number == last)
        if not chooses and step.number <= last:
            return
        with torch.no_grad():
            if chooses:
                left = (last - step.number) / (last - warmup)
                budget = int(len(layers) * (plan.rank + (_start_rank(plan) - plan.rank) * left**3))
                scores = torch.cat([_importance(a, b) for _, a, b in layers])
                kept = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(budget).indices, True)
                for (_, a, _), part in zip(layers, kept.view(len(layers), -1), strict=True):
                    a.kept.copy_(part[:, None])
            for _, a, _ in layers:
                a.values.mul_(a.kept)


def _start_rank(plan: AdapterPlan) -> int:
    return int(plan.own.get("ada_start_rank", (3 * plan.rank + 1) // 2))


def _warmup(plan: AdapterPlan, steps: int) -> int:
    return int(plan.own.get("ada_warmup", steps // 10))


def _final(plan: AdapterPlan, steps: int) -> int:
    return int(plan.own.get("ada_final", steps // 2))


def _factors(model: "torch.nn.Module") -> "Iterator[tuple[str, Values, Columns]]":
    """Name, A and B of every layer."""
    from cora_cli.methods.parts.layers import ADAPTER, lora_layers

    found: Any = model
    for name, layer in lora_layers(found):
        yield name, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]


def _importance(a: "Values", b: "Columns") -> "torch.Tensor":
    """(r₀,): of each triplet."""
    return a.importance("values")[:, 0] + a.importance("rows").mean(1) + b.importance("columns").mean(0)
