"""LoRA factors from the principal directions of a layer's inputs, with a rank of the layer's own (EVA, arXiv 2410.07170)."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from cora_cli.methods.parts.computed import Computed


class OwnRank(Computed):
    """A or B as a trained matrix whose rank is the layer's own instead of the configuration's."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(values)

    def matrix(self) -> torch.Tensor:
        """The trained matrix itself."""
        return self.values

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the rank of the checkpoint: shares of variance that are equal up to rounding may fall otherwise when they are computed again."""
        if (shape := tuple(shapes["values"])) != tuple(self.values.shape):
            self.values = torch.nn.Parameter(self.values.new_zeros(shape))


def principal_directions(inputs: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` eigenvectors (rank, in) of `inputs` (in, in) with the largest eigenvalues, as rows; each one's largest entry is positive."""
    vectors = torch.linalg.eigh(inputs)[1].flip(1)[:, :rank].T.contiguous()
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def shared_out(inputs: Mapping[str, torch.Tensor], rank: int, most: int) -> dict[str, int]:
    """Share out `rank` times as many ranks as there are layers, at most `most` to one, to the largest shares of variance.

    `inputs` has the second moments (in, in) of each layer's inputs; a share is an eigenvalue over their trace.
    """
    shares = [
        (-float(value) / float(matrix.trace()), place, name)
        for name, matrix in inputs.items()
        for place, value in enumerate(torch.linalg.eigvalsh(matrix).flip(0)[:most])
    ]
    kept = Counter(name for _, _, name in sorted(shares)[: rank * len(inputs)])
    return {name: kept[name] for name in inputs}
