"""What `TrainConfig` accepts, refuses and writes down."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.rundir import RunDirectory
from cora_cli.settings import comma_separated
from cora_cli.training.config import NOT_PART_OF_THE_RESULT, TrainConfig, config_of_run

NEEDED: dict[str, Any] = {"model": "m", "dataset": "d.jsonl", "output_dir": "o"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate must be positive, not 0.0"),
        ({"learning_rate": math.inf}, "--learning-rate must be a finite number, not inf"),
        ({"learning_rate": math.nan}, "--learning-rate must be a finite number, not nan"),
        ({"epochs": -1.0}, "--epochs must be positive, not -1.0"),
        ({"epochs": math.inf}, "--epochs must be a finite number, not inf"),
        ({"max_steps": 0}, "--max-steps must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"gradient_accumulation": 0}, "--gradient-accumulation must be at least 1, not 0"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio must be at least 0 and below 1, not 1.0"),
        ({"warmup_ratio": -0.1}, "--warmup-ratio must be at least 0 and below 1, not -0.1"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0, not -1.0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm must be at least 0, not -1.0"),
        ({"max_length": 1}, "--max-length must be at least 2, not 1"),
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"eval_steps": 0}, "--eval-steps must be at least 1, not 0"),
        ({"eval_limit": 0}, "--eval-limit must be at least 1, not 0"),
        ({"save_steps": 0}, "--save-steps must be at least 1, not 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1, not 0"),
        ({"seed": -1}, "--seed must be at least 0 and below 2^32, not -1"),
        ({"split_seed": -1}, "--split-seed must be at least 0, not -1"),
        ({"seed": 2**32}, "--seed must be at least 0 and below 2^32, not 4294967296"),
        ({"test_size": math.nan}, "--test-size must be a finite number, not nan"),
        ({"rank": 0}, "--rank must be at least 1, not 0"),
        ({"alpha": -2.0}, "--alpha must be positive, not -2.0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"target_modules": ()}, "--target-modules must name at least one module"),
        ({"b_init": "ones"}, "--b-init applies to the modes fb and tb; mode lora starts B as zeros"),
        ({"basis": "b"}, "--basis has no effect where B starts as zeros; leave it out"),
        ({"mode": "fb"}, "mode fb needs --basis FILE, written by `cora extract-basis`, or another start by --b-init"),
        ({"mode": "tb"}, "mode tb needs --basis FILE, written by `cora extract-basis`, or another start by --b-init"),
        ({"mode": "fb", "b_init": "random", "basis": "b"}, "--basis has no effect where B starts as random; leave it out"),
        ({"mode": "rslora", "rslora": True}, "--rslora does not apply to mode rslora"),
        ({"mode": "mica", "a_init": "gaussian"}, "--a-init does not apply to mode mica"),
        ({"lora_plus_ratio": 4.0}, "--lora-plus-ratio does not apply to mode lora"),
        ({"mode": "lora+", "lora_plus_ratio": 0.0}, "--lora-plus-ratio must be positive, not 0.0"),
        ({"mode": "peft"}, "mode peft needs --peft-config FILE, a JSON file in the form of PEFT's adapter_config.json"),
        (
            {"mode": "pissa", "load_in_4bit": True},
            "--load-in-4bit does not apply to mode pissa, which needs the weights themselves",
        ),
        (
            {"mode": "lora", "shard": "fsdp", "load_in_4bit": True},
            "--shard divides weights that are stored as numbers, not those of --load-in-4bit; leave out one of them",
        ),
        (
            {"mode": "flat-lora", "shard": "fsdp"},
            "--shard does not apply to mode flat-lora, which changes the weights of the base model in each step",
        ),
        ({"mode": "lora", "rate_from": "run"}, "--rate-from has no effect without --dry-run; leave it out"),
        ({"outer_rank": 64}, "--outer-rank does not apply to mode lora"),
        ({"outer_rank": 0}, "--outer-rank does not apply to mode lora"),
        ({"mode": "full", "alpha": 0.0}, "--alpha applies to adapters, not to mode full"),
        ({"mode": "lora-mini", "outer_rank": 0}, "--outer-rank must be at least 1, not 0"),
        ({"mode": "lora-mini", "outer_rank": -3}, "--outer-rank must be at least 1, not -3"),
        ({"mode": "vera", "alpha": 0.0}, "--alpha does not apply to mode vera"),
        ({"mode": "vera", "alpha": 4.0}, "--alpha does not apply to mode vera"),
        (
            {"mode": "lora-mini", "outer_rank": 47},
            "--outer-rank must be at least --rank 48, not 47: the product cannot have a higher rank than k",
        ),
        ({"mode": "fa-basis"}, "mode fa-basis needs --basis FILE, written by `cora extract-basis --side input`"),
        (
            {"mode": "tb", "basis": "b", "compact": True},
            "--compact stores only A, but mode tb also trains B; leave out --compact",
        ),
        ({"mode": "lora-fa", "compact": True}, "--compact stores only A, but mode lora-fa trains B; leave out --compact"),
        (
            {"mode": "mica", "compact": True},
            "--compact needs a B that is frozen from a basis or a seed, which mode mica does not have",
        ),
        ({"mode": "full", "basis": "b"}, "--basis applies to adapters, not to mode full"),
        ({"mode": "full", "compact": True}, "--compact applies to adapters, not to mode full"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{"mode": "lora", **NEEDED, **settings})
    assert message in str(caught.value).split("; ") or str(caught.value) == message


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**NEEDED, mode="full", basis="b", batch_size=0, epochs=0.0)
    assert str(caught.value) == (
        "--epochs must be positive, not 0.0; --batch-size must be at least 1, not 0; "
        "--basis applies to adapters, not to mode full"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "lora", "learning_rate": 1e-5, "test_size": 200.0, "rslora": True},
        {"mode": "fb", "basis": "b", "alpha": 16.0, "target_modules": ("q_proj",), "resume": True},
        {"mode": "fb", "b_init": "orthonormal", "a_init": "gaussian", "max_steps": 7},
        {"mode": "full", "lr_schedule": "cosine"},
    ],
)
def test_a_configuration_survives_yaml(settings: dict[str, Any]) -> None:
    config = TrainConfig(**NEEDED, **settings)
    read = yaml.safe_load(yaml.safe_dump(config.as_dict()))
    assert TrainConfig(**{**read, "target_modules": tuple(read["target_modules"])}) == config


def test_the_configuration_of_a_run_is_read_with_changes(tmp_path: Path) -> None:
    made = {"model": "m", "dataset": "d", "output_dir": "o", "mode": "mean-delta", "start_models": ("a", "b")}
    config = TrainConfig(**made, target_modules=("q_proj",))
    run = RunDirectory(tmp_path)
    run.config.write_text(yaml.safe_dump(config.as_dict()))
    assert config_of_run(run) == config
    assert config_of_run(run, seed=5, probe="p") == dataclasses.replace(config, seed=5, probe="p")
    run.config.write_text("model: m\ndataset: d\noutput_dir: o\nmode: lora\nlearning: 1\n")
    with pytest.raises(CoraError, match=r"config\.yaml is damaged .*learning"):
        config_of_run(run)
    run.config.unlink()
    with pytest.raises(CoraError, match=r"config\.yaml"):
        config_of_run(run)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    plans = [TrainConfig(**NEEDED, mode="lora", rank=12, **given).adapter_plan() for given in ({}, {"alpha": 12.0})]
    assert [plan.scaling for plan in plans if plan] == [2.0, 1.0]
    assert TrainConfig(**NEEDED, mode="full").adapter_plan() is None


def test_settings_that_have_no_effect_are_named(tmp_path: Path) -> None:
    def notices(**settings: Any) -> list[str]:
        return TrainConfig(**NEEDED, **settings).notices()

    (tmp_path / "loha.json").write_text('{"peft_type": "LOHA", "r": 2}')
    assert notices(mode="full", rank=4, dropout=0.1) == [
        "--rank has no effect in mode full, which has no adapter",
        "--dropout has no effect in mode full, which has no adapter",
    ]
    file = str(tmp_path / "loha.json")
    assert notices(mode="peft", peft_config=file, rank=4) == ["--rank has no effect with --peft-config, which states it"]
    assert notices(mode="lora", max_steps=4, epochs=2.0) == [
        "--epochs has no effect with --max-steps, which decides how long the run is"
    ]
    assert notices(mode="lora", test_size=0, eval_steps=2, eval_limit=3) == [
        "--eval-steps has no effect with --test-size 0, which holds out nothing",
        "--eval-limit has no effect with --test-size 0, which holds out nothing",
    ]
    unused = [
        {"mode": "full"},
        {"mode": "lora", "epochs": 2.0},
        {"mode": "lora", "max_steps": 4, "eval_steps": 2},
        {"mode": "lora", "rank": 4},
        {"mode": "peft", "peft_config": file, "target_modules": ("q_proj",)},
    ]
    assert not any(notices(**settings) for settings in unused)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "LORA", "use_dora": True}, "6, and not PEFT's default, 8, with its default of lora_alpha, 8"),
        ({"peft_type": "LORA", "lora_alpha": 3}, "6, and not PEFT's default, 8"),
        ({"peft_type": "LORA", "r": 6}, None),
        ({"peft_type": "IA3", "feedforward_modules": []}, None),
    ],
)
def test_a_rank_that_no_file_states_is_said(values: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    writing.write_json(tmp_path / "peft.json", values)
    said = TrainConfig(**NEEDED, mode="peft", peft_config=str(tmp_path / "peft.json"), rank=6).notices()
    assert [one for one in said if "no effect" not in one] == (
        [f"--peft-config states no r, so r is that of --rank, {says}"] if says else []
    )


def test_only_settings_that_change_no_number_may_differ_on_resume() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= NOT_PART_OF_THE_RESULT
    one = TrainConfig(**NEEDED, mode="lora")
    other = TrainConfig(
        **{**NEEDED, "output_dir": "p"}, mode="lora", resume=True, save_steps=7, keep_checkpoints=1, device="cpu"
    )
    assert one.result_settings() == other.result_settings()
    assert one.result_settings() != TrainConfig(**NEEDED, mode="lora", gradient_accumulation=2).result_settings()


def test_paper_runs_have_rank_48_on_queries_keys_and_values() -> None:
    config = TrainConfig(**NEEDED, mode="lora")
    assert (config.rank, config.target_modules) == (48, ("q_proj", "k_proj", "v_proj"))


def test_comma_separated_ignores_spaces_and_empty_parts() -> None:
    assert comma_separated(" q_proj, v_proj,,") == ("q_proj", "v_proj")
    assert comma_separated("") == ()


def test_settings_that_came_later_do_not_stop_the_resumption_of_earlier_runs_at_their_defaults():
    config = TrainConfig(model="m", dataset="d", output_dir="o", mode="lora")
    assert config.result_settings().keys() & {"load_in_4bit", "train_on"} == set()
    changed = dataclasses.replace(config, train_on="all", load_in_4bit=True)
    assert changed.result_settings()["train_on"] == "all"
    assert changed.result_settings()["load_in_4bit"] is True
