"""An adapter that is not W plus scaled BA, is incomplete or is damaged is refused by what it has or lacks."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cora_cli.adapters.loading import load_adapter
from cora_cli.basis.choices import BasisChoices
from cora_cli.device import select_hardware
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.inspection.inspect import inspect
from cora_cli.weights.sources import open_source
from tests.weights.helpers import CPU, change_config, change_tensors, local, make_adapter, make_llama

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "LOHA"}, "LOHA adapter"),
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "olora"}, "changes the base weights; merge it first"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be computed again; save it as a plain LoRA"),
        ({"alora_invocation_tokens": [5]}, r"not W \+ s·B·A, nor can it be merged into any"),
        ({"r": 5}, "do not fit r = 5"),
        ({"rank_pattern": {"q_proj": 2}}, "do not fit r = 2"),
        ({"layers_pattern": "layers"}, "PEFT refuses its adapter_config.json: .*layers_to_transform"),
        ({"exclude_modules": 3}, "exclude_modules must be a list or text or null, not 3"),
        ({"layers_to_transform": "abc"}, 'layers_to_transform must be a list or an integer or null, not "abc"'),
        ({"target_modules": []}, "adapter_config.json names no target_modules; PEFT would leave out the adapter"),
        ({"bias": "some"}, "has bias 'some', which PEFT does not know"),
        ({"lora_alpha": 0}, f"lora_alpha 0 for {Q0}, which leaves its weight as it is; the adapter is damaged"),
        (
            {"layers_to_transform": [0]},
            "for 2 layers that its adapter_config.json does not name, such as .*layers.1.*; PEFT would",
        ),
        (
            {"exclude_modules": ["v_proj"]},
            "for 2 layers that its adapter_config.json does not name, such as .*v_proj; PEFT would",
        ),
    ],
)
def test_adapters_that_are_not_w_plus_scaled_b_a_are_refused(copy, changed, said):
    change_config(copy, **changed)
    with pytest.raises(CoraError, match=said):
        open_source(local(copy))


def test_a_start_that_peft_reads_in_any_case_of_letters_is_not_taken_for_a_change_of_the_base(copy):
    change_config(copy, init_lora_weights="Gaussian")
    assert open_source(local(copy)).read(Q0).any()


def test_an_adapter_of_rank_0_is_refused(copy):
    def empty(tensors):
        for key in tensors:
            tensors[key] = (tensors[key][:0] if "lora_A" in key else tensors[key][:, :0]).contiguous()

    change_tensors(copy, empty)
    change_config(copy, r=0)
    with pytest.raises(CoraError, match=r"copy: .*_proj has rank 0; the adapter is empty or damaged"):
        open_source(local(copy))


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_an_adapter_with_half_a_pair_is_refused(copy, matrix):
    change_tensors(copy, lambda tensors: tensors.pop(f"base_model.model.{Q0}.lora_{matrix}.weight"))
    with pytest.raises(CoraError, match=f"{Q0} has no lora_{matrix} matrix; the adapter is incomplete"):
        open_source(local(copy))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model.model.layers.0.self_attn.q_proj.lora_{}.weight", "matches no module of its base"),
        ("base_model.model.model.layers.0.self_attn.q_proj.hada_{}", "neither a lora_A or lora_B matrix"),
        (Q0 + ".lora_{}.weight", "neither a lora_A or lora_B matrix"),
    ],
)
def test_an_adapter_with_unmatched_keys_is_refused(copy, key, said):
    def rename(tensors):
        for matrix in "AB":
            tensors[key.format(matrix)] = tensors.pop(f"base_model.model.{Q0}.lora_{matrix}.weight")

    change_tensors(copy, rename)
    with pytest.raises(CoraError, match=said):
        open_source(local(copy))


def test_an_adapter_for_weights_of_another_shape_is_refused_with_the_shapes(copy, square_models):
    with pytest.raises(CoraError, match=r"v_proj has lora_A \(4, 16\) and lora_B \(8, 4\).*\(16, 16\)"):
        open_source(local(copy), open_source(local(square_models[0])))


def test_an_empty_adapter_is_refused(copy):
    change_tensors(copy, lambda tensors: tensors.clear())
    with pytest.raises(CoraError, match="holds no lora_A"):
        open_source(local(copy))


def test_a_factor_that_is_not_finite_is_refused_by_name(copy):
    key = f"base_model.model.{Q0}.lora_B.weight"
    change_tensors(copy, lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(CoraError, match=r"lora_B.*not finite"):
        open_source(local(copy)).read(Q0)


def test_factors_under_other_names_than_pefts_are_refused_by_key(copy):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    change_tensors(copy, rename)
    with pytest.raises(CoraError, match=r"lora_A\.default\.weight is of no linear layer of its base"):
        open_source(local(copy))


def test_an_adapter_without_a_layer_that_its_configuration_names_is_refused(copy):
    change_tensors(copy, lambda tensors: [tensors.pop(f"base_model.model.{V1}.lora_{matrix}.weight") for matrix in "AB"])
    with pytest.raises(
        CoraError, match=f"copy holds no lora_A and lora_B for 1 layers of its base .* such as {V1}; .* incomplete"
    ):
        open_source(local(copy))
    change_config(copy, target_modules="all-linear")
    with pytest.raises(CoraError, match=f"such as {V1}"):
        open_source(local(copy))
    change_config(copy, target_modules=["q_proj", "layers.0.self_attn.v_proj"])
    assert open_source(local(copy)).shapes[V1] == (8, 16)


@pytest.mark.parametrize("shape", [(16, 8), (128,), (8, 4, 4)])
def test_a_saved_weight_of_another_shape_than_the_layers_is_refused(grouped_models, tmp_path, shape):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", target_modules=["q_proj"], modules_to_save=["v_proj"])
    change_tensors(adapter, lambda tensors: tensors.update({f"base_model.model.{V1}.weight": torch.ones(shape)}))
    with pytest.raises(CoraError, match=rf"{V1}\.weight has the shape .*, which does not fit the weight \(8, 16\) of its base"):
        open_source(local(adapter))


def test_dora_magnitudes_are_refused_by_name(grouped_models, tmp_path):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", use_dora=True)
    base = open_source(local(grouped_models[0]))
    with pytest.raises(CoraError, match=r"a was trained with use_dora, so its weights are not W \+ s·B·A; merge it first"):
        open_source(local(adapter), base)
    change_config(adapter, use_dora=False)
    with pytest.raises(CoraError, match=r"lora_magnitude_vector.* is of DoRA, whose weights are not W \+ s·B·A"):
        open_source(local(adapter), base)


def test_a_saved_module_under_its_name_in_the_wrapped_model_is_refused_by_key(grouped_models, tmp_path):
    adapter = make_adapter(grouped_models[0], tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.modules_to_save.default.weight"
    change_tensors(adapter, lambda tensors: tensors.update({key: tensors.pop("base_model.model.lm_head.weight")}))
    with pytest.raises(
        CoraError, match=f"{re.escape(key)} is neither a lora_A or lora_B matrix nor the weight of a fully saved"
    ):
        open_source(local(adapter))


@pytest.fixture
def changed_base(tiny_sources, tiny_model, tmp_path) -> tuple[Path, Path]:
    """An adapter that `cora` trained, and its base after another change."""
    base, adapter = (
        Path(shutil.copytree(path, tmp_path / name)) for path, name in ((tiny_model, "base"), (tiny_sources[0], "adapter"))
    )
    change_config(adapter, base_model_name_or_path=str(base))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return adapter, base


def test_a_base_that_changed_after_the_training_is_refused_unless_it_is_named(changed_base, tmp_path, capsys):
    adapter, base = changed_base
    with pytest.raises(CoraError, match="it is another model, or it has changed"):
        open_source(local(adapter))
    with pytest.raises(CoraError, match="it is another model, or it has changed"):
        inspect([str(adapter)], None, 4, None, None, (), (), None, 0, select_hardware("cpu", "fp32"))
    choices = BasisChoices(rank=4, source="delta", target_modules=("q_proj",))
    extract_basis([local(adapter)], tmp_path / "b", choices, local(base), CPU)
    assert "it is another model, or it has changed" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_an_adapter_whose_parts_were_not_gathered_is_refused_by_its_key(shape, plain, grouped_models, tmp_path):
    directory = Path(shutil.copytree(plain, tmp_path / "adapter"))
    tensors = load_file(directory / "adapter_model.safetensors")
    key = f"base_model.model.{Q0}.lora_A.weight"
    save_file({**tensors, key: torch.zeros(shape)}, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    said = (
        rf"{re.escape(key)} is stored without its numbers, with the shape {re.escape(str(shape))}: its parts were not gathered"
    )
    with pytest.raises(CoraError, match=said):
        open_source(local(directory))
    with pytest.raises(CoraError, match=said):
        load_adapter(make_llama(kv_heads=2), local(directory))
