"""Which modules of a model are its language model's."""

from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from cora_cli.models.configuration import length_limits
from cora_cli.models.loading import context_length
from cora_cli.models.skeleton import build_skeleton, other_modalities

from .fused import model_of


def test_encoders_within_the_decoder_are_no_part_of_the_language_model() -> None:
    """Phi-4-multimodal's stand next to the layers of the text, whose configuration is that of the complete model."""
    model = model_of("phi4_multimodal")
    others = other_modalities(model)
    attention = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith((".o_proj", ".out_proj"))]
    assert {name.startswith("model.layers.") for name in attention} == {True, False}
    assert {name for name in attention if name not in others} == {f"model.layers.{number}.self_attn" for number in range(2)}
    assert not [name for name in others if name.startswith("model.layers")]


class TwoPartsConfig(PreTrainedConfig):
    """As code of models' own has it: the language model's sizes are in an entry that transformers does not know."""

    model_type = "two_parts"

    def __init__(self, llm_config: dict[str, Any] | None = None, **rest: Any) -> None:
        self.llm_config = LlamaConfig(**(llm_config or {}))
        super().__init__(**rest)


class TwoParts(PreTrainedModel):
    config_class = TwoPartsConfig

    def __init__(self, config: TwoPartsConfig) -> None:
        super().__init__(config)
        self.vision_model = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
        self.language_model = LlamaForCausalLM(config.llm_config)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()


def test_a_part_with_a_configuration_of_its_own_and_the_embedding_is_the_language_model() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TwoPartsConfig({**sizes, "max_position_embeddings": 64})
    others = other_modalities(TwoParts(config))
    assert {name for name in others if name} == {"vision_model", "vision_model.0"}
    assert context_length(config) == 64
    assert length_limits(TwoPartsConfig({**sizes, "sliding_window": 5})) == {5} | length_limits(config)


def test_parts_that_read_text_are_no_other_modality_whatever_their_configuration() -> None:
    assert not other_modalities(build_skeleton(AutoConfig.for_model("blt")))
