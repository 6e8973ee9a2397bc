"""Changes as matrices and as low-rank factors against numpy, and the sums over all models but one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.inspection.changes import Change, leave_one_out, pooled_directions


def random_change(generator: np.random.Generator, shape: tuple[int, int], rank: int | None) -> tuple[Change, np.ndarray]:
    """One of full rank as it is, or of rank `rank` in factors, and the same as a dense matrix."""
    if rank is None:
        matrix = generator.standard_normal(shape)
        return Change(torch.from_numpy(matrix.copy())), matrix
    left, right = generator.standard_normal((shape[0], rank)), generator.standard_normal((rank, shape[1]))
    return Change(torch.from_numpy(left), torch.from_numpy(right)), left @ right


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.one_of(st.integers(2, 9), st.integers(30, 60)),
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
        for one, matrix in ((Change(torch.from_numpy(other)), other), *known.values()):
            cosine = (dense * matrix).sum() / np.linalg.norm(dense) / np.linalg.norm(matrix)
            assert change.aligned_with(one) == pytest.approx(cosine**2, abs=1e-12)
        top = change.leading(1).numpy()
        assert np.linalg.norm(top.T @ dense) == pytest.approx(np.linalg.norm(dense, 2))
        np.testing.assert_allclose(change.add_to(torch.from_numpy(other.copy())), other + dense)
        square = np.linalg.norm(dense @ dense.T) ** 2
        assert change.concentration == pytest.approx(square / energy**2)
    shape = torch.Size((rows, columns))
    changes = {name: change for name, (change, _) in known.items()}
    scaled = [dense / np.linalg.norm(dense) for _, dense in known.values()]
    both = pooled_directions(list(changes.values()), 2).numpy()
    values = np.linalg.svd(np.hstack(scaled), compute_uv=False)[: both.shape[1]]
    assert np.linalg.norm(both.T @ np.hstack(scaled)) ** 2 == pytest.approx((values**2).sum())
    seen = [(normalize, *one) for normalize in (True, False) for one in leave_one_out(changes, shape, normalize)]
    assert [name for _, name, _ in seen] == [*known, *known]
    for normalize, name, together in seen:
        others = [dense / np.linalg.norm(dense) if normalize else dense for key, (_, dense) in known.items() if key != name]
        if together is None:
            assert not others
            continue
        pooled = np.hstack(others)
        top = together.leading(2).numpy()
        np.testing.assert_allclose(top.T @ top, np.eye(top.shape[1]), atol=1e-9)
        values = np.linalg.svd(pooled, compute_uv=False)[: top.shape[1]]
        assert np.linalg.norm(top.T @ pooled) ** 2 == pytest.approx((values**2).sum())
        assert top.shape[1] == min(2, np.linalg.matrix_rank(pooled))
        np.testing.assert_allclose(
            together.mean.add_to(torch.zeros(shape, dtype=torch.float64)), np.mean(others, axis=0), atol=1e-12
        )


@pytest.mark.parametrize("rows", [6, 40])
def test_what_is_left_out_leaves_no_trace_in_what_the_others_have(rows):
    generator = np.random.default_rng(0)
    shape = (rows, 5)
    known = {name: random_change(generator, shape, 1) for name in "ab"}
    huge, _ = random_change(generator, shape, 1)
    changes = {"a": known["a"][0], "huge": Change(1e9 * huge.left, huge.right), "b": known["b"][0]}
    others = dict(leave_one_out(changes, torch.Size(shape), normalize=False))["huge"]
    assert others is not None
    mean = others.mean.add_to(torch.zeros(shape, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(mean, (known["a"][1] + known["b"][1]) / 2, atol=1e-14)
    assert others.leading(4).shape[1] == 2


def test_nothing_is_left_out_of_nothing():
    assert list(leave_one_out({}, torch.Size((3, 2)))) == []
