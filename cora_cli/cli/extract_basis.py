"""`cora extract-basis`: extract the common subspace of several models into a basis file."""

import dataclasses
from pathlib import Path

import typer

from cora_cli.basis.choices import (
    DEFAULT_RANK,
    DEFAULT_TARGET_MODULES,
    BasisChoices,
    Component,
    Merge,
    Method,
    Share,
    Side,
    Source,
)
from cora_cli.cli.command import all_or_nothing, command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import setting
from cora_cli.terminal import show

_CHOICES, _RUN = "Choices (the first value is the default)", "Run"


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Every setting of `cora extract-basis`."""

    models: tuple[str, ...] = setting(
        "Fine-tuned models: hub ids with optional @revision, model directories, adapters or cora runs.",
        argument=True,
        names="model",
    )
    output: str = setting("Basis file to write.", flags=("--output", "-o"), panel=_RUN)
    rank: int = setting(
        "Rank R of the basis: the number of directions kept per group of weights.", DEFAULT_RANK, panel=_CHOICES
    )
    share: Share = setting(
        "Weights that share one basis. module: one basis per module; layer: one for all projections of a layer; projection: "
        "one per projection, for all layers; global: one for all weights (as the paper describes).",
        "module",
        panel=_CHOICES,
    )
    merge: Merge = setting(
        "mean: decompose the mean (1/n) Σ Wᵢ (equation 2); gram: top eigenvectors of Σ WᵢWᵢᵀ, in which opposite weights do not cancel.",
        "mean",
        panel=_CHOICES,
    )
    source: Source = setting("weights: the weights themselves; delta: their difference from --base.", "weights", panel=_CHOICES)
    normalize: bool = setting(
        "With --source delta: divide each weight's difference by its Frobenius norm, so that a model that was trained further does not "
        "count more than the others.",
        False,
        panel=_CHOICES,
    )
    side: Side = setting(
        "output: left singular vectors, for B; input: right singular vectors, for A in mode fa-basis, or for B if the weights "
        "are square.",
        "output",
        panel=_CHOICES,
    )
    method: Method = setting(
        "svd: singular vectors (equations 3-5); pca: the same after centring (equations 7-9).", "svd", panel=_CHOICES
    )
    component: Component = setting("top: principal directions; bottom: minor directions.", "top", panel=_CHOICES)
    target_modules: tuple[str, ...] = setting(
        "Names of the weights to read, comma-separated.", DEFAULT_TARGET_MODULES, panel=_CHOICES
    )
    base: str | None = setting(
        "Base model: --source delta subtracts it, and adapters are applied to it.", None, panel=_CHOICES, names="model"
    )
    device: str = setting("Device for the decompositions: auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0, panel=_RUN)
    dry_run: bool = setting(
        "Print what would be read and written and the peak memory by part, then exit. Needs no weights; without --device cpu, it plans for a GPU.",
        False,
        panel=_RUN,
    )
    overwrite: bool = setting("Replace an existing file.", False, panel=_RUN)

    def __post_init__(self) -> None:
        """Check the choices against each other."""
        self.choices().require_base(self.base is not None)

    def choices(self) -> BasisChoices:
        """The settings that determine the basis. Raises `UsageError` if one is invalid."""
        return BasisChoices(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BasisChoices)})


def what_is_saved(config: ExtractConfig) -> str:
    """What an interrupted extraction leaves."""
    return "nothing was written" if config.dry_run else all_or_nothing(config.output)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "extract-basis", ExtractConfig, run, what_is_saved)


def run(config: ExtractConfig) -> None:
    """Extract the common subspace of fine-tuned models. Reads only the target weights, one matrix at a time."""
    from cora_cli.device import select_hardware
    from cora_cli.extraction.extract import extract_basis
    from cora_cli.lock import own_output
    from cora_cli.models.references import resolve_model

    choices = config.choices()
    if config.dry_run:
        from cora_cli.device import planned_hardware
        from cora_cli.extraction.preflight import preflight

        models = [resolve_model(reference, weights=False) for reference in config.models]
        base = resolve_model(config.base, weights=False) if config.base else None
        device = planned_hardware(config.device, "auto").device
        show(preflight(models, Path(config.output), choices, base, device, config.overwrite))
        return
    device = select_hardware(config.device, "auto").device
    models = [resolve_model(reference) for reference in config.models]
    base = resolve_model(config.base) if config.base else None
    with own_output(Path(config.output)):
        summary = extract_basis(models, Path(config.output), choices, base, device, config.overwrite)
    show(summary.render())
    mode = ("fa-basis", "fb")[config.side == "output"]
    say_next(
        f"{config.output} is written",
        "train",
        "--mode",
        mode,
        "--basis",
        config.output,
        "--model",
        "MODEL",
        "--dataset",
        "DATA",
        "--output-dir",
        "RUN",
    )
