"""Factored extraction: the same basis as from full weights, without a full weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch.utils._python_dispatch import TorchDispatchMode

from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.decompose import Decomposition, decompose
from cora_cli.extraction.extract import extract_basis
from cora_cli.extraction.merge import merge_group, plan
from cora_cli.weights.sources import AdapterSource
from tests.weights.helpers import CPU, ArraySource, local, make_adapter, reference_directions, reference_matrix

Q0, Q1 = "layers.0.q_proj", "layers.1.q_proj"


class FactorSource(ArraySource):
    """A base plus products L R, known only as factors."""

    def __init__(self, base: ArraySource, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__({name: weight + factors[name][0] @ factors[name][1] for name, weight in base.weights.items()})
        self.base, self.factors = base, factors

    def own_rank(self, module, base):
        return self.factors[module][0].shape[1] if base is self.base else None

    def own_factors(self, module, base):
        left, right = self.factors[module]
        return torch.from_numpy(left.copy()), torch.from_numpy(right.copy())


def extract(sources: list[ArraySource], base: ArraySource, choices: BasisChoices) -> Decomposition:
    [group] = plan(sources, base, choices)
    return decompose(merge_group(group, sources, base, choices, CPU), choices.rank, choices.component)


def deltas(sources: list[FactorSource]) -> list[np.ndarray]:
    return [left @ right for name in sources[0].shapes for source in sources for left, right in [source.factors[name]]]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("method", ["svd", "pca"])
@pytest.mark.parametrize("merge", ["mean", "gram"])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    out=st.integers(24, 40),
    inside=st.integers(24, 40),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    layers=st.integers(1, 2),
    shift=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_the_factored_subspace_is_the_dense_one_to_1e_6_rad(merge, method, side, out, inside, ranks, layers, shift, seed, data):
    inside = out if side == "input" else inside
    rng = np.random.default_rng(seed)
    names = [Q0, Q1][:layers]
    base = ArraySource({name: 100 * rng.standard_normal((out, inside)) for name in names})

    def factors(rank: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((out, rank)) * 10 ** rng.uniform(-2, 2), rng.standard_normal((rank, inside)) + shift

    sources = [FactorSource(base, {name: factors(rank) for name in names}) for rank in ranks]
    rank = data.draw(st.integers(1, min(out, inside - 1, sum(ranks) * layers)))
    choices = BasisChoices("projection", merge, "delta", side, method, rank=rank, target_modules=("q_proj",))
    matrix = reference_matrix(deltas(sources), choices)
    values = np.linalg.svd(matrix, compute_uv=False)
    if values[rank - 1] < 1e-4 * values[0] or (rank < len(values) and values[rank] > 0.99 * values[rank - 1]):
        return  # no subspace is defined to 1e-6 where two neighbours are nearly alike
    found = extract(sources, base, choices)
    assert not any(source.reads for source in [base, *sources]), "a weight was read"
    reference, singular = reference_directions(matrix, choices)
    assert subspace_angles(reference, found.basis.numpy()).max() < 1e-6
    np.testing.assert_allclose(found.singular_values.numpy(), singular, rtol=1e-9)
    np.testing.assert_allclose(found.total_energy, (matrix**2).sum(), rtol=1e-9)


def random_adapters(models: int, rank: int, shape: tuple[int, int]) -> tuple[ArraySource, list[FactorSource]]:
    rng = np.random.default_rng(0)
    base = ArraySource({"q_proj": np.zeros(shape)})
    out, inside = shape
    pairs = [(rng.standard_normal((out, rank)), rng.standard_normal((rank, inside))) for _ in range(models)]
    return base, [FactorSource(base, {"q_proj": pair}) for pair in pairs]


@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_no_tensor_is_as_large_as_a_weight(merge):
    base, sources = random_adapters(8, 4, (300, 280))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    with Watch():
        extract(sources, base, BasisChoices(merge=merge, source="delta", rank=8, target_modules=("q_proj",)))
    assert 0 < largest <= 300 * 8 * 4, "the factors of all adapters are the most there is"


def test_factors_that_are_together_larger_than_a_weight_are_multiplied_out_and_give_the_same():
    base, sources = random_adapters(5, 4, (16, 12))
    choices = BasisChoices(source="delta", rank=3, target_modules=("q_proj",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorSource, "own_factors", None)
        found = extract(sources, base, choices)
    reference, _ = reference_directions(reference_matrix(deltas(sources), choices), choices)
    assert subspace_angles(reference, found.basis.numpy()).max() < 1e-6


def test_adapters_that_cancel_are_refused_under_the_mean_and_not_under_the_gram():
    base, [one] = random_adapters(1, 3, (20, 18))
    left, right = one.factors["q_proj"]
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    opposite = FactorSource(base, {"q_proj": (-left @ turn, turn.T @ right)})
    choices = BasisChoices(source="delta", rank=2, target_modules=("q_proj",))
    with pytest.raises(CoraError, match="q_proj is zero; either the models equal the base there"):
        extract([one, opposite], base, choices)
    assert extract([one, opposite], base, BasisChoices(**{**choices.__dict__, "merge": "gram"})).gap


@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_the_file_from_adapters_has_the_metadata_and_the_space_of_the_one_from_full_weights(
    grouped_models, tmp_path, merge, monkeypatch
):
    base = grouped_models[0]
    adapters = [local(make_adapter(base, tmp_path / f"a{n}", seed=n, r=n + 1)) for n in range(2)]
    choices = BasisChoices(merge=merge, source="delta", rank=2, target_modules=("q_proj", "v_proj"))
    extract_basis(adapters, tmp_path / "factored", choices, local(base), CPU)
    monkeypatch.setattr(AdapterSource, "own_rank", lambda *_: None)
    extract_basis(adapters, tmp_path / "dense", choices, local(base), CPU)
    one, other = read_basis(tmp_path / "factored"), read_basis(tmp_path / "dense")
    assert (one.sources, one.base, one.choices, one.modules, one.gaps) == (
        other.sources,
        other.base,
        other.choices,
        other.modules,
        other.gaps,
    )
    for group, directions in one.directions.items():
        assert subspace_angles(directions.double().numpy(), other.directions[group].double().numpy()).max() < 1e-6
        np.testing.assert_allclose(one.singular_values[group], other.singular_values[group], rtol=1e-9)
        np.testing.assert_allclose(one.total_energy[group], other.total_energy[group], rtol=1e-9)
