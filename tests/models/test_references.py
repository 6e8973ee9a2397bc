import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from cora_cli import writing
from cora_cli.data.readers import read_located
from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.loading import load_model
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import EMBEDDED_MODEL, location, resolve_base, resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.models.trained_on import known_prompts, run_of
from cora_cli.rundir import RunDirectory


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def test_a_directory_with_a_configuration_is_a_model(tiny_model):
    found = resolve_model(str(tiny_model))
    assert (found.reference, found.path, found.revision, found.is_adapter) == (str(tiny_model), tiny_model, None, False)
    assert found.config()["model_type"] == "llama"
    assert [file.name for file in found.weight_files()] == ["model.safetensors"]


def test_a_directory_with_an_adapter_configuration_is_an_adapter(tmp_path):
    found = resolve_model(
        str(make(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors", "other.safetensors"))
    )
    assert found.is_adapter
    assert found.adapter_config() == {}
    assert [file.name for file in found.weight_files()] == ["adapter_model.safetensors"]


def test_the_weights_decide_between_model_and_adapter(tmp_path):
    merged = resolve_model(str(make(tmp_path / "merged", "config.json", "model.safetensors", "adapter_config.json")))
    assert not merged.is_adapter
    assert [file.name for file in merged.weight_files()] == ["model.safetensors"]
    both = make(tmp_path / "both", "config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(
        CoraError, match=r"both a complete model \(model.safetensors\) and an adapter \(adapter_model.safetensors\)"
    ):
        resolve_model(str(both))
    with_value_head = make(tmp_path / "ppo", "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors")
    assert resolve_model(str(with_value_head)).is_adapter
    assert [file.name for file in resolve_model(str(with_value_head)).other_weight_files()] == ["pytorch_model.bin"]


def test_weights_that_the_configuration_names_in_place_of_the_usual_file_are_refused(tmp_path):
    """Transformers loads that file, others read the usual one."""
    model = make(tmp_path / "model", "config.json", "model.safetensors", "other.safetensors")
    for named, refused in (("other.safetensors", True), ("model.safetensors", False), (None, False)):
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_weights": named}))
        if refused:
            with pytest.raises(CoraError, match=r"load its weights from other\.safetensors \(transformers_weights\)"):
                resolve_model(str(model))
        else:
            resolve_model(str(model))


def test_an_adapter_that_is_not_pefts_is_named(tmp_path):
    mlx = make(tmp_path / "mlx", "adapter_config.json", "adapters.safetensors")
    with pytest.raises(CoraError, match=r"but adapters.safetensors in place of the adapter_model.safetensors of PEFT"):
        resolve_model(str(mlx))


def test_weights_that_are_there_twice_are_refused(tmp_path):
    directory = make(tmp_path / "model", "config.json", "model.safetensors", "part.safetensors")
    index = directory / "model.safetensors.index.json"
    for files, twice in (("part", True), ("gone", False), ("model", False)):
        index.write_text(json.dumps({"weight_map": {"weight": f"{files}.safetensors"}}))
        if twice:
            with pytest.raises(
                CoraError, match=r"holds the weights twice, in model.safetensors and in the 1 files of .*index.json"
            ):
                resolve_model(str(directory)).weight_files()
        else:
            assert [file.name for file in resolve_model(str(directory)).weight_files()] == ["model.safetensors"]


def test_the_weights_that_are_hashed_are_those_that_are_read(tmp_path):
    directory = make(tmp_path / "model", "config.json", "model.safetensors", "consolidated.safetensors")
    model = resolve_model(str(directory))
    before, everything = model.content_hash(), model.content_hashes()
    assert [file.name for file in model.weight_files()] == ["model.safetensors"]
    (directory / "consolidated.safetensors").write_text("other")
    assert model.content_hash() == before
    assert before in everything
    assert len(everything) == 2, "earlier versions hashed both files"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
    ],
)
def test_a_file_that_transformers_cannot_read_for_its_byte_order_mark_is_refused_by_name(name, tiny_model, tmp_path):
    marked = Path(shutil.copytree(tiny_model, tmp_path / "marked"))
    there = (marked / name).read_bytes() if (marked / name).exists() else b"{}"
    (marked / name).write_bytes(b"\xef\xbb\xbf" + there)
    with pytest.raises(CoraError, match=rf"marked/{name} begins with a byte order mark, .* save it as UTF-8 without one"):
        resolve_model(str(marked))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "chat_template.jinja", "added_tokens.json", "model.safetensors"]
)
def test_a_link_to_nothing_among_the_files_of_a_model_is_named(name, tiny_model, tmp_path):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "consolidated.pt").symlink_to("nowhere")  # which nothing reads
    resolve_model(str(tmp_path))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0123")
    with pytest.raises(CoraError, match=f"{name} is a symbolic link to ../../blobs/0123, which does not exist; download"):
        resolve_model(str(tmp_path))


def test_a_nested_language_model_states_what_the_top_level_does_not(tmp_path):
    directory = make(tmp_path / "model", "model.safetensors")
    (directory / "config.json").write_text(
        '{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}'
    )
    config = resolve_model(str(directory)).language_config()
    assert (config["model_type"], config["hidden_size"]) == ("gemma3", 64)


def test_the_tokenizers_hash_covers_its_template(tmp_path):
    model = resolve_model(str(make(tmp_path / "model", "config.json", "tokenizer.json", "chat_template.jinja")))
    assert model.has_tokenizer
    before = model.tokenizer_hash()
    (tmp_path / "model" / "chat_template.jinja").write_text("other")
    assert resolve_model(str(tmp_path / "model")).tokenizer_hash() != before


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "qwen.tiktoken", "bpe.codes"])
def test_the_tokenizers_hash_covers_a_vocabulary_of_any_kind(name, tmp_path):
    model = resolve_model(str(make(tmp_path / "model", "config.json", "tokenizer_config.json", name)))
    before = model.tokenizer_hash()
    (tmp_path / "model" / name).write_text("other")
    assert resolve_model(str(tmp_path / "model")).tokenizer_hash() != before


def test_code_that_comes_with_a_model_is_part_of_its_hash(tmp_path):
    directory = make(tmp_path / "model", "config.json", "tokenizer_config.json", "model.safetensors", "modeling_own.py")
    model = resolve_model(str(directory))
    without = model.content_hash()
    (directory / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}')
    (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}')
    model = resolve_model(str(directory))
    before, of_text = model.content_hash(), model.text_hash()
    earlier = model.content_hashes() - {before}
    (directory / "modeling_own.py").write_text("other")
    model = resolve_model(str(directory))
    assert without != model.content_hash() != before
    assert model.text_hash() != of_text
    assert earlier
    assert earlier < model.content_hashes(), "earlier versions hashed no code, and still know the model"


def test_the_weights_of_a_compact_adapter_are_its_a_alone_and_its_hash_covers_them(tmp_path):
    directory = make(tmp_path / "adapter", "adapter_config.json", "adapter_a_only.safetensors")
    found = resolve_model(str(directory))
    assert [file.name for file in found.weight_files()] == ["adapter_a_only.safetensors"]
    before = found.content_hash()
    (directory / "adapter_a_only.safetensors").write_text("other")
    assert resolve_model(str(directory)).content_hash() != before


@pytest.mark.parametrize(("kind", "is_adapter"), [("adapter", True), ("model", False)])
def test_a_run_directory_stands_for_what_it_trained(kind, is_adapter, tmp_path):
    make(tmp_path / "run", "run.json")
    make(tmp_path / "run" / kind, "adapter_config.json" if is_adapter else "config.json")
    found = resolve_model(str(tmp_path / "run"))
    assert found.path == tmp_path / "run" / kind
    assert found.is_adapter is is_adapter


def test_another_programs_run_json_makes_no_run_of_a_model_next_to_it_or_below_it(tiny_model, tmp_path):
    models = [tmp_path / "tracked", tmp_path / "all" / "one"]
    for model in models:
        shutil.copytree(tiny_model, model)
    for place in (models[0], tmp_path / "all"):
        (place / "run.json").write_text('{"project": "mine"}')
    for model in models:
        found = resolve_model(str(model))
        assert (found.path, run_of(found), known_prompts(found)) == (model, None, frozenset())


def test_a_run_is_that_of_its_result_and_checkpoints_and_of_no_other_model_in_its_directory(tiny_model, tmp_path):
    run = tmp_path / "run"
    places = [
        make(run / name, "adapter_config.json")
        for name in ("adapter", "checkpoints/checkpoint-3", "another", "checkpoints/of/3")
    ]
    (run / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(places[0])
    found = [run_of(ModelPath(str(place), place, None)) for place in (*places, tmp_path / "link")]
    assert found == [RunDirectory(run), RunDirectory(run), None, None, RunDirectory(run)]


def test_a_base_is_a_whole_model_or_none_at_all(tiny_model, tmp_path):
    assert resolve_base(None) is None
    assert resolve_base(str(tiny_model)) == resolve_model(str(tiny_model))
    adapter = make(tmp_path / "adapter", "adapter_config.json")
    with pytest.raises(CoraError, match=f"--base {adapter} is an adapter, not a complete model; merge it first"):
        resolve_base(str(adapter))


def test_a_run_that_never_ended_is_no_model(tmp_path):
    make(tmp_path / "run", "run.json")
    (tmp_path / "run" / "run.json").write_text('{"status": "running"}')
    with pytest.raises(CoraError, match=r"run is not finished \(status running\); complete it with .* --resume$"):
        resolve_model(str(tmp_path / "run"))


def test_what_a_run_that_is_being_completed_again_left_is_no_model(tmp_path):
    make(tmp_path / "run" / "adapter", "adapter_config.json", "adapter_model.safetensors")
    (tmp_path / "run" / "run.json").write_text('{"status": "running"}')
    for name in ("run", "run/adapter"):
        with pytest.raises(CoraError, match=r"run is not finished \(status running\)"):
            resolve_model(str(tmp_path / name))


def test_a_directory_without_a_configuration_is_no_model(tmp_path):
    with pytest.raises(CoraError, match=r"is not a model: .* has neither config.json nor adapter_config.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["snapshots/abc/config.json"], r"; .*hub/snapshots/abc in it is one"),
        (["sft/adapter_config.json"], r"; .*hub/sft in it is one"),
        (
            ["checkpoint-1/config.json", "checkpoint-2/config.json"],
            r"choose one of those in it: .*checkpoint-1, .*checkpoint-2",
        ),
    ],
)
def test_a_directory_of_models_is_none_and_those_in_it_are_named(places, said, tmp_path):
    for place in places:
        file = tmp_path / "hub" / place
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    with pytest.raises(
        CoraError, match=f"has neither config.json nor adapter_config.json{said if said[0] == ';' else '; ' + said}"
    ):
        resolve_model(str(tmp_path / "hub"))


def test_the_embedded_model_is_found_by_its_name():
    found = resolve_model(EMBEDDED_MODEL)
    assert found.reference == "builtin:smollm2"
    assert found.config()["hidden_size"] == 576


@pytest.mark.parametrize(
    "reference", ["./gone", "../gone", "/gone/for/ever", "~/gone-for-ever", "a/b/c", "builtin:other", "a b"]
)
def test_what_is_neither_directory_nor_hub_id_says_so(reference):
    with pytest.raises(CoraError, match="is neither a directory on this disk nor a hub id such as org/name@revision"):
        resolve_model(reference)


@pytest.mark.parametrize("reference", ["some-org/some-model", "some-org/some-model@v1", "gpt-none", "a..b/c", "-x/y"])
def test_a_hub_id_that_cannot_be_fetched_gives_one_sentence(reference):
    with pytest.raises(CoraError, match="is not a local directory and could not be downloaded from the hub: ") as caught:
        resolve_model(reference)
    assert repr(reference) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://proxy:port", "socks5://127.0.0.1:9"])
def test_a_proxy_that_the_hub_client_cannot_use_is_named_by_its_variable(proxy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", proxy)

    def download(*_, **__):
        from huggingface_hub import HfApi

        HfApi().model_info("some-org/some-model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CoraError, match=r"could not be downloaded from the hub: .*through the proxy that https_proxy names"):
        resolve_model("some-org/some-model")


@pytest.mark.parametrize(
    ("reference", "revision", "stored", "patterns"),
    [
        ("org/name", None, "model.safetensors", ["*.safetensors"]),
        ("org/name@v2", "v2", "model.safetensors", ["*.safetensors"]),
        ("org/name@v2", "v2", "pytorch_model.bin", ["*.safetensors", "*.bin"]),
        ("org/name", None, "model.pth", ["*.safetensors", "*.bin", "*.pt", "*.pth"]),
    ],
)
def test_a_hub_model_is_fetched_at_its_revision_and_pickles_only_where_there_is_nothing_else(
    reference, revision, stored, patterns, tmp_path, monkeypatch
):
    snapshot = make(tmp_path / "0123abcd", "config.json")
    asked = []

    def download(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision, allow_patterns[-1]))
        if Path(stored).match(allow_patterns[-1]):
            make(snapshot, stored)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve_model(reference)
    assert asked == [("org/name", revision, pattern) for pattern in patterns]
    assert (found.path, found.revision) == (snapshot, "0123abcd"), "the revision is the commit, not the name of a branch"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["b.safetensors", "a.safetensors", "a.bin"], ["a.safetensors", "b.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["model.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"], ["model.pt"]),
        (["part-2.pth", "part-1.pth", "scaler.pt"], ["part-1.pth", "part-2.pth"]),
        (["model.pt", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["a.safetensors", "._a.safetensors"], ["a.safetensors"]),
    ],
)
def test_weights_are_the_safetensors_or_else_files_of_torch(files, found, tmp_path):
    model = resolve_model(str(make(tmp_path / "model", "config.json", *files)))
    assert [file.name for file in model.weight_files()] == found


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "global_step10/mp_rank_00_model_states.pt",
            "those in global_step10 are the parts of several processes of DeepSpeed; gather",
        ),
        (
            "pytorch_model_fsdp_0/__0_0.distcp",
            "those in pytorch_model_fsdp_0 are the parts of several processes of FSDP; gather",
        ),
    ],
)
def test_weights_that_were_not_gathered_are_named(part, said, tmp_path):
    directory = make(tmp_path / "model", "config.json")
    make((directory / part).parent, Path(part).name)
    with pytest.raises(CoraError, match=f"holds no weights: .*; {said}"):
        resolve_model(str(directory)).weight_files()


@pytest.mark.parametrize("files", [[], ["training_args.bin"], ["optimizer.pt", "rng_state.pth"]])
def test_a_model_without_weights_says_so(files, tmp_path):
    model = resolve_model(str(make(tmp_path / "model", "config.json", *files)))
    with pytest.raises(CoraError, match=r"model holds no weights: it has no file \*.safetensors, \*.bin, \*.pt or \*.pth"):
        model.weight_files()
    (model.path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(CoraError, match=r"\*\.pth; model-Q4_K_M\.gguf is of a format that is not read: use .* as safetensors$"):
        model.weight_files()


def test_a_damaged_configuration_is_named(tmp_path):
    model = resolve_model(str(make(tmp_path / "model", "config.json")))
    (model.path / "config.json").write_text("{")
    with pytest.raises(CoraError, match=r"config.json is not valid JSON"):
        model.config()
    with pytest.raises(CoraError, match=r"adapter_config.json does not exist"):
        model.adapter_config()


def test_the_content_hash_covers_weights_and_configuration_but_not_the_place(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    original, copied = resolve_model(str(tiny_model)), resolve_model(str(copy))
    assert original.content_hash() == copied.content_hash()
    writing.write_json(copy / "config.json", {**json.loads((copy / "config.json").read_text()), "rope_theta": 5})
    assert original.content_hash() != resolve_model(str(copy)).content_hash()


def _replaced(directory: Path, name: str) -> None:
    """Put another file in the place of `name`, as a program does that writes a new version and renames it."""
    (directory / "new").write_bytes((directory / name).read_bytes())
    (directory / "new").replace(directory / name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_is_replaced_while_a_command_uses_it_is_refused_by_file(name, tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    of_hash, of_weights, of_tokenizer, of_matrices = (resolve_model(str(directory)) for _ in range(4))
    checkpoint = Checkpoint(of_matrices)
    _replaced(directory, name)
    said = rf"{name} was changed while this command was using it; start it again"
    with pytest.raises(CoraError, match=said):
        of_hash.content_hash()
    with pytest.raises(CoraError, match=said):
        load_model(of_weights, torch.float32, torch.device("cpu"), None)
    with pytest.raises(CoraError, match=said):
        load_tokenizer(of_tokenizer)
    with pytest.raises(CoraError, match=said) if name == "model.safetensors" else contextlib.nullcontext():
        checkpoint.read("model.norm.weight")
    load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)


def test_weights_that_arrive_while_a_plan_is_made_from_the_configuration_change_nothing(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model = resolve_model(str(directory), weights=False)
    shutil.copy(tiny_model / "model.safetensors", directory)
    load_tokenizer(model)


def test_the_hash_of_a_model_is_that_of_the_weights_that_were_loaded_whatever_happens_to_the_files_later(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    model = resolve_model(str(directory))
    before = model.content_hash()
    load_model(model, torch.float32, torch.device("cpu"), None)
    (directory / "config.json").write_text("{}")
    assert model.content_hash() == before


def test_a_link_that_leads_nowhere_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/gone").symlink_to("removed")
    Path("org/loop").symlink_to("loop")
    with pytest.raises(CoraError, match=r"^org/gone is a symbolic link to removed, which does not exist$"):
        resolve_model("org/gone")
    with pytest.raises(CoraError, match=r"^org/loop is a symbolic link to loop, which does not exist$"):
        resolve_model("org/loop")
    with pytest.raises(CoraError, match=r"^org/gone is a symbolic link to removed, which does not exist$"):
        list(read_located("org/gone"))


def test_other_programs_find_the_result_of_a_run_in_its_own_directory(tiny_model, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    assert location(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert [location(name) for name in (str(tiny_model), "org/name", EMBEDDED_MODEL)] == [
        str(tiny_model),
        "org/name",
        EMBEDDED_MODEL,
    ]
