"""`cora doctor` reports what is installed and what is missing, and changes nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cora_cli import __version__
from cora_cli.cli import app, doctor


def cora_doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_it_names_versions_device_precision_and_reasons() -> None:
    result = cora_doctor("--device=cpu", "--dtype=auto")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"cora {__version__}, Python 3.")
    for package in doctor.REQUIRED:
        assert any(re.fullmatch(rf"  {re.escape(package)} +\d+\.\d+\S*", line) for line in lines)
    assert re.search(r"device cpu \(requested\), (bf16|fp32) \(the processor has (no )?bfloat16 instructions\)", result.stdout)
    assert "packed attention cora_segments (CPU: causal attention per segment, shared prefixes once)" in result.stdout
    for name, use in doctor.OPTIONAL.items():
        assert any(line.split()[0] == name and line.endswith(use) for line in lines if line.startswith("  "))


def test_a_precision_that_is_asked_for_is_named_as_such() -> None:
    assert "fp32 (requested)" in cora_doctor("--device=cpu", "--dtype=fp32").stdout


def test_missing_packages_are_listed_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package", "nor-this"))
    result = cora_doctor("--device=cpu")
    assert result.exit_code == 1
    assert "no-such-package missing: pip install no-such-package" in result.stdout
    assert result.stderr == "missing packages: pip install no-such-package nor-this\n"


@pytest.mark.parametrize(
    ("name", "version", "code", "said"),
    [
        (
            "torchvision",
            "0.1.0",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "the package torchvision cannot be imported (operator torchvision::nms does not exist); install",
        ),
        pytest.param(
            *("torchao", "0.10.0", ""),
            "a package is missing or does not fit the others (Found an incompatible version of torchao.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_package_that_breaks_the_others_is_found(name: str, version: str, code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / f"{name}-{version}.dist-info").mkdir()
    (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "cora_cli", "doctor", "--device=cpu"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert f"cora: error: {said}" in found.stderr


def test_missing_embedded_models_are_reported_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "cache"))
    result = cora_doctor("--device=cpu")
    assert result.exit_code == 0
    assert f"embedded models and data, in {tmp_path / 'cache'}" in result.stdout
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2", "WordNet 3.0"):
        assert f"  {name}: not downloaded yet; fetched when first needed" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_missing_device_is_an_error() -> None:
    result = cora_doctor("--device=cuda:9")
    assert result.exit_code == 1
    assert result.stderr.startswith("cora: error: --device cuda:9 is not available")
