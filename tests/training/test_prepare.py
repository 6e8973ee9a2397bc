"""What a run says about its inputs before it reads weights."""

from cora_cli.training.prepare import layers_without

LINEARS = [f"model.layers.{n}.{part}" for n in range(3) for part in ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj")]


def test_layers_of_another_kind_that_no_target_matches_are_named() -> None:
    every = [
        *LINEARS,
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.1.linear_attn.in_proj",
    ]
    assert layers_without(["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"], every) == ["model.layers.1"]


def test_other_stacks_and_heads_are_no_layers_to_adapt() -> None:
    every = [*LINEARS, "visual.blocks.0.qkv", "lm_head"]
    assert layers_without([f"model.layers.{n}.mlp.experts.0.up_proj" for n in range(3)], every) == []
    assert layers_without(["lm_head"], every) == []
