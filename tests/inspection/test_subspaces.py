"""Overlap, angles, capture and chance against numpy and scipy, over shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from cora_cli.inspection.subspaces import captured, chance, gram, in_common, leading, overlap, principal_angles

SHAPES = {"rows": st.integers(2, 24), "columns": st.integers(2, 24), "seed": st.integers(0, 999), "data": st.data()}


def frame(generator: np.random.Generator, rows: int, size: int) -> np.ndarray:
    return np.linalg.qr(generator.standard_normal((rows, size)))[0]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(**SHAPES)
def test_leading_directions_are_the_left_singular_vectors(rows, columns, seed, data):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    rank = data.draw(st.integers(1, rows))
    found = leading(gram(as_tensor(matrix)), rank).numpy()
    vectors, values, _ = np.linalg.svd(matrix)
    kept = min(rank, columns)
    assert found.shape == (rows, kept), "directions beyond the numerical rank mean nothing"
    if kept == min(rows, columns) or values[kept] < 0.99 * values[kept - 1]:
        assert subspace_angles(found, vectors[:, :kept]).max() < 1e-6


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.integers(2, 24), seed=st.integers(0, 999), near=st.sampled_from([0.0, 1e-9, 1e-4, 1.0]), data=st.data())
def test_angles_and_overlap_are_those_of_scipy_also_where_they_are_tiny(rows, seed, near, data):
    sizes = [data.draw(st.integers(1, rows)) for _ in range(2)]
    generator = np.random.default_rng(seed)
    one = frame(generator, rows, sizes[0])
    start = np.hstack([one, generator.standard_normal((rows, rows))])[:, : sizes[1]]
    other = np.linalg.qr(start + near * generator.standard_normal((rows, sizes[1])))[0]
    angles = principal_angles(as_tensor(one), as_tensor(other)).numpy()
    assert (np.diff(angles) >= -1e-7).all()
    np.testing.assert_allclose(np.sort(angles), np.sort(subspace_angles(one, other)), atol=1e-9, rtol=1e-6)
    np.testing.assert_allclose(overlap(as_tensor(one), as_tensor(other)), np.mean(np.cos(angles) ** 2), atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(**SHAPES)
def test_capture_is_the_energy_of_the_projection_and_its_ceiling_the_own_directions(rows, columns, seed, data):
    generator = np.random.default_rng(seed)
    matrix, size = generator.standard_normal((rows, columns)), data.draw(st.integers(1, rows))
    basis = frame(generator, rows, size)
    share = captured(as_tensor(basis), as_tensor(matrix))
    np.testing.assert_allclose(share, np.linalg.norm(basis @ basis.T @ matrix) ** 2 / np.linalg.norm(matrix) ** 2)
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    ceiling = captured(leading(gram(as_tensor(matrix)), size), as_tensor(matrix))
    np.testing.assert_allclose(ceiling, values[:size].sum() / values.sum())
    assert share <= ceiling + 1e-12


@pytest.mark.parametrize(("rows", "one", "other"), [(12, 3, 3), (12, 2, 5), (9, 6, 4)])
def test_chance_is_the_mean_over_random_subspaces(rows, one, other):
    generator = np.random.default_rng(0)
    fixed = np.eye(rows)[:, :one]
    matrix = as_tensor(generator.standard_normal((rows, 7)))
    draws = [as_tensor(frame(generator, rows, other)) for _ in range(3000)]
    overlaps = [overlap(as_tensor(fixed), draw) for draw in draws]
    captures = [captured(draw, matrix) for draw in draws]
    for values, expected in ((overlaps, chance(one, other, rows)), (captures, other / rows)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize("size", [3, 10, 16])
def test_large_subspaces_have_directions_in_common_by_their_size_alone_which_do_not_count(size):
    generator = np.random.default_rng(0)
    frames = {str(n): as_tensor(frame(generator, 20, size)) for n in range(6)}
    assert all(in_common(name, frames) is None for name in frames)
    turned = as_tensor(np.linalg.qr(generator.standard_normal((size, size)))[0])
    found = in_common("0", frames | {"same": frames["0"] @ turned})
    assert found is not None
    assert overlap(found, frames["0"]) == pytest.approx(1)
    assert found.shape == (20, size)
    part = in_common("0", {"0": frames["0"], "a part": frames["0"][:, :2]})
    assert (part is None) == (size + 2 > 20 + 2 - 1)
