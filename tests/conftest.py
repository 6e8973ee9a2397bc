"""Small real models and data that every test may use; nothing here reaches for a hub."""

import gc
import json
import os
import random
import shutil
import signal
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell starts its background jobs with Ctrl-C ignored, and so would be the processes that the tests of Ctrl-C start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cora_cli import embedded
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.choices import BasisChoices
from cora_cli.extraction.extract import extract_basis
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.models.references import resolve_model
from tests.methods.helpers import plan_of
from tests.weights.helpers import make_llama

TARGETS = ("q_proj", "k_proj", "v_proj")
VOCABULARY = 8192


def seed_draws(name: str) -> None:
    """Let what is drawn next be the same on each run, whatever ran before, and be another for each name."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    # `torch.manual_seed` notes the stack for each device that may come to be used, which takes milliseconds.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    seed_draws(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_draws(item.nodeid)


def write_tokenizer(directory: Path) -> None:
    """Write the embedded model's tokenizer with no more than its first `VOCABULARY` tokens, so that logits and files are small."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    kept = {token: index for token, index in model["vocab"].items() if index < VOCABULARY}
    described["model"] = {**model, "vocab": kept, "merges": [pair for pair in model["merges"] if "".join(pair) in kept]}
    path.write_text(json.dumps(described), encoding="utf-8")
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def make_model(directory: Path, seed: int, key_value_heads: int = 2, intermediate: int = 96) -> Path:
    """A two-layer Llama with hidden size 64 and four heads, in float32, with a small tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with grouped-query attention: q_proj is 64 × 64, k_proj and v_proj are 32 × 64."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def tiny_multihead_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose q_proj, k_proj and v_proj are all 64 × 64."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-multihead", seed=1, key_value_heads=4)


@pytest.fixture(scope="session")
def dated_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that writes the date into every prompt, as Llama 3.1's does."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "dated"))
    template = path / "chat_template.jinja"
    template.write_text("{{ 'Today: ' + strftime_now('%d %b %Y') }}\n" + template.read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_basis(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of rank 8 of the tiny model alone."""
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    extract_basis([resolve_model(str(tiny_model))], path, BasisChoices(rank=8), None, torch.device("cpu"))
    return path


@pytest.fixture(scope="session")
def tiny_input_basis(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of rank 8 of the tiny model's input side."""
    path = tmp_path_factory.mktemp("basis") / "input.safetensors"
    extract_basis([resolve_model(str(tiny_model))], path, BasisChoices(rank=8, side="input"), None, torch.device("cpu"))
    return path


@pytest.fixture(scope="session")
def tiny_sources(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two LoRA adapters of rank 4 on q, k and v of the tiny model, with random factors."""
    root = tmp_path_factory.mktemp("sources")
    base_hash = resolve_model(str(tiny_model)).content_hash()
    for seed in range(2):
        plan = plan_of("lora", rank=4, alpha=8.0, rslora=False, target_modules=TARGETS, dropout=0.0, seed=seed)
        wrapped = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), plan, None)
        for _, layer in lora_layers(wrapped):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.03, generator=torch.Generator().manual_seed(seed))
        facts = AdapterFacts(plan, str(tiny_model), None, base_hash, None, None, compact=False)
        save_adapter(wrapped, root / f"source-{seed}", facts)
    return str(root / "source-0"), str(root / "source-1")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short Alpaca records of different lengths, JSONL."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    records = [
        {
            "instruction": f"Count to {n}.",
            "input": "" if n % 2 else "in words",
            "output": " ".join(map(str, range(1, n % 9 + 2))),
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def square_models(tmp_path_factory) -> list[Path]:
    """Three multi-head models (square q, k, v) of one architecture."""
    root = tmp_path_factory.mktemp("square")
    for seed in range(3):
        make_llama(seed=seed).save_pretrained(root / f"m{seed}")
    return [root / f"m{seed}" for seed in range(3)]


@pytest.fixture(scope="session")
def grouped_models(tmp_path_factory) -> list[Path]:
    """Two grouped-query models: k and v are (8, 16), q is (16, 16)."""
    root = tmp_path_factory.mktemp("grouped")
    for seed in range(2):
        make_llama(kv_heads=2, seed=seed).save_pretrained(root / f"m{seed}")
    return [root / f"m{seed}" for seed in range(2)]


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: accelerate asks for one at each training, which would look through all of it."""
    gc.collect()
    gc.freeze()
