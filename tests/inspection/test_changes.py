"""Changes as matrices and as low-rank factors against numpy, and the sums over all models but one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.inspection.changes import Change, leave_one_out


def random_change(generator: np.random.Generator, shape: tuple[int, int], rank: int | None) -> tuple[Change, np.ndarray]:
    """One of full rank as it is, or of rank `rank` in factors, and the same as a dense matrix."""
    if rank is None:
        matrix = generator.standard_normal(shape)
        return Change(torch.from_numpy(matrix.copy())), matrix
    left, right = generator.standard_normal((shape[0], rank)), generator.standard_normal((rank, shape[1]))
    return Change(torch.from_numpy(left), torch.from_numpy(right)), left @ right


def symmetric(lower: torch.Tensor) -> np.ndarray:
    return (lower.tril() + lower.tril(-1).T).numpy()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    ranks=st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=1, max_size=7),
    seed=st.integers(0, 999),
)
def test_in_factors_or_not_every_number_is_that_of_the_dense_matrix(rows, columns, ranks, seed):
    generator = np.random.default_rng(seed)
    known = {str(n): random_change(generator, (rows, columns), rank) for n, rank in enumerate(ranks)}
    basis = np.linalg.qr(generator.standard_normal((rows, 2)))[0]
    other = generator.standard_normal((rows, columns))
    for change, dense in known.values():
        energy = np.linalg.norm(dense) ** 2
        assert change.energy == pytest.approx(energy)
        assert change.captured_by(torch.from_numpy(basis)) == pytest.approx(np.linalg.norm(basis.T @ dense) ** 2 / energy)
        cosine = (dense * other).sum() / np.linalg.norm(dense) / np.linalg.norm(other)
        assert change.aligned_with(torch.from_numpy(other)) == pytest.approx(cosine**2, abs=1e-12)
        top = change.leading(1).numpy()
        assert np.linalg.norm(top.T @ dense) == pytest.approx(np.linalg.norm(dense, 2))
        np.testing.assert_allclose(change.add_to(torch.from_numpy(other.copy())), other + dense)
    seen = list(leave_one_out({name: change for name, (change, _) in known.items()}, (rows, columns)))
    assert [name for name, *_ in seen] == list(known)
    for name, pooled, mean in seen:
        others = [dense for key, (_, dense) in known.items() if key != name]
        if not others:
            assert (pooled, mean) == (None, None)
            continue
        np.testing.assert_allclose(symmetric(pooled), sum(dense @ dense.T for dense in others), atol=1e-9)
        np.testing.assert_allclose(mean, np.mean(others, axis=0), atol=1e-12)


def test_what_is_left_out_leaves_no_trace_in_the_sums_of_the_others():
    generator = np.random.default_rng(0)
    small, _ = random_change(generator, (6, 5), 1)
    huge = Change(torch.from_numpy(1e9 * generator.standard_normal((6, 5))))
    tiny, dense = random_change(generator, (6, 5), 1)
    sums = {name: (pooled, mean) for name, pooled, mean in leave_one_out({"a": small, "huge": huge, "b": tiny}, (6, 5))}
    pooled, mean = sums["huge"]
    np.testing.assert_allclose(
        mean.numpy() * 2 - small.add_to(torch.zeros(6, 5, dtype=torch.float64)).numpy(), dense, atol=1e-14
    )
    assert np.linalg.matrix_rank(symmetric(pooled), tol=1e-9) == 2


def test_nothing_is_left_out_of_nothing():
    assert list(leave_one_out({}, (3, 2))) == []
