"""Directions and spectra from one reduction against full decompositions in numpy, and what a large inspection does not compute."""

import dataclasses

import numpy as np
import pytest
import torch

from cora_cli.extraction import gram as gram_module
from cora_cli.inspection import around_mean as around_module
from cora_cli.inspection import measure as measure_module
from cora_cli.inspection.around_mean import AroundMean, around_mean
from cora_cli.inspection.changes import Change
from cora_cli.inspection.measure import measure
from tests.inspection.test_measure import NAME, FactoredSource
from tests.weights.helpers import CPU, ArraySource

RANK = 4


def orthonormal(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(generator.standard_normal((rows, columns)))[0]


def with_values(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    left, right = (orthonormal(generator, size, len(values)) for size in (rows, columns))
    return (left * values) @ right.T


BASES = {
    "wide": with_values(np.linspace(5, 1, 60), 60, 90),
    "tall": with_values(np.linspace(5, 1, 40), 60, 40),
    "rank-deficient": with_values(np.linspace(5, 1, 9), 60, 60),
    "of a lower rank than wanted": with_values(np.array([3.0, 2.0]), 60, 60),
    "repeated values": with_values(np.r_[[4.0] * 3, [3.0] * 57], 60, 60),
    "with a mean column": with_values(np.linspace(5, 1, 60), 60, 60) + np.linspace(-0.4, 0.3, 60)[:, None],
}


def changes_of(base: np.ndarray, count: int = 3, size: float = 0.2) -> tuple[dict[str, Change], dict[str, np.ndarray]]:
    """Low-rank changes, in factors and dense, of that size compared with `base`."""
    generator = np.random.default_rng(1)
    changes, dense = {}, {}
    for number in range(count):
        left, right = (generator.standard_normal(shape) for shape in ((len(base), number + 1), (number + 1, base.shape[1])))
        left *= size * np.linalg.norm(base) / np.linalg.norm(left @ right)
        changes[f"m{number}"] = Change(torch.from_numpy(left), torch.from_numpy(right))
        dense[f"m{number}"] = left @ right
    return changes, dense


@pytest.mark.parametrize("kind", BASES)
def test_directions_and_spectra_are_those_of_full_decompositions(kind):
    base = BASES[kind]
    changes, dense = changes_of(base)
    around = AroundMean(torch.from_numpy(base.copy()), changes, 4)  # a fourth model is the base itself
    for scales in ({}, {"m1": 1.0}, {"m0": 0.5, "m2": 0.5}, {"m0": -2.0, "m1": 3.0, "m2": 1.0}):
        matrix = base + sum(scale * dense[name] for name, scale in scales.items())
        vectors, values, _ = np.linalg.svd(matrix)
        found = around.leading(scales, RANK).numpy()
        kept = min(RANK, int((values > 1e-7 * values[0]).sum()))
        assert found.shape == (len(base), kept)
        np.testing.assert_allclose(found.T @ found, np.eye(kept), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(found.T @ matrix) ** 2, (values[:kept] ** 2).sum(), rtol=1e-12)
        if kept == len(values) or values[kept] < 0.999 * values[kept - 1]:
            assert np.linalg.norm(found - vectors[:, :kept] @ (vectors[:, :kept].T @ found), 2) < 1e-10
    mean = base + sum(dense.values()) / 4
    centred = mean - mean.mean(axis=1, keepdims=True)
    found_spectra = around.spectra()
    for shares, of in ((found_spectra.svd, mean), (found_spectra.pca, centred)):
        squares = np.linalg.svd(of, compute_uv=False) ** 2
        np.testing.assert_allclose(shares, squares.cumsum() / squares.sum(), atol=1e-12)
    assert found_spectra.mean_share == pytest.approx(1 - np.linalg.norm(centred) ** 2 / np.linalg.norm(mean) ** 2, abs=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_large_inspection_of_adapters_has_the_numbers_of_the_full_one_and_decomposes_no_weight_in_full(side, monkeypatch):
    base = BASES["wide"]
    adapters = {
        name: FactoredSource(base, (change.left.numpy(), change.right.numpy())) for name, change in changes_of(base)[0].items()
    }
    adapters["unchanged"] = FactoredSource(base, (np.zeros((len(base), 0)), np.zeros((0, base.shape[1]))))

    def found():
        [one] = measure(adapters, ArraySource({NAME: base}), {}, RANK, ("q_proj",), CPU, {}, side)
        return one

    expected = found()
    monkeypatch.setattr(gram_module, "_LANCZOS_ROWS", 50)

    real = torch.linalg.svd

    def of_thin(matrix, **options):
        assert min(matrix.shape) < 20, "a full decomposition of a weight or its Gram matrix"
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", of_thin)
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("a full decomposition of a Gram matrix"))
    grams = []
    for module in (measure_module, around_module):
        original = module.gram
        monkeypatch.setattr(module, "gram", lambda matrix, original=original: grams.append(1) or original(matrix))
    one = found()
    assert len(grams) == 1, "only the mean of the models has a Gram matrix"
    for now, before in zip(one.overlaps, expected.overlaps, strict=True):
        assert dataclasses.replace(now, value=0, angles=()) == dataclasses.replace(before, value=0, angles=())
        assert (now.value, *now.angles) == pytest.approx((before.value, *before.angles), abs=1e-9)
    for now, before in zip(one.captures, expected.captures, strict=True):
        assert now.shares == pytest.approx(before.shares, abs=1e-11)
    for now, before in zip(one.pairs, expected.pairs, strict=True):
        assert (now.model, now.by) == (before.model, before.by)
        assert (now.value, now.own, now.ceiling) == pytest.approx((before.value, before.own, before.ceiling), abs=1e-11)
    assert (one.spectra.svd, one.spectra.pca) == (
        pytest.approx(expected.spectra.svd, abs=1e-12),
        pytest.approx(expected.spectra.pca, abs=1e-12),
    )


def test_where_lanczos_does_not_converge_the_matrix_itself_is_decomposed(monkeypatch):
    base = BASES["wide"]
    changes, dense = changes_of(base)
    around = AroundMean(torch.from_numpy(base.copy()), changes, 3)
    expected = np.linalg.svd(base + dense["m1"])[0][:, :RANK]
    monkeypatch.setattr(around_module, "lanczos", lambda *_: None)
    found = around.leading({"m1": 1.0}, RANK).numpy()
    assert np.linalg.norm(found - expected @ (expected.T @ found), 2) < 1e-9


def test_it_is_used_for_large_matrices_with_small_low_rank_changes_only(monkeypatch):
    base = torch.from_numpy(BASES["wide"].copy())
    changes = changes_of(BASES["wide"])[0]
    assert around_mean(base, changes, 3, RANK) is None, "60 rows are few"
    monkeypatch.setattr(gram_module, "_LANCZOS_ROWS", 50)
    assert around_mean(base, changes, 3, RANK) is not None
    assert around_mean(base, changes, 3, 7) is None, "a tenth of the directions and more"
    dense = changes | {"m0": Change(changes["m0"].add_to(torch.zeros_like(base)))}
    assert around_mean(base, dense, 3, RANK) is None, "a change that is not in factors"
    assert around_mean(base, changes_of(BASES["wide"], size=1.1)[0], 3, RANK) is None, "changes larger than the base"
    assert around_mean(base, changes_of(BASES["wide"], count=4)[0], 4, RANK) is None, "ten columns of 60"
    assert around_mean(base + 9.0, changes, 3, RANK) is None, "nearly all of it is the mean column"
