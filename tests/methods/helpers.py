"""Plans of any method, as tests write them down."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cora_cli.adapters.install import target_linears
from cora_cli.methods.parts.layers import Observed
from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.methods.registry import OWN_SETTINGS, plan_adapter

SMALL: dict[str, dict[str, Any]] = {
    "eigenlorax": {"eigen_directions": 4, "eigen_random": 4, "eigen_init": 0.1},
    "lora-sb": {"start_step": 0.01},
    "uni-lora": {"theta_length": 500},
    "vb-lora": {"bank_vectors": 20, "bank_length": 16},
}
"""Own settings of methods whose defaults are for larger models than those of the tests."""


def plan_of(mode: str, **values: Any) -> AdapterPlan:
    """The plan of `mode`; methods' own settings stand among `values`, and `peft` is the content of a file for `--peft-config`."""
    own = {setting.name: values.pop(setting.name) for setting in OWN_SETTINGS if setting.name in values}
    with tempfile.TemporaryDirectory() as directory:
        if "peft" in values:
            own["peft_config"] = str(Path(directory) / "config.json")
            Path(own["peft_config"]).write_text(json.dumps(values.pop("peft")))
        made = plan_adapter(mode, AdapterRequest(**values, own=own))
    assert made is not None
    return made


def older_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen factors of lora-xs in earlier versions: V_rᵀ and U_r Σ_r."""
    u, values, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return v[:rank].contiguous(), u[:, :rank] * values[:rank]


def first_adam_step(layer: Any, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ΔW (out, in) after Adam's first step on a random linear loss, and the loss's gradient with respect to W, in float64."""
    generator = torch.Generator().manual_seed(3)
    x, pull = (torch.randn(9, width, generator=generator) for width in (layer.in_features, layer.out_features))
    ((layer(x) - layer.base_layer(x)) * pull).sum().backward()
    torch.optim.Adam([one for one in layer.parameters() if one.requires_grad], lr=rate, eps=1e-30).step()
    return layer.get_delta_weight("default").detach().double(), pull.double().T @ x.double()


def observed_in(model: torch.nn.Module, plan: AdapterPlan) -> dict[str, Observed]:
    """Random factors of two sources, gradients and inputs for all layers that `plan` adapts."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {}
    for name, linear in target_linears(model, plan.target_modules).items():
        out, inside = linear.out_features, linear.in_features
        x = draw(100, inside)
        sources = [(draw(out, 3), 0.01 * draw(3, inside)) for _ in range(2)]
        found[name] = Observed(sources, gradient=draw(out, inside), inputs=x.T @ x / 100)
    return found
