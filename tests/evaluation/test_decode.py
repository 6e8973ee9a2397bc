from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cora_cli.evaluation import decode
from cora_cli.evaluation.decode import PASS_COST, PooledDecoder, shared_prefixes, unsupported

from .helpers import UNUSED, Answers, random_prompts

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_multihead_model: Path) -> dict[str, Answers]:
    return {"grouped": Answers(load(tiny_model)), "multihead": Answers(load(tiny_multihead_model))}


def until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def answer(decoder: PooledDecoder, prompts: list[list[int]]) -> list[list[int]]:
    answers = []
    for start in range(0, len(prompts), decoder.wave):
        answers += decoder.answer(prompts[start : start + decoder.wave], lambda: None)
    return answers


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(["grouped", "multihead"]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    shared=st.integers(0, 30),
    other=st.integers(0, 30),
    batch_size=st.integers(1, 5),
    new_tokens=st.integers(1, 9),
    end_at=st.integers(0, 8),
)
def test_pooled_answers_are_those_of_one_prompt_at_a_time(
    models: dict[str, Answers],
    kind: str,
    lengths: list[int],
    shared: int,
    other: int,
    batch_size: int,
    new_tokens: int,
    end_at: int,
) -> None:
    half = len(lengths) // 2
    prompts = random_prompts(*lengths[:half], shared=shared) + random_prompts(*lengths[half:], shared=other)
    oracle = models[kind]
    assume(oracle.clear_prompts(prompts, new_tokens))
    alone = [oracle.greedy(prompt, new_tokens)[0] for prompt in prompts]
    end = alone[0][min(end_at, new_tokens - 1)]
    with pytest.MonkeyPatch.context() as patch:
        # Small, so that beginnings are shared, prefills are split and the cache grows.
        patch.setattr(decode, "PASS_COST", 2)
        patch.setattr(decode, "PREFILL_TOKENS", 64)
        patch.setattr(decode, "GROWTH", 8)
        found = answer(PooledDecoder(oracle.model, prompts, [end], batch_size, new_tokens), prompts)
    assert found == [until(tokens, end) for tokens in alone]


def test_rows_that_end_make_place_at_once(models: dict[str, Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = models["grouped"]
    prompts = random_prompts(*[6] * 8)
    alone = [oracle.greedy(prompt, 12)[0] for prompt in prompts]
    ends = [tokens[0] for tokens in alone[:3]]  # three answers end with their first token
    rows: list[int] = []
    real = PooledDecoder._next_tokens

    def counted(self: PooledDecoder, active: Any) -> Any:
        rows.append(len(active))
        return real(self, active)

    monkeypatch.setattr(PooledDecoder, "_next_tokens", counted)
    finished: list[int] = []
    answers = PooledDecoder(oracle.model, prompts, ends, 4, 12).answer(prompts, lambda: finished.append(len(rows)))
    lengths = [len(tokens) for tokens in answers]
    assert lengths[:3] == [1, 1, 1]
    assert sum(rows) == sum(lengths)  # no row is computed after its end
    assert rows[:2] == [4, 4]  # three left after the first step, three entered
    assert len(finished) == 8
    assert finished[:3] == [1, 1, 1]


def test_a_shared_beginning_is_computed_once(models: dict[str, Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(*[60] * 6, shared=50)
    computed = 0
    real = PooledDecoder._forward

    def counted(self: PooledDecoder, part: Any, first: int, tokens: Any, *rest: Any) -> Any:
        nonlocal computed
        computed += sum(map(len, tokens))
        return real(self, part, first, tokens, *rest)

    monkeypatch.setattr(PooledDecoder, "_forward", counted)
    PooledDecoder(models["grouped"].model, prompts, [UNUSED], 2, 3).answer(prompts, lambda: None)
    assert computed == 50 + 6 * 9 + 6 * 3  # the beginning, the rests but for a last token each, and three tokens each


def test_an_answer_depends_on_its_wave_alone(models: dict[str, Answers]) -> None:
    prompts = sorted(random_prompts(*range(3, 27), shared=0), key=len, reverse=True)
    model = models["grouped"].model.to(torch.bfloat16)
    try:
        whole = PooledDecoder(model, prompts, [UNUSED], 2, 6)
        expected = answer(whole, prompts)
        for start in (16, 8):  # other waves first, or none at all before
            fresh = PooledDecoder(model, prompts, [UNUSED], 2, 6)
            assert fresh.answer(prompts[start : start + 8], lambda: None) == expected[start : start + 8]
    finally:
        model.to(torch.float32)


# Shared prefixes


def test_prompts_of_two_templates_share_one_prefix_each() -> None:
    common, one, two = list(range(8)), list(range(100, 140)), list(range(200, 260))
    prompts = [[*common, *one, 900 + n, 5] for n in range(5)] + [[*common, *two, 900 + n, 5] for n in range(5)]
    assert shared_prefixes(prompts) == [48] * 5 + [68] * 5


def test_prompts_share_nothing_where_one_more_pass_costs_more() -> None:
    prompts = [[*range(PASS_COST), 900], [*range(PASS_COST), 901]]
    assert shared_prefixes(prompts) == [0, 0]
    prompts = [[7, *range(PASS_COST), 900], [7, *range(PASS_COST), 901]]
    assert shared_prefixes(prompts) == [PASS_COST + 1] * 2
    assert shared_prefixes([]) == []


def test_the_last_token_is_never_shared() -> None:
    prompt = list(range(100))
    assert shared_prefixes([prompt, prompt, prompt]) == [99] * 3
    assert shared_prefixes([prompt, [*prompt, 7]]) == [99] * 2


def test_thousands_of_nested_prompts_work() -> None:
    found = shared_prefixes([[3] * length for length in range(1, 3000)])
    assert all(0 <= shared < length for shared, length in zip(found, range(1, 3000), strict=True))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8))
def test_what_is_shared_saves_as_much_as_any_partition_of_the_prompts(prompts: list[list[int]]) -> None:
    def saved(depths: dict[tuple[int, ...], int]) -> int:
        return sum((count - 1) * len(prefix) - 2 for prefix, count in depths.items())

    def best(members: list[list[int]], depth: int) -> int:
        """Each node of the prefix tree is either a group or split further, one token at a time."""
        if len(members) < 2 or depth > 9:
            return 0
        parts: dict[Any, list[list[int]]] = {}
        for member in members:
            if len(member) > depth:
                parts.setdefault(member[depth], []).append(member)
        return max((len(members) - 1) * depth - 2, sum(best(part, depth + 1) for part in parts.values()), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "PASS_COST", 2)
        lengths = shared_prefixes(prompts)
    groups: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        if length:
            groups[tuple(prompt[:length])] = groups.get(tuple(prompt[:length]), 0) + 1
    assert all(length < len(prompt) for prompt, length in zip(prompts, lengths, strict=True))
    assert saved(groups) == best([prompt[:-1] for prompt in prompts], 0)


# Models that the pool does not support


def mistral(window: int) -> Any:
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def longrope(switch: int) -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 5.0],
        "original_max_position_embeddings": switch,
    }
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: mistral(16), "a layer other than full attention"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)), "accepts no custom mask"),
        (lambda: longrope(63), "its rotary embedding depends on the longest sequence of the batch above 63 tokens"),
    ],
)
def test_models_of_other_kinds_are_left_to_transformers(build: Callable[[], Any], reason: str) -> None:
    assert reason in str(unsupported(build().eval(), 64))


@pytest.mark.parametrize("build", [lambda: mistral(64), gpt2, lambda: longrope(64)])
def test_a_wide_window_learned_positions_and_an_unreached_rotary_limit_are_supported_equally(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():  # far from ties
        parameter.data.mul_(4)
    assert unsupported(model, 64) is None
    oracle = Answers(model)
    # Long prompts next to long shared prefixes: padding would extend beyond the 64 positions.
    prompts = [*random_prompts(3, 58, 17), *random_prompts(42, 44, shared=40)]
    prompts = [[token % 128 for token in prompt] for prompt in prompts]
    monkeypatch.setattr(decode, "PASS_COST", 2)
    assert shared_prefixes(prompts)[3:] == [40, 40]
    assert oracle.clear_prompts(prompts, 6)
    found = answer(PooledDecoder(model, prompts, [UNUSED], 5, 6), prompts)
    assert found == [oracle.greedy(prompt, 6)[0] for prompt in prompts]
