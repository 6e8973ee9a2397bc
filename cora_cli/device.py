"""Choose the device, the precision and the attention kernel of a command, and record why.

The facts about the hardware can be passed in, so tests cover machines other than the one they run on. This module moves no
tensors.
"""

import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import torch

from cora_cli.errors import CoraError, UsageError
from cora_cli.settings import DtypeName, device_problem

DTYPES: dict[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16")


def _name(dtype: torch.dtype) -> DtypeName:
    return next(name for name, each in DTYPES.items() if each == dtype)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The device and precision of a command, and why.

    `dtype` applies to the frozen weights and the matrix products; trained parameters stay in float32.
    """

    device: torch.device
    dtype: torch.dtype
    device_reason: str
    dtype_reason: str

    @property
    def dtype_name(self) -> DtypeName:
        """`bf16` or `fp32`."""
        return _name(self.dtype)

    def describe(self) -> str:
        """One line for the log."""
        return f"device {self.device} ({self.device_reason}), {self.dtype_name} ({self.dtype_reason})"


def select_hardware(device: str, dtype: DtypeName) -> Hardware:
    """Resolve `--device` and `--dtype`.

    Raises `UsageError` for an unknown device name and `CoraError` if the device does not exist on this machine.
    """
    _check_name(device)
    if device != "cpu":
        _show_one_gpu(device)
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device.startswith("cuda") and gpus == 0:
        raise CoraError(
            f"--device {device} is not available: torch {torch.__version__} finds no such CUDA device; use --device cpu"
        )
    if gpus:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank >= gpus:
            raise CoraError(
                f"the launcher started more processes than there are GPUs here: this one has the local rank {rank}, and torch finds {gpus}; "
                "start at most one process per GPU"
            )
        chosen, reason = torch.device("cuda", rank), torch.cuda.get_device_name(rank)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        chosen, reason = torch.device("cpu"), "requested" if device == "cpu" else "no CUDA device here"
        has_bf16 = cpu_has_bf16()
    torch_dtype, dtype_reason = select_dtype(dtype, has_bf16, chosen.type)
    return Hardware(chosen, torch_dtype, reason, dtype_reason)


def planned_hardware(device: str, dtype: DtypeName) -> Hardware:
    """The hardware of a plan: as `select_hardware`, but unless `device` is cpu, a CUDA GPU with bfloat16 where this machine has none."""
    if device == "cpu" or torch.cuda.is_available():
        return select_hardware(device, dtype)
    _check_name(device)
    torch_dtype, dtype_reason = select_dtype(dtype, True, "cuda")
    return Hardware(torch.device("cuda"), torch_dtype, "planned, there is none here", dtype_reason)


def _check_name(device: str) -> None:
    if problem := device_problem(device):
        raise UsageError(problem)


def _show_one_gpu(device: str) -> None:
    """Make only one GPU visible to this process, before CUDA starts, unless a launcher assigns one GPU per process.

    With several visible GPUs the Trainer would wrap the model in DataParallel, which cannot split a packed row.
    """
    if "LOCAL_RANK" in os.environ or torch.cuda.is_initialized():
        return
    index = int(device.partition(":")[2] or 0)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
        return
    visible = [name for name in shown.split(",") if name]  # an empty value hides every GPU and stays as it is
    if index >= len(visible) and device != "auto":
        raise CoraError(f"--device {device} is not available: CUDA_VISIBLE_DEVICES lists only {len(visible)} device(s)")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index : index + 1])


def select_dtype(dtype: DtypeName, has_bf16: bool, device_type: str) -> tuple[torch.dtype, str]:
    """The dtype for `--dtype`, and the reason; `auto` chooses bfloat16 only if the hardware multiplies it natively."""
    if dtype != "auto":
        return DTYPES[dtype], "requested"
    part = "GPU" if device_type == "cuda" else "processor"
    if has_bf16:
        return torch.bfloat16, f"the {part} has bfloat16 instructions"
    return torch.float32, f"the {part} has no bfloat16 instructions"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bfloat16 matrix products (x86 AMX or AVX512-BF16, Arm `bf16`)."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    flags = set(line.partition(":")[2].split())
    return bool(flags & {*BF16_CPU_FLAGS, "bf16"})


@dataclasses.dataclass(frozen=True)
class PackedAttention:
    """The attention implementation for packed rows, whether it supports shared prefixes, and why it was chosen."""

    name: str
    shares_prefixes: bool
    reason: str


def select_packed_attention(
    device_type: str,
    dtype: torch.dtype = torch.bfloat16,
    requested: str = "auto",
    has: Callable[[str], bool] | None = None,
) -> PackedAttention:
    """Choose the attention implementation for packed rows.

    On CUDA, `auto` takes the kernel of torch's own FlashAttention in bfloat16, which compiles nothing; else FlexAttention if Triton
    can compile it; else SDPA with the block-diagonal mask that transformers derives from `position_ids`. The first two and the
    CPU implementation, all in `training.attention`, support shared prefixes. `has` tells whether a package is installed. Raises
    `CoraError` for a `requested` implementation that this machine does not have.
    """
    has = has or is_installed
    if device_type != "cuda":
        if requested != "auto":
            raise CoraError(f"--attention {requested} needs a CUDA GPU; leave it out on a processor")
        return PackedAttention("cora_segments", True, "CPU: causal attention per segment, shared prefixes once")
    varlen = dtype == torch.bfloat16 and has_varlen()
    asked = "requested" if requested != "auto" else ""
    if requested == "varlen" and not varlen:
        raise CoraError(
            f"--attention varlen computes in bf16, with torch 2.11 or later, not in {_name(dtype)} with torch {torch.__version__}"
        )
    if requested in ("auto", "varlen") and varlen:
        return PackedAttention(
            "cora_varlen", True, asked or "CUDA in bf16: torch's FlashAttention, shared prefixes once, nothing to compile"
        )
    if requested in ("auto", "flex") and has("triton"):
        return PackedAttention("cora_flex", True, asked or "CUDA with Triton: FlexAttention, shared prefixes once")
    needed = {"flex": "triton", "flash-attn": "flash_attn"}.get(requested, "kernels" if "/" in requested else None)
    if needed is not None and not has(needed):
        raise CoraError(f"--attention {requested} needs the package {needed}: pip install {needed.replace('_', '-')}")
    if requested == "flash-attn":
        return PackedAttention("flash_attention_2", False, asked)
    if needed is not None:
        return PackedAttention(requested, False, asked)
    return PackedAttention("sdpa", False, asked or "CUDA without bf16 and Triton: SDPA with a block-diagonal mask")


def has_varlen() -> bool:
    """Whether torch's FlashAttention for sequences of different lengths takes causal masks and windows, as it does from 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None
