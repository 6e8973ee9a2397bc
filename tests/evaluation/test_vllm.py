import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation import evaluate as module
from cora_cli.evaluation import vllm
from cora_cli.evaluation.backend import open_vllm
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.vllm import (
    VllmEngine,
    engine_arguments,
    lora_arguments,
    lora_rank,
    require_vllm,
    sampling_arguments,
    token_prompts,
)
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json
from cora_cli.rundir import RunDirectory

from .helpers import FAST

CPU = Hardware(torch.device("cpu"), torch.float32, "no CUDA device here", "requested")
GPU = Hardware(torch.device("cuda", 0), torch.bfloat16, "a GPU", "it has bf16")
END = 7


def adapter_of(directory: Path, **config: Any) -> ModelPath:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    (directory / "adapter_model.safetensors").touch()
    return resolve_model(str(directory))


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"r": 1}, 1), ({"r": 2}, 8), ({"r": 48}, 64), ({"r": 300}, 320)],
)
def test_the_rank_is_rounded_up_to_one_that_vllm_takes(tmp_path: Path, config: dict[str, Any], expected: int) -> None:
    assert lora_rank(adapter_of(tmp_path / "adapter", **config)) == expected


def test_adapters_that_vllm_cannot_load_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CoraError, match="rank 600, but vLLM supports ranks up to 512: leave out --no-merge"):
        lora_rank(adapter_of(tmp_path / "adapter", r=600))
    for name, value in (("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4})):
        with pytest.raises(CoraError, match=f"has a {name}, but vLLM scales all layers alike"):
            lora_rank(adapter_of(tmp_path / name, **{name: value}))
    for name, value in (("init_lora_weights", "pissa"), ("bias", "all"), ("alora_invocation_tokens", [1])):
        with pytest.raises(CoraError, match="is not a plain LoRA"):
            lora_rank(adapter_of(tmp_path / name, **{name: value}))
    with pytest.raises(CoraError, match="compact adapter, which vLLM cannot load: leave out --no-merge"):
        lora_rank(resolve_model(str(trained["compact"])))


def test_the_end_tokens_of_a_nested_configuration_are_known(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "eos_token_id": END}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "eos_token_id": None, "text_config": text}))
    base = resolve_model(str(tmp_path), weights=False)
    config = EvaluateConfig(model=str(tmp_path), dataset="d.jsonl", output_dir=str(tmp_path / "out"))
    assert open_vllm(config, base, None, GPU, {3}, tmp_path).ends == [3, END]


def test_vllm_gets_arguments_for_greedy_decoding_of_token_ids(tmp_path: Path) -> None:
    arguments = engine_arguments(tmp_path, "bf16", 300)
    assert arguments["model"] == str(tmp_path)
    assert (arguments["dtype"], arguments["max_model_len"], arguments["trust_remote_code"]) == ("bfloat16", 300, False)
    assert arguments["generation_config"] == "vllm"
    assert not any("lora" in name for name in arguments)
    adapter = adapter_of(tmp_path / "adapter", r=48)
    assert engine_arguments(tmp_path, "fp32", 300, adapter).items() >= {"enable_lora": True, "max_lora_rank": 64}.items()
    assert lora_arguments(adapter) == {"lora_name": "adapter", "lora_int_id": 1, "lora_path": str(tmp_path / "adapter")}
    sampling = sampling_arguments([2, END], 64)
    assert sampling == {"temperature": 0.0, "max_tokens": 64, "stop_token_ids": [2, END], "detokenize": False}
    assert token_prompts([[1, 2], (3,)]) == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]


def test_without_vllm_or_a_gpu_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoraError, match="needs the package vllm, which is not installed: `pip install vllm`"):
        require_vllm(GPU)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CoraError, match=r"needs a CUDA device, but the device is cpu \(no CUDA device here\)"):
        require_vllm(CPU)


# A fake with the names and defaults of vLLM's own signatures


@dataclass
class StandIn:
    """The calls that were made."""

    loaded: list[Any]
    generated: list[Any]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    calls = StandIn([], [])

    @dataclass
    class SamplingParams:
        temperature: float = 1.0
        max_tokens: int = 16
        stop_token_ids: list[int] | None = None
        detokenize: bool = True

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            trust_remote_code: bool = False,
            dtype: str = "auto",
            seed: int = 0,
            max_model_len: int | None = None,
            enable_prefix_caching: bool | None = None,
            generation_config: str = "auto",
            enable_lora: bool = False,
            max_loras: int = 1,
            max_lora_rank: int = 16,
        ) -> None:
            calls.loaded.append({**locals(), "files": sorted(path.name for path in Path(model).iterdir())})

        def generate(
            self,
            prompts: list[dict[str, list[int]]],
            sampling_params: SamplingParams,
            *,
            use_tqdm: bool = True,
            lora_request: LoRARequest | None = None,
        ) -> list[Any]:
            calls.generated.append((prompts, sampling_params, lora_request))
            answers = [[len(prompt["prompt_token_ids"]), END, 9][: sampling_params.max_tokens] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in answers]

    for name, members in {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }.items():
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
    return calls


def test_answers_end_with_their_end_token(stand_in: StandIn, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", r=48)
    engine = VllmEngine(engine_arguments(tmp_path, "bf16", 30, adapter), [END], 5, adapter)
    finished: list[None] = []
    assert engine.answer([[1, 2, 3], [4]], lambda: finished.append(None)) == [[3, END], [1, END]]
    assert len(finished) == 2
    [(prompts, sampling, lora)] = stand_in.generated
    assert prompts == [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4]}]
    assert (sampling.temperature, sampling.max_tokens, sampling.stop_token_ids) == (0.0, 5, [END])
    assert lora.lora_path == str(tmp_path / "adapter")
    assert VllmEngine(engine_arguments(tmp_path, "bf16", 30), [END], 1, None).answer([[4]], lambda: None) == [[1]]


@pytest.mark.parametrize("merge", [True, False])
def test_a_run_is_evaluated_merged_or_with_its_adapter(
    stand_in: StandIn, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    monkeypatch.setattr(module, "require_vllm", lambda hardware: version("pytest"))
    run = RunDirectory(trained["lora"])
    config = EvaluateConfig(runs=(str(run.root),), output_dir=str(tmp_path / "out"), backend="vllm", merge=merge, **FAST)
    evaluate(config)
    [loaded] = stand_in.loaded
    [(prompts, sampling, lora)] = stand_in.generated
    assert loaded["enable_lora"] is not merge
    assert "model.safetensors" in loaded["files"]
    assert (Path(loaded["model"]).exists(), lora is None) == (not merge, merge)  # the merged copy is deleted after loading
    assert loaded["max_model_len"] == max(len(prompt["prompt_token_ids"]) for prompt in prompts) + sampling.max_tokens
    assert 2 in sampling.stop_token_ids
    recorded = read_json(tmp_path / "out" / "generation.json")
    assert recorded["engine"] == recorded["settings"]["backend"] == "vllm"
    assert recorded["settings"]["vllm"] == version("pytest")
    assert recorded["settings"]["merged"] is merge
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
