"""Which weights share a group, and the merged matrix of each group (equation 2 of arXiv 2409.02119, or a pooled Gram).

`plan` makes every check that needs only shapes, before a tensor is read; `decompose` decomposes the result.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from cora_cli.basis.artifact import differing_key
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.gram import EPS, add_gram, empty_gram
from cora_cli.extraction.lowrank import Pair, gram_factor, mean_factor
from cora_cli.weights.sources import WeightSource

# The largest Gram matrix, 8 GiB in float64. Weights with more rows are embeddings and would exhaust the memory.
_MAX_GRAM_ROWS = 32_768
# Entries converted to float64 and added at a time: this many fit in the processor's cache, which is five times faster.
_CHUNK_ENTRIES = 2**18


@dataclasses.dataclass(frozen=True)
class Group:
    """The weights that are merged into one matrix M of `rows` x `columns`.

    `modules` maps names to (out, in). `rows` is the out-dimension, or the in-dimension under `--side input`. `directions` is
    the number of singular vectors that M can have.
    """

    name: str
    modules: dict[str, tuple[int, int]]
    rows: int
    columns: int
    directions: int


@dataclasses.dataclass
class Merged:
    """One group's M, as `matrix` or as the lower triangle of `gram` = M Mᵀ (rows, rows); the other is None. All float64.

    `matrix` is M (rows, columns), or a narrower matrix with the same M Mᵀ (see `lowrank`). Under `--method pca` M is already
    centred. `energy` = ‖M‖_F². `removed` is the energy lost to centring or to factors that cancel; its rounding errors remain
    in M.
    """

    group: Group
    matrix: torch.Tensor | None
    gram: torch.Tensor | None
    energy: float
    removed: float


def plan(sources: Sequence[WeightSource], base: WeightSource | None, choices: BasisChoices) -> list[Group]:
    """The groups of `choices`, from shapes alone.

    `base` is the model to subtract, if any. Raises `CoraError` naming modules and shapes if the models differ, if the weights
    of a group cannot be merged, or if `rank` exceeds the number of directions.
    """
    modules = _common_targets([*sources, *([base] if base else [])], choices)
    grouped: dict[str, dict[str, tuple[int, int]]] = {}
    for module, shape in modules.items():
        name = choices.mapping.group_of(module)
        if name is None:
            raise CoraError(
                f"--share {choices.share}: {module} is not in a numbered layer; use --share module or --share projection"
            )
        grouped.setdefault(name, {})[module] = shape
    return [_plan_group(name, members, len(sources), choices) for name, members in grouped.items()]


def merge_group(
    group: Group,
    sources: Sequence[WeightSource],
    base: WeightSource | None,
    choices: BasisChoices,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Merged:
    """Merge one group on `device`, with one model's tensor in memory at a time besides the float64 accumulator.

    For LoRA adapters of one base under `--source delta`, only their factors are held if that takes no more memory. `mean` gives
    M = (1/n) Σ Wᵢ over all weights of the group (equation 2), `gram` M = [W1 … Wn] through Σ Wᵢ Wᵢᵀ; Wᵢ has W_base subtracted
    if `base` is given, and is transposed under `--side input`. With `--normalize` each difference is divided by its Frobenius norm, so
    that all models, and in a shared group all weights, count alike however much they changed; one of zero stays zero. Under `pca` the columns are centred (equation 7). `advance` is
    called after each tensor. Raises `CoraError` if the merged matrix is zero.
    """
    merged = merge_weights(group, sources, base, choices, device, advance)
    if merged is None:
        reasons = {
            "delta": "the models equal the base there (exclude it with --target-modules)",
            "weights": "all its weights are zero" if choices.method == "svd" else "all its columns are equal",
        }
        reason = reasons[choices.source]
        if choices.source == "delta" and choices.merge == "mean":
            reason = f"either {reason} or their differences cancel (use --merge gram)"
        raise CoraError(f"the merged matrix of group {group.name} is zero; {reason}")
    return merged


def merge_weights(
    group: Group,
    sources: Sequence[WeightSource],
    base: WeightSource | None,
    choices: BasisChoices,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Merged | None:
    """As `merge_group`; None if the merged matrix is zero."""
    low_rank = base is not None and is_low_rank(group, sources, base, choices)
    pool: _Mean | _Gram | _LowRank = _LowRank(choices) if low_rank else _Mean() if choices.merge == "mean" else _Gram()
    for module in group.modules:
        base_weight: torch.Tensor | None = None
        for source in sources:
            if isinstance(pool, _LowRank):
                assert base is not None
                left, right = (factor.to(device) for factor in source.own_factors(module, base))
                pool.add(*_scaled_pair(left, right, choices))
            elif base is None:
                pool.add(_oriented(source.read(module).to(device), choices))
            elif (delta := source.own_delta(module, base)) is not None:
                pool.add(_scaled(_oriented(delta.to(device), choices), choices))
            else:
                if base_weight is None:
                    base_weight = base.read(module).to(device)
                pool.add(_scaled(_oriented(source.read(module).to(device).double() - base_weight, choices), choices))
            delta = None  # free it before the next tensor is read
            advance()
    merged = pool.result(group, centred=choices.method == "pca")
    return None if merged.energy <= pool.rounding(group) * (merged.energy + merged.removed) else merged


class _Mean:
    """(1/n) Σ Wᵢ."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, weight: torch.Tensor) -> None:
        if self._sum is None:
            self._sum = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        rows = max(1, _CHUNK_ENTRIES // weight.shape[1])
        for total, part in zip(self._sum.split(rows), weight.split(rows), strict=True):
            total.add_(part.double())
        self._count += 1

    def result(self, group: Group, centred: bool) -> Merged:
        assert self._sum is not None
        matrix, total = self._sum.div_(self._count), 0.0
        if centred:
            total = _energy(matrix)
            matrix -= matrix.mean(dim=1, keepdim=True)
        energy = _energy(matrix)
        return Merged(group, matrix, None, energy, max(total - energy, 0.0))

    @staticmethod
    def rounding(group: Group) -> float:
        """The share of the energy that may be rounding error: each entry is off by a few units in its last place."""
        return (8 * EPS) ** 2


class _Gram:
    """Σ Wᵢ Wᵢᵀ, in which differences cannot cancel, and the sum of the columns for centring: Σ W Wᵀ − N μ μᵀ."""

    def __init__(self) -> None:
        self._gram: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def add(self, weight: torch.Tensor) -> None:
        weight = weight.double()
        if self._gram is None or self._sum is None:
            self._gram = empty_gram(weight)
            self._sum = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
        add_gram(self._gram, weight)
        self._sum += weight.sum(dim=1)

    def result(self, group: Group, centred: bool) -> Merged:
        assert self._gram is not None
        assert self._sum is not None
        total = self._gram.trace().item()
        if centred:
            self._gram.addr_(self._sum, self._sum, alpha=-1.0 / group.columns)
        energy = max(self._gram.trace().item(), 0.0)
        return Merged(group, None, self._gram, energy, max(total - energy, 0.0))

    @staticmethod
    def rounding(group: Group) -> float:
        """See `_Mean.rounding`; here the error is that of a difference of squares."""
        return 8 * EPS * group.rows


class _LowRank:
    """The mean or the Gram of products L R, which are never built."""

    def __init__(self, choices: BasisChoices) -> None:
        self._factor = mean_factor if choices.merge == "mean" else gram_factor
        self._transposed = choices.side == "input"
        self._pairs: list[Pair] = []

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self._pairs.append((right.T, left.T) if self._transposed else (left, right))

    def result(self, group: Group, centred: bool) -> Merged:
        factor, total = self._factor(self._pairs, centred)
        self._pairs.clear()
        energy = _energy(factor)
        return Merged(group, factor, None, energy, max(total - energy, 0.0))

    @staticmethod
    def rounding(group: Group) -> float:
        """See `_Mean.rounding`; here each entry is a sum over as many terms as the weight has directions."""
        return (8 * EPS) ** 2 * group.directions


def is_low_rank(group: Group, sources: Sequence[WeightSource], base: WeightSource, choices: BasisChoices) -> bool:
    """Whether all differences are known low-rank products whose factors take no more memory than M and one difference.

    Not for `bottom`: minor directions lie outside all factors, so they need M itself.
    """
    ranks = [source.own_rank(module, base) for module in group.modules for source in sources]
    most = min(group.rows, group.columns) if choices.merge == "mean" else group.rows
    return choices.component == "top" and all(r is not None for r in ranks) and sum(r or 0 for r in ranks) <= most


def _energy(matrix: torch.Tensor) -> float:
    return torch.linalg.vector_norm(matrix).item() ** 2


def _scaled(delta: torch.Tensor, choices: BasisChoices) -> torch.Tensor:
    """`delta` / ‖`delta`‖_F under `--normalize`, else `delta`."""
    norm = torch.linalg.vector_norm(delta).item() if choices.normalize else 0.0
    return delta / norm if norm > 0 else delta


def _scaled_pair(left: torch.Tensor, right: torch.Tensor, choices: BasisChoices) -> Pair:
    """`_scaled` of L R, as factors."""
    norm = torch.linalg.vector_norm(gram_factor([(left, right)], centred=False)[0]).item() if choices.normalize else 0.0
    return (left / norm if norm > 0 else left), right


def _oriented(weight: torch.Tensor, choices: BasisChoices) -> torch.Tensor:
    return weight.T if choices.side == "input" else weight


def _common_targets(sources: Sequence[WeightSource], choices: BasisChoices) -> dict[str, tuple[int, int]]:
    """Target module -> (out, in). Raises `CoraError` naming the difference if two sources differ in these."""
    first, *others = sources
    modules = first.targets(choices.target_modules)
    for other in others:
        names = set(other.targets(choices.target_modules))
        if different := names.symmetric_difference(modules):
            module = min(different)
            has, lacks = (first, other) if module in first.shapes else (other, first)
            raise CoraError(
                f"{has.reference} has a weight {module} {has.shapes[module]}, but {lacks.reference} does not; "
                "only models of one architecture can be merged"
            )
        for module in modules:
            if first.shapes[module] != other.shapes[module]:
                raise CoraError(
                    f"{module} is {first.shapes[module]} in {first.reference}, but {other.shapes[module]} in {other.reference}; "
                    "only models of one architecture can be merged"
                )
        if key := differing_key(first.architecture, other.architecture):
            raise CoraError(
                f"{key} is {first.architecture[key]} in {first.reference}, but {other.architecture[key]} in {other.reference}; "
                "only models of one architecture can be merged"
            )
    return {module: first.shapes[module] for module in modules}


def _plan_group(name: str, members: dict[str, tuple[int, int]], models: int, choices: BasisChoices) -> Group:
    along, across = (1, 0) if choices.side == "input" else (0, 1)
    lead = next(iter(members))
    for side in (along, across) if choices.merge == "mean" else (along,):  # pooling allows different numbers of columns
        for module, shape in members.items():
            if shape[side] != members[lead][side]:
                raise CoraError(_refusal(name, (lead, members[lead]), (module, shape), side, choices))
    rows = members[lead][along]
    columns = members[lead][across] if choices.merge == "mean" else models * sum(shape[across] for shape in members.values())
    if choices.merge == "gram" and rows > _MAX_GRAM_ROWS:
        raise CoraError(
            f"--merge gram needs a {rows} x {rows} matrix ({rows**2 * 8 / 2**30:.0f} GiB) for group {name}; use --merge mean"
        )
    # Centred columns sum to zero, which removes one direction.
    directions = min(rows, columns - (choices.method == "pca"))
    if choices.rank > directions:
        raise CoraError(
            f"--rank {choices.rank} is more than the {directions} directions of group {name}, whose merged matrix is "
            f"{(rows, columns)}; use --rank {directions} or less"
        )
    return Group(name, members, rows, columns, directions)


def _refusal(
    name: str, one: tuple[str, tuple[int, int]], two: tuple[str, tuple[int, int]], side: int, choices: BasisChoices
) -> str:
    what = ("out", "in")[side]
    of_keys = side == 0 and any(module.endswith(("k_proj", "v_proj")) for module, _ in (one, two))
    reason = " (grouped-query attention makes K and V smaller)" if of_keys and choices.share in ("layer", "global") else ""
    other_share = "--share module" if choices.share == "projection" else "--share module or --share projection"
    pools = side == (0 if choices.side == "input" else 1)  # --merge gram does not need this dimension to be equal
    alternative = f"{other_share}, or --merge gram" if pools else other_share
    return (
        f"--share {choices.share} needs weights of equal {what}-dimension, but in group {name} {one[0]} is {one[1]} and "
        f"{two[0]} is {two[1]}{reason}; use {alternative}"
    )
