"""Opens a base model, with or without an adapter, in transformers or vLLM, and returns it as an `Engine`.

It only loads models: `evaluate` selects the records, and the engine generates the tokens.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import CannotMerge, merge_adapter, merged_into_base, say_rounded_away
from cora_cli.adapters.posterior import drawn_models
from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.decode import Tokens
from cora_cli.evaluation.generate import Engine, end_tokens, transformers_engine
from cora_cli.evaluation.mixture import mixture, share_equal_weights
from cora_cli.evaluation.sampling import Sampling
from cora_cli.evaluation.targets import Target
from cora_cli.evaluation.vllm import VllmEngine, engine_arguments
from cora_cli.methods.parts.layers import has_invocation
from cora_cli.models.configuration import load_configuration
from cora_cli.models.loading import context_length, load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import say


@dataclasses.dataclass(frozen=True)
class Backend:
    """A model ready to generate: its context length in tokens, the rows of its embedding, its end-token ids, and a function from
    prompts to an engine. `not_merged` says why the adapter was not merged although that was wanted, `rounded_away` which share of its change the
    merged weights lost, if much. `model` is None with vLLM."""

    context: int
    rows: int
    ends: list[int]
    start: Callable[[Sequence[Tokens]], Engine]
    not_merged: str | None = None
    model: Any = None
    rounded_away: float | None = None


def sampling_of(config: EvaluateConfig) -> Sampling | None:
    """How answers are drawn; None for greedy decoding."""
    return Sampling(config.temperature, config.seed) if config.temperature else None


def open_transformers(
    config: EvaluateConfig, target: Target, hardware: Hardware, tokenizer: Any, template_ends: Collection[int]
) -> Backend:
    """Load base and adapter, cut to the target's rank, with transformers; an adapter that PEFT cannot merge stays as it is.

    The members of an ensemble become one model. Raises `CoraError` if one of them cannot be loaded, or they cannot be averaged.
    """
    loaded: list[Any] = []
    shares: list[float] = []
    kinds: list[Any] = []
    not_merged = None
    lost: list[float] = []
    for member in target.members:
        model, reason, share = _load(config, member, hardware)
        not_merged = not_merged or reason
        lost += [] if share is None else [share]
        if target.others or member.draws:
            model = _member(model, member)
        if loaded:
            share_equal_weights(loaded[0], model)
        drawn = drawn_models(model, member.adapter, member.draws) if member.draws and member.adapter else [model]
        # One draw stands for all of a member. A copy of its own, since a mixture takes the place of its first model.
        kinds.append(copy.copy(drawn[0]))
        loaded += drawn
        shares += [1 / len(drawn)] * len(drawn)
    model = mixture(loaded, shares) if len(loaded) > 1 else loaded[0]
    sizes = {one.config.get_text_config(decoder=True).vocab_size for one in loaded}
    if len(sizes) > 1:
        raise CoraError(f"{target.name}: the members have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens")
    ends = end_tokens(model.generation_config.eos_token_id, template_ends)
    averages = "it averages several models" if target.others or target.draws else None
    return Backend(
        min(context_length(one.config) for one in loaded),
        min(one.get_input_embeddings().weight.shape[0] for one in loaded),
        ends,
        lambda prompts: transformers_engine(
            model,
            tokenizer,
            ends,
            prompts,
            config.batch_size,
            config.max_new_tokens,
            sampling_of(config),
            averages,
            kinds if averages else None,
        ),
        not_merged,
        model,
        max(lost, default=None),
    )


def _load(config: EvaluateConfig, target: Target, hardware: Hardware) -> tuple[Any, str | None, float | None]:
    """The model of one member, why its adapter was not merged although that was wanted, and the share of its change that merging lost, if much."""
    adapter = target.adapter

    def load() -> Any:
        model = load_model(target.base, hardware.dtype, hardware.device, None, config.trust_remote_code)
        basis = Path(config.basis) if config.basis else None
        return load_adapter(model, adapter, basis, rank=target.rank, base=target.base) if adapter is not None else model

    model = load()
    if adapter is None or not config.merge or target.draws:
        return model, None, None
    try:
        lost = say_rounded_away(model, adapter)
        return merged_into_base(model, adapter), None, lost
    except CannotMerge as error:
        say(f"{adapter.reference} is evaluated without merging it, which is slower: {error.reason}")
        reason = error.reason
    del model  # some of its layers may be merged already
    return load(), reason, None


def _member(model: Any, target: Target) -> Any:
    """The model as transformers knows it. Raises `CoraError` for an adapter that is not inside of it."""
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise CoraError(
            f"{target.name} cannot be averaged with others: its adapter ({kind}) changes the input, not the weights"
        )
    if has_invocation(model):
        raise CoraError(
            f"{target.name} cannot be averaged with others: its adapter changes only the tokens from its invocation on (aLoRA)"
        )
    return model.get_base_model()


def open_vllm(
    config: EvaluateConfig,
    base: ModelPath,
    adapter: ModelPath | None,
    hardware: Hardware,
    template_ends: Collection[int],
    scratch: Path,
) -> Backend:
    """Prepare base and adapter for vLLM. `Backend.start` loads the model, with an adapter from a merged copy in `scratch`.

    The copy is deleted once vLLM has loaded it. Raises `CoraError` if the model's configuration cannot be read.
    """
    model_config = load_configuration(base, config.trust_remote_code)
    own = base.generation_config() or vars(GenerationConfig.from_model_config(model_config))
    ends = end_tokens(own.get("eos_token_id"), template_ends)

    def start(prompts: Sequence[Tokens]) -> Engine:
        longest = max(map(len, prompts)) + config.max_new_tokens

        def engine(path: Path, unmerged: ModelPath | None) -> Engine:
            arguments = engine_arguments(path, hardware.dtype_name, longest, unmerged, config.trust_remote_code)
            return VllmEngine(arguments, ends, config.max_new_tokens, unmerged, sampling_of(config))

        if adapter is None or not config.merge:
            return engine(base.path, adapter)
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

    return Backend(context_length(model_config), model_config.get_text_config(decoder=True).vocab_size, ends, start)
