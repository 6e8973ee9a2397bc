"""`cora merge`: merge an adapter into its base model."""

import dataclasses
from pathlib import Path
from typing import Literal

import typer

from cora_cli.cli.command import all_or_nothing, command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import setting
from cora_cli.terminal import show


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Every setting of `cora merge`."""

    adapter: str = setting("Run directory of `cora train`, or a PEFT LoRA adapter directory.", argument=True, names="model")
    output: str = setting("Output directory; must not exist yet.", flags=("--output", "-o"))
    base: str | None = setting("Base model. Default: the one recorded in the adapter.", None, names="model")
    basis: str | None = setting(
        "Basis file of a compact adapter. Default: the path recorded in the adapter.", None, names="basis"
    )
    dtype: Literal["stored", "bf16", "fp32"] = setting(
        "Precision of the merged weights. stored: that of the base checkpoint; fp32 keeps small updates that bf16 rounds away.",
        "stored",
    )
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)
    trust_remote_code: bool = setting("Run Python code that comes with the model. Use only if you trust its author.", False)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "merge", MergeConfig, run, lambda config: all_or_nothing(config.output))


def run(config: MergeConfig) -> None:
    """Merge an adapter into its base model.

    The result is a plain model for transformers and others.
    """
    from cora_cli.adapters.loading import check_basis
    from cora_cli.adapters.merge import merge_adapter
    from cora_cli.lock import own_output
    from cora_cli.models.references import resolve_base, resolve_model

    adapter, basis = resolve_model(config.adapter), Path(config.basis) if config.basis else None
    check_basis([adapter], basis)
    with own_output(Path(config.output)):
        written = merge_adapter(
            adapter,
            Path(config.output),
            base=resolve_base(config.base),
            basis_path=basis,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
    show(f"{config.output}: {written} layers merged")
    say_next(f"{config.output} is written", "evaluate", "--model", config.output, "--dataset", "DATA", "-o", "EVALUATION")
