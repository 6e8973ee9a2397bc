"""vLLM as an engine for decoding: on a GPU it batches and caches better than a loop over a plain model.

vLLM is optional: functions without vLLM build its arguments, and only `VllmEngine` imports it. Its kernels and batches differ
from transformers', so its logits differ in the last bits and its tokens can differ too.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing
from cora_cli.adapters.elsewhere import vllm_rank
from cora_cli.device import Hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.decode import Tokens
from cora_cli.evaluation.generate import until_end
from cora_cli.evaluation.sampling import Sampling
from cora_cli.models.model_path import ModelPath

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
WAVE = 1024
"""Prompts per call of vLLM: enough to keep a GPU busy, few enough that an interruption loses little work."""


def require_vllm(hardware: Hardware) -> str:
    """Return the version of the installed vLLM. Raises `CoraError` if vLLM is not installed or there is no CUDA device."""
    if importlib.util.find_spec("vllm") is None:
        raise CoraError(
            "--backend vllm needs the package vllm, which is not installed: `pip install vllm`, or use --backend transformers"
        )
    if hardware.device.type != "cuda":
        raise CoraError(
            f"--backend vllm needs a CUDA device, but the device is {hardware.device} ({hardware.device_reason}); use "
            "--backend transformers"
        )
    return importlib.metadata.version("vllm")


def engine_arguments(
    model: Path, dtype_name: str, longest: int, adapter: ModelPath | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the directory `model`, sequences of up to `longest` tokens, and an unmerged adapter."""
    arguments = {
        "model": str(model),
        "dtype": DTYPES[dtype_name],
        "max_model_len": longest,
        "trust_remote_code": trust_remote_code,
        "enable_prefix_caching": True,
        # Not the model's own configuration, which may sample or penalize repetition.
        "generation_config": "vllm",
        "seed": 0,
    }
    return arguments | ({} if adapter is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(adapter)})


def lora_rank(adapter: ModelPath) -> int:
    """The smallest value of `max_lora_rank` that fits `adapter`. Raises `CoraError` if vLLM cannot load the adapter."""
    try:
        return vllm_rank(adapter)
    except CoraError as error:
        raise CoraError(f"{error}: leave out --no-merge") from error


def sampling_arguments(ends: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for greedy decoding of up to `max_new_tokens` tokens, or until one of `ends`."""
    return {"temperature": 0.0, "max_tokens": max_new_tokens, "stop_token_ids": list(ends), "detokenize": False}


def drawing_arguments(ends: Sequence[int], max_new_tokens: int, sampling: Sampling, stream: str) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for one prompt whose tokens are drawn, with a seed of its own, from the complete vocabulary."""
    seed = int(hashing.sha256_text(f"{sampling.seed} {stream}")[:8], 16)
    return {**sampling_arguments(ends, max_new_tokens), "temperature": sampling.temperature, "seed": seed}


def lora_arguments(adapter: ModelPath) -> dict[str, Any]:
    """Arguments of `vllm.lora.request.LoRARequest`."""
    return {"lora_name": adapter.path.name or "adapter", "lora_int_id": 1, "lora_path": str(adapter.path.resolve())}


def token_prompts(wave: Sequence[Tokens]) -> list[dict[str, list[int]]]:
    """Prompts as `vllm.inputs.TokensPrompt`: token ids, so that vLLM does not tokenize again."""
    return [{"prompt_token_ids": list(prompt)} for prompt in wave]


class VllmEngine:
    """An `Engine` that calls `vllm.LLM`, created with `arguments` (see `engine_arguments`)."""

    name = "vllm"
    wave = WAVE

    def __init__(
        self,
        arguments: dict[str, Any],
        ends: Sequence[int],
        max_new_tokens: int,
        adapter: ModelPath | None,
        sampling: Sampling | None = None,
    ) -> None:
        vllm = importlib.import_module("vllm")
        self._ends = list(ends)
        self._model = vllm.LLM(**arguments)
        greedy = vllm.SamplingParams(**sampling_arguments(ends, max_new_tokens))
        self._parameters = lambda streams: (
            [vllm.SamplingParams(**drawing_arguments(ends, max_new_tokens, sampling, stream)) for stream in streams]
            if sampling is not None
            else greedy
        )
        self._lora = None
        if adapter is not None:
            self._lora = importlib.import_module("vllm.lora.request").LoRARequest(**lora_arguments(adapter))

    def answer(self, wave: Sequence[Tokens], finished: Callable[[], None], streams: Sequence[str] = ()) -> list[list[int]]:
        """See `generate.Engine`."""
        outputs = self._model.generate(token_prompts(wave), self._parameters(streams), use_tqdm=False, lora_request=self._lora)
        for _ in outputs:
            finished()
        return [until_end(output.outputs[0].token_ids, self._ends) for output in outputs]
