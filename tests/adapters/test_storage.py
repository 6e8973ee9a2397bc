import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cora_cli.adapters.base import base_of
from cora_cli.adapters.facts import COMPACT_FILE, SIDE_FILE, AdapterFacts, read_facts
from cora_cli.adapters.install import check_trained_set, install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.storage import WEIGHTS_FILE, save_adapter
from cora_cli.basis.artifact import Basis, read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.errors import CoraError
from cora_cli.extraction.extract import extract_basis
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.weights.planned import open_planned
from cora_cli.weights.sources import open_source
from tests.methods.helpers import plan_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def basis(tiny_basis: Path) -> Basis:
    return read_basis(tiny_basis)


@pytest.fixture
def load(tiny_model: Path):
    return lambda path=tiny_model: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def store(tiny_model: Path, basis: Basis, tmp_path_factory):
    """A function that makes an adapter, trains it by a fixed random step, saves it, and returns directory and logits."""

    def made(mode="fb", compact=False, step=0.1, directory=None, **changes) -> tuple[Path, torch.Tensor]:
        defaults = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0}
        plan = plan_of(mode, **{**defaults, **changes})
        model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        wrapped = install_adapter(model, plan, basis if plan.needs_basis else None)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=step)
        facts = AdapterFacts(
            plan=plan,
            base=str(tiny_model),
            base_revision=None,
            base_sha256="0" * 64,
            basis=str(basis.path) if plan.needs_basis else None,
            basis_sha256=basis.sha256 if plan.needs_basis else None,
            compact=compact,
        )
        directory = directory or tmp_path_factory.mktemp("adapter") / "adapter"
        save_adapter(wrapped, directory, facts)
        assert read_facts(directory) == facts
        return directory, logits(wrapped)

    return made


@pytest.fixture(scope="module")
def standard(store):
    return store("fb")


@pytest.fixture(scope="module")
def compact(store):
    return store("fb", compact=True)


@pytest.fixture
def copied(standard, tmp_path) -> Path:
    """A standard adapter that a test may damage."""
    return Path(shutil.copytree(standard[0], tmp_path / "adapter"))


@pytest.fixture
def copied_compact(compact, tmp_path) -> Path:
    return Path(shutil.copytree(compact[0], tmp_path / "compact"))


def failure(model, directory: Path, **options) -> str:
    with pytest.raises(CoraError) as caught:
        load_adapter(model, resolve_model(str(directory)), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("mode", ["lora", "fb", "tb"])
def test_plain_peft_loads_a_saved_adapter_unchanged(mode, rslora, store, load, recwarn):
    directory, expected = store(mode, rslora=rslora)
    recwarn.clear()
    model = PeftModel.from_pretrained(load(), str(directory))
    assert not [warning for warning in recwarn if "adapter" in str(warning.message).lower()]
    assert torch.equal(logits(model), expected)
    ours = load_adapter(load(), resolve_model(str(directory)))
    assert torch.equal(logits(ours), expected)
    assert not ours.training
    assert sorted(path.name for path in directory.iterdir() if path.name != "README.md") == sorted(
        ["adapter_config.json", WEIGHTS_FILE, SIDE_FILE]
    )


@pytest.mark.parametrize("method", ["RANDLORA", "VERA", "VBLORA"])
def test_a_method_whose_layers_share_a_tensor_is_stored_and_loaded(method, store, load):
    sizes = {"r": 8} if method != "VBLORA" else {"num_vectors": 16, "vector_length": 16}
    directory, expected = store("peft", peft={"peft_type": method, **sizes})
    assert not torch.equal(expected, logits(load()))
    for model in (
        load_adapter(load(), resolve_model(str(directory))),
        PeftModel.from_pretrained(load(), str(directory)).eval(),
    ):
        assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_the_b_of_a_saved_fb_adapter_is_the_basis(standard, basis):
    tensors = load_file(standard[0] / WEIGHTS_FILE)
    assert len(tensors) == 8
    for key, tensor in tensors.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            assert torch.equal(tensor, basis.directions[name][:, :4])


def test_the_saved_configuration_is_that_of_an_ordinary_lora(standard, tiny_model):
    config = json.loads((standard[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert type(config["lora_alpha"]) is int
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert {"cora", "basis"}.isdisjoint(config)


@pytest.mark.parametrize("form", ["standard", "compact"])
def test_an_adapter_loaded_for_training_has_its_b_frozen_again(form, standard, compact, load):
    directory = {"standard": standard, "compact": compact}[form][0]
    wrapped = load_adapter(load(), resolve_model(str(directory)), trainable=True)
    plan = read_facts(directory).plan
    check_trained_set(wrapped, plan)
    with wrapped.disable_adapter():
        pass
    wrapped.set_adapter("default")
    check_trained_set(wrapped, plan)


@pytest.mark.parametrize("mode", ["lora", "tb"])
def test_an_adapter_whose_b_was_trained_trains_it_on(mode, store, load):
    directory, _ = store(mode)
    check_trained_set(load_adapter(load(), resolve_model(str(directory)), trainable=True), read_facts(directory).plan)


def test_an_adapter_loaded_for_use_trains_nothing(standard, compact, load):
    for directory, _ in (standard, compact):
        wrapped = load_adapter(load(), resolve_model(str(directory)))
        assert not [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "changes", [{}, {"b_init": "orthonormal"}, {"b_init": "random", "rslora": True}, {"b_init": "ones", "seed": 3}]
)
def test_the_compact_form_holds_a_alone_and_gives_the_same_logits(changes, store, load):
    directory, expected = store("fb", compact=True, **changes)
    assert not (directory / WEIGHTS_FILE).exists()
    assert all(".lora_A." in key for key in load_file(directory / COMPACT_FILE))
    reference = resolve_model(str(directory))
    assert torch.equal(logits(load_adapter(load(), reference)), expected)
    assert reference.content_hash() == resolve_model(str(directory)).content_hash()


def test_plain_peft_refuses_the_compact_form_rather_than_loading_a_random_b(compact, load):
    with pytest.raises(Exception, match=r"(?i)repo id|weights|not found|exist"):
        PeftModel.from_pretrained(load(), str(compact[0]))


def test_the_compact_form_of_a_trained_b_is_refused(store, tmp_path):
    with pytest.raises(CoraError, match="mode tb trains B, which the compact form would lose"):
        store("tb", compact=True, directory=tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_compact_adapter_finds_a_basis_that_moved_and_refuses_without_it(copied_compact, compact, tiny_basis, load, tmp_path):
    facts = json.loads((copied_compact / SIDE_FILE).read_text())
    (copied_compact / SIDE_FILE).write_text(json.dumps({**facts, "basis": str(tmp_path / "gone.safetensors")}))
    assert "its B comes from the basis" in (message := failure(load(), copied_compact))
    assert "gone.safetensors, which does not exist; pass its path with --basis" in message
    moved = shutil.copy(tiny_basis, tmp_path / "moved.safetensors")
    wrapped = load_adapter(load(), resolve_model(str(copied_compact)), Path(moved))
    assert torch.equal(logits(wrapped), compact[1])


def test_a_compact_adapter_refuses_another_basis_naming_both_hashes(compact, tiny_model, basis, load, tmp_path):
    other = tmp_path / "other.safetensors"
    extract_basis([resolve_model(str(tiny_model))], other, BasisChoices(rank=8, component="bottom"), None, torch.device("cpu"))
    message = failure(load(), compact[0], basis_path=other)
    assert basis.sha256 in message
    assert read_basis(other).sha256 in message


@pytest.mark.parametrize("form", ["copied", "copied_compact"])
@pytest.mark.parametrize(("change", "said"), [("missing", "is missing"), ("foreign", "belongs to no")])
def test_a_missing_and_a_foreign_key_are_named(form, change, said, load, request):
    directory = request.getfixturevalue(form)
    file = directory / (WEIGHTS_FILE if form == "copied" else COMPACT_FILE)
    tensors = load_file(file)
    key = sorted(tensors)[0]
    if change == "missing":
        del tensors[key]
    else:
        key = key.replace("layers.0", "layers.7")
        tensors[key] = next(iter(tensors.values())).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    message = failure(load(), directory)
    assert said in message
    assert key.removesuffix("lora_A.weight") in message


def test_an_unknown_key_of_the_plan_is_named(copied, load):
    facts = json.loads((copied / SIDE_FILE).read_text())
    (copied / SIDE_FILE).write_text(json.dumps({**facts, "plan": {**facts["plan"], "gate": 2}}))
    assert "this one does not know the key 'gate' of its plan" in failure(load(), copied)
    (copied / SIDE_FILE).write_text(json.dumps({**facts, "plan": {**facts["plan"], "gate": None}}))
    load_adapter(load(), resolve_model(str(copied)))


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("peft_type", "lora", 'has the peft_type "lora", which the installed PEFT'),
        ("peft_type", None, "has the peft_type null, which the installed PEFT"),
        ("rank_pattern", None, "has rank_pattern null, in place of a value such as {}"),
        ("bias", None, 'has bias null, in place of a value such as "none"'),
        ("lora_alpha", None, "has lora_alpha null, in place of a value such as 8"),
        ("lora_dropout", "0.1", 'has lora_dropout "0.1", in place of a value such as 0.0'),
    ],
)
def test_a_setting_with_which_peft_cannot_compute_is_named(setting, value, said, copied, load):
    (copied / SIDE_FILE).unlink()
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
    assert said in failure(load(), copied)


def test_an_adapter_without_any_b_is_refused_also_where_cora_knows_nothing_of_it(copied, load):
    (copied / SIDE_FILE).unlink()
    tensors = load_file(copied / WEIGHTS_FILE)
    save_file({key: tensor for key, tensor in tensors.items() if ".lora_A." in key}, copied / WEIGHTS_FILE)
    assert "4 keys do not fit the model" in failure(load(), copied)


def test_a_weight_that_the_configuration_does_not_train_is_refused_as_that(copied, load):
    (copied / SIDE_FILE).unlink()
    norm = {"base_model.model.model.norm.weight": torch.ones(64)}
    save_file(load_file(copied / WEIGHTS_FILE) | norm, copied / WEIGHTS_FILE)
    said = failure(load(), copied)
    assert (
        "model.norm.weight, is a weight that nothing in its adapter_config.json trains; if it was trained, name its layer"
        in said
    )


def test_factors_with_the_name_of_the_adapter_in_their_keys_are_not_taken_for_weights_of_the_model(copied, load):
    (copied / SIDE_FILE).unlink()
    tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in load_file(copied / WEIGHTS_FILE).items()}
    save_file(tensors, copied / WEIGHTS_FILE)
    said = failure(load(), copied)
    assert "keys do not fit the model" in said
    assert "modules_to_save" not in said


@pytest.mark.parametrize("broken", [False, True])
def test_an_adapter_of_peft_alone_is_loaded_in_its_pickled_form_too_and_checked_alike(broken, load, tmp_path):
    directory = tmp_path / "adapter"
    model = get_peft_model(load(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(str(directory))
    tensors = load_file(directory / WEIGHTS_FILE)
    (directory / WEIGHTS_FILE).unlink()
    if broken:
        tensors = {key: tensor for key, tensor in tensors.items() if ".lora_A." in key}
    torch.save(tensors, directory / "adapter_model.bin")
    if broken:
        assert "2 keys do not fit the model" in failure(load(), directory)
    else:
        assert torch.equal(logits(load_adapter(load(), resolve_model(str(directory)))), logits(model))


@pytest.mark.parametrize("form", ["copied", "copied_compact"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "no configuration", "malformed configuration"])
def test_damaged_files_give_one_sentence(form, damage, load, request):
    directory = request.getfixturevalue(form)
    reference = resolve_model(str(directory))
    file = directory / (WEIGHTS_FILE if form == "copied" else COMPACT_FILE)
    config = directory / "adapter_config.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif damage == "no configuration":
        config.unlink()
    else:
        config.write_text(config.read_text()[:-30])
    with pytest.raises(CoraError, match=str(directory)) as caught:
        load_adapter(load(), reference)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"plan": ', "is not valid JSON"),
        ("[]", "is damaged or from another version of cora"),
        ('"text"', "is damaged or from another version of cora"),
        ("{}", "is damaged or from another version of cora"),
        ('{"plan": {"mode": "fb"}}', "is damaged or from another version of cora"),
        ('{"plan": {"target_modules": 3}}', "is damaged or from another version of cora"),
    ],
)
def test_a_damaged_side_file_is_named(content, said, copied, load):
    (copied / SIDE_FILE).write_text(content)
    message = failure(load(), copied)
    assert SIDE_FILE in message
    assert said in message


def test_an_adapter_of_a_model_of_other_shapes_is_refused(standard, compact, load, tiny_multihead_model):
    assert "they do not belong together" in failure(load(tiny_multihead_model), standard[0])
    with pytest.raises(CoraError, match=r"v_proj has 64 outputs, but group .* expects 32"):
        load_adapter(load(tiny_multihead_model), resolve_model(str(compact[0])))


def test_an_adapter_that_changes_nothing_is_refused_unless_it_cannot_train(store, load):
    directory, _ = store("fb", step=0.0)
    assert "was trained, but changes no weight" in failure(load(), directory)
    directory, expected = store("fb", step=0.0, b_init="zeros")
    assert torch.equal(logits(load_adapter(load(), resolve_model(str(directory)))), expected)


@pytest.mark.parametrize("factor", ["lora_B", "lora_alpha"])
def test_an_adapter_of_another_program_that_changes_nothing_is_said_to(factor, copied, load, capfd):
    (copied / SIDE_FILE).unlink()
    config = copied / "adapter_config.json"
    load_adapter(load(), resolve_model(str(copied)))
    assert "changes no weight" not in capfd.readouterr().err
    if factor == "lora_alpha":
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    else:
        state = load_file(copied / WEIGHTS_FILE)
        state |= {key: torch.zeros_like(tensor) for key, tensor in state.items() if factor in key}
        save_file(state, copied / WEIGHTS_FILE)
    load_adapter(load(), resolve_model(str(copied)))
    assert f"adapter {copied} changes no weight of its layers: s·B·A is zero in all of them" in capfd.readouterr().err


def test_saving_over_an_adapter_replaces_it_whole(store, tmp_path):
    target = tmp_path / "adapter"
    store("fb", compact=True, directory=target)
    directory, _ = store("lora", directory=target)
    assert not (directory / COMPACT_FILE).exists()
    assert read_facts(directory).plan.mode == "lora"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_base_of_an_adapter_is_the_one_that_it_was_trained_on(standard, tiny_model):
    assert base_of(resolve_model(str(standard[0]))).path == tiny_model


@pytest.mark.parametrize(
    ("base", "revision", "asked"),
    [
        ("org/base", "abc123", "org/base@abc123"),
        ("org/base@main", "abc123", "org/base@abc123"),
        ("builtin:smollm2", None, "builtin:smollm2"),
    ],
)
def test_the_base_is_looked_up_at_the_revision_that_was_trained_on(
    base, revision, asked, store, basis, load, monkeypatch, tmp_path
):
    first, _ = store("lora")
    wrapped = load_adapter(load(), resolve_model(str(first)))
    facts = AdapterFacts(read_facts(first).plan, base, revision, "0" * 64, None, None, compact=False)
    save_adapter(wrapped, tmp_path / "adapter", facts)
    seen = []
    monkeypatch.setattr(
        "cora_cli.adapters.base.resolve_model",
        lambda reference, weights: seen.append(reference) or ModelPath(reference, tmp_path / "base", None),
    )
    base_of(resolve_model(str(tmp_path / "adapter")))
    assert seen == [asked]


def test_an_adapter_that_names_no_base_says_so(copied):
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / SIDE_FILE).unlink()
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(CoraError, match="does not say what its base model is"):
        base_of(resolve_model(str(copied)))


def test_an_adapter_as_the_base_of_an_adapter_is_refused_by_all_even_where_it_is_its_own(copied):
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(copied)}))
    (copied / SIDE_FILE).unlink()
    for read in (base_of, open_source, open_planned):
        with pytest.raises(CoraError, match=f"adapter {copied} names {copied} as its base model, which is an adapter too"):
            read(resolve_model(str(copied)))


def test_a_loaded_adapter_is_scaled_as_it_was_trained(store, load):
    directory, _ = store("tb", rslora=True)
    wrapped = load_adapter(load(), resolve_model(str(directory)))
    assert {layer.scaling["default"] for _, layer in lora_layers(wrapped)} == {8.0 / math.sqrt(4)}
    assert all(factor.dtype == torch.float32 for _, layer in lora_layers(wrapped) for factor in factors_of(layer))


def test_an_adapter_whose_pickle_wants_to_run_code_is_refused_and_does_not_run_it(tiny_model, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "evil"))
    torch.save({"w": Evil()}, tmp_path / "evil" / "adapter_model.bin")
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(CoraError, match="contains more than tensors and could run code"):
        load_adapter(model, resolve_model(str(tmp_path / "evil")))
    assert not (tmp_path / "ran").exists()


def test_the_target_modules_of_the_configuration_are_in_alphabetical_order(standard):
    written = json.loads((standard[0] / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)


def test_a_chat_template_beside_an_adapter_is_taken_with_the_tokenizer_of_its_base(tmp_path):
    adapter = ModelPath("adapter", tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(resolve_model("builtin:smollm2"), False, adapter)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("adapter_model.pt", torch.save),
        ("adapter_weights.safetensors", save_file),
        ("adapter_model.bin", lambda state, path: torch.save({"state_dict": state}, path)),
    ],
)
def test_the_tensors_of_an_adapter_are_found_in_any_file_that_is_read_as_an_adapters(name, write, standard, copied, load):
    state = load_file(copied / WEIGHTS_FILE)
    (copied / WEIGHTS_FILE).unlink()
    write(state, copied / name)
    adapter = resolve_model(str(copied))
    assert torch.equal(logits(load_adapter(load(), adapter)), standard[1])
    assert [file.name for file in adapter.weight_files()] == [name]


def test_a_setting_that_peft_does_not_know_is_said(copied, load, capfd):
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "use_later": True, "other_later": None}))
    load_adapter(load(), resolve_model(str(copied)))
    said = " ".join(capfd.readouterr().err.split())
    assert "adapter_config.json sets use_later, which the installed PEFT" in said
