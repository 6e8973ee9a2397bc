"""Every install command that the project prints or documents names this distribution, one of its extras, or another project's package."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERS = {"vllm", "flash-attn", "bitsandbytes", "submitit", "tensorboard", "wandb", "trackio", "trl", "ruff"}
COMMAND = re.compile(r"pip install((?: +(?:-[ce] +)?[^ `\"')#(]*(?:'[^']*'|\"[^\"]*\")?)+)")


def install_commands() -> list[tuple[str, str]]:
    """(file, arguments) of each command in the documents and the package; arguments that are computed are left out."""
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "cora_cli").rglob("*.py")]
    texts = ((file, file.read_text(encoding="utf-8")) for file in files)
    found = [(file.name, arguments.strip()) for file, text in texts for arguments in COMMAND.findall(text)]
    return [(name, arguments) for name, arguments in found if "{" not in arguments and "$" not in arguments and arguments]


def test_install_commands_name_this_distribution_its_extras_or_known_packages():
    commands = install_commands()
    assert len(commands) >= 5
    for file, arguments in commands:
        options_removed = re.sub(r"-c +\S+|--constraint +\S+|-e\b|--editable\b|--quiet\b", "", arguments)
        for requirement in re.findall(r"[^\s'\"]+", options_removed):
            name, _, extras = requirement.rstrip("].").partition("[") if requirement != "." else (".", "", "")
            name = name.partition("==")[0]
            assert name in {"", ".", PROJECT["name"], *OTHERS}, f"{file}: pip install {arguments}"
            assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"]), f"{file}: {arguments}"
            assert not extras or name in {"", ".", PROJECT["name"]}, f"{file}: {arguments}"


def test_a_command_that_installs_a_namesake_would_be_found():
    assert COMMAND.findall("install it with `pip install 'cora[slurm]'`")[0].strip() == "'cora[slurm]'"
