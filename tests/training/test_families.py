"""Every causal family of transformers that plain PEFT can train is trained, answered and merged as it is alone.

`make test` takes one or two families of each kind; `make test-slow` takes all of them.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import training_arguments
from cora_cli.training.assemble import assemble
from cora_cli.training.prepare import prepare

from .families import FAMILIES, build, measure
from .helpers import config_for

REPRESENTATIVES = frozenset(
    {
        *("llama", "gemma2"),  # packed
        *("phimoe", "roberta", "gpt_oss"),  # whose packed rows have other losses
        "gemma3n_text",  # which computes a part by itself in training, in the precision of the weights alone
        *("bert", "phi3-longrope"),  # positions or embeddings that depend on the row
        *("bloom", "gptj", "mamba"),  # which compute attention by themselves
        *("gpt2", "falcon"),  # whose linear layers are of classes of their own
        *("bart", "rwkv"),  # whose answers depend on padding, or on any other prompt in the batch
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


def test_a_run_routes_as_its_evaluation_does(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    settings = build("phimoe")
    settings.vocab_size = len(AutoTokenizer.from_pretrained(model))
    AutoModelForCausalLM.from_config(settings).save_pretrained(model)
    config, run = config_for(model, tiny_data, tmp_path / "run"), RunDirectory(tmp_path / "run")
    prepared = prepare(config)
    trained, *_ = assemble(
        config, prepared, training_arguments(config, prepared.hardware, len(prepared.train.examples), run), run
    )
    assert all(router.router_jitter_noise > 0 for router in trained.modules() if isinstance(router, PhimoeTopKRouter))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(trained.train()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)
