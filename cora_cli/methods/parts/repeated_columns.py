"""A LoRA factor A whose columns are equal within each group of inputs (QA-LoRA, arXiv 2309.14717)."""

import torch

from cora_cli.methods.parts.computed import Computed


class RepeatedColumns(Computed):
    """A (r, in) from trained `columns` (r, in / group): each is multiplied by `factor` and repeated for the inputs of its group."""

    def __init__(self, columns: torch.Tensor, group: int, factor: float) -> None:
        super().__init__()
        self.columns = torch.nn.Parameter(columns)
        self._group, self._factor = group, factor

    def matrix(self) -> torch.Tensor:
        """(r, in)."""
        return self._factor * self.columns.repeat_interleave(self._group, dim=1)
