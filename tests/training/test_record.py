"""What a run's record says about the machine."""

import subprocess
import sys

import pytest

from cora_cli.training.record import peak_resident_bytes


@pytest.mark.slow
def test_the_peak_does_not_begin_with_that_of_the_process_that_started_this_one() -> None:
    ballast = b"x" * (1 << 30)
    script = "from cora_cli.training.record import peak_resident_bytes; print(peak_resident_bytes())"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert 10**7 < int(found) < len(ballast) < peak_resident_bytes()


def test_without_a_status_file_the_system_call_answers(tmp_path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    for status in (tmp_path / "none", tmp_path / "status"):
        assert peak_resident_bytes(status) > 10**7
