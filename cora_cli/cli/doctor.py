"""`cora doctor`: report installed and missing packages, hardware, and embedded models, and how to get what is missing.

With `--gpu-check` it also computes on the hardware and compares the results with the processor's.
"""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.errors import UsageError
from cora_cli.scratch import temporary_directory
from cora_cli.settings import DtypeName, setting
from cora_cli.terminal import complain, show

CHECKS = (
    *("attention", "layouts", "packing", "speed", "memory", "repetition"),
    *("answers", "4-bit", "extraction", "training", "options"),
)
"""The checks of --gpu-check, in their order."""
REQUIRED = (
    "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "rouge-score", "sacrebleu", "bert-score", "nltk",
    "safetensors", "scipy", "typer", "gguf",
)  # fmt: skip
OPTIONAL = {
    "flash_attn": "cora train --attention flash-attn (pip install flash-attn)",
    "kernels": "cora train --attention kernels-community/flash-attn2 (pip install kernels)",
    "liger_kernel": "cora train --liger on CUDA (pip install liger-kernel)",
    "triton": "packed training in fp32 on CUDA, and --attention flex (included in torch's CUDA builds)",
    "vllm": "cora evaluate --backend vllm (pip install vllm)",
    "bitsandbytes": "cora train --load-in-4bit (pip install 'cora-cli[four-bit]')",
    "submitit": "cora ablate --launcher slurm (pip install submitit)",
    "tensorboard": "--report-to tensorboard (pip install tensorboard)",
    "wandb": "--report-to wandb (pip install wandb)",
    "trackio": "--report-to trackio (pip install trackio)",
}


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Every setting of `cora doctor`."""

    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto")
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, else fp32.", "auto")
    gpu_check: bool = setting(
        "Also train, answer and decompose on the device, and compare with the processor; takes minutes.", False
    )
    checks: tuple[str, ...] | None = setting("Which of --gpu-check's checks to run, comma-separated. Default: all.", None)
    check_model: str | None = setting("Model of --gpu-check, instead of builtin:smollm2.", None, names="model")
    output: str | None = setting("Write what --gpu-check found to this JSON file.", None)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "doctor", DoctorConfig, run)


def run(config: DoctorConfig) -> None:
    """Show versions, device, precision and what is missing.

    Also the reason for the device and the precision. Downloads nothing.

    --gpu-check computes on the embedded model, and downloads that where it is missing.
    """
    for name in ("checks", "check_model", "output"):
        if getattr(config, name) is not None and not config.gpu_check:
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --gpu-check; add --gpu-check")
    if config.output is not None and Path(config.output).is_dir():
        raise UsageError(f"--output must be a file, and {config.output} is a directory")
    if unknown := next((name for name in config.checks or () if name not in CHECKS), None):
        raise UsageError(f"--checks knows no check named {unknown}; it has {', '.join(CHECKS)}")

    import importlib.metadata

    import torch

    from cora_cli import __version__, embedded
    from cora_cli.device import select_hardware, select_packed_attention

    hardware = select_hardware(config.device, config.dtype)
    show(f"cora {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    missing = []
    for name in REQUIRED:
        try:
            show(f"  {name:<14} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            show(f"  {name:<14} missing: pip install {name}")
            missing.append(name)
    attention = select_packed_attention(hardware.device.type, hardware.dtype)
    show(hardware.describe())
    show(f"packed attention {attention.name} ({attention.reason}); {torch.get_num_threads()} threads")
    for module, use in OPTIONAL.items():
        show(f"  {module:<14} {'installed' if importlib.util.find_spec(module) else 'not installed'}: {use}")
    show(f"embedded models and data, in {embedded.cache_directory()}")
    for asset in embedded.status():
        state = f"complete, {asset.bytes / 1e6:.0f} MB" if asset.present else f"not downloaded yet; {asset.how}"
        show(f"  {asset.name}: {state}")
    if missing:
        complain(f"missing packages: pip install {' '.join(missing)}")
        raise typer.Exit(1)
    _use_libraries()

    if config.gpu_check:
        _check(config)
    else:
        say_next(None, "demo")


def _use_libraries() -> None:
    """Adapt a layer, for which PEFT imports transformers, and whatever they use where it is there. What does not fit raises its own error."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2)))


def _check(config: DoctorConfig) -> None:
    """Run the checks, show them as they end, and exit with 1 if one failed."""
    import importlib.metadata

    import torch

    from cora_cli import __version__, writing
    from cora_cli.experiments.hardware_check import Check, check_hardware
    from cora_cli.models.references import EMBEDDED_MODEL

    checks: list[Check] = []
    model = config.check_model or EMBEDDED_MODEL
    found: dict[str, Any] = {
        "cora": __version__,
        "model": model,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "packages": {name: importlib.metadata.version(name) for name in REQUIRED},
    }
    with temporary_directory("check") as folder:
        for check in check_hardware(config.device, config.dtype, folder, model, config.checks):
            show(check.line())
            checks.append(check)
            if config.output is not None:  # after each, so that nothing is lost when the time is up
                writing.write_json(Path(config.output), {**found, "checks": [dataclasses.asdict(each) for each in checks]})
    if failed := [check.name for check in checks if check.passed is False]:
        complain(f"failed on this machine: {', '.join(failed)}")
        raise typer.Exit(1)
