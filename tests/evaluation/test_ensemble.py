"""Several runs as one model: probabilities are averaged over them, for the reference tokens and for generation."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from cora_cli.adapters.loading import load_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.generate import BatchedGenerate
from cora_cli.evaluation.mixture import mixture, share_equal_weights
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json, read_jsonl
from cora_cli.reporting.report import report
from tests.conftest import VOCABULARY

from .helpers import CLEAR, FAST, UNUSED, Answers, evaluate_run, make_run, random_prompts


@pytest.fixture(scope="module")
def members(
    trained: dict[str, Path], tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ...]:
    """A LoRA, one of another seed and rank, and a complete model."""
    other = make_run(tiny_model, tiny_data, tmp_path_factory.mktemp("member") / "other", mode="lora", rank=4, seed=1)
    return trained["lora"], other, trained["full"]


def ensemble(runs: tuple[Path, ...], output: Path, **settings):
    config = {**FAST, "metrics": ("calibration",), "ensemble": True, "output_dir": str(output), **settings}
    return evaluate(EvaluateConfig(runs=tuple(map(str, runs)), **config))


def tokens(directory: Path, key: str) -> list[list[float]]:
    return [line["reference_tokens"][key] for line in read_jsonl(directory / "predictions.jsonl")]


@pytest.fixture(scope="module")
def alone(members: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An evaluation of each member."""
    places = [tmp_path_factory.mktemp("alone") / str(place) for place in range(3)]
    for run, place in zip(members, places, strict=True):
        evaluate_run(run, metrics=("nll",), output_dir=str(place))
    return places


@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_probabilities_are_the_means_of_the_members_and_so_the_nll_is_at_most_their_mean(
    members: tuple[Path, ...], alone: list[Path], tmp_path: Path, merge: bool
):
    [average] = ensemble(members, tmp_path, merge=merge)
    of_members = [tokens(place, "nll") for place in alone]
    for record, found in enumerate(tokens(tmp_path, "nll")):
        for place, nll in enumerate(found):
            mean = sum(math.exp(-one[record][place]) for one in of_members) / 3
            assert nll == pytest.approx(-math.log(mean), rel=1e-4)
    values = [read_json(place / "metrics.json")["metrics"]["nll"]["value"] for place in alone]
    assert average.record["metrics"]["nll"]["value"] < sum(values) / 3
    assert average.record["generation"]["settings"]["merged"] is merge
    assert len(average.record["generation"]["settings"]["members"]) == 3


def test_a_member_with_draws_counts_as_much_as_one_without(
    members: tuple[Path, ...], alone: list[Path], tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    drawn = make_run(tiny_model, tiny_data, tmp_path / "drawn", mode="scalabl", rank=4)
    evaluate_run(drawn, metrics=("nll",), output_dir=str(tmp_path / "own"), draws=3)
    [average] = ensemble((members[0], drawn), tmp_path / "both", draws=3)
    assert average.record["generation"]["settings"]["draws"] == [0, 3]
    every = [
        [nll for record in tokens(place, "nll") for nll in record] for place in (tmp_path / "both", alone[0], tmp_path / "own")
    ]
    for found, plain, of_draws in zip(*every, strict=True):
        assert found == pytest.approx(-math.log((math.exp(-plain) + math.exp(-of_draws)) / 2), rel=1e-4)


def test_it_answers_with_the_most_likely_token_of_the_mean(members: tuple[Path, ...], tiny_model: Path, tmp_path: Path):
    base = lambda: AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)  # noqa: E731
    models = [load_adapter(base(), resolve_model(str(run))) for run in members[:2]]
    models.append(AutoModelForCausalLM.from_pretrained(members[2] / "model", dtype=torch.float32).eval())
    mixed = mixture([load_adapter(base(), resolve_model(str(run))).get_base_model() for run in members[:2]] + models[2:])
    prompts = random_prompts(3, 7, 7, 12, shared=2)
    engine = BatchedGenerate(mixed, [UNUSED], UNUSED, 4, 5)
    answers = engine.answer(prompts, lambda: None)
    alone = AutoModelForCausalLM.from_pretrained(members[2] / "model", dtype=torch.float32).eval()
    models[2] = alone
    clear = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                p = torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1) for model in models])
            best = p.mean(0).log().topk(2)
            if best.values[0] - best.values[1] < CLEAR:
                break
            assert token == int(best.indices[0])
            ids.append(token)
            clear += 1
    assert clear > 10


@pytest.mark.parametrize("family", ["mamba", "gpt2", "rwkv"])
def test_members_of_other_families_keep_states_of_their_own(family: str):
    def made(seed: int):
        torch.manual_seed(seed)
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, initializer_range=0.5)).eval()
        if family == "rwkv":  # whose state is a list
            model = RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=300)).eval()
            for weight in model.parameters():
                weight.data += 0.5 * torch.randn_like(weight)
            return model
        config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=300, initializer_range=0.5)
        return MambaForCausalLM(config).eval()

    mixed, pair = mixture([made(0), made(1)]), [made(0), made(1)]
    prompt = list(range(20, 30))
    [answer] = BatchedGenerate(mixed, [299], 0, 1, 6).answer([prompt], lambda: None)
    for place, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:place]])
        with torch.no_grad():
            p = torch.stack([model(ids).logits[0, -1].softmax(-1) for model in pair]).mean(0)
        assert token == int(p.argmax())


class Summing:
    """A model whose state is a tuple, as the keys and values of older code are, made anew in each pass."""

    def __init__(self, seed: int) -> None:
        self._weight = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed))

    def forward(self, ids: torch.Tensor, past_key_values: tuple[torch.Tensor] | None = None) -> Any:
        sums = self._weight[ids].cumsum(1) + (past_key_values[0] if past_key_values else 0)
        return SimpleNamespace(logits=sums, past_key_values=(sums[:, -1:],))

    __call__ = forward


def test_members_whose_state_is_a_tuple_keep_their_own():
    mixed, pair = mixture([Summing(0), Summing(1)]), [Summing(0), Summing(1)]
    ids = torch.arange(8)[None]
    wanted = torch.stack([model.forward(ids).logits.softmax(-1) for model in pair]).mean(0).log()
    for _ in range(2):  # a second text begins without a state
        state, found = None, []
        for place in range(0, 8, 2):
            output = mixed.forward(ids[:, place : place + 2], past_key_values=state)
            state, found = output.past_key_values, [*found, output.logits]
        torch.testing.assert_close(torch.cat(found, dim=1), wanted)


def test_an_ensemble_of_equal_models_is_that_model_and_costs_no_memory_twice(tiny_model: Path):
    first, second, alone = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval() for _ in range(3))
    with torch.no_grad():
        second.model.layers[0].mlp.up_proj.weight[0, 0] += 0
        second.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    share_equal_weights(first, second)
    shared = [one.data_ptr() == other.data_ptr() for one, other in zip(first.parameters(), second.parameters(), strict=True)]
    assert shared.count(False) == 1
    mixed = mixture([first, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()])
    prompts = [prompt for prompt in random_prompts(4, 9, 15) if Answers(alone).clear_prompts([prompt], 4)]
    assert prompts
    for prompt in prompts:
        assert BatchedGenerate(mixed, [UNUSED], UNUSED, 1, 4).answer([prompt], lambda: None) == [
            Answers(alone).greedy(prompt, 4)[0]
        ]


def test_it_stands_in_a_report_beside_its_members_and_the_base_model(members: tuple[Path, ...], tmp_path: Path):
    found = ensemble(members[:2], tmp_path / "out", with_base=True)
    assert [one.name.partition(" ")[0] for one in found][1] == "ensemble"
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"base", "ensemble"}
    text = report([str(tmp_path / "out" / "base"), str(tmp_path / "out" / "ensemble")], "markdown")
    assert "ensemble of lora, other" in text
    assert f"{read_json(tmp_path / 'out' / 'ensemble' / 'metrics.json')['metrics']['nll']['value']:.3f}" in text


def test_a_tokenizer_that_was_written_again_is_the_same_and_one_with_another_token_is_not(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    base, grown = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("base", "grown"))
    described = read_json(base / "tokenizer.json")
    (base / "tokenizer.json").write_text(json.dumps(described, indent=1))  # as no transformers writes it
    added = {**described["added_tokens"][-1], "id": VOCABULARY, "content": "<|new|>"}
    (grown / "tokenizer.json").write_text(json.dumps({**described, "added_tokens": [*described["added_tokens"], added]}))
    runs = [make_run(base, tiny_data, tmp_path / mode, mode=mode) for mode in ("lora", "full")]
    assert (base / "tokenizer.json").read_bytes() != (runs[1] / "model" / "tokenizer.json").read_bytes()
    [average] = ensemble(tuple(runs), tmp_path / "out")
    assert len(average.record["generation"]["settings"]["members"]) == 2
    other = make_run(grown, tiny_data, tmp_path / "other", mode="lora", seed=1)
    with pytest.raises(CoraError, match="cannot be one ensemble: they have different tokenizers"):
        ensemble((runs[0], other), tmp_path / "again")


def test_what_is_no_ensemble_is_refused(members: tuple[Path, ...], tiny_model: Path, tiny_data: Path, tmp_path: Path):
    for settings, said in (
        ({"runs": ("a",), "output_dir": "o"}, "--ensemble needs at least two run directories, not 1"),
        ({"model": "m", "dataset": "d", "output_dir": "o"}, "--ensemble needs at least two run directories, not 0"),
        ({"runs": ("a", "b")}, "--ensemble needs --output-dir DIR"),
        ({"runs": ("a", "b"), "output_dir": "o", "ranks": ("1",)}, "--ranks has no effect with --ensemble"),
        ({"runs": ("a", "b"), "output_dir": "o", "backend": "vllm"}, "--ensemble needs --backend transformers"),
    ):
        with pytest.raises(UsageError, match=said):
            EvaluateConfig(ensemble=True, **settings)
    with pytest.raises(CoraError, match="have the same weights; an ensemble needs runs that were trained independently"):
        ensemble((members[0], members[0]), tmp_path / "out")
    split = make_run(tiny_model, tiny_data, tmp_path / "split", mode="lora", rank=4, split_seed=5)
    with pytest.raises(CoraError, match="hold out different records: train them with one --split-seed"):
        ensemble((members[0], split), tmp_path / "out")
    assert not (tmp_path / "out").exists()
