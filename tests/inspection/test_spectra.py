"""Explained variance by SVD and PCA of one matrix, and the bounds between them that the page's note rests on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.inspection.spectra import bounds, least_mean_share, needed, paper_note, spectra

MATRICES = {
    "rows": st.integers(2, 20),
    "columns": st.integers(3, 20),
    "shift": st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    "decay": st.sampled_from([0.0, 0.5, 2.0]),
    "seed": st.integers(0, 999),
}


def matrix_of(rows: int, columns: int, shift: float, decay: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    matrix = np.arange(1, rows + 1)[:, None] ** -decay * generator.standard_normal((rows, columns))
    return matrix + shift * generator.standard_normal((rows, 1))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(**MATRICES)
def test_both_are_the_squared_singular_values_of_the_matrix_and_of_the_centred_one(rows, columns, shift, decay, seed):
    matrix = matrix_of(rows, columns, shift, decay, seed)
    found = spectra(torch.from_numpy(matrix))
    centred = matrix - matrix.mean(axis=1, keepdims=True)
    for shares, of in ((found.svd, matrix), (found.pca, centred)):
        squares = np.linalg.svd(of, compute_uv=False) ** 2
        np.testing.assert_allclose(shares, squares.cumsum() / squares.sum(), atol=1e-9)
    np.testing.assert_allclose(found.mean_share, 1 - (centred**2).sum() / (matrix**2).sum(), atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(**MATRICES)
def test_the_share_of_pca_lies_between_the_bounds_that_the_share_of_svd_gives(rows, columns, shift, decay, seed):
    found = spectra(torch.from_numpy(matrix_of(rows, columns, shift, decay, seed)))
    low, high = bounds(found)
    room = 1e-9 / (1 - found.mean_share)
    assert (low - room <= found.pca).all()
    assert (found.pca <= high + room).all()


@settings(derandomize=True, deadline=None, max_examples=120)
@given(**MATRICES, level=st.floats(0.3, 0.99))
def test_pca_needs_more_than_svd_only_where_the_mean_holds_more_than_the_stated_share(rows, columns, shift, decay, seed, level):
    found = spectra(torch.from_numpy(matrix_of(rows, columns, shift, decay, seed)))
    svd, pca = needed(found.svd, level), needed(found.pca, level)
    if pca > svd:
        assert found.mean_share > least_mean_share(svd, pca, min(rows, columns)) - 1e-9


@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=st.integers(4, 16), columns=st.integers(4, 16), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_all_of_the_variance_needs_as_many_components_by_pca_as_by_svd_or_one_less(rows, columns, rank, seed):
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((rows, rank)) @ (generator.standard_normal((rank, columns)) + 1)
    found = spectra(torch.from_numpy(matrix))
    assert needed(found.svd, 1 - 1e-10) == rank
    assert needed(found.pca, 1 - 1e-10) in (rank, max(rank - 1, 1))


def test_needed_counts_the_first_directions_that_reach_the_level():
    assert [needed((0.5, 0.9, 1.0), level) for level in (0.4, 0.5, 0.6, 0.9, 1.0)] == [1, 1, 2, 2, 3]
    assert needed((0.5, 1.0 - 1e-16), 1.0) == 2


def test_the_papers_counts_need_a_mean_that_holds_more_than_half_of_the_energy():
    assert least_mean_share(130, 3000, 5120) == pytest.approx(1 - 2121 / 4990)
    assert "more than 57% of the energy" in paper_note(0.0123)
    assert "here it holds at most 1.23%" in paper_note(0.0123)
