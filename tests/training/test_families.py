"""Every causal family of transformers that plain PEFT can train is trained, answered and merged as it is alone."""

import pytest

from .families import FAMILIES, measure


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_answers_and_merged_weights_are_those_of_single_examples(family: str) -> None:
    measured = measure(family)
    assert measured.loss < 1e-6
    assert measured.answers == 1
    assert measured.merged is None or measured.merged < 1e-5
