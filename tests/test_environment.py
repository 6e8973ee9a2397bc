"""No variable of the environment changes a result; a launcher's own keep working (`training/test_distributed.py`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cora_cli.environment import behind_hub_error, forget_settings, proxy_variable, variable_of_path
from cora_cli.errors import CoraError
from cora_cli.training.run import train
from tests.training.helpers import config_for, losses, record_of

ROOT = Path(__file__).parents[1]
CHANGING = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "eager",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_CPU": "false",
    "FSDP_OFFLOAD_PARAMS": "true",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    # Cluster software sets it without being a launcher; it would change the warm-up.
    "WORLD_SIZE": "4",
}


def test_training_is_the_same_with_every_variable_that_could_change_it(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 2.0, "max_steps": None, "warmup_ratio": 0.5, "gradient_accumulation": 2}
    train(config_for(tiny_model, tiny_data, tmp_path / "plain", **options))
    for name, value in CHANGING.items():
        monkeypatch.setenv(name, value)
    train(config_for(tiny_model, tiny_data, tmp_path / "other", **options))
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")
    assert record_of(tmp_path / "other")["hardware"]["processes"] == 1
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_training_leaves_no_precision_behind_for_the_next(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "before"))
    train(config_for(tiny_model, tiny_data, tmp_path / "bf16", dtype="bf16"))
    train(config_for(tiny_model, tiny_data, tmp_path / "after"))
    assert losses(tmp_path / "after") == losses(tmp_path / "before") != losses(tmp_path / "bf16")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_another_kind_of_training_is_refused_by_the_variable_s_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(CoraError, match=f"the environment variable {name} asks for .*; unset it"):
        forget_settings()


def test_an_empty_variable_at_which_torch_fails_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_LOGS", "")
    forget_settings()
    assert "TORCH_LOGS" not in os.environ


def test_a_launcher_s_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    forget_settings()
    assert ours.items() <= os.environ.items()


def test_programs_that_a_command_starts_do_not_import_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("print('executed')\n")
    code = (
        "import subprocess, sys, cora_cli.cli\n"
        "cora_cli.cli.app = lambda **_: subprocess.run([sys.executable, '-c', 'import random'])\n"
        "cora_cli.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "executed" not in done.stdout


def test_what_libraries_log_is_not_shown() -> None:
    code = (
        "import logging, sys\n"
        "from cora_cli.environment import quiet_libraries\n"
        "quiet_libraries()\n"
        "logging.getLogger('any.library').warning('install this')\n"
        "logging.warning('from here on, there is a handler')\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('install that')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "install" not in done.stderr


def test_a_launcher_that_left_out_the_address_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(CoraError, match=r"LOCAL_RANK.*MASTER_ADDR is missing"):
        forget_settings()


@pytest.mark.parametrize(
    ("name", "value"), [("LOCAL_RANK", "first"), ("RANK", ""), ("WORLD_SIZE", "2(x3)"), ("LOCAL_WORLD_SIZE", "²")]
)
def test_a_launcher_s_numbers_are_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for each, right in (theirs | {name: value}).items():
        monkeypatch.setenv(each, right)
    with pytest.raises(CoraError, match=rf"but {name} is {re.escape(repr(value))} and not an integer"):
        forget_settings()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        pytest.param(
            "HF_HUB_DOWNLOAD_TIMEOUT",
            "soon",
            "the environment variable HF_HUB_DOWNLOAD_TIMEOUT is 'soon', which a library cannot use",
            marks=pytest.mark.slow,
        ),
        ("TORCH_LOGS", "nonsense", "the environment variable TORCH_LOGS is 'nonsense', which a library cannot use"),
        pytest.param(
            "TORCH_DISTRIBUTED_DEBUG",
            "yes",
            "the environment variable TORCH_DISTRIBUTED_DEBUG is 'yes', which a library cannot use",
            marks=pytest.mark.slow,
        ),
        ("TQDM_MININTERVAL", "often", "the environment variable TQDM_MININTERVAL is 'often', which a library cannot use"),
        ("PYTHONOPTIMIZE", "2", "unset the environment variable PYTHONOPTIMIZE"),
        pytest.param(
            "TORCHINDUCTOR_CACHE_DIR",
            "/proc/nowhere",
            "/proc/nowhere cannot be used: No such file or directory; the environment variable TORCHINDUCTOR_CACHE_DIR names that place",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_variable_at_which_libraries_fail_is_named(
    variable: str, value: str, says: str, tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cora_cli", "export", str(tiny_model), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, variable: value}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert "unexpected" not in done.stderr


def test_a_place_belongs_to_the_library_s_variable_that_names_it_most_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"XDG_CACHE_HOME": "/full", "HF_HOME": "/full/hub", "DATA_DIR": "/mine", "HF_TOKEN": "x"}.items():
        monkeypatch.setenv(name, value)
    assert variable_of_path("/full/hub/a") == "HF_HOME"
    assert variable_of_path("/full/hubs") == "XDG_CACHE_HOME"
    assert variable_of_path("/mine/a") is None


@pytest.mark.parametrize(
    ("variables", "reads_all", "name"),
    [
        ({"https_proxy": "a:1", "HTTPS_PROXY": "b:1"}, False, "https_proxy"),
        ({"HTTPS_PROXY": "b:1", "http_proxy": "a:1"}, False, "HTTPS_PROXY"),
        ({"ALL_PROXY": "b:1"}, True, "ALL_PROXY"),
        ({"ALL_PROXY": "b:1"}, False, None),
        ({"http_proxy": "a:1"}, True, None),
        ({"https_proxy": "a:1", "no_proxy": "other.example,example.org"}, True, None),
        ({"https_proxy": "a:1", "NO_PROXY": "*"}, True, None),
    ],
)
def test_the_proxy_of_an_address_is_known_by_the_variable_that_names_it(
    variables: dict[str, str], reads_all: bool, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usual in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(usual, raising=False)
        monkeypatch.delenv(usual.upper(), raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert proxy_variable("https://www.example.org/v1", reads_all) == name


def test_the_variable_behind_an_error_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert behind_hub_error(ValueError("busy")) == ""
    assert "correct or unset HF_TOKEN" in behind_hub_error(UnicodeEncodeError("ascii", "bäd", 1, 2, "not in range"))
    monkeypatch.setenv("HF_TOKEN_PATH", "/etc")
    assert (
        behind_hub_error(IsADirectoryError(21, "Is a directory", "/etc"))
        == "; the environment variable HF_TOKEN_PATH names that place"
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert behind_hub_error(ValueError("busy")) == ""
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "HF_ENDPOINT is 'hub.example', which is no address such as https://huggingface.co" in behind_hub_error(
        ValueError("busy")
    )
