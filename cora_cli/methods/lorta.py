"""LoRTA: the changes of all layers, projections and heads are one tensor of low rank in CP form."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import Method, MethodSetting, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight


class LoRta(Method):
    """For layer l and projection m, the columns of ΔW that belong to head h are s·P·diag(C_H[h] ⊙ C_M[m] ⊙ C_L[l])·Q.

    P (out, r), Q (r, in/H), C_H (H, r), C_M (M, r) and C_L (L, r) are trained and shared by all adapted weights of one shape. Side by
    side over the heads this is a LoRA of rank r for each weight: B = P·diag(C_M[m] ⊙ C_L[l]) and A = [diag(C_H[h])·Q]_h.
    """

    name = "lorta"
    paper = "2410.04060"
    summary = "one CP tensor for all weights of one shape: Q = 0; P, C_H, C_M and C_L random"
    takes = frozenset({"alpha", "rslora"})
    settings = (
        MethodSetting(
            "tensor_heads", int, "Mode lorta: number H of parts of the inputs; default: the model's attention heads."
        ),
        MethodSetting(
            "lorta_init_scale", float, "Mode lorta: c in the start U(±√(6 / (r(1 + 5c²)))) of C_H, C_M and C_L; default 0."
        ),
    )
    b_init, a_init = "uniform", "zeros"
    trained: ClassVar[Shapes] = {
        "lora_A.heads": ("H", "r"),
        "lora_A.inputs": ("r", "in/H"),
        "lora_B.outputs": ("out", "r"),
        "lora_B.projections": ("M", "r"),
        "lora_B.layers": ("L", "r"),
    }
    trained_in_words = "r(out + in/H + H + M + L), once per shape of W"
    notes = (
        "The paper's initialisation is not established; the start is that of the authors' code (ihounie/lorta), where `--lorta-init-scale` "
        "is `init_scale`, 0 by default. Its s is alpha / r with alpha 8, 16 to 128 in its scripts. As there, the inputs are divided into "
        "heads for all projections. Their tensor is for square attention weights alone. Here, weights of each shape have a tensor of their "
        "own, so that grouped-query models work, with M projections and L layers, those that are adapted. For q, k, v and o of one shape this is "
        "the authors' method and count. `--tensor-heads` is H."
    )

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """H is positive, c is not negative."""
        heads, scale = settings["tensor_heads"], settings["lorta_init_scale"]
        found = [f"--tensor-heads must be at least 1, not {heads}"] if heads is not None and heads < 1 else []
        return found + ([f"--lorta-init-scale must be at least 0, not {scale}"] if scale is not None and scale < 0 else [])

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """c is 0 unless it is given."""
        return dataclasses.replace(request, own={"lorta_init_scale": 0.0, **request.own})

    def for_model(self, plan: AdapterPlan, heads: int | None) -> AdapterPlan:
        """H is the number of attention heads unless it is given."""
        if heads is None or "tensor_heads" in plan.own:
            return plan
        return dataclasses.replace(plan, own={**plan.own, "tensor_heads": heads})

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """H is known and divides the inputs."""
        heads = plan.own.get("tensor_heads")
        if heads is None:
            raise CoraError(
                "mode lorta needs --tensor-heads: this model's config.json does not state its number of attention heads"
            )
        if linear.in_features % heads:
            raise CoraError(
                f"mode lorta divides the {linear.in_features} inputs of {name} by the number of heads, {heads}, which does not divide them; "
                "choose --tensor-heads"
            )

    def starts(self, *_: Any) -> None:
        """None: `after_install` starts all layers together."""

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Give all weights of one shape the same five parameters."""
        from cora_cli.methods.parts.cp_tensor import InputFactor, OutputFactor
        from cora_cli.methods.parts.layers import ADAPTER, lora_layers

        found: dict[str, Any] = dict(lora_layers(model))
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in found.items()}
        for shape in dict.fromkeys(shapes.values()):
            places = {name: _place(name) for name in shapes if shapes[name] == shape}
            numbers, projections = (list(dict.fromkeys(place[part] for place in places.values())) for part in (0, 1))
            heads, inputs, outputs, of_projections, of_layers = self._tensor(plan, *shape, len(projections), len(numbers))
            for name, (number, projection) in places.items():
                device = found[name].lora_A[ADAPTER].weight.device
                row, column = projections.index(projection), numbers.index(number)
                found[name].lora_A[ADAPTER] = InputFactor(heads, inputs).to(device)
                found[name].lora_B[ADAPTER] = OutputFactor(outputs, of_projections, of_layers, row, column).to(device)

    def _tensor(
        self, plan: AdapterPlan, out: int, inside: int, projections: int, layers: int
    ) -> "tuple[torch.nn.Parameter, ...]":
        """C_H, Q, P, C_M and C_L at the start, of the weights of one shape."""
        import torch

        from cora_cli.methods.parts.starts import kaiming_uniform

        heads, slope = plan.own["tensor_heads"], 5**0.5 * plan.own["lorta_init_scale"]
        of_heads, of_projections, of_layers = (
            kaiming_uniform(plan, f"{out} × {inside}", part, (rows, plan.rank), slope)
            for part, rows in (("heads", heads), ("projections", projections), ("layers", layers))
        )
        inputs = torch.zeros(plan.rank, inside // heads)
        outputs = kaiming_uniform(plan, str(out), "outputs", (out, plan.rank))
        return tuple(map(torch.nn.Parameter, (of_heads, inputs, outputs, of_projections, of_layers)))

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """P, whose columns span those of each B; A is zero."""
        from cora_cli.methods.parts.starts import kaiming_uniform

        return kaiming_uniform(plan, str(features), "outputs", (features, plan.rank)) if side == "output" else None

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int | None:
        """r(out + in/H + H + M + L) for each shape; None where H is that of a model that does not state it."""
        heads = plan.own.get("tensor_heads")
        if heads is None:
            return None
        total = 0
        for out, inside in set(shapes.values()):
            places = [_place(name) for name, shape in shapes.items() if shape == (out, inside)]
            numbers, projections = ({place[part] for place in places} for part in (0, 1))
            total += plan.rank * (out + inside // heads + heads + len(projections) + len(numbers))
        return total


def _place(name: str) -> tuple[str, str]:
    """The layer of a weight and the projection within it: what comes before and after the first number in the weight's name."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: first + 1]), ".".join(parts[first + 1 :])
