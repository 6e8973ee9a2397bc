"""`cora export`: convert an adapter of any mode to a plain PEFT LoRA."""

import dataclasses
from pathlib import Path

import typer

from cora_cli.cli.command import all_or_nothing, command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import LARGEST_RANK, setting
from cora_cli.terminal import show


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Every setting of `cora export`."""

    adapter: str = setting("Run directory of `cora train`, or a PEFT adapter directory.", argument=True, names="model")
    output: str = setting("Output directory; must not exist yet.", flags=("--output", "-o"))
    base: str | None = setting("Base model. Default: the one recorded in the adapter.", None, names="model")
    basis: str | None = setting(
        "Basis file of a compact adapter. Default: the path recorded in the adapter.", None, names="basis"
    )
    rank: int | None = setting("Keep only the first pairs of A and B, of a run of mode dylora.", None, most=LARGEST_RANK)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)
    trust_remote_code: bool = setting("Run Python code that comes with the model. Use only if you trust its author.", False)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "export", ExportConfig, run, lambda config: all_or_nothing(config.output))


def run(config: ExportConfig) -> None:
    """Write an adapter as a plain PEFT LoRA.

    It has the same weight update, where a LoRA with that exists.
    """
    from cora_cli.adapters.export import export_adapter
    from cora_cli.lock import own_output
    from cora_cli.models.references import resolve_base, resolve_model

    with own_output(Path(config.output)):
        rank = export_adapter(
            resolve_model(config.adapter),
            Path(config.output),
            base=resolve_base(config.base),
            basis_path=Path(config.basis) if config.basis else None,
            rank=config.rank,
            trust_remote_code=config.trust_remote_code,
        )
    show(f"{config.output}: a LoRA of rank {rank}")
    say_next(f"{config.output} is written", "evaluate", "--model", config.output, "--dataset", "DATA", "-o", "EVALUATION")
