"""What is measured of a weight matrix against a dense reference in numpy, and how much is held in memory for it."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from cora_cli.errors import CoraError
from cora_cli.inspection.measure import (
    ALONG,
    BASE,
    CEILING,
    CHANCE,
    DELTA,
    FILE,
    MEAN,
    OWN,
    PAPER,
    POOLED,
    START,
    UNSCALED_MEAN,
    UNSCALED_POOLED,
    WEIGHTS,
    chance_of,
    measure,
)
from tests.weights.helpers import CPU, ArraySource

NAME = "model.layers.3.self_attn.q_proj"


def left(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix)[0][:, :rank]


def share(basis: np.ndarray, matrix: np.ndarray) -> float:
    return float(np.linalg.norm(basis.T @ matrix) ** 2 / np.linalg.norm(matrix) ** 2)


def deviation(matrix: np.ndarray, rank: int) -> float:
    """That of the share in `rank` random directions, from the second moments of a Haar-distributed projector."""
    d = len(matrix)
    concentration = np.linalg.norm(matrix @ matrix.T) ** 2 / np.linalg.norm(matrix) ** 4
    return float(np.sqrt(2 * rank * (d - rank) / (d * (d - 1) * (d + 2)) * (concentration - 1 / d)))


def found_of(base, models, rank, bases=None, side="output"):
    """What is found of matrices whose rows are what is compared: for the input side, weights are stored transposed."""

    def source(matrix, name):
        return ArraySource({NAME: matrix.T if side == "input" else matrix}, name)

    sources = {name: source(matrix, name) for name, matrix in models.items()}
    of_base = None if base is None else source(base, BASE)
    [found] = measure(sources, of_base, bases or {}, rank, ("q_proj",), CPU, {}, side, unscaled=True)
    return found


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rows=st.integers(3, 14),
    columns=st.integers(3, 14),
    models=st.integers(1, 4),
    side=st.sampled_from(["output", "input"]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_every_number_equals_the_dense_reference(rows, columns, models, side, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns) - 1))
    generator = np.random.default_rng(seed)
    base = generator.standard_normal((rows, columns))
    deltas = {f"m{n}": 0.3 * generator.standard_normal((rows, columns)) for n in range(models)}
    weights = {name: base + delta for name, delta in deltas.items()}
    given_basis = np.linalg.qr(generator.standard_normal((rows, rank)))[0]
    found = found_of(base, weights, rank, {"file": lambda module, out: torch.from_numpy(given_basis.copy())}, side)
    assert (found.kind, found.layer) == ("q_proj", 3)
    assert found.shape == ((rows, columns) if side == "output" else (columns, rows))
    for name, delta in deltas.items():
        assert found.sizes[name] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base))
    own = left(base, rank)
    frames = {
        WEIGHTS: {name: left(weight, rank) for name, weight in weights.items()},
        DELTA: {name: left(delta, rank) for name, delta in deltas.items()},
        FILE: {"file": given_basis},
    }
    pairs = {
        (kind, one, other)
        for kind, known in frames.items()
        for one, other in [*itertools.combinations(known, 2), *((name, BASE) for name in known)]
    }
    assert {(o.kind, o.one, o.other) for o in found.overlaps} == pairs
    for o in found.overlaps:
        one, other = frames[o.kind][o.one], own if o.other == BASE else frames[o.kind][o.other]
        angles = np.rad2deg(subspace_angles(one, other))
        assert o.value == pytest.approx(np.linalg.norm(one.T @ other) ** 2 / rank, abs=1e-7)
        assert o.chance == pytest.approx(rank / rows)
        assert o.angles == pytest.approx((angles.min(), np.median(angles), angles.max()), abs=1e-4)
    for capture in found.captures:
        delta = deltas[capture.left_out]
        others = [name for name in deltas if name != capture.left_out]
        expected = {
            CHANCE: rank / rows,
            CEILING: share(left(delta, rank), delta),
            OWN: share(own, delta),
            "file": share(given_basis, delta),
            chance_of("file"): rank / rows,
        }
        if others:
            scaled = [deltas[name] / np.linalg.norm(deltas[name]) for name in others]
            mean, plain = np.mean(scaled, axis=0), np.mean([deltas[name] for name in others], axis=0)
            expected |= {
                POOLED: share(left(np.hstack(scaled), rank), delta),
                MEAN: share(left(mean, rank), delta),
                PAPER: share(left(base + plain, rank), delta),
                UNSCALED_POOLED: share(left(np.hstack([deltas[name] for name in others]), rank), delta),
                UNSCALED_MEAN: share(left(plain, rank), delta),
                ALONG: (delta * mean).sum() ** 2 / np.linalg.norm(delta) ** 2 / np.linalg.norm(mean) ** 2,
            }
        assert capture.shares == pytest.approx(expected, abs=1e-7)
        assert capture.deviation == pytest.approx(deviation(delta, rank))
    assert len(found.captures) == models
    assert {(pair.model, pair.by) for pair in found.pairs} == set(itertools.permutations(deltas, 2))
    for pair in found.pairs:
        delta = deltas[pair.model]
        numbers = (pair.value, pair.own, pair.chance, pair.deviation, pair.ceiling)
        known = (share(left(deltas[pair.by], rank), delta), share(own, delta), rank / rows, deviation(delta, rank))
        assert numbers == pytest.approx((*known, share(left(delta, rank), delta)), abs=1e-7)


def test_a_model_that_equals_the_base_has_a_size_of_zero_and_no_directions_of_change():
    base = np.random.default_rng(0).standard_normal((5, 4))
    found = found_of(base, {"same": base, "other": base + 1.0}, 1)
    assert found.sizes["same"] == 0
    assert [capture.left_out for capture in found.captures] == ["other"]
    assert POOLED not in found.captures[0].shares


def test_the_mean_weight_is_of_all_other_models_also_of_those_that_equal_the_base():
    """As `cora extract-basis` takes it, after equation 2 of the paper."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((9, 7))
    weights = {
        name: base + scale * generator.standard_normal((9, 7)) for name, scale in (("a", 3.0), ("b", 5.0), ("same", 0.0))
    }
    found = found_of(base, weights, 2)
    for capture, other in zip(found.captures, ("b", "a"), strict=True):
        mean = (weights[other] + base) / 2
        assert capture.shares[PAPER] == pytest.approx(share(left(mean, 2), weights[capture.left_out] - base), abs=1e-9)


def test_low_rank_changes_are_compared_in_the_directions_that_they_have():
    generator = np.random.default_rng(0)
    base = generator.standard_normal((12, 10))
    deltas = {
        name: generator.standard_normal((12, size)) @ generator.standard_normal((size, 10))
        for name, size in (("a", 1), ("b", 2))
    }
    found = found_of(base, {name: base + delta for name, delta in deltas.items()}, 4)
    [pair] = [o for o in found.overlaps if (o.kind, o.other) == (DELTA, "b")]
    assert pair.chance == pytest.approx(2 / 12), "one direction against two"
    [capture] = [c for c in found.captures if c.left_out == "a"]
    assert capture.shares[CHANCE] == pytest.approx(2 / 12), "the others have two directions"
    assert capture.shares[OWN] == pytest.approx(share(left(base, 2), deltas["a"]), abs=1e-7), "and so has their control"
    assert capture.shares[POOLED] == pytest.approx(share(left(deltas["b"], 2), deltas["a"]), abs=1e-7)


def test_without_a_base_only_the_weights_are_compared():
    one, two = np.random.default_rng(0).standard_normal((2, 6, 5))
    found = found_of(None, {"one": one, "two": two}, 2)
    assert (found.sizes, found.captures) == ({}, ())
    assert [(o.kind, o.one, o.other) for o in found.overlaps] == [(WEIGHTS, "one", "two")]


def test_a_matrix_of_zeros_is_refused_by_name():
    with pytest.raises(CoraError, match=r"q_proj of one is zero.*--target-modules"):
        found_of(None, {"one": np.zeros((4, 4)), "two": np.ones((4, 4))}, 1)


def test_one_matrix_of_all_models_is_read_at_a_time_and_each_once():
    alive: list[tuple[str, weakref.ref]] = []

    class Spy(ArraySource):
        def read(self, module):
            tensor = super().read(module)
            others = {name for name, reference in alive if name != module and reference() is not None}
            assert not others, f"{others} live while {module} is read"
            alive.append((module, weakref.ref(tensor)))
            return tensor

    generator = np.random.default_rng(0)
    base, *models = (Spy({f"layers.{n}.q_proj": generator.standard_normal((6, 5)) for n in range(3)}) for _ in range(4))
    measure({str(n): model for n, model in enumerate(models)}, base, {}, 2, ("q_proj",), CPU, {})
    assert all(len(source.reads) == len(set(source.reads)) == 3 for source in [base, *models])


class FactoredSource(ArraySource):
    """An adapter: a change in factors on a base, which must not be built."""

    def __init__(self, base: np.ndarray, factors: tuple[np.ndarray, np.ndarray]) -> None:
        super().__init__({NAME: base})
        self.factors = [torch.from_numpy(factor) for factor in factors]

    def read(self, module):
        raise AssertionError("the full weight of an adapter was built")

    own_delta = read

    def own_rank(self, module, base):
        return self.factors[0].shape[1]

    def own_factors(self, module, base):
        return self.factors


@pytest.mark.parametrize("side", ["output", "input"])
def test_adapters_of_one_base_are_held_in_factors_and_measured_as_if_they_were_whole(side):
    generator = np.random.default_rng(0)
    base = generator.standard_normal((12, 10))
    factors = {
        name: (generator.standard_normal((12, size)), generator.standard_normal((size, 10)))
        for name, size in (("a", 2), ("b", 3), ("c", 2), ("untouched", 0))
    }
    adapters = {name: FactoredSource(base, pair) for name, pair in factors.items()}
    [found] = measure(adapters, ArraySource({NAME: base}, BASE), {}, 4, ("q_proj",), CPU, {}, side, unscaled=True)
    full = {name: base + left @ right for name, (left, right) in factors.items()}
    if side == "input":
        base, full = base.T, {name: weight.T for name, weight in full.items()}
    expected = found_of(base, full, 4, side=side)
    assert found.sizes == pytest.approx(expected.sizes)
    assert found.sizes["untouched"] == 0
    for one, other in zip(found.overlaps, expected.overlaps, strict=True):
        assert (one.kind, one.one, one.other, one.chance) == (other.kind, other.one, other.other, other.chance)
        assert (one.value, *one.angles) == pytest.approx((other.value, *other.angles), abs=1e-5)
    for one, other in zip(found.captures, expected.captures, strict=True):
        assert one.left_out == other.left_out
        assert one.shares == pytest.approx(other.shares, abs=1e-9)


def test_what_two_began_with_is_a_control_of_as_many_directions_as_the_others_have():
    generator = np.random.default_rng(0)
    base = generator.standard_normal((40, 30))
    deltas = {name: generator.standard_normal((40, 30)) for name in "abcd"}
    sources = {name: ArraySource({NAME: base + delta}, name) for name, delta in deltas.items()}
    shared, own = np.linalg.qr(generator.standard_normal((40, 2)))[0], np.linalg.qr(generator.standard_normal((40, 2)))[0]
    turned = np.linalg.qr(np.hstack([shared @ [[0.6, -0.8], [0.8, 0.6]], generator.standard_normal((40, 1))]))[0]
    begun = {"a": shared, "b": turned, "c": own}  # of d nothing is known
    starts = {name: lambda module, rows, frame=frame: torch.from_numpy(frame) for name, frame in begun.items()}
    [found] = measure(sources, ArraySource({NAME: base}, BASE), {}, 5, ("q_proj",), CPU, {}, "output", starts)
    held = {c.left_out: c.shares.get(START) for c in found.captures}
    assert held.keys() == set("abcd")
    assert held["c"] is None, "another start than all others"
    assert held["d"] is None
    for name in "ab":
        alone = share(shared, deltas[name])
        assert held[name] == pytest.approx(alone + (1 - alone) * 3 / 38), name
    [found] = measure(sources, ArraySource({NAME: base}, BASE), {}, 1, ("q_proj",), CPU, {}, "output", starts)
    for capture in found.captures:
        if capture.left_out in "ab":
            best = np.linalg.norm(shared.T @ deltas[capture.left_out], 2) ** 2 / np.linalg.norm(deltas[capture.left_out]) ** 2
            assert capture.shares[START] == pytest.approx(best), "of more directions than are taken, the best"
