"""The examples of docs/extending.md work: they are put into a copy of the package, and the page's commands are run with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL)
COMMANDS = re.findall(r"^cora .*$", PAGE.rpartition("```bash\n")[2], re.MULTILINE)
_RUN = """
import shlex, sys
from pathlib import Path
import cora_cli
from cora_cli.cli import app
from typer.testing import CliRunner
assert Path(cora_cli.__file__).is_relative_to(sys.argv[1])
for line in sys.argv[2:]:
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    print(done.stderr, done.stdout)
    assert done.exit_code == 0, line
"""


def with_examples(package: Path) -> None:
    """Write the files that the page shows; in one that exists, the lines marked as new go where the page shows them."""
    for name, body in FILES:
        path = package / name
        if not path.exists():
            path.write_text(body, encoding="utf-8")
            continue
        lines = body.splitlines(keepends=True)
        old, text = "".join(line for line in lines if "# new" not in line), path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has no such place: {old}"
        path.write_text(text.replace(old, body), encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page's commands ran, and what they printed."""
    package, place = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "cora_cli", package / "cora_cli")
    with_examples(package)
    tickets = [
        {"subject": f"Order {n}", "body": f"Where is order {n}?", "reply": f"On its way, number {n}."} for n in range(24)
    ]
    (place / "tickets.jsonl").write_text("".join(json.dumps(ticket) + "\n" for ticket in tickets), encoding="utf-8")
    lines = [line.replace("builtin:smollm2", str(tiny_model)) for line in COMMANDS]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(package), *lines],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout


def test_the_page_shows_a_method_a_metric_and_a_format() -> None:
    assert {Path(name).parent.name for name, _ in FILES} == {"methods", "metrics", "formats"}
    assert [line.split()[1] for line in COMMANDS] == ["train", "evaluate", "report"]


def test_the_method_trains_b_alone_from_signs(ran: tuple[Path, str]) -> None:
    place, _ = ran
    record = json.loads((place / "runs/sign-a/run.json").read_text(encoding="utf-8"))
    assert (record["mode"], record["status"]) == ("sign-a", "finished")
    # Rank 8 on q (64 outputs), k and v (32 outputs) of two layers.
    assert record["parameters"]["trained"] == 2 * 8 * (64 + 32 + 32)
    tensors = load_file(place / "runs/sign-a/adapter/adapter_model.safetensors")
    factors = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    assert len(factors) == 6
    assert all(torch.equal(factor.abs(), torch.full_like(factor, 1 / 8)) for factor in factors)


def test_the_format_is_recognised_and_announced(ran: tuple[Path, str]) -> None:
    assert "read as tickets, 24 records" in ran[1]


def test_the_metric_is_in_the_evaluation_and_in_the_report(ran: tuple[Path, str]) -> None:
    place, printed = ran
    metrics = json.loads((place / "runs/sign-a/eval/metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["exact_match"]["n"] == 4
    assert metrics["exact_match"]["signature"].startswith("exact_match|strip:ends|")
    assert printed.count("exact_match") >= 2
