"""Plans of any method, as tests write them down."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.methods.registry import OWN_SETTINGS, plan_adapter


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
