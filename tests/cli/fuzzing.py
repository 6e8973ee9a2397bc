"""A small directory with every kind of file that `cora` reads, ways to damage a file, and what a command makes of it."""

import dataclasses
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.reading import read_json
from cora_cli.records.sealed import write_sealed
from tests.reporting.helpers import ladder, make_grid, record_steps

TRAIN = [
    "--mode",
    "lora",
    "--rank",
    "2",
    "--max-steps",
    "1",
    "--batch-size",
    "2",
    "--test-size",
    "2",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
]
SCORE = ["--metrics", "rouge", "--bootstrap", "100", "--device", "cpu"]
EVALUATE = [*SCORE, "--max-new-tokens", "2", "--dtype", "fp32"]
JUNK: tuple[Any, ...] = (
    *(None, True, "x", "", -1, 0, 1.5, 10**400, [], {}, "\ud800", float("nan"), float("inf"), "\x1b[2J", "n" * 250),
    *([[[[]]]], {"a": {"b": None}}, "(a+)+$", "../..", "\0", [None], ["x", 3]),
)
"""Values that are not what a file should hold; not all are wrong at every place."""
DEEP = "[" * 100_000


@dataclasses.dataclass(frozen=True)
class Case:
    """A file to damage, a command that reads it, and the file that the command writes (its stdout where None).

    A file with `settings` is the user's or another program's: other valid values in it rightly give another result.
    """

    file: str
    command: tuple[str, ...]
    written: str | None = None
    settings: bool = False


RESUME = ("train", "--config", "run/config.yaml", "--resume")
CASES = (
    *(Case(f"run/{name}", ("report", "run")) for name in ("run.json", "log.jsonl", "heldout.jsonl")),
    *(Case(f"run/eval/{name}", ("report", "run/eval")) for name in ("metrics.json", "scores.jsonl", "predictions.jsonl")),
    Case("run/run.json", ("evaluate", "run", *EVALUATE), "run/eval/metrics.json"),
    Case("run/eval/generation.json", ("evaluate", "run", *EVALUATE), "run/eval/metrics.json"),
    Case("run/eval/predictions.jsonl", ("evaluate", "--from", "run/eval/predictions.jsonl", *SCORE), "run/eval/scores.jsonl"),
    Case("run/run.json", RESUME, "run/adapter/adapter_model.safetensors"),
    Case("run/config.yaml", RESUME, "run/adapter/adapter_model.safetensors", settings=True),
    *(
        Case(f"run/adapter/{name}", command, written, settings=name == "adapter_config.json")
        for name in ("cora.json", "adapter_config.json", "adapter_model.safetensors")
        for command, written in (
            (("extract-basis", "run", "--rank", "2", "-o", "new.safetensors"), "new.safetensors"),
            (("merge", "run", "-o", "merged"), "merged/model.safetensors"),
        )
    ),
    *(
        Case(f"base/{name}", ("extract-basis", "base", "--rank", "2", "-o", "new.safetensors"), "new.safetensors", settings=True)
        for name in ("config.json", "model.safetensors.index.json")
    ),
    *(
        Case(f"base/{name}", ("train", *TRAIN, "--model", "base", "--dataset", "pairs.jsonl", "--output-dir", "new"), "new/heldout.jsonl", settings=True)
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
    ),
    Case("basis.safetensors", ("inspect", "basis.safetensors", "--format", "markdown")),
    Case("grid/plan.json", ("report", "grid")),
    Case("grid/steps/train-tiny-lora_r4_nNone_lr0.001_seed0.json", ("report", "grid")),
    Case("grid.yaml", ("ablate", "grid.yaml", "--dry-run", "--device", "cpu"), settings=True),
    Case(
        "peft.json",
        ("train", *TRAIN, "--mode", "peft", "--peft-config", "peft.json", "--model", "base", "--dataset", "pairs.jsonl", "--output-dir", "new"),
        "new/heldout.jsonl",
        settings=True,
    ),
)  # fmt: skip


def make_workspace(root: Path) -> None:
    """Fill `root`, the working directory: a model, data, a finished and evaluated run, a basis, a grid and its file."""
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", "count", *map(str, range(12))]
    own = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(root / "base")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, num_key_value_heads=2, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(root / "base", max_shard_size="10KB")
    pairs = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 12)]
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (root / "peft.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}))
    must(("train", *TRAIN, "--model", "base", "--dataset", "pairs.jsonl", "--output-dir", "run"))
    must(("evaluate", "run", *EVALUATE))
    must(("extract-basis", "base", "--rank", "2", "-o", "basis.safetensors"))
    record_steps(make_grid(root / "grid", ladder(2), prompts=4))
    plan = root / "grid" / "plan.json"
    write_sealed(plan, read_json(plan))  # as `ablate` does
    grid = {
        "name": "tiny",
        "model": "base",
        "models": {"a": "base"},
        "datasets": {"pairs": "pairs.jsonl"},
        "defaults": {"train": {"max_steps": 1, "rank": 2, "test_size": 2}, "evaluate": {"limit": 2, "metrics": ["rouge"]}},
        "grid": [{"mode": ["lora", "fb"], "seed": [0, 1]}, {"mode": "base"}],
    }
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))


def must(command: tuple[str, ...]) -> None:
    """Run a command that has to succeed."""
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 0, result.output


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, its text on the screen, its result, and the seconds that it took."""

    code: int
    screen: str
    result: bytes | None
    seconds: float


def run(case: Case) -> Outcome:
    """Run the command of a case in this process and the working directory."""
    began = time.monotonic()
    done = CliRunner().invoke(app, list(case.command))
    path = Path(case.written) if case.written else None
    result = done.stdout.encode() if path is None else path.read_bytes() if path.is_file() else None
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Outcome(done.exit_code, done.output, result, time.monotonic() - began)


def fault_of(case: Case, before: Outcome, after: Outcome) -> str | None:
    """What is wrong with the outcome for a damaged file, given the one for the undamaged file; None if nothing is."""
    errors = [line for line in after.screen.splitlines() if line.startswith("cora: error")]
    if re.search(r"unexpected \w+(Error|Exception)|Traceback", after.screen):
        return "a programming error reached the user"
    if "\x1b" in after.screen:
        return "an escape sequence reached the screen"
    if after.seconds > 20:
        return f"it took {after.seconds:.0f} s"
    if after.code in (1, 2):
        return None if len(errors) == 1 else f"{len(errors)} sentences"
    if after.code != 0:
        return f"exit code {after.code}"
    named = Path(case.file).name in after.screen or "damaged" in after.screen or "run `cora ablate` again" in after.screen
    right = case.settings or named or after.result == before.result
    return None if right else "another result, and not a word about it"


def damage(content: bytes, choose: random.Random, structured: bool) -> bytes | None:
    """`content` damaged; None stands for a directory in the file's place."""
    raw: list[Callable[[], bytes | None]] = [
        lambda: content[: choose.randrange(len(content))],
        lambda: b"",
        lambda: None,
        lambda: b"\xff\xfe" + content,
        lambda: content + b"\0",
        DEEP.encode,
        lambda: b"9" * 5000,
        lambda: content[: (at := choose.randrange(len(content)))] + b"\xff" + content[at + 1 :],
    ]
    if not structured:
        return choose.choice(raw[:-1])()  # a flipped bit of a weight is a matter of hashes
    if choose.random() < 0.3:
        return choose.choice(raw)()
    text = content.decode()
    lines = (
        text.splitlines() if len(text.splitlines()) > 1 and text.startswith("{") and _is_json(text.splitlines()[0]) else [text]
    )
    place = choose.randrange(len(lines))
    value = yaml.safe_load(lines[place])
    lines[place] = _write(_changed(value, choose), choose)
    return "\n".join(lines).encode() + b"\n"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _changed(value: Any, choose: random.Random) -> Any:
    """A tree with one part removed or replaced."""
    if isinstance(value, dict | list) and value and choose.random() < 0.85:
        copy: Any = value.copy()
        key = choose.choice(list(value)) if isinstance(value, dict) else choose.randrange(len(value))
        if choose.random() < 0.15:
            del copy[key]
        else:
            copy[key] = _changed(value[key], choose)
        return copy
    return choose.choice([junk for junk in JUNK if _kind(junk) != _kind(value)])


def _kind(value: Any) -> str:
    """What can take the place of a value unnoticed: a finite number that of another, a text that of another."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" if abs(value) < 1e300 else "no finite number"
    return "text" if isinstance(value, str) and value != "\ud800" else str(type(value))


def _write(value: Any, choose: random.Random) -> str:
    text = json.dumps(value)
    if isinstance(value, dict) and value and choose.random() < 0.1:
        return f"{text[:-1]}, {json.dumps(next(iter(value)))}: 1}}"
    return text.replace('"(a+)+$"', choose.choice(['"(a+)+$"', DEEP, "9" * 5000, "2024-13-45", '{"a": 1, "a": 2}']))


def put(path: Path, content: bytes | None) -> None:
    """Write `content`, or a directory for None, at `path`."""
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


def restore(pristine: Path, place: Path) -> None:
    """Make `place`, the working directory, a copy of `pristine` again."""
    for entry in place.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(pristine, place, dirs_exist_ok=True)
    os.chdir(place)
