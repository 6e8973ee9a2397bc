import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cora_cli import rundir, writing
from cora_cli.data.split import load_split
from cora_cli.errors import CoraError
from cora_cli.experiments.estimate import estimate_steps
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import find_inputs, require_on_hub
from cora_cli.experiments.steps import Step, StepFlags, make_plan, of_answers
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from tests.conftest import VOCABULARY
from tests.experiments.helpers import grid_of


@pytest.fixture
def grid(tiny_model: Path, tiny_data: Path) -> Grid:
    pool = {"made": {"dataset": str(tiny_data), "test_size": 10}, "unused": "no-org/no-model"}
    row = {"mode": "fb", "sources": ["made"], "rank": 4}
    return grid_of(
        *[row], model=str(tiny_model), models=pool, datasets={"data": str(tiny_data)}, defaults={"train": {"test_size": 4}}
    )


def test_models_are_measured_and_data_are_split_for_each_use(grid: Grid, tiny_model: Path, tmp_path: Path) -> None:
    inputs = find_inputs(grid, tmp_path / "hashes.json")
    inputs.require_all()  # the model that no row uses is not resolved
    model = inputs.models[str(tiny_model)]
    assert model.embedded == VOCABULARY * 64
    assert model.parameters == VOCABULARY * 64 + 2 * (64 * (64 + 32 + 32 + 64 + 3 * 96) + 2 * 64) + 64
    assert sorted(set(model.targets().values())) == [(32, 64), (64, 64)]
    assert sorted(len(data.test) for data in inputs.datasets.values()) == [4, 10]
    assert len({data.sha256 for data in inputs.datasets.values()}) == 2


def test_the_data_of_a_training_on_every_answer_are_those_that_it_will_read(tiny_model: Path, tmp_path: Path) -> None:
    """It leaves out conversations that begin with a held-out prompt, which others keep."""
    hi = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chats = [[*hi, {"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": "1 2"}] for n in range(3)]
    others = [[{"role": "user", "content": f"name {n}"}, {"role": "assistant", "content": "x"}] for n in range(4)]
    for name, records in (("chat", [*chats, *others]), ("held", [hi])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in records))
    data, held = str(tmp_path / "chat.jsonl"), str(tmp_path / "held.jsonl")
    rows = [{"mode": "lora", "train_on": "all"}, {"mode": "full"}, {"mode": "base"}]
    defaults = {"train": {"test_dataset": held}}
    grid = grid_of(*rows, model=str(tiny_model), datasets={"data": data}, defaults=defaults)
    inputs = find_inputs(grid, tmp_path / "hashes.json")
    plan = make_plan(grid, tmp_path / "out", inputs, StepFlags("cpu", "fp32"))
    found = {step.facts["mode"]: step.facts["dataset"] for step in plan.steps.values() if step.kind == "train"}
    for mode, every in (("lora", True), ("full", False)):
        split = load_split(data, None, 0, None, test_dataset=held, every_answer=every)
        assert found[mode] == split.content_hash()
        assert len(split.train) == (4 if every else 7)
    assert estimate_steps(plan, inputs, 1e9).keys() >= {step.name for step in plan.steps.values() if step.kind == "train"}


def test_weights_are_hashed_once_while_their_files_are_unchanged(
    grid: Grid, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_inputs(grid, tmp_path / "hashes.json").models[str(tiny_model)]
    with monkeypatch.context() as patch:
        patch.setattr(ModelPath, "content_hash", lambda _: pytest.fail("read again"))
        assert find_inputs(grid, tmp_path / "hashes.json").models[str(tiny_model)] == first
    (tmp_path / "hashes.json").write_text("damaged")
    assert find_inputs(grid, tmp_path / "hashes.json").models[str(tiny_model)] == first
    assert find_inputs(grid, None).models[str(tiny_model)].sha256 is None


def test_other_weights_with_the_size_and_time_of_the_first_ones_are_hashed(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    grid = grid_of({"mode": "base"}, model=str(model), datasets={"data": str(tiny_data)})
    first = find_inputs(grid, tmp_path / "hashes.json").models[str(model)].sha256
    [weights] = model.glob("*.safetensors")
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert find_inputs(grid, tmp_path / "hashes.json").models[str(model)].sha256 != first


def test_all_missing_inputs_are_reported_at_once(tmp_path: Path) -> None:
    grid = grid_of({"mode": "fb", "sources": ["a"]}, model="./nowhere", datasets={"data": "missing.jsonl"})
    inputs = find_inputs(grid, None)
    assert inputs.unresolved.keys() == {"./nowhere", "org/a", "missing.jsonl"}
    with pytest.raises(CoraError) as error:
        inputs.require_all()
    assert all(name in str(error.value) for name in inputs.unresolved)


def test_models_that_are_not_on_the_hub_are_reported_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(_: HfApi, hub_id: str, revision: str | None, timeout: float) -> None:
        asked.append((hub_id, revision))
        if hub_id != "org/a":
            raise RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(HfApi, "model_info", model_info)
    pool = {"a": "org/a", "b": "org/gone@v1"}
    with pytest.raises(CoraError, match=r"model 'org/gone@v1' is neither a local directory nor on the hub") as error:
        require_on_hub(grid_of({"mode": "fb"}, model="org/base", models=pool))
    assert "org/base" in str(error.value)
    assert "org/a" not in str(error.value)
    assert asked == [("org/base", None), ("org/a", None), ("org/gone", "v1")]


def test_an_unreachable_hub_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("the client's own kind of error")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    require_on_hub(grid_of({"mode": "fb"}, model="org/base"))


def test_a_models_shapes_are_out_by_in_whichever_way_round_its_layers_store_them(tiny_data: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).save_pretrained(
        tmp_path / "gpt2"
    )
    inputs = find_inputs(grid_of({"mode": "base"}, model=str(tmp_path / "gpt2"), datasets={"data": str(tiny_data)}), None)
    assert inputs.models[str(tmp_path / "gpt2")].targets(("c_attn",)) == {"transformer.h.0.attn.c_attn": (48, 16)}


def test_answers_that_only_call_tools_are_measured_like_others(tiny_model: Path, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "1"}}}]}
    talks = [{"messages": [{"role": "user", "content": f"question {number}"}, call]} for number in range(4)]
    writing.write_jsonl(tmp_path / "calls.jsonl", talks)
    inputs = find_inputs(
        grid_of({"mode": "lora"}, model=str(tiny_model), datasets={"data": str(tmp_path / "calls.jsonl")}), None
    )
    inputs.require_all()
    (data,) = inputs.datasets.values()
    assert data.characters > data.response_characters > 20


def test_weights_are_hashed_again_where_any_hashed_file_has_changed(tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    grid = grid_of(
        {"mode": "fb", "sources": ["a"]}, model=str(tiny_model), models={"a": str(adapter)}, datasets={"d": "x.jsonl"}
    )
    first = find_inputs(grid, tmp_path / "hashes.json").models[str(adapter)]
    (adapter / rundir.POSTERIOR).write_bytes(b"a distribution")
    second = find_inputs(grid, tmp_path / "hashes.json").models[str(adapter)]
    assert second.sha256 != first.sha256
    assert second.base_sha256 == first.base_sha256 == resolve_model(str(base)).content_hash()
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    inputs = find_inputs(grid, tmp_path / "hashes.json")
    assert inputs.models[str(adapter)].base_sha256 not in (first.base_sha256, None)
    plan = make_plan(grid, tmp_path / "out", inputs, StepFlags("cpu", "fp32"))
    assert plan.bases == {second.sha256: inputs.models[str(adapter)].base_sha256}


def test_for_a_plan_a_configuration_and_a_tokenizer_say_what_the_weights_would(
    grid: Grid, tiny_model: Path, tmp_path: Path
) -> None:
    complete = find_inputs(grid, None).models[str(tiny_model)]
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    without = dataclasses.replace(grid, model=str(bare))
    assert str(bare) in find_inputs(without, None).unresolved
    planned = find_inputs(without, None, weights=False).models[str(bare)]
    assert planned.sha256 is None
    assert planned.targets(("q_proj", "v_proj")) == complete.targets(("q_proj", "v_proj"))
    assert (planned.parameters, planned.embedded, planned.heads) == (complete.parameters, complete.embedded, complete.heads)


def test_another_encoder_in_the_folder_of_bertscore_scores_the_same_answers_again(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    encoder = Path(shutil.copytree(tiny_model, tmp_path / "encoder"))
    evaluate = {"metrics": ["bertscore"], "bertscore_model": str(encoder)}
    rows = grid_of({"mode": "lora", "rank": 4}, model=str(tiny_model), datasets={"data": str(tiny_data)})
    grid = dataclasses.replace(rows, evaluate=evaluate)

    def step() -> Step:
        inputs = find_inputs(grid, tmp_path / "hashes.json")
        steps = make_plan(grid, Path("out"), inputs, StepFlags("cpu", "fp32")).steps.values()
        return next(step for step in steps if step.kind == "evaluate")

    before = step()
    for name in ("config.json", "tokenizer_config.json"):
        (encoder / name).write_text((encoder / name).read_text() + " ")
        after = step()
        assert before.key != after.key
        assert of_answers(before.facts) == of_answers(after.facts)
        before = after
