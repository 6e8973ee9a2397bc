"""Opens what answers: a base model with or without an adapter, in transformers or in vLLM, as one `Engine`.

It loads models; which records they answer is `evaluate`, and how tokens are chosen is the engine's.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from cora_cli.adapters.merge import merge_adapter, merged_into_base
from cora_cli.adapters.storage import load_adapter
from cora_cli.device import Hardware
from cora_cli.errors import CoraError, reason
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.decode import Tokens
from cora_cli.evaluation.generate import Engine, end_tokens, transformers_engine
from cora_cli.evaluation.vllm import VllmEngine, engine_arguments
from cora_cli.models.loading import context_length, load_model
from cora_cli.models.references import ModelPath


@dataclasses.dataclass(frozen=True)
class Backend:
    """A model that is ready to answer: its context in tokens, the ids that end an answer, and its engine for given prompts."""

    context: int
    ends: list[int]
    start: Callable[[Sequence[Tokens]], Engine]


def open_transformers(
    config: EvaluateConfig, base: ModelPath, adapter: ModelPath | None, hardware: Hardware, tokenizer: Any
) -> Backend:
    """Load base and adapter with transformers. Raises `CoraError` where they cannot be loaded."""
    model: Any = load_model(base, hardware.dtype, hardware.device, None, config.trust_remote_code)
    if adapter is not None:
        wrapped = load_adapter(model, adapter, Path(config.basis) if config.basis else None)
        model = merged_into_base(wrapped, adapter) if config.merge else wrapped
    ends = end_tokens(model.generation_config.eos_token_id, tokenizer)
    return Backend(
        context_length(model.config),
        ends,
        lambda prompts: transformers_engine(model, tokenizer, ends, prompts, config.batch_size, config.max_new_tokens),
    )


def open_vllm(
    config: EvaluateConfig, base: ModelPath, adapter: ModelPath | None, hardware: Hardware, tokenizer: Any, scratch: Path
) -> Backend:
    """Prepare base and adapter for vLLM; the model itself is loaded by `start`, which writes a merged copy under `scratch` first.

    The copy is deleted once vLLM has read it. Raises `CoraError` where the model's configuration cannot be read.
    """
    try:
        model_config = AutoConfig.from_pretrained(base.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises unrelated types for damaged files
        raise CoraError(f"config.json of {base.reference} cannot be read: {reason(error)}") from error
    try:
        own = GenerationConfig.from_pretrained(base.path).eos_token_id
    except OSError:  # a model need not have one
        own = getattr(model_config, "eos_token_id", None)
    ends = end_tokens(own, tokenizer)

    def start(prompts: Sequence[Tokens]) -> Engine:
        longest = max(map(len, prompts)) + config.max_new_tokens

        def engine(path: Path, unmerged: ModelPath | None) -> Engine:
            arguments = engine_arguments(path, hardware.dtype_name, longest, unmerged, config.trust_remote_code)
            return VllmEngine(arguments, ends, config.max_new_tokens, unmerged)

        if adapter is None or not config.merge:
            return engine(base.path, adapter)
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".merged.", suffix=".tmp") as directory:
            merged = Path(directory) / "model"
            basis = Path(config.basis) if config.basis else None
            merge_adapter(
                adapter,
                merged,
                base=base,
                basis_path=basis,
                dtype=hardware.dtype_name,
                trust_remote_code=config.trust_remote_code,
            )
            return engine(merged, None)

    return Backend(context_length(model_config), ends, start)
