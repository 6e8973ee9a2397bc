"""The settings of `cora laplace`. A grid plans with them, so this module does not import torch."""

import dataclasses

from cora_cli.errors import UsageError
from cora_cli.settings import MOST, range_problems, setting


@dataclasses.dataclass(frozen=True)
class LaplaceConfig:
    """Every setting of `cora laplace`."""

    run: str = setting(
        "Run directory of `cora train`, finished, of a mode that trains A and B of each layer as they are.", argument=True
    )
    output_dir: str = setting("Run directory to write; must not exist yet.", flags=("--output-dir", "-o"))
    prior_precision: float | None = setting(
        "Precision λ of the Gaussian prior over A and B. Default: the one with the largest marginal likelihood.", None
    )
    directions: int = setting(
        "Most eigenvectors of each side of a matrix whose curvature is kept; the prior decides about the others.", 64, most=MOST
    )
    limit: int | None = setting("Measure the curvature on the first N training records only.", None, most=MOST)
    seed: int = setting("Seed of the answers that are sampled to measure the curvature.", 0)
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto")
    trust_remote_code: bool = setting("Run Python code that comes with the model. Use only if you trust its author.", False)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.prior_precision is not None and not self.prior_precision > 0:
            raise UsageError(f"--prior-precision must be positive, not {self.prior_precision}")
        for name in ("directions", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, not {value}")
        if problems := range_problems(self):
            raise UsageError("; ".join(problems))
