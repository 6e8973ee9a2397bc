"""The parts that `cora` reads of other programs' files: the configurations of models and adapters."""

from typing import Any, NotRequired, TypedDict


class ModelConfig(TypedDict):
    """The entries of a model's `config.json` that decide about its weights; transformers reads the rest."""

    model_type: str
    hidden_size: NotRequired[int | None]
    num_hidden_layers: NotRequired[int | list[int] | None]
    vocab_size: NotRequired[int | None]
    quantization_config: NotRequired[dict[str, Any] | None]
    text_config: NotRequired[dict[str, Any] | None]


class GenerationConfig(TypedDict, total=False):
    """The entries of `generation_config.json` that decide how a model answers, or that transformers computes with."""

    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    do_sample: bool | None
    max_length: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    num_beams: int | None
    use_cache: bool | None


class AdapterConfig(TypedDict, total=False):
    """The entries of `adapter_config.json` that weights are computed from; PEFT reads the rest.

    AdaLoRA has, in place of a layer's rank, a list of which triplets were kept.
    """

    peft_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    r: int | None
    lora_alpha: float | None
    use_rslora: bool | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    bias: str | None
    lora_bias: bool | None
    rank_pattern: dict[str, int | list[bool]] | None
    alpha_pattern: dict[str, float] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    token_indices: list[int] | None


class WeightIndex(TypedDict):
    """The index of a model in several files."""

    weight_map: dict[str, str]
