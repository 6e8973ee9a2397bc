"""The mean of earlier models' ΔW, alone and below other modes: W + mean in float64, storage, export, resume, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from cora_cli.training.laplace import laplace
from cora_cli.training.preflight import preflight
from cora_cli.training.prepare import prepare
from cora_cli.training.run import train
from cora_cli.weights.sources import open_source
from cora_cli.weights.start_models import StartModels

from .helpers import config_for, record_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def base(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def mean_of(sources):
    """The mean of s·B·A of the adapters' files, in float64, by layer."""
    found = {}
    for source in sources:
        state = load_file(Path(source) / "adapter_model.safetensors")
        for key, a in state.items():
            if ".lora_A." in key:
                b = state[key.replace(".lora_A.", ".lora_B.")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                found[name] = found.get(name, 0) + 2.0 * b.double() @ a.double() / len(sources)
    return found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["model.norm"]}, "also changes 1 layers that --target-modules leaves out, such as model.norm"),
        (
            {"trainable_token_indices": [5]},
            "also changes 1 layers that --target-modules leaves out, such as model.embed_tokens",
        ),
        ({"bias": "all"}, "also trained"),
    ],
)
def test_what_a_start_model_changes_that_is_not_in_the_start_is_said(settings, said, tiny_model, tmp_path, capsys):
    model = base(tiny_model)
    if "bias" in settings:
        model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tiny_model)}))
    layers = [f"model.layers.{number}.self_attn.q_proj" for number in range(len(model.model.layers))]
    StartModels([str(tmp_path / "adapter")], resolve_model(str(tiny_model)), layers)
    assert said in capsys.readouterr().err


def test_of_a_complete_start_model_a_line_says_what_is_taken(tiny_model, tmp_path, capsys):
    other = base(tiny_model)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    StartModels([str(tmp_path / "other")], resolve_model(str(tiny_model)), ["model.layers.0.self_attn.q_proj"])
    assert (
        "is a complete model; of its changes, the start has those to the layers of --target-modules alone"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_data, tiny_sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("mean") / "run"
    config = config_for(tiny_model, tiny_data, output, mode="mean-delta", start_models=tiny_sources)
    return config, output, train(config)


@pytest.fixture(scope="module")
def below(tiny_model, tiny_data, tiny_sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("below") / "run"
    settings = {"mode": "lora", "start": "mean-delta", "start_models": tiny_sources, "max_steps": 4, "save_steps": 2}
    config = config_for(tiny_model, tiny_data, output, **settings)
    return config, output, train(config)


def test_the_mean_alone_is_w_plus_the_mean_of_the_products_and_trains_nothing(alone, tiny_model, tiny_sources, tmp_path):
    _, output, record = alone
    assert merge_adapter(resolve_model(str(output)), tmp_path / "merged") == 6
    weights, merged = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (tiny_model, tmp_path / "merged"))
    for name, change in mean_of(tiny_sources).items():
        key = f"{name}.weight"
        assert torch.allclose(merged[key].double(), weights[key].double() + change, atol=1e-6)
        assert change.abs().max() > 1e-3
    assert (record["parameters"]["trained"], record["speed"]["steps"], record["is_base_model"]) == (0, 0, False)
    assert record["heldout"]["before"] == record["heldout"]["after"]
    assert export_adapter(resolve_model(str(output)), tmp_path / "exported") == 8
    assert torch.allclose(
        logits(PeftModel.from_pretrained(base(tiny_model), tmp_path / "exported")), logits(base(tmp_path / "merged")), atol=1e-4
    )


def test_training_below_the_mean_begins_there_and_is_stored_with_it(alone, below, tiny_model, tmp_path):
    config, output, record = below
    assert record["heldout"]["before"]["loss"] == pytest.approx(alone[2]["heldout"]["after"]["loss"], rel=1e-6)
    assert record["heldout"]["change"]["value"] < 0
    ours = logits(load_adapter(base(tiny_model), resolve_model(str(output))))
    plain = PeftModel.from_pretrained(base(tiny_model), str(output / "adapter")).eval()
    assert plain.peft_config["default"].r == 4 + 8
    assert torch.equal(logits(plain), ours)
    merge_adapter(resolve_model(str(output)), tmp_path / "merged")
    assert torch.allclose(logits(base(tmp_path / "merged")), ours, atol=1e-4 * ours.abs().max())
    again = train(config_for(tmp_path / "merged", Path(config.dataset), tmp_path / "again", max_steps=1, learning_rate=1e-9))
    assert again["heldout"]["before"]["loss"] == pytest.approx(record["heldout"]["after"]["loss"], rel=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_and_needs_the_same_models(below, tiny_sources, tmp_path):
    config, output, _ = below
    again = tmp_path / "run"
    shutil.copytree(output, again)
    for name in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(again / name)
    (again / "run.json").write_text(json.dumps({**record_of(again), "status": "running"}))
    resumed = replace(config, output_dir=str(again), resume=True)
    with pytest.raises(CoraError, match="cannot be resumed with other inputs than it was started with: start_models_sha256"):
        train(replace(resumed, start_models=tiny_sources[:1]))
    train(resumed)
    found, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (again, output))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    with pytest.raises(CoraError, match="is stored as an equivalent plain LoRA; to continue training, resume"):
        load_adapter(base(config.model), resolve_model(str(output)), trainable=True)


def test_a_complete_model_counts_with_its_difference_from_the_base(tiny_model, tiny_data, tiny_sources, tmp_path):
    merge_adapter(resolve_model(tiny_sources[0]), tmp_path / "complete")
    models = (str(tmp_path / "complete"), tiny_sources[1])
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="mean-delta", start_models=models)
    observed = prepare(config).start_models.observed()
    for name, change in mean_of(tiny_sources).items():
        found = sum(b.double() @ a.double() for b, a in observed[name].sources) / 2
        assert torch.allclose(found, change, atol=1e-5)
    with pytest.raises(
        CoraError, match=r"mode eigenlorax starts from the factors of LoRA adapters, but .*complete is a complete model"
    ):
        prepare(replace(config, mode="eigenlorax", eigen_directions=4, eigen_random=4))


@pytest.mark.slow
def test_a_plan_counts_the_parameters_and_the_stored_rank(below, tiny_sources):
    config, output, record = below
    found = preflight(replace(config, output_dir=str(output.parent / "plan")))
    assert found.measured.parameters["trained"] == record["parameters"]["trained"]
    sizes = {key: tensor.nbytes for key, tensor in load_file(output / "adapter" / "adapter_model.safetensors").items()}
    assert found.measured.adapter_bytes == sum(sizes.values())


def test_models_that_do_not_fit_are_refused(tiny_model, tiny_multihead_model, tiny_data, tiny_sources, tmp_path):
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="mean-delta", start_models=tiny_sources)
    with pytest.raises(CoraError, match=r"was trained on .* with content hash"):
        prepare(replace(config, model=str(tiny_multihead_model)))
    with pytest.raises(CoraError, match=r"has no weight .*k_proj of the base model's shape \(32, 64\)"):
        prepare(replace(config, start_models=(str(tiny_multihead_model),)))
    copy = shutil.copytree(tiny_sources[0], tmp_path / "copy")
    with pytest.raises(CoraError, match=r"--start-models: .*copy has the same content as another of them"):
        prepare(replace(config, start_models=(tiny_sources[0], str(copy))))
    with pytest.raises(CoraError, match="--start-models change none of the layers of --target-modules"):
        prepare(replace(config, target_modules=("o_proj",))).start_models.observed()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "mean-delta"}, "mode mean-delta needs --start-models A,B,…: models that were fine-tuned from the base model"),
        ({"mode": "lora", "start": "mean-delta"}, "--start mean-delta needs --start-models A,B,…"),
        ({"mode": "lora", "start_models": ("a",)}, "--start-models has no effect in mode lora without --start mean-delta"),
        (
            {"mode": "dora", "start": "mean-delta", "start_models": ("a",)},
            r"--start mean-delta is stored as a part of a LoRA, and mode dora is stored as DoRA; train on W \+ mean instead",
        ),
        ({"mode": "mean-delta", "start_models": ("a", "b", "a")}, "--start-models names a twice"),
        ({"mode": "full", "start_models": ("a",)}, "--start-models applies to adapters, not to mode full"),
        ({"mode": "mean-delta", "start_models": ("a",), "alpha": 3.0}, "--alpha does not apply to mode mean-delta"),
        (
            {"mode": "fb", "b_init": "orthonormal", "compact": True, "start": "mean-delta", "start_models": ("a",)},
            "--compact stores only A, which would lose the models of --start mean-delta",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", **settings})


def test_a_checkpoint_which_lacks_the_mean_is_refused_as_a_model(below, tmp_path):
    _, output, _ = below
    checkpoint = resolve_model(str(output / "checkpoints" / "checkpoint-2"))
    refusal = r"checkpoint-2 is a checkpoint of a run of mode lora with --start mean-delta, which holds only what is trained"
    with pytest.raises(CoraError, match=refusal):
        merge_adapter(checkpoint, tmp_path / "merged")
    with pytest.raises(CoraError, match=refusal):
        open_source(checkpoint)


def test_an_adapter_next_to_the_mean_has_no_laplace_approximation(below, tmp_path):
    _, output, _ = below
    with pytest.raises(CoraError, match=r"cora laplace needs a run whose adapter is the A and B .* with --start mean-delta"):
        laplace(str(output), tmp_path / "laplace", device="cpu")
    assert not (tmp_path / "laplace").exists()
