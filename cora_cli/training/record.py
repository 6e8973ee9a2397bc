"""The content of `run.json`: settings, hashes, counts, versions, and the hash of the result.

`run` decides when it is written.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from cora_cli import __version__, hashing, writing
from cora_cli.basis.artifact import Basis
from cora_cli.data.encode import EncodedSet
from cora_cli.data.records import repeated_prompts
from cora_cli.environment import launched_processes
from cora_cli.errors import CoraError
from cora_cli.methods.plan import AdapterPlan
from cora_cli.models.loading import completed_ends
from cora_cli.models.model_path import ModelPath
from cora_cli.training.batching import Batching
from cora_cli.training.config import TrainConfig
from cora_cli.training.observe import Observation
from cora_cli.training.prepare import Prepared
from cora_cli.weights.sources import open_source

FINISHED, RUNNING, FAILED, STOPPED, INTERRUPTED = "finished", "running", "failed", "stopped", "interrupted"


def first_record(
    config: TrainConfig,
    prepared: Prepared,
    fingerprint: dict[str, Any],
    model: Any,
    batching: Batching,
    observation: Observation | None = None,
) -> dict[str, Any]:
    """The record of a run that is about to start; `fingerprint` is `Prepared.fingerprint`, `model` the model to train."""
    repeated = repeated_prompts(prepared.data.test[: config.eval_limit], prepared.data.schema)
    return {
        "format": 1,
        "status": RUNNING,
        "sealed_checkpoints": True,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mode": config.mode,
        "plan": prepared.plan.as_dict() if prepared.plan else None,
        "fingerprint": fingerprint,
        "model": {"reference": config.model, "revision": prepared.model_path.revision},
        "basis": _describe(prepared.basis, prepared.model_path) if prepared.basis else None,
        "parameters": parameter_counts(model, prepared.plan),
        "data": {
            "dataset": config.dataset,
            **{name: chosen for name in ("subset", "split", "test_dataset") if (chosen := getattr(config, name))},
            "template": prepared.template.name,
            **({"template_date": prepared.template.date} if prepared.template.reads_clock else {}),
            "train": _counts(prepared.train),
            "test": _counts(prepared.test),
            "validation": _counts(prepared.validation),
            "overlapping_dropped": prepared.data.overlapping,
            **({"repeated_held_out": repeated} if repeated else {}),
            **({"end_tokens": ends} if (ends := completed_ends(model, prepared.template.ends)) else {}),
            "test_sha256": hashing.sha256_text(writing.jsonl_text(prepared.data.test)),
        },
        "hardware": {
            "device": str(prepared.hardware.device),
            "device_reason": prepared.hardware.device_reason,
            "dtype": prepared.hardware.dtype_name,
            "dtype_reason": prepared.hardware.dtype_reason,
            "threads": torch.get_num_threads(),
            "processes": launched_processes(),
            **({"shard": config.shard} if config.shard != "none" else {}),
            **({"fast_path": path} if (path := fast_path(config)) != "none" else {}),
            **({"tokens_per_row": config.tokens_per_row} if config.tokens_per_row is not None else {}),
        },
        "attention": {"name": batching.attention, "batches": batching.form.kind, "reason": batching.reason},
        "versions": versions(
            config.load_in_4bit or (prepared.model_path.quantization() or {}).get("quant_method") == "bitsandbytes"
        ),
        **({"start": observation.record()} if observation is not None else {}),
        "seeds": {"seed": config.seed, "split_seed": config.split_seed},
    }


def fast_path(config: TrainConfig) -> str:
    """The option that makes the layers faster: `compile`, `liger` or `none`; they do not go together."""
    return next((name for name in ("compile", "liger") if getattr(config, name)), "none")


def parameter_counts(model: Any, plan: AdapterPlan | None) -> dict[str, int]:
    """Numbers of parameters that train, of all, and of those in an adapter."""
    return {
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "total": sum(map(_numbers, model.parameters())),
        "adapter": sum(p.numel() for name, p in model.named_parameters() if plan and model.base_model.prefix in name),
    }


def _numbers(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; one of 4 bits holds two in each of its bytes."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _describe(basis: Basis, model: ModelPath) -> dict[str, Any]:
    return {
        "path": str(basis.path.resolve()),
        "sha256": basis.sha256,
        "choices": basis.choices.to_json(),
        "sources": [dataclasses.asdict(source) for source in basis.sources],
        **({"of_base": True} if _is_of(model, basis) else {}),
    }


def _is_of(model: ModelPath, basis: Basis) -> bool:
    """Whether a basis is made of the weights of `model` alone, by whatever name."""
    (one, *others) = {source.hash for source in basis.sources}
    with contextlib.suppress(CoraError):  # such as of weights that are held quantised, of which no basis is made
        return not others and open_source(model).content_hash(basis.modules) == one
    return False


def _counts(encoded: EncodedSet) -> dict[str, int]:
    return {
        "records": len(encoded.examples),
        "tokens": encoded.tokens,
        "response_tokens": encoded.response_tokens,
        "truncated": encoded.truncated + encoded.cut,
        "dropped": encoded.dropped,
    }


def versions(four_bit: bool) -> dict[str, str]:
    """Versions of the packages that can change a number."""
    names = ["torch", "transformers", "peft", "accelerate", "numpy", "safetensors", *(["bitsandbytes"] if four_bit else [])]
    return {
        "cora": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Peak resident memory of this process.

    Linux counts it in `status` from the start of the program; the count of `getrusage` includes the peak of the parent process.
    """
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
