"""Which modules of a model are its language model's."""

from cora_cli.models.skeleton import other_modalities

from .fused import model_of


def test_encoders_within_the_decoder_are_no_part_of_the_language_model() -> None:
    """Phi-4-multimodal's stand next to the layers of the text, whose configuration is that of the complete model."""
    model = model_of("phi4_multimodal")
    others = other_modalities(model)
    attention = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith((".o_proj", ".out_proj"))]
    assert {name.startswith("model.layers.") for name in attention} == {True, False}
    assert {name for name in attention if name not in others} == {f"model.layers.{number}.self_attn" for number in range(2)}
    assert not [name for name in others if name.startswith("model.layers")]
