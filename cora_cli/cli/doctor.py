"""`cora doctor`: report installed and missing packages, hardware, and embedded models, and how to get what is missing."""

import dataclasses
import importlib.metadata
import importlib.util
import platform

import typer

from cora_cli.cli.command import command
from cora_cli.settings import DtypeName, setting
from cora_cli.terminal import complain, show

REQUIRED = (
    "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "rouge-score", "sacrebleu", "bert-score", "nltk",
    "safetensors", "scipy", "typer", "gguf",
)  # fmt: skip
OPTIONAL = {
    "flash_attn": "faster packed training on CUDA (pip install flash-attn)",
    "triton": "packed training on CUDA that computes shared prefixes once (included in torch's CUDA builds)",
    "vllm": "cora evaluate --backend vllm (pip install vllm)",
    "bitsandbytes": "cora train --load-in-4bit on CUDA (pip install bitsandbytes)",
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
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "doctor", DoctorConfig, run)


def run(config: DoctorConfig) -> None:
    """Report installed and missing packages, the device and precision that would be used, and why. Downloads nothing."""
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
    attention = select_packed_attention(hardware.device.type)
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
