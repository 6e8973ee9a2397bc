"""The commands of docs/quickstart.md run one after the other, from a ShareGPT file to a report."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cora_cli.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("## The same with")[0]


def block(language: str) -> str:
    return textwrap.dedent(re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[0])


@pytest.mark.slow
def test_the_quickstart_goes_from_a_sharegpt_file_to_a_report(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    Path("quick.yaml").write_text(block("yaml").replace("builtin:smollm2", str(tiny_model)), encoding="utf-8")
    commands = re.findall(r"^    cora (?!doctor)(.*)$", PAGE, re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        *("train", "train", "extract-basis", "train", "train", "evaluate", "report"),
    ]
    for command in commands:
        # The tiny model has narrower layers than the default rank of a basis and of a run.
        narrow = " --rank 8" if command.startswith(("train", "extract-basis")) else ""
        done = CliRunner().invoke(app, shlex.split(command.replace("builtin:smollm2", str(tiny_model)) + narrow))
        assert done.exit_code == 0, f"{command}: {done.stderr}"
        if "--dry-run" in command:
            assert "chat.jsonl: read as ShareGPT, 160 records" in done.stderr
            assert not Path("runs").exists()
    assert "undecided" in Path("report/report.md").read_text(encoding="utf-8")
    assert Path("report/report.html").is_file()
