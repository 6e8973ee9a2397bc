"""Every causal family of transformers that plain PEFT can train is trained, answered and merged as it is alone.

`make test` takes one or two families of each kind; `make test-slow` takes all of them.
"""

import pytest

from .families import FAMILIES, measure

REPRESENTATIVES = frozenset(
    {
        *("llama", "gemma2"),  # packed
        *("phimoe", "roberta", "gpt_oss"),  # whose packed rows have other losses
        *("bert", "phi3-longrope"),  # positions or embeddings that depend on the row
        *("bloom", "gptj", "mamba"),  # which compute attention by themselves
        *("gpt2", "falcon"),  # whose linear layers are of classes of their own
        *("bart",),  # whose answers depend on padding
    }
)


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in REPRESENTATIVES else pytest.mark.slow) for one in FAMILIES]
)
def test_losses_answers_and_merged_weights_are_those_of_single_examples(family: str) -> None:
    measured = measure(family)
    assert measured.loss < 1e-6
    assert measured.answers == 1
    assert measured.merged < 1e-5


def test_the_representatives_are_families() -> None:
    assert set(FAMILIES) >= REPRESENTATIVES
