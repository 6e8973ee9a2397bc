"""The plan of a run: its memory is that of the real one, its counts are those of the record, and nothing is needed but the configuration."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.models.llama.modeling_llama import LlamaMLP

from cora_cli import writing
from cora_cli.data.encode import Example
from cora_cli.device import planned_hardware
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.registry import METHODS, Mode
from cora_cli.models.references import resolve_model
from cora_cli.models.skeleton import skeleton_of
from cora_cli.planning.memory import StorageMeter
from cora_cli.planning.page import duration, size_text
from cora_cli.training import losses as losses_of_tokens
from cora_cli.training import run as training
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.observe import observe
from cora_cli.training.preflight import plan_run, preflight
from cora_cli.training.preflight_text import describe, marked
from cora_cli.training.prepare import prepare
from cora_cli.training.work import planned_form
from tests.conftest import VOCABULARY
from tests.methods.helpers import SMALL
from tests.training.helpers import Metered, config_for, log_lines, measured, real_peak, record_of, run_together


def meter_process(out: Path) -> None:
    """Let this process of a divided training write its peak, and the bytes that it keeps of the divided weights, into the directory `out`."""

    class Writing(Metered):
        meter = StorageMeter(VOCABULARY)

        def train(self, **arguments: Any) -> Any:
            kept = [p.to_local().numel() * p.element_size() for p in self.model.parameters() if isinstance(p, DTensor)]
            found = super().train(**arguments)
            writing.write_json(out / f"{os.environ['RANK']}.json", {"peak": self.meter.peak, "kept": sum(kept)})
            return found

    training.CoraTrainer = Writing


def test_a_head_that_the_files_hold_apart_counts_and_is_written_as_one_of_its_own(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = config_for(model, tiny_data, tmp_path / "run", mode="full")
    tied = measured(preflight(config))
    weights["lm_head.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert AutoConfig.from_pretrained(model).tie_word_embeddings
    planned = measured(preflight(config))
    assert planned.parameters["total"] - tied.parameters["total"] == weights["lm_head.weight"].numel()
    assert planned.memory.parts["weights"] > tied.memory.parts["weights"]
    record = training.train(config)
    assert record["parameters"] == planned.parameters
    assert not AutoConfig.from_pretrained(tmp_path / "run" / "model").tie_word_embeddings


def test_a_checkpoint_without_a_head_is_refused_as_by_the_run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = AutoConfig.from_pretrained(model)
    config.tie_word_embeddings = False
    AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    said = "is incomplete: 1 weights .* are missing, such as lm_head.weight, while 1 tensors of its files fit no weight, such as score.weight; by its config.json it is a LlamaForSequenceClassification, and cora works with causal language models alone"
    for begin in (preflight, training.train):
        with pytest.raises(CoraError, match=said):
            begin(config_for(model, tiny_data, tmp_path / "run"))


def test_a_checkpoint_is_complete_where_one_tensor_becomes_several_or_a_rule_would_rename_what_the_model_has(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of HRM's files, which hold two layers in one tensor, and of DeepSeek V4's, where norm is another layer's name as well.
    rules = [
        WeightRenaming(r"\.norm\.", ".kv_norm."),
        WeightConverter("mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
    ]
    monkeypatch.setattr("cora_cli.models.skeleton.get_model_conversion_mapping", lambda _: rules)
    skeleton = skeleton_of(resolve_model(str(tiny_model)))
    keys = {name.replace(".gate_proj.", ".gate_up_proj.") for name in skeleton.model.state_dict() if ".up_proj." not in name}
    assert any("gate_up_proj" in key for key in keys)
    assert skeleton.missing(keys) == []
    assert skeleton.missing({key for key in keys if "gate_up_proj" not in key}) != []


def without_weights(model: Path, to: Path) -> Path:
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


SETTINGS: dict[str, dict[str, Any]] = {
    "a B from the gradient": {"mode": "tb", "b_init": "gradient", "start_examples": 2, "max_steps": 1},
    "an adapter in bf16": {"mode": "lora", "dtype": "bf16", "max_steps": 1},
    "a frozen B with checkpointing and accumulation": {
        **{"mode": "fb", "b_init": "random", "compact": True, "max_steps": 2},
        **{"gradient_checkpointing": True, "gradient_accumulation": 2},
    },
    "a chain": {"mode": "cola", "rank": 64, "max_steps": 3, "chain_length": 3},
    "all weights in short rows": {"mode": "full", "tokens_per_row": 150, "max_steps": 2},
}


FAMILIES: dict[str, dict[str, Any]] = {
    # It looks for padding among the tokens.
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    # Its experts are multiplied together, in float32 here.
    "mixtral": {
        **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    },
    # These look for padding, each by itself.
    "lfm2": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    },
    "qwen3_next": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
        **{"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        **{"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]},
    },
}


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        ("qwen3_next", 8),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("gpt2", 8), ("mixtral", 8), ("lfm2", 8), ("lfm2", 1))),
    ],
)
def test_the_peak_of_another_family_is_that_of_the_real_training(
    family: str, batch: int, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one example in a batch, the rows of the held-out loss are larger."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = Path(shutil.copytree(tiny_model, tmp_path / family, ignore=shutil.ignore_patterns("*.safetensors", "config.json")))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **FAMILIES[family])).save_pretrained(model)
    config = config_for(model, tiny_data, tmp_path / "run", max_steps=1, batch_size=batch, eval_limit=1 if batch > 1 else 4)
    found = measured(preflight(config))
    if batch > 1:
        assert found.memory.total == pytest.approx(sum(real_peak(config, VOCABULARY, monkeypatch).values()), rel=0.03)
    else:
        training.train(config)
        assert found.memory.stage == "measuring the held-out loss"
    assert found.parameters["trained"] == record_of(tmp_path / "run")["parameters"]["trained"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if place > 2 else ()) for place, name in enumerate(SETTINGS)]
)
def test_the_peak_is_that_of_the_real_training(
    name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", **SETTINGS[name], eval_limit=1)
    plan = preflight(config)
    found = measured(plan)
    peak = real_peak(config, VOCABULARY, monkeypatch)
    assert found.memory.stage == "a training step"
    assert found.memory.total == pytest.approx(sum(peak.values()), rel=0.1)
    assert found.memory.parts["weights"] == peak["weights"]
    assert found.parameters == record_of(tmp_path / "run")["parameters"]
    assert plan.steps == record_of(tmp_path / "run")["speed"]["steps"]
    assert plan.tokens == sum(line["tokens"] for line in log_lines(tmp_path / "run") if "loss" in line)
    if found.adapter_bytes is not None:
        (stored,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
        header = int.from_bytes(stored.read_bytes()[:8], "little") + 8
        assert found.adapter_bytes == stored.stat().st_size - header


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("mode", ["lora-one", pytest.param("eva", marks=pytest.mark.slow)])
def test_a_start_from_data_that_takes_more_than_a_step_is_the_peak(
    mode: Mode, checkpointing: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "start_examples": 30, "eval_limit": 1, "gradient_checkpointing": checkpointing}
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode=mode, **settings)
    memory = measured(preflight(config)).memory
    prepared = prepare(config)
    examples, form = prepared.start_examples, planned_form(config, prepared)
    kind = METHODS[mode].observes()
    assert kind is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    register_packed_attention()
    model.set_attn_implementation(prepared.attention.name)
    with StorageMeter(VOCABULARY) as meter:
        meter.assign((*model.parameters(), *model.buffers()), "weights")
        observe(model, kind, prepared.layers, examples, prepared.hardware, form, checkpointing)
    if mode == "eva":  # one example at a time, without a backward pass
        assert memory.stage == "a training step"
        assert memory.total > sum(meter.peak.values())
        return
    assert memory.stage == "computing the start"
    assert memory.total == pytest.approx(sum(meter.peak.values()), rel=0.1)
    tokens = form.tokens(list(examples))
    assert f"in computing the start (largest row: {tokens:,} tokens)" in describe(preflight(config))


@pytest.mark.parametrize(("rho", "says"), [(None, True), (1.0, False)])
def test_a_plan_of_eva_says_that_the_run_shares_out_the_ranks_that_it_counts_alike(
    rho: float | None, says: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="eva", eva_rho=rho, max_steps=1)
    shown = describe(preflight(config)).splitlines()
    assert shown[0].startswith("mode eva: training 2,560 of")
    assert shown[1].startswith("  with rank 4 in every layer: the run shares out the ranks") == says


@pytest.mark.slow
def test_a_plan_in_bf16_multiplies_blocks_as_the_run_does(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="melora", dtype="bf16", max_steps=1, eval_limit=1)
    found = measured(preflight(config))
    assert found.memory.total == pytest.approx(sum(real_peak(config, VOCABULARY, monkeypatch).values()), rel=0.1)


def test_a_plan_needs_no_weights_and_writes_nothing(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = without_weights(tiny_model, tmp_path / "bare")
    with_weights = preflight(config_for(tiny_model, tiny_data, tmp_path / "run"))
    plan = preflight(config_for(model, tiny_data, tmp_path / "run"))
    assert measured(plan) == measured(with_weights)
    assert not (tmp_path / "run").exists()
    with pytest.raises(CoraError, match="holds no weights"):
        training.train(config_for(model, tiny_data, tmp_path / "run"))


def test_a_plan_for_a_directory_that_is_taken_says_that_the_run_would_be_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run")
    preflight(config)
    assert "is refused" not in capfd.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    measured(preflight(config))
    assert f"without --dry-run is refused: output directory {tmp_path / 'run'} contains other files" in capfd.readouterr().err
    training.train(config_for(tiny_model, tiny_data, tmp_path / "done"))
    measured(preflight(config_for(tiny_model, tiny_data, tmp_path / "done")))
    assert f"refused: output directory {tmp_path / 'done'} already contains a run" in capfd.readouterr().err
    preflight(config_for(tiny_model, tiny_data, tmp_path / "done", resume=True))
    assert "is refused" not in capfd.readouterr().err


def test_a_basis_is_planned_without_the_weights_that_it_came_from(
    tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    model = without_weights(tiny_model, tmp_path / "bare")
    plan = preflight(config_for(model, tiny_data, tmp_path / "run", mode="fb", basis=str(tiny_basis)))
    assert measured(plan).parameters["trained"] == 2 * 3 * 4 * 64
    with pytest.raises(CoraError, match="holds 8 directions"):
        preflight(config_for(model, tiny_data, tmp_path / "run", mode="fb", basis=str(tiny_basis), rank=9))


@pytest.mark.slow
def test_a_plan_for_a_gpu_counts_no_copy_of_the_scores(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    usual = config_for(tiny_model, tiny_data, tmp_path / "run", device="auto", dtype="auto")
    if torch.cuda.is_available():
        pytest.skip("the plan is for the GPU that is here")
    plan = preflight(usual)
    assert (plan.prepared.hardware.device.type, plan.prepared.hardware.dtype) == ("cuda", torch.bfloat16)
    assert measured(plan).memory.parts["weights"] == pytest.approx(2 * measured(plan).parameters["total"], rel=0.01)
    page = describe(plan)
    assert "fits a card of  16 GB: yes" in page
    assert "141 GB: yes" in page
    several = preflight(dataclasses.replace(usual, gradient_accumulation=2, batch_size=4))
    assert (several.steps, several.largest < plan.largest) == (3, True)


def test_several_processes_exchange_a_second_copy_of_the_gradients(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="full", max_steps=None, batch_size=4)
    alone = preflight(config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = preflight(config)
    assert (alone.steps, plan.steps, plan.processes, plan.tokens) == (9, 5, 2, alone.tokens)
    trained = measured(plan).parameters["trained"]
    assert measured(plan).memory.parts["gradients"] == measured(alone).memory.parts["gradients"] + 4 * trained


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_peak_of_a_divided_model_is_that_of_each_process(
    mode: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    # The second process has no held-out record, and takes part in the pass of the first one.
    shards = {"shard": "fsdp", "batch_size": 2, "max_steps": 2, "eval_limit": 1}
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode=mode, **shards)
    found = measured(preflight(dataclasses.replace(config, dry_run=True, processes=2)))
    complete = measured(preflight(dataclasses.replace(config, dry_run=True, processes=2, shard="none"))).memory
    assert not torch.distributed.is_initialized()
    assert run_together(config, before=functools.partial(meter_process, tmp_path)) == [(0, ""), (0, "")]
    real = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # The first process has the larger part of what two cannot share equally; buffers are complete everywhere.
    assert found.memory.parts["weights"] == real[0]["peak"]["weights"]
    assert real[1]["kept"] <= real[0]["kept"] <= found.memory.parts["weights"] < 0.6 * complete.parts["weights"]
    assert found.memory.total == pytest.approx(max(sum(each["peak"].values()) for each in real), rel=0.1)
    assert complete.parts["gathered"] == 0
    assert found.memory.parts["gathered"] > 0
    if mode == "full":
        assert found.memory.parts["gradients"] < 0.6 * complete.parts["gradients"]
        assert found.memory.parts["optimizer"] == pytest.approx(real[0]["peak"]["optimizer"], rel=0.1)


def test_a_divided_optimizer_keeps_two_numbers_for_each_trained_one_of_its_share(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="full", dry_run=True, processes=8, shard="fsdp")
    plan = measured(preflight(config))
    assert plan.memory.parts["optimizer"] == pytest.approx(2 * 4 * plan.parameters["trained"] / 8, rel=0.05)


def test_a_divided_model_keeps_no_converted_copy_of_complete_layers(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast's cache would keep all of them to the end of the forward pass."""
    seen = []
    forward = LlamaMLP.forward

    def look(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", look)
    several: dict[str, Any] = {"dry_run": True, "processes": 8, "shard": "fsdp", "dtype": "bf16"}
    preflight(config_for(tiny_model, tiny_data, tmp_path / "run", mode="full", **several))
    assert seen
    assert set(seen) == {(True, False)}


def test_a_plan_for_several_processes_needs_none_of_them(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings = {"processes": 8, "shard": "fsdp", "batch_size": 2, "eval_limit": 1}
    config = config_for(tiny_model, tiny_data, tmp_path / "run", dry_run=True, **settings)
    page = describe(preflight(config))
    assert "in 8 processes" in page
    assert "  gathered " in page
    assert "  gathered " not in describe(preflight(dataclasses.replace(config, shard="none")))
    with pytest.raises(CoraError, match="plan for several with --processes N, or leave it out"):
        preflight(dataclasses.replace(config, processes=1))
    with pytest.raises(UsageError, match="--processes is for --dry-run"):
        config_for(tiny_model, tiny_data, tmp_path / "run", processes=2)


def test_the_example_shows_each_token_and_which_of_them_carry_loss(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    plan = preflight(config_for(tiny_model, tiny_data, tmp_path / "run"))
    example = plan.prepared.train.examples[0]
    lines = marked(example, plan.prepared.tokenizer)
    response = plan.prepared.tokenizer.decode(example.input_ids[example.prompt_length :])
    shown = "".join(line.removeprefix("> ").replace("|", "") for line in lines if line.startswith("> "))
    assert shown == response.replace("|", "").replace("\n", "\\n")
    ids = plan.prepared.tokenizer("Grüße 日本語 🙂")["input_ids"]
    assert "".join(marked(Example([0, *ids], 1), plan.prepared.tokenizer)[1:]).replace("|", "") == "> Grüße 日本語 🙂"


@pytest.mark.parametrize("mode", ["dylora", "eigenlorax", "lora-rite", "uni-lora", "xgblora"])
def test_a_mode_that_chooses_by_numbers_is_not_measured(
    mode: Mode, tiny_model: Path, tiny_data: Path, tiny_sources: tuple[str, ...], tmp_path: Path
) -> None:
    """docs/hardware.md names them."""
    own: dict[str, Any] = {**SMALL.get(mode, {}), **({"start_models": tiny_sources} if mode == "eigenlorax" else {})}
    plan = preflight(config_for(tiny_model, tiny_data, tmp_path / "run", mode=mode, max_steps=30, **own))
    assert isinstance(plan.measured, str)
    assert f"in mode {mode} depends on its numbers" in plan.measured
    page = Path(__file__).parents[2] / "docs" / "hardware.md"
    assert f"`{mode}`" in page.read_text(encoding="utf-8")


def test_a_run_without_gradient_plans_no_optimizer(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    plan = preflight(config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", b_init="zeros"))
    assert measured(plan).memory.stage == "measuring the held-out loss"
    assert measured(plan).memory.parts["optimizer"] == 0


def test_a_plan_for_a_gpu_takes_logits_in_the_pieces_of_a_gpu(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the plan is for the GPU that is here")
    plan = preflight(config_for(tiny_model, tiny_data, tmp_path / "run", device="auto", dtype="bf16", batch_size=16))
    logits = plan.largest_labels * VOCABULARY
    assert losses_of_tokens.CHUNK < logits <= losses_of_tokens.GPU_CHUNK
    # In bf16 the logits and their gradient, in float32 the piece, here all of them, and its softmax.
    assert measured(plan).memory.parts["logits"] == pytest.approx((2 + 2 + 4 + 4) * logits, rel=0.05)


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    assert [size_text(size) for size in (0, 700, 9 * 2**16, 2**20, 2**27)] == [
        *("0 B", "700 B", "576.0 KiB", "1.0 MiB", "0.12 GiB")
    ]


def test_nothing_of_the_fakes_remains(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    swapping = torch.nn.Module._apply
    preflight(config_for(tiny_model, tiny_data, tmp_path / "run"))
    assert torch.nn.Module._apply is swapping
    training.train(config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1))
    assert record_of(tmp_path / "run")["status"] == "finished"


def test_the_time_is_that_of_the_tokens_at_the_rate_of_a_finished_run(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    finished = config_for(tiny_model, tiny_data, tmp_path / "run")
    training.train(finished)
    speed = record_of(tmp_path / "run")["speed"]
    record = {**record_of(tmp_path / "run"), "speed": {**speed, "tokens_per_second": 0.5}}
    writing.write_json(tmp_path / "run" / "run.json", record)

    planned = dataclasses.replace(finished, dry_run=True, rate_from=str(tmp_path / "run"), mode="full", max_steps=6)
    page = describe(plan := preflight(planned))

    assert plan.tokens > speed["tokens"]
    assert f"time of the steps: {duration(2 * plan.tokens)} at 0 tokens/s, the rate of {tmp_path / 'run'}\n" in page
    assert [line for line in page.splitlines() if "another kind" in line] == [
        "  which is another kind of run: mode lora there, full here"
    ]


def test_a_run_without_a_rate_gives_no_time(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", b_init="zeros")
    training.train(config)
    with pytest.raises(CoraError, match=r"--rate-from needs a finished run, and .*run has no rate: it took no step"):
        preflight(dataclasses.replace(config, dry_run=True, rate_from=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(95.2, "95 s"), (720, "12 min"), (3570, "1 h 0 min"), (12_000, "3 h 20 min"), (400_000, "111 h 7 min")],
)
def test_a_duration_has_two_places(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_plan_says_of_the_records_what_the_run_would_say(tiny_model: Path, tmp_path: Path, capfd) -> None:
    rows = [{"instruction": f"Say {n}", "output": "" if n else "<|im_end|> yes", "label": n} for n in range(8)]
    writing.write_jsonl(tmp_path / "data.jsonl", rows)
    config = config_for(tiny_model, tmp_path / "data.jsonl", tmp_path / "run", test_size=2)
    preflight(config)
    planned = [line for line in capfd.readouterr().err.splitlines() if "records" in line or "columns" in line]
    training.train(config)
    assert any("with an answer that is empty" in line for line in planned)
    assert any("columns that are not used: label" in line for line in planned)
    assert set(planned) <= set(capfd.readouterr().err.splitlines())


def test_pairs_without_a_template_are_said_to_have_none_unless_it_was_named(tiny_model: Path, tmp_path: Path, capfd) -> None:
    writing.write_jsonl(tmp_path / "data.jsonl", [{"question": f"What is {n}?", "answer": str(n)} for n in range(8)])
    for template, said in (("auto", True), ("plain", False), ("chat", False)):
        preflight(config_for(tiny_model, tmp_path / "data.jsonl", tmp_path / "run", test_size=2, template=template))
        shown = " ".join(capfd.readouterr().err.split())
        assert ("follow each other as they are (template plain); --template chat renders them" in shown) == said


def test_an_end_of_a_turn_that_is_no_token_is_named(tiny_model: Path, tmp_path: Path, capfd) -> None:
    model = without_weights(tiny_model, tmp_path / "foreign")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|im_end|>", "<|eot_id|>"), encoding="utf-8")
    writing.write_jsonl(tmp_path / "data.jsonl", [{"instruction": f"Say {n}", "output": f"{n}"} for n in range(8)])
    for base, said in ((model, True), (tiny_model, False)):
        preflight(config_for(base, tmp_path / "data.jsonl", tmp_path / "run", test_size=2))
        shown = " ".join(capfd.readouterr().err.split())
        assert ("ends an answer with <|eot_id|>, which the tokenizer has no token for" in shown) == said


@pytest.mark.slow
def test_with_checkpointing_the_measured_row_is_the_one_whose_layers_keep_most(tiny_model: Path, tmp_path: Path) -> None:
    """A long row without labels to speak of keeps the inputs of 24 layers; a short one with many labels keeps fewer bytes."""
    model = without_weights(tiny_model, tmp_path / "deep")
    shape = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 24}
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, **shape, "head_dim": 256, "max_position_embeddings": 4096}))
    long = {"instruction": " ".join(["one two three"] * 330), "output": " ".join(["five"] * 8)}
    short = {"instruction": "Go.", "output": " ".join(["five"] * 110)}

    def peak(name: str, records: list[dict[str, str]]) -> int:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        test = tmp_path / "test.jsonl"
        test.write_text(json.dumps({"instruction": "Say x.", "output": "x"}) + "\n")
        own = {"test_dataset": str(test), "test_size": None, "batch_size": 1, "max_steps": len(records)}
        config = config_for(model, data, tmp_path / name, gradient_checkpointing=True, max_length=2048, **own)
        return measured(plan_run(config, prepare(config, planned=planned_hardware("cuda", "bf16")))).memory.total

    assert peak("both", [long, short]) == peak("long", [long]) > peak("short", [short])
