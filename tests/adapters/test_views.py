"""Adapters on q_proj, k_proj and v_proj of models that have them fused: their basis, training, merge and export."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cora_cli.adapters.elsewhere import peft_loads
from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter, target_linears
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.fused import VIEWS, split_projections
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.weights.planned import PlannedSource
from cora_cli.weights.sources import open_source
from cora_cli.weights.start_models import StartModels
from tests.methods.helpers import plan_of
from tests.models.fused import FAMILY_SLICES, IDS, logits, model_of, weight_of
from tests.training.families import build

RANK = 3
SETTINGS = {"rank": RANK, "alpha": 6.0, "rslora": False, "dropout": 0.0, "seed": 0}
FAMILIES = ("gpt2", "phi3", "gpt_neox", "falcon", "falcon-alibi", "falcon-old", "codegen")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model of a family, as a directory."""
    root, made = tmp_path_factory.mktemp("fused"), {}

    def of(family: str) -> Path:
        if family not in made:
            model_of(family).save_pretrained(root / family)
            made[family] = root / family
        return made[family]

    return of


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def places(model, family: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == FAMILY_SLICES[family][0]]


def basis_of(base: Path, directory: Path) -> Basis:
    path = directory / "basis.safetensors"
    extract_basis([resolve_model(str(base))], path, BasisChoices(rank=RANK), None, torch.device("cpu"))
    return read_basis(path)


def trained(
    base: Path, mode: str, directory: Path, targets: tuple[str, ...] = VIEWS, compact: bool = False, **own: object
) -> tuple[ModelPath, torch.Tensor, list[float]]:
    """An adapter after six steps of Adam, the logits with it, and the losses."""
    plan = plan_of(mode, **SETTINGS, target_modules=targets, has_basis=mode == "fb", **own)
    basis = basis_of(base, directory) if mode == "fb" else None
    wrapped = install_adapter(load(base), plan, basis)
    optimizer = torch.optim.Adam([one for one in wrapped.parameters() if one.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    of_basis = (str(basis.path), basis.sha256) if basis else (None, None)
    facts = AdapterFacts(plan, str(base), None, resolve_model(str(base)).content_hash(), *of_basis, compact=compact)
    save_adapter(wrapped.eval(), directory / "adapter", facts)
    return resolve_model(str(directory / "adapter")), logits(wrapped), losses


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_has_the_names_of_the_split_model_and_the_directions_of_their_rows(family, saved, tmp_path):
    base = load(saved(family))
    basis = basis_of(saved(family), tmp_path)
    rows = FAMILY_SLICES[family][1]
    assert sorted(basis.modules) == sorted(f"{place}.{part}" for place in places(base, family) for part in VIEWS)
    for place in places(base, family):
        for number, part in enumerate(VIEWS):
            weight = rows(weight_of(base.get_submodule(place)), number).double()
            found = basis.for_module(f"{place}.{part}", RANK, len(weight)).double()
            u = torch.linalg.svd(weight).U[:, :RANK]
            assert torch.linalg.matrix_norm(found - u @ (u.T @ found), 2) < 1e-5
    split_projections(base, VIEWS)
    assert target_linears(base, VIEWS).keys() == basis.modules.keys()


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((family, "lora") for family in FAMILIES[:3]),
        ("gpt2", "fb"),
        *(pytest.param(family, "lora", marks=pytest.mark.slow) for family in FAMILIES[3:]),
        pytest.param("falcon", "fb", marks=pytest.mark.slow),
    ],
)
def test_training_on_the_views_lowers_the_loss_and_plain_programs_load_the_merged_and_the_exported(
    family, mode, saved, tmp_path
):
    base = saved(family)
    adapter, expected, losses = trained(base, mode, tmp_path)
    plain = logits(load(base))
    assert losses[-1] < losses[0] - 0.02
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert set(adapter.adapter_config()["target_modules"]) == set(VIEWS)
    assert json.loads((adapter.path / "cora.json").read_text())["views"] is True
    assert not peft_loads(adapter)
    assert close(logits(load_adapter(load(base), adapter)), expected)
    if mode == "fb":
        directions, state = read_basis(tmp_path / "basis.safetensors"), load_file(adapter.path / "adapter_model.safetensors")
        for module, (outputs, _) in directions.modules.items():
            stored = state[f"base_model.model.{module}.lora_B.weight"]
            assert torch.equal(stored, directions.for_module(module, RANK, outputs))

    assert merge_views(adapter, tmp_path / "merged") == 6
    merged = load(tmp_path / "merged")
    assert merged.state_dict().keys() == load(base).state_dict().keys()
    assert close(logits(merged), expected)

    assert export_adapter(adapter, tmp_path / "exported") == 3 * RANK
    exported = PeftModel.from_pretrained(load(base), tmp_path / "exported").eval()
    assert resolve_model(str(tmp_path / "exported")).adapter_config()["target_modules"] == [FAMILY_SLICES[family][0]]
    assert close(logits(exported), expected)
    assert close(logits(exported.merge_and_unload()), expected)

    sources = [open_source(resolve_model(str(path))) for path in (adapter.path, tmp_path / "exported", tmp_path / "merged")]
    for place in places(merged, family):
        whole = weight_of(merged.get_submodule(place)).detach().double()
        for source in sources:
            assert close(source.read(place).double(), whole)
            for number, part in enumerate(VIEWS):
                assert close(source.read(f"{place}.{part}").double(), FAMILY_SLICES[family][1](whole, number))
    assert sources[0].own_rank(f"{places(merged, family)[0]}.q_proj", sources[0].base) == RANK
    assert sources[0].own_rank(places(merged, family)[0], sources[0].base) == 3 * RANK
    assert sources[1].own_rank(f"{places(merged, family)[0]}.q_proj", sources[1].base) == 3 * RANK


def merge_views(adapter: ModelPath, output: Path) -> int:
    """`merge_adapter` for a base model without a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cora_cli.adapters.merge.load_tokenizer", lambda *_: NoTokenizer())
        return merge_adapter(adapter, output)


class NoTokenizer:
    def save_pretrained(self, directory: Path) -> None:
        pass


def test_queries_alone_are_adapted_and_exported_next_to_other_layers(saved, tmp_path):
    adapter, expected, _ = trained(saved("phi3"), "lora", tmp_path, ("q_proj", "o_proj"))
    state = load_file(adapter.path / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in state} == {"q_proj", "o_proj"}
    assert export_adapter(adapter, tmp_path / "exported") == RANK
    assert close(logits(PeftModel.from_pretrained(load(saved("phi3")), tmp_path / "exported")), expected)
    merge_views(adapter, tmp_path / "merged")
    assert close(logits(load(tmp_path / "merged")), expected)


def test_peft_refuses_an_adapter_on_views_and_does_not_load_its_other_layers_alone(saved, tmp_path):
    adapter, expected, _ = trained(saved("phi3"), "lora", tmp_path, targets=("q_proj", "o_proj"))
    with pytest.raises((KeyError, ValueError), match="CORA_LORA"):
        PeftModel.from_pretrained(load(saved("phi3")), adapter.path)
    assert close(logits(load_adapter(load(saved("phi3")), adapter)), expected)
    # As earlier versions wrote it.
    file = adapter.path / "adapter_config.json"
    file.write_text(file.read_text().replace("CORA_LORA", "LORA"))
    assert close(logits(load_adapter(load(saved("phi3")), resolve_model(str(adapter.path)))), expected)


def test_an_adapter_whose_b_comes_from_the_basis_file_gets_that_of_each_view(saved, tmp_path):
    adapter, expected, _ = trained(saved("gpt2"), "fb", tmp_path, compact=True)
    assert close(logits(load_adapter(load(saved("gpt2")), adapter)), expected)
    assert export_adapter(adapter, tmp_path / "exported") == 3 * RANK
    assert close(logits(PeftModel.from_pretrained(load(saved("gpt2")), tmp_path / "exported")), expected)


def test_a_checkpoint_is_loaded_into_the_same_views(saved, tmp_path):
    adapter, expected, _ = trained(saved("falcon"), "lora", tmp_path)
    (adapter.path / "cora.json").unlink()
    assert close(logits(load_adapter(load(saved("falcon")), resolve_model(str(adapter.path)))), expected)


def test_an_adapter_with_one_list_of_targets_for_many_families_is_read_as_plain_peft_does(saved, tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj"]
    wrapped = get_peft_model(load(saved("phi3")), LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(saved("phi3"))
    wrapped.save_pretrained(tmp_path)
    adapter = resolve_model(str(tmp_path))
    assert close(logits(load_adapter(load(saved("phi3")), adapter)), logits(wrapped))
    merged = wrapped.merge_and_unload().state_dict()
    for name in ("qkv_proj", "o_proj"):
        found = open_source(adapter).read(f"model.layers.0.self_attn.{name}")
        assert close(found, merged[f"model.layers.0.self_attn.{name}.weight"].double())


def test_a_method_without_a_lora_form_of_its_own_is_exported_on_the_fused_projection(saved, tmp_path):
    adapter, expected, _ = trained(saved("gpt_neox"), "mora-1", tmp_path)
    export_adapter(adapter, tmp_path / "exported")
    found = logits(PeftModel.from_pretrained(load(saved("gpt_neox")), tmp_path / "exported"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {"v_proj": 9}},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_each_view_is_exported_with_its_own_scale_once(family, settings, saved, tmp_path):
    own = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, **settings}
    adapter, expected, _ = trained(saved(family), "peft", tmp_path, peft=own)
    export_adapter(adapter, tmp_path / "exported")
    assert close(logits(PeftModel.from_pretrained(load(saved(family)), tmp_path / "exported")), expected)
    merge_views(adapter, tmp_path / "merged")
    assert close(logits(load(tmp_path / "merged")), expected)


def test_models_to_start_from_may_have_changed_the_projection_as_one(saved, tmp_path, capsys):
    base = saved("falcon")
    adapter, _, _ = trained(base, "lora", tmp_path)
    export_adapter(adapter, tmp_path / "exported")
    queries = [f"{place}.q_proj" for place in places(load(base), "falcon")]
    for path in (adapter.path, tmp_path / "exported"):
        models = StartModels([str(path)], resolve_model(str(base)), queries)
        assert "also changes 4 layers that --target-modules leaves out" in capsys.readouterr().err
        source = open_source(adapter)
        for name, found in models.observed().items():
            [(b, a)] = found.sources
            expected = source.own_delta(name, source.base)
            assert expected is not None
            assert close((b @ a).double(), expected)
        StartModels(
            [str(path)],
            resolve_model(str(base)),
            [f"{place}.{part}" for place in places(load(base), "falcon") for part in VIEWS],
        )
        StartModels([str(path)], resolve_model(str(base)), places(load(base), "falcon"))
        assert "also changes" not in capsys.readouterr().err


def test_an_adapter_tells_whether_layers_hold_all_that_it_changes_and_which_it_has_in_another_form(saved, tmp_path):
    base = open_source(resolve_model(str(saved("falcon"))))
    fused = places(load(saved("falcon")), "falcon")
    views = [f"{place}.{part}" for place in fused for part in VIEWS]
    adapter, _, _ = trained(saved("falcon"), "lora", tmp_path)
    export_adapter(adapter, tmp_path / "exported")
    for path, otherwise in ((adapter.path, fused[0]), (tmp_path / "exported", views[0])):
        source = open_source(resolve_model(str(path)), base)
        assert source.changes_only(views, base)
        assert source.changes_only(fused, base)
        assert not source.changes_only(views[1:], base)
        assert source.held_otherwise([fused[0], *views] if otherwise in fused else [views[0], *fused]) == otherwise
        assert source.held_otherwise(views if otherwise in fused else fused) is None


def test_the_hash_of_a_view_is_that_of_what_changes_it(saved, tmp_path):
    adapter, _, _ = trained(saved("gpt2"), "lora", tmp_path)
    place = "transformer.h.0.attn.c_attn"
    hashes = {name: open_source(adapter).content_hash([name]) for name in (place, f"{place}.q_proj", f"{place}.k_proj")}
    assert len(set(hashes.values())) == 3
    state = load_file(adapter.path / "adapter_model.safetensors")
    state[f"base_model.model.{place}.q_proj.lora_A.weight"] += 1
    save_file(state, adapter.path / "adapter_model.safetensors")
    adapter = resolve_model(str(adapter.path))
    changed = {name for name, digest in hashes.items() if open_source(adapter).content_hash([name]) != digest}
    assert changed == {place, f"{place}.q_proj"}


def test_a_layer_of_unknown_layout_is_named(saved):
    model = load(saved("phi3"))
    model.config.model_type = "phi3_of_someone"
    with pytest.raises(
        CoraError, match=r"'q_proj' matches nothing in this model; .*; how qkv_proj holds queries, keys and values is not known"
    ):
        install_adapter(model, plan_of("lora", **SETTINGS, target_modules=VIEWS), None)


def test_a_plan_knows_the_views_of_a_model_without_weights(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved("falcon") / "config.json").read_bytes())
    planned, real = PlannedSource(resolve_model(str(tmp_path), weights=False)), open_source(resolve_model(str(saved("falcon"))))
    assert planned.targets(VIEWS) == real.targets(VIEWS)
    assert {name: planned.shapes[name] for name in planned.targets(VIEWS)} == {
        name: real.shapes[name] for name in real.targets(VIEWS)
    }
    assert planned.entry_bytes(planned.targets(VIEWS)[0]) == 4


def test_the_fault_of_a_fused_projection_is_that_of_its_views(saved, tmp_path):
    model = load(saved("phi3"))
    config = model.config.to_dict() | {"num_hidden_layers": 3}
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Phi3ForCausalLM"]}))
    with pytest.raises(CoraError, match=r"hold no weight for model.layers.2.self_attn.qkv_proj"):
        open_source(resolve_model(str(tmp_path))).targets(VIEWS)


def test_latent_projections_are_adapted_by_their_names(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build("deepseek_v3")).save_pretrained(tmp_path / "base")
    targets = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    adapter, expected, losses = trained(tmp_path / "base", "lora", tmp_path, targets)
    assert losses[-1] < losses[0]
    assert "views" not in json.loads((adapter.path / "cora.json").read_text())
    assert merge_views(adapter, tmp_path / "merged") == 2 * len(targets)
    assert close(logits(load(tmp_path / "merged")), expected)
