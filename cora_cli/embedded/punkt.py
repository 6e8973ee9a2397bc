"""Extract NLTK's English sentence splitter, Punkt, in the form that NLTK reads (`punkt_tab`), from a wheel that carries it."""

from pathlib import Path

from cora_cli.embedded.archive import copy_members

_WHEEL_FOLDER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab"
_LICENCE_MEMBER = "llama_index_core-0.14.25.dist-info/licenses/LICENSE"
_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def convert_wheel(wheel: Path, target: Path) -> None:
    """Copy the English model to `target/tokenizers/punkt_tab/english`, unchanged, with its README and the wheel's licence."""
    (target / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    members = {f"{_WHEEL_FOLDER}/english/{name}": f"tokenizers/punkt_tab/english/{name}" for name in _FILES}
    members |= {f"{_WHEEL_FOLDER}/README": "tokenizers/punkt_tab/README", _LICENCE_MEMBER: "LICENSE"}
    copy_members(wheel, members, target)
