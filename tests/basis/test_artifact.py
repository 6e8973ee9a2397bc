import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cora_cli import __version__, hashing
from cora_cli.basis.artifact import Basis, differing_key, read_basis, write_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.weights.sources import open_source
from tests.weights.helpers import CPU, local

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def files(grouped_models, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    models = [local(path) for path in grouped_models]
    extract_basis(models, root / "weights", BasisChoices(rank=4), None, CPU)
    extract_basis(models[1:], root / "delta", BasisChoices(rank=4, source="delta"), models[0], CPU)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def basis(files) -> Basis:
    return read_basis(files["weights"])


def rewrite(source: Path, target: Path, tensors=lambda tensors: None, record=lambda record: None, key="cora_basis") -> Path:
    """A copy with changes and a digest that fits them, as a careless editor of the file would make it."""
    content = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = json.loads(file.metadata()["cora_basis"])
    tensors(content)
    record(metadata)
    metadata.pop("digest")
    metadata["digest"] = hashing.sha256_json(metadata)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, target, {key: json.dumps(metadata)})
    return target


def test_the_file_holds_what_the_contract_says(files, grouped_models):
    tensors = load_file(files["weights"])
    assert tensors[f"basis/{Q0}"].shape == (16, 4)
    assert tensors[f"basis/{Q0}"].dtype == torch.float32
    assert tensors["basis/model.layers.1.self_attn.k_proj"].shape == (8, 4)
    assert tensors[f"singular_values/{Q0}"].shape == (4,)
    assert tensors[f"total_energy/{Q0}"].shape == ()
    with safe_open(files["weights"], framework="pt") as file:
        record = json.loads(file.metadata()["cora_basis"])
    assert record["format_version"] == 1
    assert record["cora_version"] == __version__
    assert record["choices"] == BasisChoices(rank=4).to_json()
    assert [source["reference"] for source in record["sources"]] == [str(path) for path in grouped_models]
    assert all(len(source["hash"]) == 64 for source in record["sources"])
    assert record["architecture"]["hidden_size"] == 16
    assert record["group_pattern"]
    assert record["group_template"]
    assert record["gaps"][Q0] is True


def test_reading_gives_back_what_was_written(files, basis, tmp_path):
    write_basis(tmp_path / "again", basis)
    again = read_basis(tmp_path / "again")
    for field in dataclasses.fields(Basis):
        old, new = getattr(basis, field.name), getattr(again, field.name)
        if isinstance(old, dict) and isinstance(next(iter(old.values()), None), torch.Tensor):
            assert all(torch.equal(old[group], new[group]) for group in old | new)
        elif field.name != "path":
            assert old == new
    assert (tmp_path / "again").read_bytes() == files["weights"].read_bytes(), "equal bases are equal files"
    assert again.sha256 == basis.sha256


def test_the_hash_is_independent_of_place_and_sees_tensors_and_choices(files, grouped_models, basis, tmp_path):
    moved = [local(shutil.copytree(path, tmp_path / path.name)) for path in grouped_models]
    assert extract_basis(moved, tmp_path / "b", BasisChoices(rank=4), None, CPU).sha256 == basis.sha256
    turned = {**basis.directions, Q0: -basis.directions[Q0]}
    assert dataclasses.replace(basis, directions=turned).sha256 != basis.sha256
    assert dataclasses.replace(basis, choices=BasisChoices(rank=4, merge="gram")).sha256 != basis.sha256


def test_groups_come_back_in_layer_order(tmp_path, basis):
    names = ["model.layers.2", "model.layers.10"]
    shared = BasisChoices(share="layer", rank=4)
    one = {name: basis.directions[Q0].clone() for name in names}
    values, energy = basis.singular_values[Q0], basis.total_energy[Q0]
    write_basis(
        tmp_path / "b",
        dataclasses.replace(
            basis,
            choices=shared,
            mapping=shared.mapping,
            directions=one,
            singular_values={name: values.clone() for name in names},
            total_energy={name: energy.clone() for name in names},
            gaps=dict.fromkeys(names, True),
            modules={f"{name}.q_proj": (16, 16) for name in names},
        ),
    )
    assert list(read_basis(tmp_path / "b").directions) == names


def test_a_module_gets_the_first_directions_of_its_group(basis):
    found = basis.for_module(Q0, 3, 16)
    assert torch.equal(found, basis.directions[Q0][:, :3])
    found.zero_()
    assert basis.directions[Q0].abs().sum() > 0, "a caller's changes stay its own"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.layers.7.self_attn.q_proj", 4, 16), r"no group for module model\.layers\.7.*6 in all"),
        ((Q0, 4, 32), "32 outputs, but group .* expects 16"),
        ((Q0, 5, 16), "--rank 5 .*holds 4 directions; use --rank 4 or less"),
        ((Q0, 0, 16), "--rank 0"),
    ],
)
def test_a_module_that_the_basis_cannot_serve_is_refused(basis, arguments, said):
    with pytest.raises(CoraError, match=said):
        basis.for_module(*arguments)


@pytest.mark.parametrize("share", ["layer", "global"])
def test_a_shared_basis_serves_no_module_that_it_was_not_extracted_from(share, grouped_models, tmp_path):
    choices = BasisChoices(share=share, rank=4, target_modules=("k_proj",))
    extract_basis([local(model) for model in grouped_models], tmp_path / "basis", choices, None, CPU)
    shared = read_basis(tmp_path / "basis")
    name = "model.layers.0.self_attn.{}"
    features = len(shared.for_module(name.format("k_proj"), 2, len(next(iter(shared.directions.values())))))
    with pytest.raises(CoraError, match=r"was extracted from k_proj, and not from model\.layers\.0\.self_attn\.v_proj"):
        shared.for_module(name.format("v_proj"), 2, features)


def test_the_text_part_that_is_loaded_of_an_image_model_has_its_architecture():
    assert differing_key({"model_type": "llama4", "hidden_size": 16}, {"model_type": "llama4_text", "hidden_size": 16}) is None
    assert differing_key({"model_type": "llama4"}, {"model_type": "qwen3_5_text"}) == "model_type"


def test_an_image_model_that_is_loaded_complete_has_another_architecture_than_its_text_part_alone():
    assert differing_key({"model_type": "gemma3"}, {"model_type": "gemma3_text"}) == "model_type"


def test_a_model_of_the_same_architecture_passes_with_any_vocabulary(basis):
    basis.check_model({**basis.architecture, "vocab_size": 99}, {Q0: (16, 16)}, 4)
    basis.check_model({}, {Q0: (16, 16)}, 2)


@pytest.mark.parametrize(
    ("changed", "shapes", "rank", "said"),
    [
        ({"model_type": "mistral"}, {}, 4, "model_type = llama, but this model has mistral"),
        ({"num_hidden_layers": 3}, {}, 4, "num_hidden_layers = 2, but this model has 3"),
        ({}, {"model.layers.2.self_attn.q_proj": (16, 16)}, 4, "no group"),
        ({}, {Q0: (8, 16)}, 4, "8 outputs"),
        ({}, {}, 5, "--rank 5"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_found_and_expected(basis, changed, shapes, rank, said):
    with pytest.raises(CoraError, match=said):
        basis.check_model({**basis.architecture, **changed}, shapes, rank)


def test_a_delta_basis_accepts_its_own_base_only(files, grouped_models, tmp_path):
    delta = read_basis(files["delta"])
    own, other = (open_source(local(path)) for path in grouped_models)
    assert delta.base_hash == own.content_hash(delta.modules)
    delta.check_base(own)
    delta.check_base(open_source(local(shutil.copytree(grouped_models[0], tmp_path / "moved"))))
    with pytest.raises(CoraError, match=rf"{delta.base_hash}.*has {other.content_hash(delta.modules)}"):
        delta.check_base(other)


def test_a_delta_basis_refuses_a_model_without_its_modules(files, square_models):
    with pytest.raises(CoraError, match=r"has no weight .*k_proj \(8, 16\)"):
        read_basis(files["delta"]).check_base(open_source(local(square_models[0])))


def test_a_basis_of_weights_serves_any_base_without_reading_it(basis, grouped_models):
    source = open_source(local(grouped_models[1]))
    basis.check_base(source)
    assert source.bytes_read == 0
    assert basis.base_hash is None


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CoraError, match="does not exist"):
        read_basis(tmp_path / "none")


@pytest.mark.parametrize("part", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(files, tmp_path, part):
    data = files["weights"].read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CoraError, match="not a complete safetensors file"):
        read_basis(tmp_path / "cut")


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(files, basis, tmp_path):
    data = files["weights"].read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    positions = [*range(0, header, 7), *range(header, len(data), 97)]
    harmless = 0
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        (tmp_path / "flipped").write_bytes(damaged)
        try:
            found = read_basis(tmp_path / "flipped")
        except CoraError:
            continue
        harmless += 1
        assert position < header, "only the header's spaces may differ"
        assert found.sha256 == basis.sha256
    assert harmless <= 2


def damage_columns(tensors):
    tensors[f"basis/{Q0}"][:, 1] = tensors[f"basis/{Q0}"][:, 0]


@pytest.mark.parametrize(
    ("tensors", "record", "said"),
    [
        (None, lambda record: record.update(format_version=2), "format version 2, but this cora reads version 1"),
        (lambda tensors: tensors.pop(f"basis/{Q0}"), None, "is missing"),
        (lambda tensors: tensors.update({"basis/x": torch.ones(2, 2)}), None, "basis/x, which its metadata does not list"),
        (
            lambda tensors: tensors.update({f"basis/{Q0}": torch.eye(16)[:, :3]}),
            None,
            r"\(16, 3\), not \(16, 4\)",
        ),
        (
            lambda tensors: tensors.update({f"basis/{Q0}": torch.eye(17)[:, :4]}),
            None,
            r"\(17, 4\), not \(16, 4\)",
        ),
        (lambda tensors: tensors[f"basis/{Q0}"].mul_(float("nan")), None, "does not hold finite"),
        (damage_columns, None, "not orthonormal"),
        (lambda tensors: tensors[f"singular_values/{Q0}"].mul_(1.001), None, "its content hash is"),
        (None, lambda record: record["choices"].update(weighting="equal"), "does not know the key 'choices.weighting'"),
        (None, lambda record: record["sources"][0].update(license="mit"), "does not know the key 'sources.license'"),
        (None, lambda record: record["choices"].update(share="block"), "edited was altered .* --share must be one of module"),
    ],
)
def test_a_file_that_was_edited_is_refused_even_with_a_fitting_digest(files, tmp_path, tensors, record, said):
    file = rewrite(files["weights"], tmp_path / "edited", tensors or (lambda _: None), record or (lambda _: None))
    with pytest.raises(CoraError, match=said):
        read_basis(file)


def test_an_edited_record_without_a_fitting_digest_is_refused(files, tmp_path):
    with safe_open(files["weights"], framework="pt") as file:
        metadata = file.metadata()["cora_basis"].replace('"hidden_size": 16', '"hidden_size": 17')
    save_file(load_file(files["weights"]), tmp_path / "edited", {"cora_basis": metadata})
    with pytest.raises(CoraError, match="does not match its digest"):
        read_basis(tmp_path / "edited")


def test_what_is_no_basis_file_at_all_is_called_so(tmp_path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CoraError, match="only a pointer of Git LFS"):
        read_basis(tmp_path / "pointer.safetensors")
    with pytest.raises(CoraError, match="is a directory; name the file"):
        read_basis(tmp_path)


def test_another_safetensors_file_is_no_basis(files, grouped_models, tmp_path):
    for file in (grouped_models[0] / "model.safetensors", rewrite(files["weights"], tmp_path / "other", key="other")):
        with pytest.raises(CoraError, match="not a basis"):
            read_basis(file)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(files, basis, tmp_path, monkeypatch):
    target = tmp_path / "b"
    shutil.copy(files["delta"], target)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CoraError, match="the disk is full"):
        write_basis(target, basis)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert target.read_bytes() == files["delta"].read_bytes()
