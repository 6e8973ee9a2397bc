import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cora_cli.basis.artifact import read_basis, write_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError, UsageError
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.references import resolve_model
from tests.weights.helpers import (
    CPU,
    dense_weights,
    local,
    make_adapter,
    reference_directions,
    reference_matrix,
    subspace_error,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def run(paths, output, base=None, **changed):
    choices = BasisChoices(**{"rank": 4, **changed})
    return extract_basis([local(path) for path in paths], output, choices, local(base) if base else None, CPU)


@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize("share", ["module", "projection"])
def test_grouped_query_models_give_the_reference_subspace_for_every_group(grouped_models, tmp_path, share, merge):
    run(grouped_models, tmp_path / "b", share=share, merge=merge)
    basis = read_basis(tmp_path / "b")
    dense = [dense_weights(path) for path in grouped_models]
    assert len(basis.directions) == (6 if share == "module" else 3)
    for group, directions in basis.directions.items():
        weights = [one[name] for one in dense for name in one if name == group or name.endswith(f".{group}")]
        reference, values = reference_directions(reference_matrix(weights, basis.choices), basis.choices)
        assert subspace_error(reference, directions) < 1e-6
        assert subspace_error(reference[:, :1], directions[:, :1]) < 1e-6, "the first direction comes first"
        np.testing.assert_allclose(basis.singular_values[group], values, rtol=1e-7)


def test_global_mean_on_the_input_side_is_the_literal_right_singular_vectors_of_the_mean(square_models, tmp_path):
    run(square_models, tmp_path / "b", share="global", merge="mean", side="input")
    weights = [one[name] for one in map(dense_weights, square_models) for name in one if name.endswith(PROJECTIONS)]
    assert len(weights) == 3 * 2 * 3
    right = np.linalg.svd(np.mean(weights, axis=0))[2][:4].T
    assert subspace_error(right, read_basis(tmp_path / "b").directions["global"]) < 1e-6


@pytest.mark.parametrize("share", ["module", "layer"])
def test_the_input_side_of_grouped_query_weights_is_the_space_that_q_k_and_v_share(share, grouped_models, tmp_path):
    run(grouped_models, tmp_path / "b", side="input", share=share, merge="gram")
    basis, dense = read_basis(tmp_path / "b"), list(map(dense_weights, grouped_models))
    for group, directions in basis.directions.items():
        members = [name for name in dense[0] if name.startswith(group) and name.endswith(PROJECTIONS)]
        assert len(members) == (1 if share == "module" else 3)
        pooled = sum(one[name].T @ one[name] for one in dense for name in members)
        assert subspace_error(np.linalg.eigh(pooled)[1][:, ::-1][:, :4], directions) < 1e-6


@pytest.mark.parametrize("with_base", [False, True])
def test_adapters_give_the_subspace_of_the_models_they_merge_into(grouped_models, tmp_path, with_base):
    base = grouped_models[0]
    adapters = [make_adapter(base, tmp_path / f"a{n}", tmp_path / f"m{n}", seed=n) for n in range(3)]
    run(adapters, tmp_path / "b", base=base if with_base else None)
    basis = read_basis(tmp_path / "b")
    dense = [dense_weights(tmp_path / f"m{n}") for n in range(3)]
    for group, directions in basis.directions.items():
        reference, _ = reference_directions(np.mean([one[group] for one in dense], axis=0), basis.choices)
        assert subspace_error(reference, directions) < 1e-5, "PEFT merges in float32"


def test_deltas_of_adapters_and_of_the_merged_models_span_the_same_space(grouped_models, tmp_path):
    base, targets = grouped_models[0], ("q_proj", "v_proj")
    adapters = [make_adapter(base, tmp_path / f"a{n}", tmp_path / f"m{n}", seed=n, r=2) for n in range(2)]
    mixed = [adapters[0], tmp_path / "m1"]
    run(adapters, tmp_path / "adapters", base=base, source="delta", target_modules=targets, share="projection", merge="gram")
    run(mixed, tmp_path / "mixed", base=base, source="delta", target_modules=targets, share="projection", merge="gram")
    one, other = read_basis(tmp_path / "adapters"), read_basis(tmp_path / "mixed")
    assert one.base_hash == other.base_hash is not None
    for group, directions in one.directions.items():
        assert subspace_error(other.directions[group].double().numpy(), directions) < 1e-4, "PEFT merges in float32"


def test_adapters_that_leave_a_target_alone_say_which_and_what_would_work(grouped_models, tmp_path):
    adapter = make_adapter(grouped_models[0], tmp_path / "a")
    with pytest.raises(CoraError, match=r"group model\.layers\.0\.self_attn\.k_proj is zero; .*--target-modules"):
        run([adapter], tmp_path / "b", base=grouped_models[0], source="delta")
    assert not (tmp_path / "b").exists()
    with pytest.raises(CoraError, match=r"is zero; the models equal the base there \(exclude it with --target-modules\)$"):
        run([adapter], tmp_path / "b", base=grouped_models[0], source="delta", merge="gram")


def test_one_low_rank_adapter_is_refused_beyond_its_rank(grouped_models, tmp_path):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", r=2)
    with pytest.raises(CoraError, match="numerical rank of 2, less than --rank 4; use --rank 2"):
        run([adapter], tmp_path / "b", base=grouped_models[0], source="delta", target_modules=("q_proj",))


def test_equal_inputs_give_equal_files_in_any_layout_of_the_checkpoint(grouped_models, tmp_path):
    first = run(grouped_models, tmp_path / "one")
    second = run(grouped_models, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert first.sha256 == second.sha256 == read_basis(tmp_path / "one").sha256


def test_an_existing_file_is_kept_unless_overwrite_is_said(grouped_models, tmp_path):
    output = tmp_path / "b"
    output.write_text("precious")
    models = [local(grouped_models[0])]
    with pytest.raises(CoraError, match="--overwrite"):
        extract_basis(models, output, BasisChoices(rank=2), None, CPU)
    assert output.read_text() == "precious"
    extract_basis(models, output, BasisChoices(rank=2), None, CPU, overwrite=True)
    assert read_basis(output).rank == 2


def test_weights_of_a_model_are_not_replaced_by_a_basis_even_with_overwrite(grouped_models, tmp_path):
    output = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2)}, output)
    before = output.read_bytes()
    with pytest.raises(CoraError, match="holds tensors and is no basis"):
        extract_basis([local(grouped_models[0])], output, BasisChoices(rank=2), None, CPU, overwrite=True)
    assert output.read_bytes() == before


def test_a_directory_is_no_place_for_a_basis_even_with_overwrite(grouped_models, tmp_path):
    with pytest.raises(CoraError, match="is a directory"):
        extract_basis([local(grouped_models[0])], tmp_path, BasisChoices(rank=2), None, CPU, overwrite=True)


def test_no_model_and_a_delta_without_base_are_usage_errors(grouped_models, tmp_path):
    with pytest.raises(UsageError, match="at least one"):
        run([], tmp_path / "b")
    with pytest.raises(UsageError, match="--base"):
        run(grouped_models, tmp_path / "b", source="delta")


def test_a_model_that_is_named_twice_is_refused_and_a_copy_of_one_is_named(grouped_models, tmp_path, capfd):
    one, other = grouped_models[:2]
    with pytest.raises(UsageError, match="is named twice; name it once"):
        run([one, other, one / ".." / one.name], tmp_path / "b.safetensors")
    copied = shutil.copytree(one, tmp_path / "copied")
    run([one, other, copied], tmp_path / "b.safetensors")
    assert f"{one} and {copied} hold the same weights there, which count twice" in capfd.readouterr().err


def test_a_model_with_the_weights_of_the_base_is_named_where_changes_are_merged(grouped_models, tmp_path, capfd):
    one, other = grouped_models[:2]
    said = "holds the weights of the base there, so its change is zero, and it counts as a model all the same"
    run([one, other], tmp_path / "b.safetensors")
    assert said not in capfd.readouterr().err
    run([one, other], tmp_path / "delta.safetensors", base=one, source="delta")
    told = capfd.readouterr().err
    assert (f"{one} {said}" in told, f"{other} {said}" in told) == (True, False)


def test_a_model_that_changed_some_of_the_weights_only_is_named_with_one_that_it_left(grouped_models, tmp_path, capfd):
    base = grouped_models[0]
    fewer = make_adapter(base, tmp_path / "fewer", target_modules=["q_proj", "v_proj"])
    all_of_them = make_adapter(base, tmp_path / "all", target_modules=["q_proj", "k_proj", "v_proj"])
    complete = shutil.copytree(base, tmp_path / "complete")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] += 1
    save_file(tensors, complete / "model.safetensors", metadata={"format": "pt"})
    run([fewer, all_of_them, complete], tmp_path / "b.safetensors", base=base, source="delta", merge="gram", rank=2)
    told = capfd.readouterr().err
    for model, left in ((fewer, 2), (complete, 5)):
        assert (
            f"{model} holds the weights of the base in {left} of the 6 matrices, such as model.layers.0.self_attn.k_proj, so"
            in told
        )
    assert f"{all_of_them} holds" not in told


def test_a_model_with_damaged_weights_stops_the_command_and_leaves_nothing(grouped_models, tmp_path):
    bad = shutil.copytree(grouped_models[0], tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CoraError, match=r"bad: model\.layers\.1\.self_attn\.v_proj holds values that are not finite"):
        run([grouped_models[0], bad], tmp_path / "out" / "b")
    assert not (tmp_path / "out").exists()


def test_models_of_different_architecture_are_refused_by_name(grouped_models, square_models, tmp_path):
    with pytest.raises(CoraError) as caught:
        run([grouped_models[0], square_models[0]], tmp_path / "b")
    for part in (str(grouped_models[0]), str(square_models[0]), "k_proj", "(8, 16)", "(16, 16)"):
        assert part in str(caught.value)


def test_the_summary_counts_groups_bytes_and_explained_variance(grouped_models, tmp_path):
    summary = run(grouped_models, tmp_path / "b")
    target_bytes = 2 * 2 * (16 * 16 + 2 * 8 * 16) * 4
    assert summary.bytes_read == target_bytes
    assert [(kind.kind, kind.groups) for kind in summary.kinds] == [("k_proj", 2), ("q_proj", 2), ("v_proj", 2)]
    dense = [dense_weights(path) for path in grouped_models]
    for kind in summary.kinds:
        shares = []
        for name in dense[0]:
            if name.endswith(kind.kind):
                energies = np.linalg.svd(np.mean([one[name] for one in dense], axis=0))[1] ** 2
                shares.append(energies[:4].sum() / energies.sum())
        np.testing.assert_allclose([kind.mean, kind.minimum, kind.maximum], [np.mean(shares), min(shares), max(shares)])
    assert 0 < summary.seconds_reading < summary.seconds
    assert 0 < summary.seconds_decomposing < summary.seconds
    text = summary.render()
    for part in ("6 groups of rank 4 from 2 models", "k_proj", "q_proj", "v_proj", summary.sha256):
        assert part in text


@pytest.mark.parametrize(
    ("share", "kinds"), [("layer", ["layer"]), ("projection", ["k_proj", "q_proj", "v_proj"]), ("global", ["global"])]
)
def test_the_summary_names_the_kind_of_each_group(square_models, tmp_path, share, kinds):
    assert [kind.kind for kind in run(square_models[:1], tmp_path / "b", share=share).kinds] == kinds


def test_a_subspace_that_is_not_unique_is_reported_and_recorded(grouped_models, tmp_path):
    flat = shutil.copytree(grouped_models[0], tmp_path / "flat")
    tensors = load_file(flat / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.eye(16)
    save_file(tensors, flat / "model.safetensors")
    summary = run([flat], tmp_path / "b")
    assert summary.without_gap == ("model.layers.0.self_attn.q_proj",)
    assert "model.layers.0.self_attn.q_proj: no spectral gap at rank 4, so this subspace is not unique" in summary.render()
    assert read_basis(tmp_path / "b").gaps["model.layers.0.self_attn.q_proj"] is False


@pytest.mark.parametrize("component", ["top", "bottom"])
@pytest.mark.parametrize("method", ["svd", "pca"])
@pytest.mark.parametrize("merge", ["mean", "gram"])
@pytest.mark.parametrize(("share", "side"), [("projection", "output"), ("projection", "input"), ("layer", "input")])
def test_a_pooled_basis_records_what_it_keeps_of_each_weight(grouped_models, tmp_path, share, side, merge, method, component):
    if share == "layer":
        merge = "gram"  # k and v are smaller
    choices = {"share": share, "side": side, "merge": merge, "method": method, "component": component}
    summary = run(grouped_models, tmp_path / "b", **choices)
    basis, dense = read_basis(tmp_path / "b"), list(map(dense_weights, grouped_models))
    assert set(basis.layers) == set(basis.modules)
    for module, found in basis.layers.items():
        m = reference_matrix([one[module] for one in dense], basis.choices)
        directions = basis.directions[basis.mapping.group_of(module)].double().numpy()
        _, values = reference_directions(m, basis.choices)
        energy = (m**2).sum()
        assert found.kept == pytest.approx(((directions.T @ m) ** 2).sum() / energy, rel=1e-6)
        assert found.own == pytest.approx((values**2).sum() / energy, rel=1e-6, abs=1e-12)
        assert found.chance == 4 / len(m)
        assert component == "bottom" or found.kept <= found.own + 1e-9
    text = summary.render()
    for pool in summary.pooled:
        kept = [energy.kept for module, energy in basis.layers.items() if share == "layer" or module.endswith(pool.kind)]
        assert (pool.weights, pool.kept) == (len(kept), pytest.approx(np.mean(kept)))
        assert (
            f"{pool.weights}  {pool.kept:7.2%}  {min(kept):7.2%}  {max(kept):7.2%}  {pool.chance:7.2%}  {pool.own:7.2%}" in text
        )


def test_a_basis_of_each_weight_alone_and_one_of_an_earlier_version_record_nothing_of_the_kind(grouped_models, tmp_path):
    assert not run(grouped_models, tmp_path / "own").pooled
    assert b'"layers"' not in (tmp_path / "own").read_bytes()
    run(grouped_models, tmp_path / "pooled", share="projection")
    pooled = read_basis(tmp_path / "pooled")
    assert pooled.layers
    write_basis(tmp_path / "earlier", dataclasses.replace(pooled, layers={}))
    earlier = read_basis(tmp_path / "earlier")
    assert (earlier.layers, earlier.sha256) == ({}, pooled.sha256)


def test_differences_of_low_rank_and_weights_without_any_are_measured_too(grouped_models, tmp_path):
    base = grouped_models[0]
    changed = shutil.copytree(base, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        change = torch.randn(16, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] += change
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    choices = {"share": "global", "source": "delta", "merge": "gram", "rank": 3, "side": "input"}
    run([changed], tmp_path / "b", base=base, **choices)
    layers = read_basis(tmp_path / "b").layers
    assert sorted(layers) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert all(energy.own == pytest.approx(1) and energy.kept < 1 for energy in layers.values())


def test_an_output_that_is_a_file_of_a_source_is_refused_and_left_alone(square_models, tmp_path):
    model = shutil.copytree(square_models[0], tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        before = (model / name).read_bytes()
        with pytest.raises(CoraError, match=f"{name} is a file of .*model, which is read; write the basis to another file"):
            extract_basis([local(model)], model / name, BasisChoices(rank=4), None, CPU, overwrite=True)
        assert (model / name).read_bytes() == before


def test_a_base_that_nothing_needs_is_refused(grouped_models, tmp_path):
    with pytest.raises(UsageError, match="--base has no effect on complete models with --source weights"):
        run(grouped_models[:1], tmp_path / "b", base=grouped_models[1])


def test_adapters_of_two_base_models_are_merged_with_a_word(tiny_sources, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cora_cli.extraction.extract.say_different_bases", asked.append)
    models = [resolve_model(source) for source in tiny_sources]
    extract_basis(models, tmp_path / "b", BasisChoices(rank=4), None, torch.device("cpu"))
    assert asked == [models]
