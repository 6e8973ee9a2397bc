import weakref

import numpy as np
import pytest
import torch

from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.merge import merge_group, plan
from tests.weights.helpers import CPU, ArraySource

Q0, K0, Q1 = "layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj"


def source(shapes: dict[str, tuple[int, int]], name: str = "memory", seed: int = 0) -> ArraySource:
    rng = np.random.default_rng(seed)
    return ArraySource({module: rng.standard_normal(shape) for module, shape in shapes.items()}, name)


def choose(**changed) -> BasisChoices:
    return BasisChoices(**{"rank": 1, "target_modules": ("q_proj", "k_proj"), **changed})


def refusal(sources: list[ArraySource], base: ArraySource | None = None, **changed) -> str:
    with pytest.raises(CoraError) as caught:
        plan(sources, base, choose(**changed))
    assert not any(one.reads for one in sources), "refused only after reading"
    return str(caught.value)


@pytest.mark.parametrize(
    ("share", "groups"),
    [
        ("module", {Q0: [Q0], K0: [K0], Q1: [Q1]}),
        ("layer", {"layers.0": [K0, Q0], "layers.1": [Q1]}),
        ("projection", {"q_proj": [Q0, Q1], "k_proj": [K0]}),
        ("global", {"global": [K0, Q0, Q1]}),
    ],
)
def test_each_share_groups_the_modules_it_says(share, groups):
    planned = plan([source({Q0: (4, 4), K0: (4, 4), Q1: (4, 4)})], None, choose(share=share))
    assert {group.name: sorted(group.modules) for group in planned} == groups


@pytest.mark.parametrize("share", ["layer", "global"])
@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_grouped_query_weights_are_refused_with_shapes_and_alternative(share, merge):
    said = refusal([source({Q0: (8, 8), K0: (4, 8), Q1: (8, 8)})], share=share, merge=merge)
    for part in ("(8, 8)", "(4, 8)", Q0, K0, "--share module", "--share projection", "grouped-query"):
        assert part in said


def test_projections_of_unequal_out_dimension_are_pointed_to_share_module():
    said = refusal([source({Q0: (8, 8), K0: (8, 8), Q1: (6, 8)})], share="projection")
    assert "--share module" in said
    assert "--share projection would" not in said


def test_mean_refuses_unequal_in_dimensions_that_gram_accepts():
    one = source({Q0: (4, 8), K0: (4, 6)})
    assert "--merge gram" in refusal([one], share="layer")
    assert plan([one], None, choose(share="layer", merge="gram"))[0].columns == 14


def test_on_the_input_side_grouped_query_weights_agree_and_only_their_mean_is_refused():
    grouped = source({Q0: (8, 8), K0: (4, 8), Q1: (8, 8)})
    assert {group.name: group.rows for group in plan([grouped], None, choose(side="input"))} == {Q0: 8, K0: 8, Q1: 8}
    [first, _] = plan([grouped], None, choose(side="input", share="layer", merge="gram"))
    assert (first.rows, first.columns) == (8, 12)
    said = refusal([grouped], side="input", share="layer")
    for part in (K0, "(4, 8)", "equal out-dimension", "--merge gram"):
        assert part in said
    assert "equal in-dimension" in refusal([source({Q0: (4, 8), K0: (4, 6)})], side="input", share="layer", merge="gram")


@pytest.mark.parametrize(
    ("merge", "method", "highest"), [("mean", "svd", 6), ("mean", "pca", 5), ("gram", "svd", 8), ("gram", "pca", 8)]
)
def test_rank_is_bounded_by_the_directions_of_the_merged_matrix(merge, method, highest):
    sources = [source({"q_proj": (8, 6)}), source({"q_proj": (8, 6)})]
    changed = {"merge": merge, "method": method, "target_modules": ("q_proj",)}
    assert f"use --rank {highest} or less" in refusal(sources, rank=highest + 1, **changed)
    assert plan(sources, None, choose(rank=highest, **changed))[0].directions == highest


def test_models_of_different_shapes_are_refused_with_both_names_module_and_shapes():
    said = refusal([source({Q0: (4, 4), K0: (4, 4)}, "one"), source({Q0: (4, 4), K0: (2, 4)}, "two")])
    for part in ("one", "two", K0, "(4, 4)", "(2, 4)"):
        assert part in said


@pytest.mark.parametrize("swapped", [False, True])
def test_models_of_different_module_sets_are_refused_with_the_module_that_is_missing(swapped):
    pair = [source({Q0: (4, 4), K0: (4, 4), Q1: (4, 5)}, "large"), source({Q0: (4, 4), K0: (4, 4)}, "small")]
    said = refusal(pair[::-1] if swapped else pair)
    assert said.startswith(f"large has a weight {Q1} (4, 5), but small does not")


def test_a_base_of_another_shape_is_refused():
    assert "base" in refusal([source({Q0: (4, 4), K0: (4, 4)})], source({Q0: (4, 4), K0: (2, 4)}, "base"), source="delta")


def test_models_that_differ_in_architecture_are_refused_but_not_in_vocabulary():
    one, two = source({Q0: (4, 4), K0: (4, 4)}, "one"), source({Q0: (4, 4), K0: (4, 4)}, "two")
    one.architecture, two.architecture = {"model_type": "llama", "vocab_size": 10}, {"vocab_size": 11, "hidden_size": 4}
    assert plan([one, two], None, choose())
    two.architecture = {"model_type": "mistral"}
    assert "model_type is llama in one, but mistral in two" in refusal([one, two])


def test_a_module_outside_all_layers_is_refused_under_share_layer():
    said = refusal([source({"lm_head": (4, 4)})], share="layer", target_modules=("lm_head",))
    assert "lm_head" in said
    assert "--share module" in said


@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_models_equal_to_their_base_are_refused_as_zero(merge):
    base, model = source({Q0: (4, 4), K0: (4, 4)}), source({Q0: (4, 4), K0: (4, 4)})
    choices = choose(source="delta", merge=merge)
    with pytest.raises(CoraError, match=f"{K0} is zero.*equal the base"):
        merge_group(plan([model], base, choices)[0], [model], base, choices, CPU)


@pytest.mark.parametrize("merge", ["mean", "gram"])
def test_equal_columns_are_zero_once_centred(merge):
    model = ArraySource({"q_proj": np.outer(np.arange(1.0, 7.0) / 3, np.ones(5))})
    choices = choose(method="pca", merge=merge, target_modules=("q_proj",))
    with pytest.raises(CoraError, match="all its columns are equal"):
        merge_group(plan([model], None, choices)[0], [model], None, choices, CPU)


@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("delta", [None, "subtracted", "known"])
def test_no_more_than_one_models_tensor_lives_at_a_time(merge, delta):
    alive: list[weakref.ref] = []
    most = 0

    class Spy(ArraySource):
        def read(self, module: str) -> torch.Tensor:
            nonlocal most
            tensor = super().read(module)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

        def own_delta(self, module, base):
            return self.read(module) if delta == "known" else None

    rng = np.random.default_rng(0)
    weights = [{f"layers.{n}.q_proj": rng.standard_normal((6, 6)) for n in range(4)} for _ in range(6)]
    base, *models = (Spy(one) for one in weights)
    subtracted = base if delta else None
    choices = choose(share="global", merge=merge, source="delta" if delta else "weights", target_modules=("q_proj",))
    [group] = plan(models, subtracted, choices)
    merge_group(group, models, subtracted, choices, CPU)
    assert all(len(model.reads) == 4 for model in models)
    assert len(base.reads) == (4 if delta == "subtracted" else 0), "the base is read once per module, not per model"
    assert most == (2 if delta == "subtracted" else 1)
