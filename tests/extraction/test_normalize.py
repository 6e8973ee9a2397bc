"""`--normalize`: every difference counts alike, however large it is, and nothing changes where it is off."""

import numpy as np
import pytest

from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import UsageError
from cora_cli.reporting.methods_section import _choice
from tests.extraction.test_lowrank import FactorSource, deltas, extract
from tests.extraction.test_merge import source
from tests.weights.helpers import ArraySource, reference_directions, reference_matrix, subspace_error

Q0, Q1 = "layers.0.q_proj", "layers.1.q_proj"
SHAPES = {Q0: (24, 24), Q1: (24, 24)}


def choose(**changed) -> BasisChoices:
    return BasisChoices(**{"rank": 3, "source": "delta", "normalize": True, "target_modules": ("q_proj",), **changed})


def models(factored: bool, sizes: list[float]) -> tuple[ArraySource, list[FactorSource]]:
    """A base and models whose differences of rank 2 have the relative `sizes`, known as factors or as weights only."""
    base = source(SHAPES)
    made = []
    for seed, size in enumerate(sizes, 1):
        rng = np.random.default_rng(seed)
        factors = {name: (size * rng.standard_normal((24, 2)), rng.standard_normal((2, 24))) for name in SHAPES}
        made.append(FactorSource(base, factors))
        if not factored:
            made[-1].own_rank = lambda module, base: None
    return base, made


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("method", ["svd", "pca"])
@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("factored", [True, False])
def test_the_basis_is_that_of_the_differences_divided_by_their_norms(factored, merge, method, side):
    choices = choose(share="projection", merge=merge, method=method, side=side)
    base, made = models(factored, [1.0, 10.0, 0.1])
    found = extract(made, base, choices)
    scaled = [delta / np.linalg.norm(delta) for delta in deltas(made)]
    reference, values = reference_directions(reference_matrix(scaled, choices), choices)
    assert subspace_error(reference, found.basis) < 1e-6
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_the_size_of_a_models_difference_does_not_matter(merge, factored):
    choices = choose(share="projection", merge=merge, rank=2)
    reference, larger = (extract(made, base, choices) for base, made in (models(factored, [1, 1]), models(factored, [1, 50])))
    assert subspace_error(reference.basis.numpy(), larger.basis) < 1e-6
    plain = BasisChoices(**{**choices.__dict__, "normalize": False})
    one, other = (extract(made, base, plain) for base, made in (models(factored, [1, 1]), models(factored, [1, 50])))
    assert subspace_error(one.basis.numpy(), other.basis) > 0.1, "without it, the larger difference decides"


@pytest.mark.parametrize("factored", [True, False])
def test_a_model_that_equals_the_base_stays_zero(factored):
    base, made = models(factored, [1.0, 0.0])
    found = extract(made, base, choose(share="projection", merge="gram"))
    alone = extract(made[:1], base, choose(share="projection", merge="gram"))
    assert subspace_error(alone.basis.numpy(), found.basis) < 1e-6
    assert found.total_energy == pytest.approx(2), "one model, two weights of norm 1"


def test_the_choice_is_recorded_only_where_it_is_on(grouped_models, tmp_path):
    from tests.extraction.test_extract import run

    assert "normalize" not in BasisChoices(source="delta").to_json(), "earlier bases keep their hash"
    assert BasisChoices.from_json(choose().to_json()) == choose()
    base, *others = grouped_models
    summary = run(others, tmp_path / "b", base=base, source="delta", normalize=True, merge="gram")
    assert "source delta, normalized" in summary.render()
    assert read_basis(tmp_path / "b").choices.normalize is True


def test_the_methods_section_says_so():
    said = _choice(choose().to_json())
    assert "source delta" in said
    assert said.endswith("each ΔW normalized to norm 1")
    assert "normalized" not in _choice(choose(normalize=False).to_json())


def test_weights_and_values_that_are_no_switch_are_refused():
    with pytest.raises(UsageError, match=r"--normalize divides the changes ΔW by their norms, so it needs --source delta"):
        choose(source="weights")
    with pytest.raises(UsageError, match="--normalize must be true or false, not 1"):
        choose(normalize=1)
