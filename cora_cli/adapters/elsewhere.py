"""Which other programs load an adapter as it is stored: PEFT, transformers and vLLM."""

from cora_cli.adapters.facts import read_facts
from cora_cli.errors import CoraError
from cora_cli.methods.registry import method_of
from cora_cli.models.references import ModelPath

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `max_lora_rank`."""


def peft_loads(adapter: ModelPath) -> bool:
    """Whether plain PEFT loads it: it holds all its tensors, for layers that the model has, and PEFT knows its type."""
    facts = read_facts(adapter.path)
    return facts is None or (not facts.compact and not facts.views and method_of(facts.plan.mode).plain_peft_loads)


def is_plain_lora(adapter: ModelPath) -> bool:
    """Whether it is a LoRA without extensions, which transformers and vLLM load too."""
    config = adapter.adapter_config()
    return peft_loads(adapter) and config.get("peft_type") == "LORA" and not config.get("use_dora")


def vllm_rank(adapter: ModelPath) -> int:
    """The smallest value of `max_lora_rank` that fits `adapter`. Raises `CoraError` if vLLM cannot load the adapter."""
    facts = read_facts(adapter.path)
    if facts is not None and facts.compact:
        raise CoraError(f"{adapter.reference} is a compact adapter, which vLLM cannot load")
    if not is_plain_lora(adapter):
        raise CoraError(f"{adapter.reference} is not a plain LoRA, the only adapter that vLLM can load")
    config = adapter.adapter_config()
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise CoraError(f"{adapter.reference} has rank {rank}, but vLLM supports ranks up to {LORA_RANKS[-1]}")
    return fitting[0]
