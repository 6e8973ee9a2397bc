"""A wrong command line is one sentence with the offending value, and exit code 2."""

import pytest
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.methods.registry import METHODS

TRAIN = "train --mode lora --model m --dataset d --output-dir o"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train --rank x", "--rank must be an integer, not 'x'"),
        ("train --alpha x", "--alpha must be a number, not 'x'"),
        ("train --rnk 3", "there is no option --rnk; did you mean --rank?"),
        ("train --rank", "--rank needs a value"),
        ("train --resume=3", "--resume takes no value"),
        (
            "train --dataset a --rank 2 --dataset=b",
            "--dataset is given several times (a, b), but takes one value; give one",
        ),
        (
            "train --start-models a --start-models=b,c",
            "--start-models is given several times (a, b,c), but takes its values in one list: --start-models a,b,c",
        ),
        ("merge a", "--output is missing; see `cora merge --help`"),
        ("merge a b -o c", "there is no place for the argument b; see `cora merge --help`"),
        ("trian", "there is no command 'trian'; did you mean train?"),
        ("frobnicate", "there is no command 'frobnicate'; see `cora --help`"),
        ("report a --format x", "--format must be one of terminal, markdown, latex, csv, json, html, not 'x'"),
        ("report a --seed -1", "--seed must be at least 0 and below 2^32, not -1"),
        ("evaluate --from a --bootstrap 1000000000", "--bootstrap must be at most 1,000,000, not 1,000,000,000"),
        (f"{TRAIN} --alpha 1e39", "--alpha must be at most 1,000,000,000, not 1e+39"),
        (f"{TRAIN} --learning-rate 1e39", "--learning-rate must be at most 3.4e+38, not 1e+39"),
        (f"{TRAIN} --weight-decay 1e39", "--weight-decay must be at most 3.4e+38, not 1e+39"),
        (f"{TRAIN} --alpha 1e-46", "--alpha must be at least 1.2e-38, not 1e-46"),
        ("ablate a.yaml --jobs-per-gpu 0", "--jobs-per-gpu must be a positive number or auto, not '0'"),
        (
            "ablate a.yaml --jobs-per-gpu auto --launcher slurm",
            "--jobs-per-gpu applies to --launcher local; a Slurm job has the GPUs that resources in the grid ask for",
        ),
        (
            f"{TRAIN} --processes 2",
            "--processes is for --dry-run; `torchrun --nproc-per-node N -m cora_cli train …` trains in N processes",
        ),
        ("inspect gone.safetensors", "gone.safetensors does not exist"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(line: str, sentence: str) -> None:
    result = CliRunner().invoke(app, line.split())
    assert result.stderr == f"cora: error: {sentence}\n"
    assert result.stdout == ""
    assert result.exit_code == (1 if "does not exist" in sentence else 2)


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_a_wrong_device_is_refused_before_anything_is_shown(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--device", "abacus"])
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "extract-basis"])
def test_help_has_a_heading_for_each_kind_of_flag_and_lines_of_80_columns(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "-h"]).stdout.splitlines()
    assert max(map(len, shown)) <= 80
    headings = [line for line in shown if line.endswith(":") and not line.startswith(" ")]
    expected = {
        "train": ["Method:", "Data:", "Run:", "Optimisation:", "Risky:", "Settings of single modes:", "General:"],
        "evaluate": ["Arguments:", "What to evaluate:", "Run:", "Generation:", "Metrics:", "Risky:", "General:"],
        "report": ["Arguments:", "Options:"],
        "extract-basis": ["Arguments:", "Run:", "Choices (the first value is the default):", "General:"],
    }
    assert headings == expected[command]


def test_help_names_every_mode_in_its_text() -> None:
    shown = " ".join(CliRunner().invoke(app, ["train", "-h"]).stdout.split()).replace("- ", "-")
    assert "--mode <mode>" in shown
    assert f"One of {', '.join(METHODS)}. [default: fb]" in shown
