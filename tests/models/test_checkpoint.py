import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cora_cli.errors import CoraError
from cora_cli.models import checkpoint
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.loading import load_configuration, load_model
from cora_cli.models.references import resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.weights.sources import open_source
from tests.conftest import VOCABULARY
from tests.weights.helpers import local, make_llama


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """One model saved in every layout that is found in the wild."""
    root = tmp_path_factory.mktemp("layouts")
    model = make_llama(kv_heads=2)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="3KB")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("bin", "bin_sharded"):
        (root / name).mkdir()
        shutil.copy(root / "single" / "config.json", root / name)
    torch.save(tensors, root / "bin" / "pytorch_model.bin")
    weight_map = {name: f"pytorch_model-0000{number % 3}.bin" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, root / "bin_sharded" / file)
    (root / "bin_sharded" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("layout", ["single", "sharded", "bin", "bin_sharded"])
def test_every_layout_lists_and_reads_the_same_tensors(layouts, layout):
    expected = make_llama(kv_heads=2).state_dict()
    checkpoint = Checkpoint(local(layouts[layout]))
    assert {name: torch.Size(shape) for name, shape in checkpoint.shapes.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert checkpoint.bytes_read == 0
    for name in checkpoint.shapes:
        assert torch.equal(checkpoint.read(name), expected[name])
    assert checkpoint.bytes_read == sum(value.nbytes for value in expected.values())
    again = Checkpoint(local(layouts[layout]))
    found = again.read_all()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.bytes_read == checkpoint.bytes_read


@pytest.mark.parametrize(("layout", "loader"), [("single", "safe_open"), ("bin", "load_pickle")])
def test_all_tensors_of_a_file_are_read_while_it_is_opened_once(layouts, layout, loader, monkeypatch):
    found, opened = Checkpoint(local(layouts[layout])), []
    own = getattr(checkpoint, loader)
    monkeypatch.setattr(checkpoint, loader, lambda *args, **named: (opened.append(args), own(*args, **named))[1])
    assert len(found.read_all()) > 10
    assert len(opened) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
@pytest.mark.parametrize("layout", ["single", "bin"])
def test_no_file_stays_open_or_mapped_after_a_read(layouts, layout):
    checkpoint = Checkpoint(local(layouts[layout]))
    kept = [checkpoint.read(name) for name in checkpoint.shapes]
    assert kept
    assert str(layouts[layout]) not in Path("/proc/self/maps").read_text()
    assert all(str(layouts[layout]) not in str(link.resolve()) for link in Path("/proc/self/fd").iterdir())


def test_stored_types_are_kept(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {str(kind): torch.ones(2, 3, dtype=kind) for kind in (torch.bfloat16, torch.float16, torch.float64)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(local(tmp_path))
    assert {name: str(checkpoint.read(name).dtype) for name in checkpoint.shapes} == {name: name for name in tensors}


@pytest.mark.parametrize("layout", ["single", "bin"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused_by_name_before_anything_is_read(layouts, tmp_path, layout, part):
    directory = shutil.copytree(layouts[layout], tmp_path / "cut")
    [file] = local(directory).weight_files()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CoraError, match=file.name):
        Checkpoint(local(directory))


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    ("name", "reads", "error"),
    [
        ("model.safetensors", "cora_cli.models.checkpoint.safe_open", MemoryError("Cannot allocate memory (os error 12)")),
        ("pytorch_model.bin", "torch.load", RuntimeError("unable to mmap 9 bytes from file <w>: Cannot allocate memory (12)")),
    ],
)
def test_a_file_for_which_there_is_no_memory_is_not_called_damaged(name, reads, error, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    save = save_file if name.endswith("safetensors") else torch.save
    save({"w": torch.zeros(2, 2)}, folder / name)

    def none_left(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(reads, none_left)
    with pytest.raises(type(error), match="Cannot allocate memory"):
        Checkpoint(local(folder))


@pytest.mark.parametrize("form", ["zip", "bare pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(tmp_path, form):
    trap = tmp_path / "trap"
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    file = directory / "pytorch_model.bin"
    if form == "zip":
        torch.save({"weight": torch.ones(2, 2), "evil": _Evil(trap)}, file)
        assert zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps(_Evil(trap)))
    with pytest.raises(CoraError, match=r"pytorch_model\.bin.*never loads"):
        Checkpoint(local(directory))
    assert not trap.exists()
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_missing_shard_is_refused_by_name(layouts, tmp_path):
    directory = shutil.copytree(layouts["sharded"], tmp_path / "m")
    victim = sorted(directory.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CoraError, match=victim.name):
        Checkpoint(local(directory))


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_missing(layouts, tmp_path):
    directory = shutil.copytree(layouts["sharded"], tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    content["weight_map"]["ghost.weight"] = file
    index.write_text(json.dumps(content))
    assert Checkpoint(local(directory)).missing == {"ghost.weight": file}
    assert Checkpoint(local(layouts["sharded"])).missing == {}


@pytest.mark.parametrize("own_code", [False, True])
def test_a_weight_that_the_index_promises_and_no_shard_holds_is_refused_where_it_is_needed(own_code, layouts, tmp_path):
    directory = shutil.copytree(layouts["sharded"], tmp_path / "m")
    index, name = directory / "model.safetensors.index.json", "model.layers.1.self_attn.o_proj.weight"
    file = directory / json.loads(index.read_text())["weight_map"][name]
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    if own_code:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    fault = (
        f"the index lists {name} in {file.name}" if own_code else "its files hold no weight for model.layers.1.self_attn.o_proj"
    )
    assert fault in open_source(local(directory)).faults[name.removesuffix(".weight")]
    if not own_code:
        with pytest.raises(CoraError, match=f"incomplete: 1 weights .*{re.escape(name)}"):
            load_model(local(directory), torch.float32, torch.device("cpu"), None)


def test_an_index_may_list_a_tied_head_that_no_shard_holds(tiny_model, tmp_path):
    """The converter of the hub stores weights that are one once, and lists both."""
    directory = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "a.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys([*tensors, "lm_head.weight"], "a.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded: Any = load_model(local(directory), torch.float32, torch.device("cpu"), None)
    assert torch.equal(loaded.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(open_source(local(directory)).read("lm_head"), tensors["model.embed_tokens.weight"])


def test_an_index_that_points_outside_its_directory_is_refused(layouts, tmp_path):
    directory = shutil.copytree(layouts["sharded"], tmp_path / "m")
    shutil.copy(layouts["single"] / "model.safetensors", tmp_path / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    with pytest.raises(CoraError, match="not in that directory"):
        Checkpoint(local(directory))


def stored_in_two_files(second: torch.Tensor, directory: Path) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    save_file({"scale": torch.ones(()), "x": torch.ones(2)}, directory / "a.safetensors")
    save_file({"scale": second, "y": torch.zeros(2)}, directory / "b.safetensors")
    return Checkpoint(local(directory))


def test_a_tensor_stored_twice_counts_once(tmp_path):
    found = stored_in_two_files(torch.ones(()), tmp_path).read_all()
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"scale": 1, "x": [1, 1], "y": [0, 0]}


@pytest.mark.parametrize("second", [torch.tensor(-1.0), torch.ones(2), torch.ones((), dtype=torch.bfloat16)])
def test_a_tensor_stored_in_two_ways_is_refused_with_both_files(second, tmp_path):
    with pytest.raises(CoraError, match=r"scale is stored twice, in \S*a\.safetensors and otherwise in b\.safetensors"):
        stored_in_two_files(second, tmp_path)


def test_a_bin_file_without_named_tensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save([torch.ones(2, 2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CoraError, match="holds a list"):
        Checkpoint(local(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "refused"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", torch.float8_e4m3fn, True),
        ("model.layers.0.mlp.experts.gate_up_proj", torch.int8, True),
        ("model.norm.weight", torch.int8, True),
        ("model.layers.0.attn.bias", torch.uint8, False),
        ("model.embeddings.position_ids", torch.int64, False),
    ],
)
def test_weights_without_their_scales_are_refused_and_buffers_are_not(name, kind, refused, tiny_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    weights = load_file(directory / "model.safetensors")
    weights[name] = torch.ones(2, 4).to(kind)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if refused:
        with pytest.raises(CoraError, match=f"{re.escape(name)} is stored as"):
            load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)
    else:
        load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)


def test_weights_of_a_quantization_that_transformers_does_not_know_are_refused_and_plain_ones_are_not(tiny_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "of_next_year"}}))
    load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights |= {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match=f"{re.escape(name)} is stored as float8_e4m3fn"):
        load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)


def test_a_quantization_that_a_nested_configuration_states_counts(tiny_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    nested = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    (directory / "config.json").write_text(json.dumps({**config, **nested}))
    with pytest.raises(CoraError, match=r"model says that its weights are quantised \(fp8\), but its files hold plain ones"):
        open_source(resolve_model(str(directory)))


def test_a_quantization_without_a_method_is_refused_by_name(tiny_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(CoraError, match=r"model has a quantization_config that cannot be read: .*no `quant_method`"):
        load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize("stated", [{}, {"metadata": None}])
def test_shards_are_loaded_by_an_index_that_has_no_metadata(stated, tiny_model, tmp_path):
    directory = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, directory / file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({**stated, "weight_map": places}))
    before = index.read_bytes()
    loaded = load_model(local(directory), torch.float32, torch.device("cpu"), None).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert index.read_bytes() == before


def test_a_weight_that_was_saved_without_its_numbers_is_named(tiny_model, tmp_path):
    directory = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: torch.zeros(0)}, directory / "model.safetensors", metadata={"format": "pt"})
    said = rf"{re.escape(name)} is stored without its numbers, with the shape \(0,\): its parts were not gathered"
    with pytest.raises(CoraError, match=said):
        load_model(local(directory), torch.float32, torch.device("cpu"), None)
    with pytest.raises(CoraError, match=said):
        open_source(local(directory)).targets(["q_proj"])


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_when_the_model_is_loaded(value, tiny_model, tmp_path):
    directory = Path(shutil.copytree(tiny_model, tmp_path / "damaged"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        load_model(local(directory), torch.float32, torch.device("cpu"), None)


def test_weights_of_zeros_as_a_download_that_was_cut_off_leaves_them_are_named(tiny_model, tmp_path, capsys):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    file = directory / "model.safetensors"
    load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)
    assert "zero throughout" not in capsys.readouterr().err
    with file.open("r+b") as opened:
        opened.seek(-150_000, 2)
        opened.write(bytes(150_000))
    load_model(resolve_model(str(directory)), torch.float32, torch.device("cpu"), None)
    assert re.search(r"model: \d+ of its 15 matrices are zero throughout, such as model\.layers\.", capsys.readouterr().err)


def test_a_pointer_of_git_lfs_is_called_one(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(CoraError, match=f"{name} is only a pointer of Git LFS, in place of the file itself"):
            Checkpoint(resolve_model(str(tmp_path)))
        (tmp_path / name).unlink()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"):
        directory = Path(shutil.copytree(tiny_model, tmp_path / f"with-{name}"))
        (directory / name).write_text(pointer)
        if name == "vocab.txt":
            assert len(load_tokenizer(local(directory))) == VOCABULARY  # by tokenizer.json
            (directory / "tokenizer.json").unlink()
        with pytest.raises(CoraError, match=f"{name} is only a pointer of Git LFS, in place of the file itself"):
            load_configuration(local(directory)) if name == "config.json" else load_tokenizer(local(directory))
