import hashlib
from pathlib import Path

import pytest

from cora_cli import hashing
from cora_cli.errors import CoraError


def test_hashes_are_sha256_of_bytes_and_independent_of_key_order():
    assert hashing.sha256_text("ü") == hashlib.sha256("ü".encode()).hexdigest()
    assert hashing.sha256_json({"a": 1, "b": [2]}) == hashing.sha256_json({"b": [2], "a": 1})
    assert hashing.sha256_json([1, 2]) != hashing.sha256_json([2, 1])


def test_a_files_hash_is_that_of_all_its_bytes(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * (hashing.HASH_CHUNK // 256) + b"tail"
    path.write_bytes(content)
    assert hashing.sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_a_link_to_a_blob_that_is_named_by_its_digest_is_not_read_in_the_hubs_cache_only(tmp_path, monkeypatch):
    digest = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(b"not the content, so that reading would show")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    assert hashing.sha256_file(tmp_path / "model.safetensors") != digest
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hashing.sha256_file(tmp_path / "model.safetensors") == digest
    (tmp_path / "other").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert hashing.sha256_file(tmp_path / "link") == digest


def test_the_hash_of_several_files_depends_on_names_and_contents_not_on_order_or_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("A")
        (tmp_path / folder / "b").write_text("B")
    one, two = ([tmp_path / folder / name for name in "ab"] for folder in ("one", "two"))
    assert hashing.sha256_files(one) == hashing.sha256_files(reversed(two))
    before = hashing.sha256_files(two)
    (tmp_path / "two" / "b").write_text("C")
    assert hashing.sha256_files(two) != before
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    assert hashing.sha256_files([tmp_path / "one" / "a", tmp_path / "one" / "c"]) != before


def test_a_file_that_changes_in_the_block_that_reads_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    with hashing.unchanged(tmp_path / "file"):
        pass
    with (
        pytest.raises(CoraError, match="file was changed while this command was using it"),
        hashing.unchanged(tmp_path / "file"),
    ):
        (tmp_path / "file").unlink()


def test_a_file_that_cannot_be_read_is_named_as_other_readers_name_it(tmp_path: Path) -> None:
    with pytest.raises(CoraError, match=rf"^{tmp_path} cannot be read: Is a directory$"):
        hashing.sha256_file(tmp_path)
