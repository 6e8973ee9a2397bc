import pytest

from cora_cli.basis.choices import BasisChoices, is_target, match_targets
from cora_cli.errors import CoraError, UsageError


@pytest.mark.parametrize(
    ("share", "module", "group"),
    [
        ("module", "model.layers.11.self_attn.q_proj", "model.layers.11.self_attn.q_proj"),
        ("layer", "model.layers.11.self_attn.q_proj", "model.layers.11"),
        ("layer", "model.layers.1.experts.3.w1", "model.layers.1"),
        ("layer", "layers.0.q_proj", "layers.0"),
        ("layer", "lm_head", None),
        ("projection", "model.layers.11.self_attn.q_proj", "q_proj"),
        ("projection", "lm_head", "lm_head"),
        ("global", "model.layers.11.self_attn.q_proj", "global"),
    ],
)
def test_each_share_names_the_group_of_a_module(share, module, group):
    assert BasisChoices(share=share).mapping.group_of(module) == group


def test_defaults_are_those_of_the_contract():
    assert BasisChoices() == BasisChoices(
        "module", "mean", "weights", "output", "svd", "top", 48, ("q_proj", "k_proj", "v_proj")
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("share", "model", "module, layer, projection, global"),
        ("merge", "sum", "mean, gram"),
        ("source", "deltas", "weights, delta"),
        ("side", "left", "output, input"),
        ("method", "eig", "svd, pca"),
        ("component", "middle", "top, bottom"),
        ("rank", 0, "at least 1"),
        ("rank", True, "at least 1"),
        ("rank", 2.0, "at least 1"),
        ("target_modules", (), "must list module names"),
        ("target_modules", "q_proj", "must list module names"),
    ],
)
def test_a_value_that_is_not_allowed_is_a_usage_error_that_names_what_is(field, value, said):
    with pytest.raises(UsageError, match=said):
        BasisChoices(**{field: value})


def test_delta_without_a_base_is_a_usage_error():
    with pytest.raises(UsageError, match="--base"):
        BasisChoices(source="delta").require_base(False)
    BasisChoices(source="delta").require_base(True)
    BasisChoices().require_base(False)


def test_json_form_reads_back_equal():
    choices = BasisChoices("layer", "gram", "delta", "input", "pca", "bottom", 3, ("a.b", "c"))
    assert BasisChoices.from_json(choices.to_json()) == choices


def test_a_target_matches_whole_components_at_the_end_of_a_name():
    assert is_target("a.self_attn.q_proj", "q_proj")
    assert is_target("a.self_attn.q_proj", "self_attn.q_proj")
    assert is_target("q_proj", "q_proj")
    assert not is_target("a.qq_proj", "q_proj")


def test_targets_come_in_numerical_layer_order():
    names = [f"layers.{n}.q_proj" for n in (10, 9, 1)]
    assert match_targets(names, ["q_proj"], "m") == ["layers.1.q_proj", "layers.9.q_proj", "layers.10.q_proj"]


def test_a_target_without_a_match_is_refused_with_the_names_that_exist():
    with pytest.raises(CoraError, match=r"of m matches .*'o_proj'.*: k_proj, q_proj$"):
        match_targets(["l.0.q_proj", "l.0.k_proj", "l.1.k_proj"], ["q_proj", "o_proj"], "m")
