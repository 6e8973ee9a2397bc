"""`cora extract-basis`: several models -> one basis file."""

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
from cora_cli.cli.command import command
from cora_cli.settings import setting

_CHOICES, _RUN = "Choices (the first value is the default)", "Run"


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Every setting of `cora extract-basis`."""

    models: tuple[str, ...] = setting(
        "Fine-tuned models: hub ids with optional @revision, directories, adapters, runs.", argument=True
    )
    output: str = setting("The basis file to write.", flags=("--output", "-o"), panel=_RUN)
    rank: int = setting("Directions R to keep per group.", DEFAULT_RANK, panel=_CHOICES)
    share: Share = setting(
        "Weights that become one matrix: each module on its own across models, all projections of a layer, one projection across "
        "layers, or everything (the paper's text).",
        "module",
        panel=_CHOICES,
    )
    merge: Merge = setting(
        "mean: (1/n) Σ Wᵢ (equation 2); gram: the top eigenvectors of Σ WᵢWᵢᵀ, which cannot cancel.", "mean", panel=_CHOICES
    )
    source: Source = setting("The weights themselves, or their difference from --base.", "weights", panel=_CHOICES)
    side: Side = setting(
        "Singular vectors of the output side, for B, or of the input side: for A in mode fa-basis, and for B of square weights.",
        "output",
        panel=_CHOICES,
    )
    method: Method = setting("svd (equations 3-5), or pca: centred first (equations 7-9).", "svd", panel=_CHOICES)
    component: Component = setting("Principal or minor directions.", "top", panel=_CHOICES)
    target_modules: tuple[str, ...] = setting("Weights to read, comma-separated.", DEFAULT_TARGET_MODULES, panel=_CHOICES)
    base: str | None = setting("The model that --source delta subtracts, and that adapters rest on.", None, panel=_CHOICES)
    device: str = setting("auto, cpu, cuda or cuda:<index>: where matrices are decomposed.", "auto", panel=_RUN)
    seed: int = setting("Has no effect on an exact decomposition; accepted so that every command takes one.", 0, panel=_RUN)
    overwrite: bool = setting("Replace an existing file.", False, panel=_RUN)

    def __post_init__(self) -> None:
        """Check the choices against each other."""
        self.choices().require_base(self.base is not None)

    def choices(self) -> BasisChoices:
        """The settings that make the basis what it is. Raises `UsageError` where one is impossible."""
        return BasisChoices(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BasisChoices)})


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "extract-basis", ExtractConfig, run)


def run(config: ExtractConfig) -> None:
    """Extract the common subspace of fine-tuned models, reading only the target weights, one matrix at a time."""
    from cora_cli.device import select_hardware
    from cora_cli.extraction.extract import extract_basis
    from cora_cli.models.references import resolve_model

    choices = config.choices()
    device = select_hardware(config.device, "auto").device
    models = [resolve_model(reference) for reference in config.models]
    base = resolve_model(config.base) if config.base else None
    print(extract_basis(models, Path(config.output), choices, base, device, config.overwrite).render())
