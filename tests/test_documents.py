"""What the documents and the messages say exists: install commands name this distribution or a known package, links lead somewhere."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERS = {
    "vllm",
    "flash-attn",
    "bitsandbytes",
    "submitit",
    "tensorboard",
    "wandb",
    "trackio",
    "trl",
    "ruff",
    "kernels",
    "liger-kernel",
    "sentencepiece",
    "protobuf",
}
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
        options_removed = re.sub(r"-c +\S+|--constraint +\S+|-e\b|--editable\b|--quiet\b|--no-compile\b", "", arguments)
        for requirement in re.findall(r"[^\s'\"]+", options_removed):
            name, _, extras = requirement.rstrip("].").partition("[") if requirement != "." else (".", "", "")
            name = name.partition("==")[0]
            assert name in {"", ".", PROJECT["name"], *OTHERS}, f"{file}: pip install {arguments}"
            assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"]), f"{file}: {arguments}"
            assert not extras or name in {"", ".", PROJECT["name"]}, f"{file}: {arguments}"


def test_a_command_that_installs_a_namesake_would_be_found():
    assert COMMAND.findall("install it with `pip install 'cora[slurm]'`")[0].strip() == "'cora[slurm]'"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_a_document_leads_to_a_file_and_a_heading():
    links = [(page, *link) for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) >= 20
    for page, target, anchor in links:
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}#{anchor}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == PROJECT["version"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert PROJECT["version"] in headings


def sentences() -> set[str]:
    """Every text in the package's code, with `…` where a value stands in it."""
    found = set()
    for path in (ROOT / "cora_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_error_on_the_page_of_troubles_is_one_that_the_code_raises():
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 15
    known = sentences()
    for sentence in quoted:
        assert any(sentence in one for one in known), sentence


def public_names() -> list[str]:
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_public_name_exists_and_is_documented():
    names = public_names()
    assert len(names) >= 15
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), last)
        assert inspect.getdoc(found), name


def test_every_page_is_in_the_navigation_and_on_the_first_page():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(pages)
    linked = {target for target, _ in LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))}
    assert pages - linked == {"index.md"}


def test_the_example_of_the_python_api_runs(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(code.replace("builtin:smollm2", str(tiny_model)).replace("chat.jsonl", str(tiny_data)), {})
    printed = capsys.readouterr().out
    assert "lora" in printed
    assert (tmp_path / "runs" / "lora" / "run.json").is_file()
