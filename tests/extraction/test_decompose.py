import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction import gram as gram_module
from cora_cli.extraction.decompose import Decomposition, decompose
from cora_cli.extraction.merge import merge_group, plan
from tests.weights.helpers import CPU, ArraySource, reference_directions, reference_matrix, subspace_error

NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"]
COMBINATIONS = list(
    itertools.product(
        ("module", "layer", "projection", "global"),
        ("mean", "gram"),
        ("weights", "delta"),
        ("svd", "pca"),
        ("top", "bottom"),
        ("output", "input"),
    )
)


def members(share: str, group: str) -> list[str]:
    return [name for name in NAMES if share == "global" or (f".{group}." in f".{name}.")]


def spectrum(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A matrix with the given singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return (left * values) @ right.T


def of_matrix(matrix: np.ndarray, rank: int, device: torch.device = CPU, **changed) -> Decomposition:
    choices = BasisChoices(rank=rank, target_modules=("w",), **changed)
    source = ArraySource({"w": matrix})
    [group] = plan([source], None, choices)
    return decompose(merge_group(group, [source], None, choices, device), rank, choices.component)


@pytest.mark.parametrize(("share", "merge", "source", "method", "component", "side"), COMBINATIONS)
@settings(derandomize=True, deadline=None, max_examples=6)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9), models=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_every_legal_combination_equals_the_literal_float64_reference(
    share, merge, source, method, component, side, rows, columns, models, seed, data
):
    columns = rows if side == "input" else columns
    rng = np.random.default_rng(seed)
    arrays = [{name: rng.standard_normal((rows, columns)) + 0.5 for name in NAMES} for _ in range(models + 1)]
    base, *sources = (ArraySource(one) for one in arrays)
    pooled = models * (1 if share == "module" else 4 if share == "global" else 2) * columns if merge == "gram" else columns
    rank = data.draw(st.integers(1, min(rows, pooled - (method == "pca"))))
    choices = BasisChoices(share, merge, source, side, method, component, rank, ("q_proj", "k_proj"))
    subtracted = base if source == "delta" else None
    for group in plan(sources, subtracted, choices):
        found = decompose(merge_group(group, sources, subtracted, choices, CPU), rank, component)
        names = members(share, group.name)
        weights = [one[name] - (arrays[0][name] if subtracted else 0) for one in arrays[1:] for name in names]
        matrix = reference_matrix(weights, choices)
        directions, values = reference_directions(matrix, choices)
        assert found.gap
        assert subspace_error(directions, found.basis) < 1e-6
        np.testing.assert_allclose(found.singular_values, values, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.total_energy, np.sum(matrix**2), rtol=1e-10)
        np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(rank), atol=1e-12)


@pytest.mark.parametrize("orders", [1, 5, 10])
@pytest.mark.parametrize("rank", [1, 8, 40, 60])
@pytest.mark.parametrize("component", ["top", "bottom"])
def test_the_mean_stays_exact_on_spectra_that_decay_over_many_orders_of_magnitude(orders, rank, component):
    values = 10.0 ** (-orders * np.arange(64) / 64)
    matrix = spectrum(values, 64, 80)
    directions, _ = reference_directions(matrix, BasisChoices(rank=rank, component=component))
    found = of_matrix(matrix, rank, component=component)
    edge = rank if component == "top" else 64 - rank
    backward_error = np.finfo(float).eps / (values[edge - 1] - values[edge])
    if backward_error < 1e-7:
        assert found.gap, "a gap that float64 resolves must be used"
    if backward_error > 1e-5:
        assert not found.gap, "a gap that float64 cannot resolve must not be claimed"
    if found.gap:
        assert subspace_error(directions, found.basis) < 1e-6


def test_the_first_r_directions_are_those_of_rank_r():
    matrix = np.random.default_rng(0).standard_normal((12, 15))
    for component in ("top", "bottom"):
        large, small = of_matrix(matrix, 8, component=component), of_matrix(matrix, 3, component=component)
        np.testing.assert_allclose(large.basis[:, :3], small.basis, atol=1e-10)


@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("component", ["top", "bottom"])
def test_a_subspace_is_reported_as_not_unique_exactly_where_two_singular_values_meet_at_its_edge(merge, component):
    matrix = spectrum(np.array([5.0, 3.0, 3.0, 2.0, 1.0]), 5, 7)
    gaps = [of_matrix(matrix, rank, merge=merge, component=component).gap for rank in range(1, 6)]
    assert gaps == ([True, False, True, True, True] if component == "top" else [True, True, False, True, True])


def test_each_columns_largest_entry_is_positive_whatever_the_sign_of_the_weights():
    matrix = np.random.default_rng(3).standard_normal((20, 30))
    for merge, component in itertools.product(("mean", "gram"), ("top", "bottom")):
        found, negated = (of_matrix(sign * matrix, 9, merge=merge, component=component).basis for sign in (1, -1))
        lead = found[found.abs().argmax(dim=0), torch.arange(9)]
        assert bool((lead > 0).all())
        np.testing.assert_allclose(found, negated, atol=1e-9)


@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("component", ["top", "bottom"])
def test_a_rank_beyond_the_numerical_rank_is_refused_with_the_one_that_works(merge, component):
    matrix = spectrum(np.array([4.0, 3.0, 2.0]), 10, 12)
    with pytest.raises(CoraError, match=r"group w has a numerical rank of 3, less than --rank 5; use --rank 3 or less"):
        of_matrix(matrix, 5, merge=merge, component=component)
    assert of_matrix(matrix, 3, merge=merge).gap


@pytest.mark.parametrize("kind", ["decaying", "repeated", "flat"])
def test_large_matrices_agree_with_a_full_decomposition(kind, monkeypatch):
    monkeypatch.setattr(gram_module, "_LANCZOS_ROWS", 60)
    size, rank = 220, 6
    values = {
        "decaying": np.exp(-np.arange(size) / 30),
        "repeated": np.r_[np.full(rank, 3.0), np.linspace(2, 1, size - rank)],
        "flat": np.ones(size),
    }[kind]
    matrix = spectrum(values, size, size)
    found = of_matrix(matrix, rank, merge="gram")
    assert found.gap == (kind != "flat")
    if found.gap:
        directions, _ = reference_directions(matrix, BasisChoices(rank=rank))
        assert subspace_error(directions, found.basis) < 1e-9
    np.testing.assert_allclose(found.singular_values, values[:rank], rtol=1e-9)


def test_lanczos_is_not_trusted_where_it_misses_a_copy_of_a_repeated_value(monkeypatch):
    import scipy.sparse.linalg

    gram = np.diag(np.r_[5.0, 4.0, 4.0, np.linspace(2, 1, 57)])
    real = scipy.sparse.linalg.eigsh

    def forgetful(matrix, k, **options):
        if k == 1:
            return real(matrix, k=k, **options)
        unit = np.eye(60)
        return np.array([2.0, 4.0, 5.0]), unit[:, [3, 1, 0]]

    assert gram_module.lanczos(60, gram.dot, 3) is not None
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", forgetful)
    assert gram_module.lanczos(60, gram.dot, 3) is None


def test_a_tall_matrix_is_decomposed_without_its_gram_matrix():
    # 60,000 rows: the Gram matrix would take 29 GB.
    matrix = np.random.default_rng(0).standard_normal((60_000, 4)) * [8, 4, 2, 1]
    found = of_matrix(matrix, 2)
    expected = np.linalg.svd(matrix, full_matrices=False)[0][:, :2]
    assert subspace_error(expected, found.basis) < 1e-9


def test_a_gram_matrix_that_no_memory_holds_is_refused_before_anything_is_read():
    source = ArraySource({"w": np.broadcast_to(0.0, (60_000, 4))})
    with pytest.raises(CoraError, match=r"60000 x 60000 matrix \(27 GiB\) for group w; use --merge mean"):
        plan([source], None, BasisChoices(rank=2, merge="gram", target_modules=("w",)))
    assert source.reads == []


@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("component", ["top", "bottom"])
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_away_from_the_processor_torch_alone_decomposes_and_agrees(merge, component, device, monkeypatch):
    monkeypatch.setattr(gram_module, "on_cpu", lambda tensor: False)
    for name in ("scipy.linalg.eigh", "scipy.sparse.linalg.eigsh", "scipy.linalg.blas.dsyrk"):
        monkeypatch.setattr(name, None)
    matrix = np.random.default_rng(0).standard_normal((40, 50))
    found = of_matrix(matrix, 6, torch.device(device), merge=merge, component=component)
    directions, values = reference_directions(matrix, BasisChoices(rank=6, component=component))
    assert subspace_error(directions, found.basis) < 1e-9
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-9)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), transposed=st.booleans())
def test_the_lower_triangle_of_a_gram_matrix_is_the_sum_of_the_products_however_they_lie_in_memory(rows, columns, transposed):
    rng = np.random.default_rng(rows)
    parts = [rng.standard_normal((columns, rows) if transposed else (rows, columns)) for _ in range(2)]
    weights = [torch.from_numpy(part).T if transposed else torch.from_numpy(part) for part in parts]
    gram = gram_module.empty_gram(weights[0])
    for weight in weights:
        assert gram_module.add_gram(gram, weight) is gram
    expected = sum(weight.numpy() @ weight.numpy().T for weight in weights)
    np.testing.assert_allclose(np.tril(gram.numpy()), np.tril(expected), atol=1e-12)
