"""Models and tokenizers with Python code of their own: run when that is asked for only, and written so that they load again."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.generate import BatchedGenerate, transformers_engine
from cora_cli.experiments.ablate import Request, dry_run
from cora_cli.methods.parts.layers import without_cache
from cora_cli.models.configuration import load_configuration
from cora_cli.models.loading import check_names, load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.own_code.ties import listed_ties
from cora_cli.models.precision import computing_in
from cora_cli.models.references import resolve_model
from cora_cli.models.skeleton import build_skeleton
from cora_cli.models.tokenizer import load_tokenizer, save_tokenizer
from cora_cli.reading import read_jsonl
from cora_cli.training.preflight import preflight
from cora_cli.training.run import train
from tests.conftest import VOCABULARY, write_tokenizer
from tests.training.helpers import config_for

NEEDED = "it needs Python code of its own, which cora runs with --trust-remote-code only"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code to a folder from which it imports it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_of_a_model_is_refused_by_the_flag_that_runs_it(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "configuration_own.py").write_text("raise RuntimeError('it ran')\n")
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(CoraError, match=f"config.json of .* cannot be read: {NEEDED}"):
        load_configuration(resolve_model(str(model)))


def test_code_of_another_repository_that_cannot_be_reached_is_asked_for_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unreachable(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.models.auto.configuration_auto.get_class_from_dynamic_module", unreachable)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "some/repository--configuration_own.OwnConfig"})
    with pytest.raises(CoraError, match=r"config\.json of .* cannot be read: We couldn't connect to the hub"):
        load_tokenizer(resolve_model(str(model)), trust_remote_code=True)
    assert asked == ["some/repository--configuration_own.OwnConfig"]


def test_a_tokenizer_with_code_of_its_own_loads_again_where_it_was_written(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    edit(model / "tokenizer_config.json", **names)
    with pytest.raises(CoraError, match=NEEDED):
        load_tokenizer(resolve_model(str(model)))
    loaded = load_tokenizer(resolve_model(str(model)), trust_remote_code=True)
    written = shutil.copytree(tiny_model, tmp_path / "written")
    save_tokenizer(loaded, written, written)
    again = load_tokenizer(resolve_model(str(written)), trust_remote_code=True)
    assert type(again).__name__ == "OwnTokenizer"
    assert again("a text")["input_ids"] == loaded("a text")["input_ids"]


def test_the_code_of_an_adapter_s_tokenizer_decides_its_tokens_whatever_its_file_describes(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = Path(
        shutil.copytree(tiny_model, tmp_path / "adapter", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    )
    (adapter / "tokenization_own.py").write_text(
        "from tokenizers.normalizers import Lowercase\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class LowerTokenizer(PreTrainedTokenizerFast):\n    def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n"
        "        self.backend_tokenizer.normalizer = Lowercase()\n"
    )
    names = {"tokenizer_class": "LowerTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.LowerTokenizer"]}}
    edit(adapter / "tokenizer_config.json", **names)
    found = load_tokenizer(resolve_model(str(tiny_model)), True, ModelPath("adapter", adapter, None))
    assert found("It IS")["input_ids"] == found("it is")["input_ids"]


OWN_MODEL = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.wpe, self.wte = torch.nn.Embedding(64, 8), torch.nn.Embedding(config.vocab_size, 8)
        self.lm_head = torch.nn.Linear(8, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **rest):
        return CausalLMOutput(logits=self.lm_head(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]))
"""


@pytest.mark.parametrize("rows", [40, 8])
def test_a_class_that_does_not_tell_its_embedding_has_that_of_the_vocabulary(rows: int, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "vocab_size": rows, "auto_map": code}))
    config = load_configuration(resolve_model(str(tmp_path), weights=False), trust_remote_code=True)
    made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with pytest.raises(NotImplementedError):
        made.get_input_embeddings()
    made.save_pretrained(tmp_path)
    skeleton = build_skeleton(config, trust_remote_code=True)
    assert skeleton.get_input_embeddings() is skeleton.wte
    loaded: Any = load_model(resolve_model(str(tmp_path)), torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    assert loaded.get_input_embeddings() is loaded.wte
    assert torch.equal(loaded.wte.weight, made.wte.weight)


NANO = """
import torch
from torch import nn
from transformers import {generates}PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class NanoConfig(PreTrainedConfig):
    model_type = "nano"

    def __init__(self, n_vocab=64, n_embd=16, n_layer=2, block_size=64, **rest):
        self.n_vocab, self.n_embd, self.n_layer, self.block_size = n_vocab, n_embd, n_layer, block_size
        super().__init__(**rest)


class NanoModel(PreTrainedModel{base}):
    config_class = NanoConfig
    _tied_weights_keys = ["head.weight"]
    {methods}

    def __init__(self, config):
        super().__init__(config)
        width = config.n_embd
        self.tok, self.pos = nn.Embedding(config.n_vocab, width), nn.Embedding(config.block_size, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(config.n_layer)])
        self.head = nn.Linear(width, config.n_vocab, bias=False)
        {tie}
        self.post_init()

    def forward(self, {arguments}):
        states = self.tok(input_ids) + self.pos.weight[: input_ids.shape[1]]
        for layer in self.layers:  # the mean over all tokens so far is all that it knows of others
            means = states.cumsum(1) / torch.arange(1, states.shape[1] + 1)[:, None]
            states = states + torch.tanh(layer(means))
        return {returned}
"""
OUTPUT = "CausalLMOutput(logits=self.head(states))"
OLDER = "states.of_an_older_cache()"
OLD = "def prepare_inputs_for_generation(self, input_ids, **kwargs): return {'input_ids': input_ids}"


def nano(directory: Path, tied: bool = False, **changes: str) -> Path:
    """A model with code of its own as nanoGPT has it, which keeps no keys and values, with some tokenizer."""
    parts = {
        "generates": "",
        "base": "",
        "methods": "",
        "arguments": "input_ids, labels=None",
        "returned": OUTPUT,
    }
    parts["tie"] = "self.head.weight = self.tok.weight" if tied else ""
    code = NANO
    for name, text in {**parts, **changes}.items():
        code = code.replace(f"{{{name}}}", text)
    write_tokenizer(directory)
    (directory / "nano.py").write_text(code)
    stated = {
        "model_type": "nano",
        "n_vocab": VOCABULARY,
        "block_size": 256,
        "tie_word_embeddings": tied,
        "gradient_checkpointing": False,
    }
    named = {"AutoConfig": "nano.NanoConfig", "AutoModelForCausalLM": "nano.NanoModel"}
    (directory / "config.json").write_text(json.dumps({**stated, "auto_map": named}))
    config = load_configuration(resolve_model(str(directory), weights=False), trust_remote_code=True)
    torch.manual_seed(0)
    with listed_ties():
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    weights = {name: torch.randn(weight.shape) for name, weight in made.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


PADDED = "size = config.n_vocab + 64; self.tok, self.head = nn.Embedding(size, width), nn.Linear(width, size, bias=False)"
"""No entry of the configuration is the number of the embedding's rows."""
GENERATES = {"generates": "GenerationMixin, ", "base": ", GenerationMixin"}


@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {}, marks=pytest.mark.slow),
        (False, {"methods": OLD, "arguments": "input_ids, attention_mask=None"}),
        pytest.param(True, {**GENERATES, "arguments": "input_ids, **rest"}, marks=pytest.mark.slow),
        pytest.param(
            False,
            {**GENERATES, "arguments": "input_ids, past_key_values=None, use_cache=None, **rest"},
            marks=pytest.mark.slow,
        ),
        (False, {"arguments": "input_ids, use_cache=True", "returned": f"{OLDER} if use_cache else {OUTPUT}"}),
        (False, {"tie": PADDED}),
    ],
)
def test_a_model_whose_class_lacks_what_others_have_is_trained_written_and_answers(
    tied: bool, changes: dict[str, str], tiny_data: Path, tmp_path: Path
) -> None:
    base = nano(tmp_path / "base", tied, **changes)
    settings: dict[str, Any] = {"trust_remote_code": True, "target_modules": ("layers.0", "layers.1")}
    for mode in ("lora", "full"):
        config = config_for(
            base,
            tiny_data,
            tmp_path / mode,
            mode=mode,
            max_steps=1,
            **(settings if mode == "lora" else {"trust_remote_code": True}),
        )
        assert preflight(config)
        assert train(config)["status"] == "finished"
    merge_adapter(resolve_model(str(tmp_path / "lora")), tmp_path / "merged", trust_remote_code=True)
    records = [{"prompt": f"{'so ' * number}long", "completion": "x"} for number in range(3)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = EvaluateConfig(
        model=str(tmp_path / "merged"),
        dataset=str(tmp_path / "records.jsonl"),
        output_dir=str(tmp_path / "out"),
        trust_remote_code=True,
        metrics=("rouge",),
        max_new_tokens=6,
        device="cpu",
        dtype="fp32",
    )
    evaluate(config)
    loaded: Any = load_model(
        resolve_model(str(tmp_path / "merged")), torch.float32, torch.device("cpu"), None, trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    for line in read_jsonl(tmp_path / "out" / "predictions.jsonl"):
        ids = tokenizer(line["prompt"])["input_ids"]
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < line["new_tokens"]:
                answer.append(
                    int(loaded(input_ids=torch.tensor([ids + answer]), **without_cache(loaded)).logits[0, -1].argmax())
                )
        assert line["prediction"].strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_grid_plans_a_model_with_code_of_its_own_where_it_may_run(tiny_data: Path, tmp_path: Path) -> None:
    own = {"rank": 4, "max_steps": 1, "test_size": 4, "target_modules": ["layers.0"]}
    grid = {
        "model": str(nano(tmp_path / "base")),
        "datasets": {"counting": str(tiny_data)},
        "defaults": {"train": own, "evaluate": False},
        "grid": [{"mode": "lora"}],
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    request = Request(tmp_path / "grid.json", tmp_path / "out", device="cpu")
    with pytest.raises(CoraError, match=NEEDED):
        dry_run(request)
    assert "to do" in dry_run(dataclasses.replace(request, trust_remote_code=True))


COMPUTED = {
    "self.scale": "self.scale = {numbers}",
    "self.kept[0]": "self.kept = [{numbers}]",
    "self.kept['scale'][0]": "self.kept = {'scale': ({numbers}, None)}",
    "self.kept.scale": "self.kept = type('Kept', (), {})(); self.kept.scale, self.kept.model = {numbers}, self.tok",
    "self.buffer": "self.register_buffer('buffer', {numbers}, persistent=False)",
}


@torch.no_grad()
@pytest.mark.parametrize("used", COMPUTED)
def test_tensors_that_the_code_computes_and_no_file_holds_are_those_of_the_code(used: str, tmp_path: Path) -> None:
    """As the frequencies of rotary embeddings in code for transformers 4: transformers 5 leaves them without numbers.

    A file of an earlier version of the code may hold them, which transformers does not read.
    """
    computed = COMPUTED[used].replace("{numbers}", "torch.arange(width) / 7")
    base = nano(tmp_path / "base", tie=computed, returned=f"CausalLMOutput(logits=self.head(states * {used}))")
    weights = load_file(base / "model.safetensors")
    older = {"buffer": torch.full((16,), 9.0)} if used == "self.buffer" else {}
    save_file(weights | older, base / "model.safetensors", metadata={"format": "pt"})
    model = resolve_model(str(base))
    loaded: Any = load_model(model, torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    reference = type(loaded).__bases__[0](load_configuration(model, trust_remote_code=True))
    reference.load_state_dict(weights)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, reference(ids).logits)


@pytest.mark.parametrize("whose", ["self", "module"])
def test_weights_that_were_read_are_not_drawn_anew_by_the_code(whose: str, tmp_path: Path) -> None:
    """As by code for transformers 4, which transformers 5 has initialize modules with a mask that no file has."""
    mask = 'self.register_buffer("mask", torch.ones(8, 8).tril(), persistent=False)'
    drawn = f"def _init_weights(self, module):\n        for weight in {whose}.parameters(): weight.data.fill_(7)"
    base = nano(tmp_path / "base", tie=mask, methods=drawn)
    weights = load_file(base / "model.safetensors")
    loaded = load_model(resolve_model(str(base)), torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    found = loaded.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_weight_that_the_code_lets_files_leave_out_is_computed_by_the_code_or_missing(
    is_trained: bool, tmp_path: Path
) -> None:
    """As with phi-1_5's own pattern, which fits every name."""
    table = f"self.table = nn.Parameter(torch.arange(3) / 7, requires_grad={is_trained})"
    base = nano(tmp_path / "base", tie=table, methods='_keys_to_ignore_on_load_missing = [""]')
    weights = load_file(base / "model.safetensors")
    del weights["table"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model = resolve_model(str(base))
    skeleton = build_skeleton(load_configuration(model, trust_remote_code=True), trust_remote_code=True)
    if is_trained:
        said = "is incomplete: 1 weights .* are missing, such as table"
        with pytest.raises(CoraError, match=said):
            load_model(model, torch.float32, torch.device("cpu"), None, trust_remote_code=True)
        with pytest.raises(CoraError, match=said):
            check_names(model, skeleton)
        return
    check_names(model, skeleton)
    loaded: Any = load_model(model, torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    assert torch.equal(loaded.table, torch.arange(3) / 7)


TIES = {
    "listed": (
        "self.head.bias = nn.Parameter(torch.zeros(config.n_vocab)); self.bias = self.head.bias",
        '["head.weight", "head.bias"]',
    ),
    "by a pattern": ("", '["^head"]'),
    "of the head that the code tells": ("", "None"),
    "of the code alone": ("self.tok.weight = self.head.weight", "None"),
}


@pytest.mark.parametrize("kind", TIES)
def test_weights_that_the_code_ties_are_one_and_are_written_once(kind: str, tmp_path: Path) -> None:
    """A configuration of transformers 4 ties the head to the embedding unless it says otherwise, and files hold one of the two."""
    in_code, keys = TIES[kind]
    told = {"methods": "def get_output_embeddings(self): return self.head"} if "tells" in kind else {}
    base = nano(tmp_path / "base", tie=f"self._tied_weights_keys = {keys}\n        {in_code}", **told)
    stated = json.loads((base / "config.json").read_text())
    del stated["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(stated))
    weights = load_file(base / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        weights.pop(name, None)
    bias = {"bias": torch.arange(VOCABULARY) / 7} if kind == "listed" else {}
    save_file(weights | bias, base / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = load_model(resolve_model(str(base)), torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    assert loaded.head.weight is loaded.tok.weight
    assert torch.equal(loaded.head.weight, weights["tok.weight"])
    if bias:
        assert loaded.head.bias is loaded.bias
        assert torch.equal(loaded.bias, bias["bias"])
    loaded.save_pretrained(tmp_path / "written")
    assert len(load_file(tmp_path / "written" / "model.safetensors")) == len(weights | bias)


def test_what_the_code_keeps_in_a_dictionary_is_forgotten_after_a_pass_in_another_precision(tmp_path: Path) -> None:
    kept = "self.masks = {}"
    used = "CausalLMOutput(logits=self.head(states * self.masks.setdefault(states.shape[1], states.new_ones(1))))"
    base = nano(tmp_path / "base", tie=kept, returned=used)
    loaded = load_model(resolve_model(str(base)), torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    with torch.no_grad(), computing_in(loaded, torch.float64):
        assert loaded(input_ids=torch.arange(5)[None]).logits.dtype == torch.float64
    assert loaded(input_ids=torch.arange(5)[None]).logits.dtype == torch.float32


def test_checkpointing_that_a_configuration_states_is_left_to_cora_and_read_by_the_code_each_time(tmp_path: Path) -> None:
    named = {"methods": "supports_gradient_checkpointing = True"}
    base = nano(tmp_path / "base", tie="self.gradient_checkpointing = config.gradient_checkpointing", **named)
    edit(base / "config.json", gradient_checkpointing=True)
    model = resolve_model(str(base))
    config = load_configuration(model, trust_remote_code=True)
    built = [build_skeleton(config, trust_remote_code=True) for _ in range(2)]
    built.append(load_model(model, torch.float32, torch.device("cpu"), None, trust_remote_code=True, config=config))
    assert [one.is_gradient_checkpointing for one in built] == [False] * 3


LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs)
"""


def test_a_model_with_code_of_its_own_that_uses_its_cache_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "own.py").write_text(LLAMA)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(model / "config.json", model_type="own", auto_map=code, architectures=["OwnModel"])
    loaded = load_model(resolve_model(str(model)), torch.float32, torch.device("cpu"), None, trust_remote_code=True)
    tokenizer = load_tokenizer(resolve_model(str(model)), trust_remote_code=True)
    prompts = [list(range(5, 5 + length)) for length in (9, 4, 30)]
    engine = transformers_engine(loaded, tokenizer, [tokenizer.eos_token_id], prompts, 2, 4, why="it is asked for here")
    assert isinstance(engine, BatchedGenerate)
    assert engine.caches


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arguments": "idx, targets=None"}, "the forward pass of NanoModel takes no input_ids, but idx, targets"),
        (
            {"returned": "(self.head(states), None)"},
            "the forward pass of NanoModel returns a tuple without an attribute logits",
        ),
        (
            {"returned": "CausalLMOutput(logits=self.head(states)[:, -1:])"},
            "NanoModel cannot be trained: without labels, it computes logits of 1 of ",
        ),
    ],
)
def test_a_model_whose_forward_pass_is_none_of_transformers_is_refused(
    changes: dict[str, str], problem: str, tiny_data: Path, tmp_path: Path
) -> None:
    base = nano(tmp_path / "base", **changes)
    with pytest.raises(CoraError, match=re.escape(problem)):
        train(config_for(base, tiny_data, tmp_path / "run", mode="full", trust_remote_code=True))
