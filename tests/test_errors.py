import pickle

import pytest
import torch

from cora_cli.errors import is_lost_process, is_out_of_memory, lost_process, reason


class _Evil:
    def __reduce__(self):
        return print, ("never printed",)


def test_a_refused_pickle_is_not_described_in_words_that_advise_to_open_it(tmp_path, capsys):
    torch.save({"w": _Evil()}, tmp_path / "evil.bin")
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "evil.bin", weights_only=True)
    assert reason(caught.value) == (
        "the pickle contains more than tensors and could run code, so it was not loaded; use a safetensors copy"
    )
    assert capsys.readouterr().out == ""


def test_a_library_for_which_there_is_no_room_means_too_little_memory():
    assert is_out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert is_out_of_memory(
        RuntimeError("unable to mmap 120001485 bytes from file </m/model.bin>: Cannot allocate memory (12)")
    )
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the matmul primitive"))
    assert not is_out_of_memory(ImportError("libtorch_cpu.so: cannot open shared object file"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("two\nlines"), "two lines"), (KeyError(), "KeyError"), (OSError("x" * 999), "x" * 300)],
)
def test_a_reason_is_one_short_line(error, expected):
    assert reason(error) == expected


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9. This is typically a crash"),
            "Connection closed by peer [::1]:9",
        ),
        (torch.distributed.DistStoreError("wait timeout after 300000ms"), "wait timeout after 300000ms"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "NCCL error: remote process exited"),
    ],
)
def test_processes_that_lost_each_other_say_so_in_one_sentence(error, detail):
    assert is_lost_process(error)
    assert str(lost_process(error)) == (
        f"another process of this run ended or cannot be reached, and its own message says why ({detail})"
    )
    assert not is_lost_process(RuntimeError("expected scalar type Float"))
