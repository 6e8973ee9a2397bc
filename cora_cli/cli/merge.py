"""`cora merge`: adapter + base -> a plain model."""

import dataclasses
from pathlib import Path
from typing import Literal

import typer

from cora_cli.cli.command import command
from cora_cli.settings import setting


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Every setting of `cora merge`."""

    adapter: str = setting("Run directory of `cora train`, or a PEFT LoRA adapter directory.", argument=True)
    output: str = setting("Directory to write; must not exist.", flags=("--output", "-o"))
    base: str | None = setting("Base model, if not the one that the adapter names.", None)
    basis: str | None = setting("Basis file of a compact adapter, if it has moved.", None)
    dtype: Literal["stored", "bf16", "fp32"] = setting(
        "Precision of the merged weights; fp32 keeps updates that bf16 would round away.", "stored"
    )
    seed: int = setting("Has no effect on a merge; accepted so that every command takes one.", 0)
    trust_remote_code: bool = setting("Run code that comes with the model. Off unless you trust its author.", False)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "merge", MergeConfig, run)


def run(config: MergeConfig) -> None:
    """Write base weights plus adapter as a plain model that transformers loads."""
    from cora_cli.adapters.merge import merge_adapter
    from cora_cli.models.references import resolve_base, resolve_model

    written = merge_adapter(
        resolve_model(config.adapter),
        Path(config.output),
        base=resolve_base(config.base),
        basis_path=Path(config.basis) if config.basis else None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    print(f"{config.output}: {written} layers changed")
