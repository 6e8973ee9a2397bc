import os
import re

import pytest
import torch

from cora_cli.device import Hardware, cpu_has_bf16, select_dtype, select_hardware, select_packed_attention
from cora_cli.errors import CoraError, UsageError


@pytest.fixture
def environment(monkeypatch):
    """A machine without launcher or choice of GPU; what a test leaves in the environment is taken back."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return monkeypatch


@pytest.fixture
def gpus(environment):
    """Pretend that torch sees `count` GPUs, of those that CUDA_VISIBLE_DEVICES leaves."""

    def pretend(count: int, bf16: bool = True) -> None:
        def seen() -> int:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            return count if shown is None else len([name for name in shown.split(",") if name and int(name) in range(count)])

        environment.setattr(torch.cuda, "device_count", seen)
        environment.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
        environment.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)

    return pretend


@pytest.mark.parametrize(
    ("asked", "has_bf16", "device", "dtype", "reason"),
    [
        ("bf16", False, "cpu", torch.bfloat16, "requested"),
        ("fp32", True, "cuda", torch.float32, "requested"),
        ("auto", True, "cpu", torch.bfloat16, "the processor has bfloat16 instructions"),
        ("auto", False, "cpu", torch.float32, "the processor has no bfloat16 instructions"),
        ("auto", True, "cuda", torch.bfloat16, "the GPU has bfloat16 instructions"),
        ("auto", False, "cuda", torch.float32, "the GPU has no bfloat16 instructions"),
    ],
)
def test_auto_takes_bfloat16_only_where_the_hardware_has_it_and_says_why(asked, has_bf16, device, dtype, reason):
    assert select_dtype(asked, has_bf16, device) == (dtype, reason)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f\nvmx flags\t: amx_bf16\n", False),
        ("flags\t\t: fpu not_avx512_bf16 avx512_bf16x\n", False),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(cpuinfo, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected


def test_a_system_without_cpuinfo_has_no_known_bfloat16(tmp_path):
    assert cpu_has_bf16(tmp_path / "gone") is False


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "installed", "expected", "shares"),
    [
        ("cpu", torch.bfloat16, "auto", {"flash_attn", "triton"}, "cora_segments", True),
        ("cuda", torch.bfloat16, "auto", {"flash_attn", "triton"}, "cora_varlen", True),
        ("cuda", torch.bfloat16, "auto", set(), "cora_varlen", True),
        ("cuda", torch.float32, "auto", {"flash_attn", "triton"}, "cora_flex", True),
        ("cuda", torch.float32, "auto", set(), "sdpa", False),
        ("cuda", torch.bfloat16, "flex", {"triton"}, "cora_flex", True),
        ("cuda", torch.bfloat16, "flash-attn", {"flash_attn"}, "flash_attention_2", False),
        ("cuda", torch.bfloat16, "sdpa", {"triton"}, "sdpa", False),
        ("cuda", torch.bfloat16, "kernels-community/flash-attn2", {"kernels"}, "kernels-community/flash-attn2", False),
    ],
)
def test_packed_rows_take_the_kernel_of_the_device(device, dtype, requested, installed, expected, shares):
    chosen = select_packed_attention(device, dtype, requested, installed.__contains__)
    assert (chosen.name, chosen.shares_prefixes) == (expected, shares)
    assert (chosen.reason == "requested") is (requested != "auto")


@pytest.mark.parametrize(
    ("device", "requested", "said"),
    [
        ("cpu", "flex", "--attention flex needs a CUDA GPU; leave it out on a processor"),
        ("cuda", "varlen", "--attention varlen computes in bf16, with torch 2.11 or later, not in fp32 with torch"),
        ("cuda", "flex", "--attention flex needs the package triton: pip install triton"),
        ("cuda", "flash-attn", "--attention flash-attn needs the package flash_attn: pip install flash-attn"),
        ("cuda", "kernels-community/flash-attn2", "needs the package kernels: pip install kernels"),
    ],
)
def test_a_requested_kernel_that_is_not_there_is_refused(device, requested, said):
    with pytest.raises(CoraError, match=re.escape(said)):
        select_packed_attention(device, torch.float32, requested, set().__contains__)


def test_kernels_are_detected_when_not_given(monkeypatch):
    found = []
    monkeypatch.setattr("importlib.util.find_spec", found.append)
    assert select_packed_attention("cuda", torch.float32).name == "sdpa"
    assert found == ["triton"]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "cpu:0", "mps", "cuda:0 "])
def test_an_unknown_device_name_is_a_usage_error(name, environment):
    with pytest.raises(UsageError, match=r"--device must be auto, cpu, cuda or cuda:<index>, not "):
        select_hardware(name, "auto")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_an_absent_gpu_is_refused_and_auto_takes_the_processor(device, gpus):
    gpus(0)
    with pytest.raises(CoraError, match=f"--device {device} is not available: torch .* finds no such CUDA device"):
        select_hardware(device, "auto")
    found = select_hardware("auto", "fp32")
    assert (found.device.type, found.device_reason) == ("cpu", "no CUDA device here")


def test_an_index_beyond_the_last_gpu_is_refused(gpus):
    gpus(2)
    with pytest.raises(CoraError, match="--device cuda:5 is not available"):
        select_hardware("cuda:5", "auto")


def test_cpu_leaves_the_gpus_alone(gpus):
    gpus(2)
    found = select_hardware("cpu", "bf16")
    assert found == Hardware(torch.device("cpu"), torch.bfloat16, "requested", "requested")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert found.describe() == "device cpu (requested), bf16 (requested)"


@pytest.mark.parametrize(
    ("visible", "device", "left"),
    [
        (None, "auto", "0"),
        (None, "cuda", "0"),
        (None, "cuda:3", "3"),
        ("2", "auto", "2"),
        ("2,3", "cuda", "2"),
        ("2,3", "cuda:1", "3"),
        ("2,3", "auto", "2"),
    ],
)
def test_one_gpu_is_left_visible_so_that_nothing_is_split_over_several(visible, device, left, gpus, environment):
    gpus(4)
    if visible is not None:
        environment.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = select_hardware(device, "auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    assert found.device == torch.device("cuda", 0)
    assert found.device_reason == "GPU number 0"
    assert found.dtype_name == "bf16"


@pytest.mark.parametrize(("visible", "device", "count"), [("2,3", "cuda:2", 2), ("", "cuda", 0), ("", "cuda:0", 0)])
def test_a_gpu_that_the_environment_hides_is_refused(visible, device, count, gpus, environment):
    gpus(4)
    environment.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(CoraError, match=f"--device {device} is not available: CUDA_VISIBLE_DEVICES lists only {count} device"):
        select_hardware(device, "auto")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_who_hides_all_gpus_gets_the_processor(hidden, gpus, environment):
    gpus(2)
    environment.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert select_hardware("auto", "auto").device.type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == hidden


def test_a_launcher_that_gives_each_process_its_gpu_is_believed(gpus, environment):
    gpus(4)
    environment.setenv("LOCAL_RANK", "2")
    assert select_hardware("auto", "auto").device == torch.device("cuda", 2)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_more_processes_than_gpus_are_refused(gpus, environment):
    gpus(2)
    environment.setenv("LOCAL_RANK", "2")
    with pytest.raises(CoraError, match="local rank 2, and torch finds 2; start at most one process per GPU"):
        select_hardware("auto", "auto")


def test_a_process_whose_cuda_has_started_keeps_what_it_sees(gpus, environment):
    gpus(2)
    environment.setattr(torch.cuda, "is_initialized", lambda: True)
    environment.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert select_hardware("cuda:1", "auto").device == torch.device("cuda", 0)


def test_emulated_bfloat16_is_none(gpus):
    gpus(1, bf16=False)
    assert select_hardware("auto", "auto").dtype == torch.float32
