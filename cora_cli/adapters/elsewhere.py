"""Which other programs load an adapter as it is stored: PEFT, transformers and vLLM."""

from collections.abc import Mapping
from typing import Any

from cora_cli.adapters.facts import read_facts
from cora_cli.adapters.peft_settings import DEFAULT_RANK
from cora_cli.errors import CoraError
from cora_cli.methods.registry import method_of
from cora_cli.models.model_path import ModelPath

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `max_lora_rank`."""


_KEEP_BASE = (None, False, True, "gaussian", "eva", "orthogonal", "mica")
_MORE_THAN_LORA = (
    *(
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "alora_invocation_tokens",
        "layer_replication",
        "target_parameters",
    ),
    *("kasa_config", "monteclora_config", "velora_config", "lora_bias", "trainable_token_indices", "modules_to_save"),
)
"""Settings of PEFT with which an adapter is more than pairs of A and B; a program that does not know one leaves it out."""


def start_that_changes_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation of a LoRA under which PEFT subtracts its start from W (PiSSA, OLoRA, CorDA, LoRA-GA, …); None for the others.

    Such an adapter, unless PEFT converted it when it was saved, applies to the changed W.
    """
    start = config.get("init_lora_weights")
    known = start.lower() if isinstance(start, str) else start  # some of PEFT's comparisons ignore case
    return None if known in _KEEP_BASE else str(start)


def peft_loads(adapter: ModelPath) -> bool:
    """Whether plain PEFT loads it: it holds all its tensors, for layers that the model has, and PEFT knows its type."""
    facts = read_facts(adapter.path)
    return facts is None or (not facts.compact and not facts.views and method_of(facts.plan.mode).plain_peft_loads)


def is_plain_lora(adapter: ModelPath) -> bool:
    """Whether it is a LoRA on W without extensions, which transformers and vLLM load too."""
    config = adapter.adapter_config()
    more = any(config.get(name) for name in _MORE_THAN_LORA) or config.get("bias") not in (None, "none")
    plain = config.get("peft_type") == "LORA" and not more and start_that_changes_base(config) is None
    return peft_loads(adapter) and plain


def vllm_rank(adapter: ModelPath) -> int:
    """The smallest value of `max_lora_rank` that fits `adapter`. Raises `CoraError` if vLLM cannot load the adapter."""
    facts = read_facts(adapter.path)
    if facts is not None and facts.compact:
        raise CoraError(f"{adapter.reference} is a compact adapter, which vLLM cannot load")
    if not is_plain_lora(adapter):
        raise CoraError(f"{adapter.reference} is not a plain LoRA, the only adapter that vLLM can load")
    config = adapter.adapter_config()
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]:
        raise CoraError(
            f"{adapter.reference} has a {patterns[0]}, but vLLM scales all layers alike; `cora export` writes it with one rank and scale"
        )
    rank = config.get("r", DEFAULT_RANK)
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise CoraError(f"{adapter.reference} has rank {rank}, but vLLM supports ranks up to {LORA_RANKS[-1]}")
    return fitting[0]
