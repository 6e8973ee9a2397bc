"""Quick evaluations, a tokenizer, and an oracle for greedy answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.generate import Request
from cora_cli.evaluation.scoring import Evaluation
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import EvaluationDirectory
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.conftest import VOCABULARY

UNUSED = VOCABULARY - 1
"""A token that the tiny models do not choose."""
CLEAR = 1e-3
"""A lead of the best logit over the second that no order of summation in float32 takes away."""
UNRELATED = (
    *("quark", "aorta", "ledger", "fjord", "banjo", "enzyme"),
    *("treaty", "gazebo", "lichen", "turbine", "sonnet", "mortgage"),
)
"""Words that an encoder of BERTScore places far apart."""
PREDICTIONS = ["The cat sat on the mat.", "def f(x):\n    return x + 1", "42", "", "Paris is the capital of France", "banana"]
REFERENCES = [
    "A cat is sitting on a mat.",
    "def f(y): return y + 1",
    "photosynthesis",
    "hello",
    "The capital of France is Paris.",
    "",
]
"""Answers and references of every kind: equal, code, short, empty, in other words."""


def unsealed(path: Path) -> Any:
    """The contents of a record without the hash of them, as an earlier version wrote it."""
    return {name: value for name, value in read_json(path).items() if name != "sha256"}


@dataclass
class Numbers:
    """A tokenizer whose text is the ids themselves, so that texts are equal where tokens are."""

    eos_token_id: int = UNUSED
    pad_token_id: int = UNUSED

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


@dataclass
class Answers:
    """Greedy answers by the model's plain forward pass: one sequence, no cache, no padding, no `generate`."""

    model: Any
    known: dict[tuple[tuple[int, ...], int], tuple[list[int], bool]] = field(default_factory=dict)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], tokens: int) -> tuple[list[int], bool]:
        """The tokens, and whether every one was chosen clearly."""
        key = (tuple(prompt), tokens)
        if key not in self.known:
            ids, clear = list(prompt), True
            for _ in range(tokens):
                best = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
                clear = clear and bool(best.values[0] - best.values[1] > CLEAR)
                ids.append(int(best.indices[0]))
            self.known[key] = ids[len(prompt) :], clear
        return self.known[key]

    def clear_prompts(self, prompts: list[list[int]], tokens: int) -> bool:
        return all(self.greedy(prompt, tokens)[1] for prompt in prompts)


def random_prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Prompts of these lengths; all begin with the same `shared` tokens, as far as they are longer."""
    generator = torch.Generator().manual_seed(sum(lengths) + shared)
    beginning = torch.randint(3, VOCABULARY - 100, (shared,), generator=generator).tolist()
    rests = [torch.randint(3, VOCABULARY - 100, (length,), generator=generator).tolist() for length in lengths]
    return [[*beginning, *rest][:length] if shared < length else rest for rest, length in zip(rests, lengths, strict=True)]


def requests_of(*lengths: int) -> list[Request]:
    return [Request(ids, f"prompt {number}", f"reference {number}") for number, ids in enumerate(random_prompts(*lengths))]


HELD_OUT = 6
SCORING: dict[str, Any] = {"device": "cpu", "metrics": ("rouge1", "sacrebleu"), "bootstrap": 100}
FAST: dict[str, Any] = {"dtype": "fp32", "batch_size": 4, "max_new_tokens": 6, **SCORING}


def make_run(model: Path, data: Path, output: Path, **settings: Any) -> Path:
    config = {"max_steps": 2, "batch_size": 8, "test_size": HELD_OUT, "learning_rate": 0.03, "dtype": "fp32", "device": "cpu"}
    train(TrainConfig(model=str(model), dataset=str(data), output_dir=str(output), **{**config, **settings}))
    return output


def evaluate_run(run: Path, **settings: Any) -> Evaluation:
    return evaluate(EvaluateConfig(runs=(str(run),), **{**FAST, **settings}))[0]


def evaluate_model(model: Path | str, dataset: Path | str, output: Path, **settings: Any) -> Evaluation:
    config = EvaluateConfig(model=str(model), dataset=str(dataset), output_dir=str(output), **{**FAST, **settings})
    return evaluate(config)[0]


def answers(directory: Path) -> list[str]:
    return [line["prediction"] for line in read_jsonl(EvaluationDirectory(directory).predictions)]
