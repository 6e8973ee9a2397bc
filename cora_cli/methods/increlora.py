"""IncreLoRA: LoRAs that start at rank 1 and grow where growing matters most."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes, Step, common_options
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight

_ORDER = ("values", "rows", "columns")
"""The order in which an optimizer step's new parameters join the optimizer, so that its stored state finds them again."""


class IncreLora(Method):
    """ΔW = s·B·diag(E)·A of each layer at its own rank ρ, with s = alpha / (ρ + 1e-5), as in the authors' code.

    Every layer starts with one pair and E = 0, and has g more pairs in reserve whose E is fixed at 1e-5 while their A and B train. After
    the warm-up, every interval, the h layers with the largest score take g pairs of their reserve into use and get new ones, until
    the ranks add up to `--rank` times the number of layers. A layer's score is (moving average of v)·(moving average of |v − average|)
    with v = Σ|ΔW ⊙ ∂L/∂ΔW| / √(out·in) of a step. The loss has the term λ·mean‖P·Pᵀ − I‖ over all A and Bᵀ.

    Other than in the authors' code, the last growth takes just as many pairs as are left, and then no layer keeps a reserve: there
    the ranks can exceed the target, and the reserve stays. There, P is one row at a time.
    """

    name = "increlora"
    paper = "2308.12043"
    summary = "A, B random, E = 0 between them; every layer starts at rank 1, and the most important ones grow"
    takes = frozenset({"alpha"})
    DECAY = 0.85
    DEFAULT_WARMUP, DEFAULT_INTERVAL, DEFAULT_LAYERS, DEFAULT_ORTHOGONALITY = 100, 100, 6, 0.1
    settings = (
        MethodSetting("growth_warmup", int, f"Mode increlora: steps before the first growth; default {DEFAULT_WARMUP}."),
        MethodSetting("growth_interval", int, f"Mode increlora: steps from growth to growth; default {DEFAULT_INTERVAL}."),
        MethodSetting("growth_layers", int, f"Mode increlora: layers h that grow at a time; default {DEFAULT_LAYERS}."),
        MethodSetting("growth_rank", int, "Mode increlora: ranks g that each of them gains; default r / 2."),
        MethodSetting(
            "orthogonality",
            float,
            f"Mode increlora: weight λ in the loss of how far A and B are from orthogonal; default {DEFAULT_ORTHOGONALITY:g}.",
        ),
    )
    b_init, a_init = "N(0, 0.02²)", "N(0, 0.02²)"
    trained: ClassVar[Shapes] = {}
    trained_in_words = "A ρ·in + E ρ + B out·ρ, with r the mean of the layers' ρ"
    step_0_is_base = "to about 1e-5"
    lora_rank = "ρ of each layer"
    runs_in_several_processes = False
    notes = (
        "ΔW = s·B·diag(E)·A with s = alpha / (ρ + 1e-5) at each layer's own rank ρ. `--rank` is the mean of the ranks at the "
        "end. A run whose steps do not suffice to reach it is refused, with the step at which it would be reached. It differs "
        "from the authors' code in four points. The last growth takes just as many ranks as are left; there, the ranks can "
        "exceed the budget, after which the reserve is never dropped. The importance of a step is that of its complete "
        "gradient, not of its last micro-batch. Layers grow in order of their scores; there, all layers with the score of the "
        "last one grow as well. The orthogonality term is ‖P·Pᵀ − I‖ of all pairs of a layer; there, pairs are separate "
        "parameters, and only the norm of each counts. `run.json` has the number of parameters that train at the end. The "
        "stored LoRA has E and s multiplied into A, and the largest ρ of any layer, with zeros in the others. The mode runs "
        "in one process only."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Counts are positive and the weight is not negative."""
        found = []
        for setting in self.settings:
            least = 0 if setting.name in ("growth_warmup", "orthogonality") else 1
            if (value := settings[setting.name]) is not None and value < least:
                found.append(f"{setting.flag} must be at least {least}, not {value}")
        return found

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """The ranks reach their target before the last step."""
        own = _Own(plan)
        if own.layers > len(layers):
            raise CoraError(f"--growth-layers {own.layers} is more than the {len(layers)} layers that --target-modules adapts")
        rounds = math.ceil((plan.rank - 1) * len(layers) / (own.layers * own.rank))
        last = (own.warmup // own.interval + rounds) * own.interval
        if rounds and last >= steps:
            raise CoraError(
                f"a mean rank of {plan.rank} in {len(layers)} layers is reached at step {last}, but the run has {steps} steps: lower "
                "--rank, --growth-warmup or --growth-interval, or raise --growth-layers or --growth-rank"
            )

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int:
        """At the start: one pair with its E, and the reserve."""
        return (1 + _reserve(plan)) * (out + inside) + 1

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's LoRA with s = 1, since s depends on the rank and is part of A here."""
        from peft import LoraConfig

        return LoraConfig(**common_options(plan), lora_alpha=plan.rank, lora_dropout=plan.dropout)

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.nn.Module, torch.nn.Module]":
        """One pair in use, and the reserve."""
        import torch

        from cora_cli.methods.parts.growing import GrowingA, GrowingB, Watch

        pairs = [drawn_pair(plan, name, index, linear.out_features, linear.in_features) for index in range(1 + _reserve(plan))]
        watch = Watch()
        return (
            GrowingA(torch.cat([row for row, _ in pairs]), plan.alpha, watch),
            GrowingB(torch.cat([column for _, column in pairs], 1), watch),
        )

    def start_directions(self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side) -> None:
        """None: the start is a part of the result only where it was kept."""

    def holds_start(self, side: Side) -> bool:
        """Both factors are trained."""
        return False

    @property
    def stored_as_trained(self) -> bool:
        """E and s are multiplied into A."""
        return False

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer":
        """The optimizer of all methods, with the parameters in the order in which they were added to the layers."""
        entries = []
        for index, (_, a, b) in enumerate(_growing(model)):
            added = {"values": a.woken[:, 0].tolist(), "rows": a.born[:, 0].tolist(), "columns": a.born[:, 0].tolist()}
            found = {"values": a.listed("values"), "rows": a.listed("rows"), "columns": b.listed("columns")}
            for place, key in enumerate(_ORDER):
                entries += [((step, index, place), parameter) for step, parameter in zip(added[key], found[key], strict=True)]
        entries.sort(key=lambda entry: entry[0])
        found_optimizer: torch.optim.Optimizer = kind([one for _, one in entries], weight_decay=weight_decay, **options)
        return found_optimizer

    def added_loss(self, model: "torch.nn.Module", plan: AdapterPlan) -> "torch.Tensor | None":
        """λ·mean‖P·Pᵀ − I‖ (Frobenius) over P = A and P = Bᵀ of all layers."""
        import torch

        if not (weight := plan.own.get("orthogonality", self.DEFAULT_ORTHOGONALITY)):
            return None
        distances = []
        for _, a, b in _growing(model):
            with torch.autocast(a.born.device.type, enabled=False):
                for p in (a.unscaled(), b.matrix().T):
                    distances.append((p @ p.T - torch.eye(len(p), device=p.device)).norm())
        return weight * torch.stack(distances).mean()

    def before_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Collect ∂L/∂ΔW while there is something to grow."""
        if _missing(model, plan):
            for _, a, b in _growing(model):
                a.watch.change = (a.weight, b.weight)

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Update the scores, and grow where it is time to."""
        own = _Own(plan)
        if not (missing := _missing(model, plan)):
            return
        scores = []
        layers = list(_growing(model))
        for _, a, _ in layers:
            value = a.watch.importance()
            a.sensitivity.lerp_(value, 1 - self.DECAY)
            a.uncertainty.lerp_((value - a.sensitivity).abs(), 1 - self.DECAY)
            scores.append(float(a.sensitivity * a.uncertainty))
        if step.number <= own.warmup or step.number % own.interval:
            return
        gains = {}
        for index in sorted(range(len(layers)), key=lambda index: -scores[index])[: own.layers]:
            gains[index] = min(own.rank, missing)
            missing -= gains[index]
        for index, (name, a, b) in enumerate(layers):
            if gain := gains.get(index, 0):
                _grow(plan, name, a, b, gain, step)
        if not missing:
            for _, a, b in layers:
                _drop_reserve(a, b, step.optimizer)


class _Own:
    """The method's settings with their defaults."""

    def __init__(self, plan: AdapterPlan) -> None:
        self.warmup: int = plan.own.get("growth_warmup", IncreLora.DEFAULT_WARMUP)
        self.interval: int = plan.own.get("growth_interval", IncreLora.DEFAULT_INTERVAL)
        self.layers: int = plan.own.get("growth_layers", IncreLora.DEFAULT_LAYERS)
        self.rank: int = plan.own.get("growth_rank", max(1, plan.rank // 2))


def _reserve(plan: AdapterPlan) -> int:
    """Pairs in reserve at the start: none where the target is reached from the start."""
    return _Own(plan).rank if plan.rank > 1 else 0


def _growing(model: "torch.nn.Module") -> "list[tuple[str, Any, Any]]":
    """Name, A and B of every layer."""
    from cora_cli.methods.parts.layers import ADAPTER, lora_layers

    found: Any = model
    return [(name, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for name, layer in lora_layers(found)]


def _missing(model: "torch.nn.Module", plan: AdapterPlan) -> int:
    """Ranks between the layers' sum and its target."""
    layers = _growing(model)
    return max(0, plan.rank * len(layers) - sum(a.rank for _, a, _ in layers))


def drawn_pair(plan: AdapterPlan, name: str, index: int, out: int, inside: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Row (1, in) and column (out, 1) of the pair `index` of a layer, N(0, 0.02²), by the seed."""
    import torch

    from cora_cli.methods.parts.starts import seeded

    generator = seeded(plan.seed, name, f"pair {index}")
    return 0.02 * torch.randn(1, inside, generator=generator), 0.02 * torch.randn(out, 1, generator=generator)


def _grow(plan: AdapterPlan, name: str, a: Any, b: Any, gain: int, step: Step) -> None:
    """Take `gain` pairs of the reserve into use and add as many to the reserve."""
    import torch

    from cora_cli.methods.parts.growing import RESERVE

    rows, values, columns = a.listed("rows"), a.listed("values"), b.listed("columns")
    inside, out, device = rows[0].shape[1], len(columns[0]), rows[0].device
    pairs = [drawn_pair(plan, name, len(rows) + index, out, inside) for index in range(gain)]
    new_values = [torch.nn.Parameter(torch.full((1, 1), RESERVE, device=device)) for _ in pairs]
    new_rows = [torch.nn.Parameter(row.to(device)) for row, _ in pairs]
    new_columns = [torch.nn.Parameter(column.to(device)) for _, column in pairs]
    a.set_list("values", [*values, *new_values])
    a.set_list("rows", [*rows, *new_rows])
    b.set_list("columns", [*columns, *new_columns])
    now = a.born.new_full((gain, 1), step.number)
    a.woken, a.born = torch.cat([a.woken, now]), torch.cat([a.born, now])
    step.optimizer.param_groups[0]["params"] += [*new_values, *new_rows, *new_columns]


def _drop_reserve(a: Any, b: Any, optimizer: "torch.optim.Optimizer") -> None:
    """Remove the pairs that are not in use."""
    rows, columns, kept = a.listed("rows"), b.listed("columns"), a.rank
    dropped = {id(parameter) for parameter in (*rows[kept:], *columns[kept:])}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in dropped:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in dropped]
    a.set_list("rows", rows[:kept])
    a.born = a.born[:kept].clone()
    b.set_list("columns", columns[:kept])
