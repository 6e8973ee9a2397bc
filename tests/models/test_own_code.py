"""Models and tokenizers with Python code of their own: run when that is asked for only, and written so that they load again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from cora_cli.errors import CoraError
from cora_cli.models.configuration import load_configuration
from cora_cli.models.loading import load_model
from cora_cli.models.references import resolve_model
from cora_cli.models.skeleton import build_skeleton
from cora_cli.models.tokenizer import load_tokenizer, save_tokenizer

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
    save_tokenizer(loaded, written)
    again = load_tokenizer(resolve_model(str(written)), trust_remote_code=True)
    assert type(again).__name__ == "OwnTokenizer"
    assert again("a text")["input_ids"] == loaded("a text")["input_ids"]


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
