"""Reference embeddings on disk: the same scores to the last bit with and without them, whatever happens to the files."""

import os
from pathlib import Path

import numpy as np
import pytest

from cora_cli.evaluation.metrics import bertscore, reference_cache
from cora_cli.evaluation.metrics.bertscore import BertScore

REFERENCES = ["a cat sat on the mat", "two dogs", "a cat sat on the mat", "so it goes, and goes, and goes on", " "]
PREDICTIONS = {
    "one": ["the cat is on a mat", "two dogs", "", "so it ends here, after a rather long sentence about nothing", "text"],
    "other": ["a mat", "three dogs ran", "a cat", "so it goes", ""],
}


@pytest.fixture(scope="module")
def scorer() -> BertScore:
    return BertScore()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of the texts that were encoded."""
    seen: list[list[int]] = []
    original = bertscore.embeddings

    def watched(model, token_ids, *rest):
        seen.extend(token_ids)
        return original(model, token_ids, *rest)

    monkeypatch.setattr(bertscore, "embeddings", watched)
    return seen


def score(scorer: BertScore, predictions: str) -> bytes:
    return scorer.statistics(PREDICTIONS[predictions], REFERENCES).tobytes()


def test_kept_references_are_not_encoded_again_and_change_no_bit(scorer, encoded, no_kept_references):
    expected = {}
    for name in PREDICTIONS:
        expected[name] = score(scorer, name)
        for path in no_kept_references.iterdir():
            path.unlink()
    score(scorer, "one")
    encoded.clear()
    assert {name: score(scorer, name) for name in PREDICTIONS} == expected
    known = {tuple(bertscore.sent_encode(scorer._encoder.tokenizer, text)) for text in REFERENCES if text.strip()}
    assert encoded
    assert not known & {tuple(ids) for ids in encoded}


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [halve, flip, lengthen, empty])
def test_a_damaged_file_is_replaced_without_a_word_and_the_scores_stay(scorer, no_kept_references, damage, capsys):
    expected = score(scorer, "one")
    [path] = no_kept_references.iterdir()
    complete = path.read_bytes()
    capsys.readouterr()
    damage(path)
    assert score(scorer, "one") == expected
    assert path.read_bytes() == complete
    assert "damaged" not in capsys.readouterr().err


def test_other_references_another_layer_or_another_number_of_threads_have_files_of_their_own(
    scorer, no_kept_references, monkeypatch
):
    score(scorer, "one")
    scorer.statistics(["a"], ["b"])
    BertScore(layer=2).statistics(PREDICTIONS["one"], REFERENCES)
    assert len(list(no_kept_references.iterdir())) == 3
    threads = bertscore.torch.get_num_threads()
    monkeypatch.setattr(bertscore.torch, "get_num_threads", lambda: threads + 1)
    score(scorer, "one")
    assert len(list(no_kept_references.iterdir())) == 4


def test_the_files_have_a_bound_together_and_each(scorer, no_kept_references, monkeypatch):
    score(scorer, "one")
    [oldest] = no_kept_references.iterdir()
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(reference_cache, "MOST_BYTES", oldest.stat().st_size + 1)
    scorer.statistics(["a"], ["a short one"])
    assert oldest not in list(no_kept_references.iterdir())
    assert len(list(no_kept_references.iterdir())) == 1
    monkeypatch.setattr(reference_cache, "LARGEST_BYTES", 100)
    scorer.statistics(["a"], ["another reference"])
    assert len(list(no_kept_references.iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_no_score(scorer, tmp_path, monkeypatch):
    expected = score(scorer, "one")
    (tmp_path / "file").touch()
    monkeypatch.setattr(reference_cache, "directory", lambda: tmp_path / "file" / "inside")
    assert score(scorer, "one") == expected


def test_a_file_that_was_used_is_the_last_to_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "directory", lambda: tmp_path)
    embeddings = [bertscore.torch.ones(3, 8)]
    for name in ("first", "second"):
        reference_cache.write(name, embeddings)
        os.utime(tmp_path / f"{name}.f32", (1, 1) if name == "first" else (2, 2))
    assert reference_cache.read("first", [3], 8) is not None
    monkeypatch.setattr(reference_cache, "MOST_BYTES", 2 * (tmp_path / "first.f32").stat().st_size)
    reference_cache.write("third", embeddings)
    assert {path.stem for path in tmp_path.iterdir()} == {"first", "third"}
    found = reference_cache.read("third", [3], 8)
    np.testing.assert_array_equal(found[0], embeddings[0])
