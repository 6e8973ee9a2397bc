"""`cora export`: an adapter of any mode -> a plain PEFT LoRA."""

import dataclasses
from pathlib import Path

import typer

from cora_cli.cli.command import command
from cora_cli.settings import setting


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Every setting of `cora export`."""

    adapter: str = setting("Run directory of `cora train`, or a PEFT adapter directory.", argument=True)
    output: str = setting("Directory to write; must not exist.", flags=("--output", "-o"))
    base: str | None = setting("Base model, if not the one that the adapter names.", None)
    basis: str | None = setting("Basis file of a compact adapter, if it has moved.", None)
    seed: int = setting("Has no effect on an export; accepted so that every command takes one.", 0)
    trust_remote_code: bool = setting("Run code that comes with the model. Off unless you trust its author.", False)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "export", ExportConfig, run)


def run(config: ExportConfig) -> None:
    """Write a trained adapter as a plain PEFT LoRA of equal effect."""
    from cora_cli.adapters.export import export_adapter
    from cora_cli.models.references import resolve_base, resolve_model

    rank = export_adapter(
        resolve_model(config.adapter),
        Path(config.output),
        base=resolve_base(config.base),
        basis_path=Path(config.basis) if config.basis else None,
        trust_remote_code=config.trust_remote_code,
    )
    print(f"{config.output}: a LoRA of rank {rank}")
