"""What a training run computes, leaves on disk and says, checked against plain torch and plain PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainingArguments

from cora_cli.adapters.loading import load_adapter
from cora_cli.data.batches import GlobalBatches
from cora_cli.data.encode import Example, encode_records
from cora_cli.data.split import load_split
from cora_cli.data.templates import Template
from cora_cli.methods.parts.starts import start_a
from cora_cli.models.references import resolve_model
from cora_cli.training.arguments import warmup_steps
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train

from .helpers import assert_b_is_basis, checkpoint_names, config_for, log_lines, losses, record_of

MODES: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"},
    "lora, Gaussian A": {"mode": "lora", "a_init": "gaussian"},
    "fb": {"mode": "fb", "basis": True},
    "fb, Kaiming A": {"mode": "fb", "basis": True, "a_init": "kaiming"},
    "fb, ones": {"mode": "fb", "b_init": "ones"},
    "fb, random": {"mode": "fb", "b_init": "random"},
    "fb, orthonormal": {"mode": "fb", "b_init": "orthonormal"},
    "tb": {"mode": "tb", "basis": True},
    "tb, orthonormal": {"mode": "tb", "b_init": "orthonormal"},
    "full": {"mode": "full"},
}
TRAINED = {"lora": 6 * 4 * 64 + 2 * 4 * (64 + 32 + 32), "fb": 6 * 4 * 64, "full": 586_048}
TRAINED["tb"] = TRAINED["lora"]


def settings_of(mode: str, basis: Path) -> dict[str, Any]:
    return {**MODES[mode], **({"basis": str(basis)} if "basis" in MODES[mode] else {})}


def encoded(config: TrainConfig, part: str) -> list[Example]:
    data = load_split(config.dataset, config.test_size, config.split_seed, config.validation_size)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return encode_records(getattr(data, part), Template("chat", data.schema, tokenizer), 512, part).examples


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each (examples, longest), padded on the right."""
    width = max(len(example.input_ids) for example in examples)
    ids, mask, labels = (torch.full((len(examples), width), value) for value in (0, 0, -100))
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        ids[row, :end] = torch.tensor(example.input_ids)
        mask[row, :end] = 1
        labels[row, example.prompt_length : end] = torch.tensor(example.input_ids[example.prompt_length :])
    return ids, mask, labels


def summed_losses(model: Any, examples: list[Example]) -> tuple[torch.Tensor, int]:
    """The negative log-likelihood of each example's response (examples,), and the number of all their tokens, with padding."""
    ids, mask, labels = padded(examples)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = plain.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    answered = labels[:, 1:] != -100
    losses_ = functional.cross_entropy(plain.lm_head(hidden[answered]), labels[:, 1:][answered], reduction="none")
    return torch.stack([part.sum() for part in losses_.split(answered.sum(1).tolist())]), int(answered.sum())


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.slow if "," in mode else ()) for mode in MODES])
def test_every_mode_leaves_a_whole_run(mode: str, tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = config_for(tiny_model, tiny_data, output, **settings_of(mode, tiny_basis))
    record = train(config)

    result = "model" if config.mode == "full" else "adapter"
    assert {path.name for path in output.iterdir()} == {
        "config.yaml", "run.json", "log.jsonl", "checkpoints", "test.jsonl", "trained_prompts.txt", "heldout.jsonl", result,
    }  # fmt: skip
    assert record == record_of(output)
    assert (record["status"], record["mode"], record["is_base_model"]) == ("finished", config.mode, False)
    assert record["parameters"]["trained"] == TRAINED[config.mode]
    assert record["parameters"]["total"] == TRAINED["full"] + record["parameters"]["adapter"]
    assert record["parameters"]["adapter"] == (0 if config.mode == "full" else TRAINED["lora"])
    assert record["speed"]["steps"] == 3
    assert record["speed"]["tokens_per_second"] > 0
    assert record["peak_memory_bytes"] > 10**8
    assert record["seeds"] == {"seed": 0, "split_seed": 0}
    assert (
        record["versions"]["torch"] == torch.__version__.partition("+")[0] or record["versions"]["torch"] == torch.__version__
    )
    for name in ("model_sha256", "data_sha256", *(["basis_sha256"] if config.basis else [])):
        assert len(record["fingerprint"][name]) == 64
    assert [line["step"] for line in log_lines(output)] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] >= 0 for line in log_lines(output))
    assert checkpoint_names(output) == ["checkpoint-3"]
    assert record["heldout"]["change"]["value"] < 0
    assert not list(output.rglob(".*.tmp"))

    data = load_split(str(tiny_data), 4, 0)
    held_out = [json.loads(line) for line in (output / "test.jsonl").read_text().splitlines()]
    assert held_out == data.test
    assert record["data"]["test"]["records"] == len(held_out) == 4
    assert record["data"]["train"]["records"] == 36
    asked = [{(example["instruction"], example["input"]) for example in part} for part in (held_out, data.train)]
    assert not asked[0] & asked[1]

    resolved = yaml.safe_load((output / "config.yaml").read_text())
    assert TrainConfig(**{**resolved, "target_modules": tuple(resolved["target_modules"])}) == config

    # The stored result, read by PEFT or transformers alone and run with padding, has the held-out loss that was reported.
    if config.mode == "full":
        model: Any = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
        AutoTokenizer.from_pretrained(output / "model")
        assert model.config.use_cache
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(output / "adapter"))
    with torch.no_grad():
        sums, tokens = summed_losses(model.eval(), encoded(config, "test"))
    assert record["heldout"]["after"]["loss"] == pytest.approx(sums.sum().item() / tokens, rel=1e-5)
    rows = [json.loads(line) for line in (output / "heldout.jsonl").read_text().splitlines()]
    assert [row["after"] for row in rows] == pytest.approx(sums.tolist(), rel=1e-5)


def test_validation_records_are_measured_after_training_and_neither_trained_on_nor_held_out(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="lora", validation_size=6)
    record = train(config)
    assert [record["data"][part]["records"] for part in ("train", "test", "validation")] == [30, 4, 6]
    validation = encoded(config, "validation")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(tmp_path / "run" / "adapter")
    )
    with torch.no_grad():
        sums, tokens = summed_losses(model.eval(), validation)
    assert record["validation"]["n"] == 6
    assert record["validation"]["loss"] == pytest.approx(sums.sum().item() / tokens, rel=1e-5)
    unmeasured = train(replace(config, output_dir=str(tmp_path / "unmeasured"), validation_loss=False))
    assert unmeasured["data"] == record["data"]
    assert unmeasured["validation"] is None
    assert unmeasured["heldout"] == record["heldout"]


def test_fb_trains_with_b_equal_to_the_basis(tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", basis=str(tiny_basis))
    record = train(config)
    assert_b_is_basis(tmp_path / "run", tiny_basis)
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for key, tensor in state.items() if ".lora_A." in key)
    assert record["largest_angle_rad"] is None
    assert record["basis"]["sha256"] == record["fingerprint"]["basis_sha256"]


def test_tb_logs_how_far_b_turns_from_the_basis(tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path) -> None:
    record = train(
        config_for(tiny_model, tiny_data, tmp_path / "run", mode="tb", basis=str(tiny_basis), max_steps=5, warmup_ratio=0)
    )
    angles = [line["largest_angle_rad"] for line in log_lines(tmp_path / "run")]
    # A starts at zero, so that B gets its first gradient in the second step.
    assert angles[0] < 1e-7 < angles[1] < angles[2] < angles[3] < angles[4] < math.pi / 2
    assert record["largest_angle_rad"] == angles[-1]
    basis = load_file(tiny_basis)
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    largest = 0.0
    for key, tensor in state.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            frames = [torch.linalg.qr(part.double())[0] for part in (tensor, basis[f"basis/{name}"][:, :4])]
            largest = max(largest, torch.linalg.svdvals(frames[0].T @ frames[1]).min().clamp(max=1).arccos().item())
    assert largest == pytest.approx(angles[-1], rel=1e-6)


def test_a_frozen_zero_b_spends_no_step_and_says_so(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", b_init="zeros", a_init="kaiming", max_steps=1000)
    record = train(config)
    assert (record["status"], record["is_base_model"], record["speed"]["steps"]) == ("finished", True, 0)
    assert record["heldout"]["before"] == record["heldout"]["after"]
    assert record["heldout"]["change"] == {"value": 0.0, "ci95": None}
    assert "this run equals the base model and takes no step" in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    load_adapter(base, resolve_model(str(tmp_path / "run")))


class ReferenceLora(torch.nn.Module):
    """y = x (W + s B A)ᵀ, written out."""

    def __init__(self, linear: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.w, self.scaling = linear.weight.detach(), scaling
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.w + self.scaling * self.b @ self.a)


def reference_run(config: TrainConfig, batches: list[list[int]]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same run in plain torch: padded batches, eager attention, AdamW, linear warm-up and decay."""
    model = LlamaForCausalLM.from_pretrained(config.model, dtype=torch.float32, attn_implementation="eager")
    trained: list[torch.nn.Parameter] = list(model.parameters())
    plan = config.adapter_plan()
    if plan is not None:
        trained = []
        directions = load_file(config.basis) if config.basis else {}
        for index, layer in enumerate(model.model.layers):
            for short in config.target_modules:
                name = f"model.layers.{index}.self_attn.{short}"
                linear = getattr(layer.self_attn, short)
                if config.basis:
                    a, b = torch.zeros(config.rank, 64), directions[f"basis/{name}"][:, : config.rank]
                else:
                    a, b = start_a(plan, name, 64), torch.zeros(linear.out_features, config.rank)
                replaced = ReferenceLora(linear, a, b, (config.alpha or 2 * config.rank) / config.rank)
                setattr(layer.self_attn, short, replaced)
                trained += [replaced.a] if config.mode == "fb" else [replaced.a, replaced.b]
    # As the Trainer does: vectors (norms) do not decay.
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=False)
    examples, steps = encoded(config, "train"), len(batches)
    warmup = math.ceil(config.warmup_ratio * steps)
    step_losses, norms = [], []
    for step, batch in enumerate(batches):
        rising, falling = step / max(1, warmup), (steps - step) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (rising if step < warmup else falling)
        sums, tokens = summed_losses(model, [examples[index] for index in batch])
        loss = sums.sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item())
        optimizer.step()
        step_losses.append(loss.item())
    return step_losses, norms


@pytest.mark.parametrize("mode", ["lora", "fb", "tb", "full"])
def test_losses_and_gradients_are_those_of_a_plain_torch_loop(
    mode: str, tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    config = config_for(
        tiny_model, tiny_data, tmp_path / "run", max_steps=6, weight_decay=0.1, warmup_ratio=0.2, max_grad_norm=0.5,
        learning_rate=3e-3, **settings_of(mode, tiny_basis),
    )  # fmt: skip
    train(config)
    # 36 records in batches of 8: five steps an epoch, the last of them with four records; the sixth begins the second epoch.
    batches = []
    for epoch in range(2):
        sampler = GlobalBatches(36, 8, 1, 0, 1, config.seed)
        sampler.set_epoch(epoch)
        batches += list(sampler)
    assert sorted(index for batch in batches[:5] for index in batch) == list(range(36))
    expected, norms = reference_run(config, batches[:6])
    lines = log_lines(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    warmed = [0, 0.5, 1, 0.75, 0.5, 0.25]  # 0.2 of six steps is rounded up to two
    assert [line["learning_rate"] for line in lines] == pytest.approx([3e-3 * share for share in warmed])


def test_what_only_saves_memory_does_not_change_the_losses(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # Six steps, of which the fifth has four records only: with accumulation 8 half of its micro-batches are ghosts.
    config = config_for(tiny_model, tiny_data, tmp_path / "plain", max_steps=6)
    train(config)
    same: dict[str, dict[str, Any]] = {
        "accumulation 2": {"batch_size": 4, "gradient_accumulation": 2},
        "accumulation 8": {"batch_size": 1, "gradient_accumulation": 8},
        "gradient checkpointing": {"gradient_checkpointing": True},
    }
    for name, settings in same.items():
        train(replace(config, output_dir=str(tmp_path / name), **settings))
        for key in ("loss", "grad_norm", "learning_rate"):
            plain, other = ([line[key] for line in log_lines(tmp_path / run)] for run in ("plain", name))
            assert other == pytest.approx(plain, rel=1e-5), name


def test_equal_seeds_give_equal_runs_and_others_do_not(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "0", max_steps=2)
    for name, seed in (("0", 0), ("again", 0), ("1", 1)):
        train(replace(config, output_dir=str(tmp_path / name), seed=seed))
    assert losses(tmp_path / "0") == losses(tmp_path / "again")
    assert losses(tmp_path / "0")[0] != losses(tmp_path / "1")[0]


def test_precision_is_chosen_for_each_run_of_a_process(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "bf16", dtype="bf16", max_steps=2)
    train(config)
    train(replace(config, output_dir=str(tmp_path / "fp32"), dtype="fp32"))
    assert [record_of(tmp_path / name)["hardware"]["dtype"] for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    state = load_file(tmp_path / "bf16" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_held_out_loss_can_be_followed_in_the_log(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", eval_steps=2, eval_limit=3, max_steps=5)
    record = train(config)
    train(replace(config, output_dir=str(tmp_path / "plain"), eval_steps=None))
    followed = [(line["step"], line["heldout_loss"]) for line in log_lines(tmp_path / "run") if "heldout_loss" in line]
    assert [step for step, _ in followed] == [2, 4]
    before, after = (record["heldout"][when]["loss"] for when in ("before", "after"))
    assert before > followed[0][1] > followed[1][1] > after
    assert record["heldout"]["after"]["n"] == 3
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_the_curve_of_a_run_that_stopped_at_one_of_its_points_is_complete(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(
        tiny_model, tiny_data, tmp_path / "run", eval_steps=2, eval_limit=3, validation_size=4, max_steps=4, resume=True
    )
    train(replace(config, stop_at=2))
    train(config)
    train(replace(config, output_dir=str(tmp_path / "unstopped")))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "unstopped")
    assert [line["step"] for line in log_lines(tmp_path / "run") if "heldout_loss" in line] == [2]


def test_all_weights_are_trained_in_mixed_precision_and_kept_in_float32(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "bf16", mode="full", dtype="bf16", max_steps=3)
    record = train(config)
    train(replace(config, output_dir=str(tmp_path / "fp32"), dtype="fp32"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert record["heldout"]["after"]["loss"] < record["heldout"]["before"]["loss"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "model" / "model.safetensors").values()} == {torch.float32}


def test_epochs_and_limit_decide_the_number_of_steps(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(
        tiny_model, tiny_data, tmp_path / "run", max_steps=None, epochs=1.5, limit=12, batch_size=4, test_size=0
    )
    record = train(config)
    assert record["speed"]["steps"] == len(losses(tmp_path / "run")) == 5
    assert record["data"]["train"]["records"] == 12
    assert record["heldout"] is None
    assert (tmp_path / "run" / "test.jsonl").read_text() == ""


def test_texts_that_lose_their_end_are_counted_in_the_record(tiny_model: Path, tmp_path: Path) -> None:
    # `report` names different maximum lengths only where something was truncated.
    texts = ["Count: " + "1" * n for n in range(1, 13)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = config_for(tiny_model, tmp_path / "texts.jsonl", tmp_path / "run", max_length=8, test_size=6.0, max_steps=1)
    counts = train(config)["data"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    longer = sum(len(tokenizer(text).input_ids) + 1 > 8 for text in texts)
    assert counts["train"]["truncated"] + counts["test"]["truncated"] == longer > 0 < counts["test"]["truncated"]


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.07, 0.1, 0.5, 0.99])
def test_warm_up_has_as_many_steps_as_the_trainer_gives_a_ratio(ratio: float) -> None:
    arguments = TrainingArguments(warmup_steps=ratio, use_cpu=True)
    for steps in (2, 3, 10, 16, 100, 101, 1000):
        assert warmup_steps(ratio, steps) == arguments.get_warmup_steps(steps)


def test_a_run_of_a_single_step_takes_it(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    record = train(config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1, warmup_ratio=0.03))
    assert log_lines(tmp_path / "run")[0]["learning_rate"] > 0
    assert record["heldout"]["change"]["value"] != 0


def test_the_newest_checkpoints_are_kept(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=5, save_steps=1, keep_checkpoints=2)
    train(config)
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2, (
        "what a checkpoint is written to before its renaming is gone"
    )


def test_compact_runs_store_a_alone_and_load_with_the_basis(
    tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    record = train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="fb", basis=str(tiny_basis), compact=True))
    state = load_file(tmp_path / "run" / "adapter" / "adapter_a_only.safetensors")
    assert len(state) == 6
    assert all(".lora_A." in key for key in state)
    facts = json.loads((tmp_path / "run" / "adapter" / "cora.json").read_text())
    assert facts["basis_sha256"] == record["fingerprint"]["basis_sha256"]
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), resolve_model(str(tmp_path / "run")))
    with torch.no_grad():
        sums, tokens = summed_losses(model, encoded(config_for(tiny_model, tiny_data, tmp_path), "test"))
    assert record["heldout"]["after"]["loss"] == pytest.approx(sums.sum().item() / tokens, rel=1e-5)
