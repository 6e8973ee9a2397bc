import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
)

from cora_cli import embedded, hashing, writing
from cora_cli.data.split import load_test_records
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation import backend
from cora_cli.evaluation import evaluate as module
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.generate import say_left_out
from cora_cli.evaluation.metrics import TEXT_NAMES
from cora_cli.evaluation.scoring import Evaluation, paired_differences
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json, read_jsonl
from cora_cli.rundir import EvaluationDirectory, RunDirectory

from .helpers import FAST, HELD_OUT, SCORING, answers, evaluate_model, evaluate_run, make_run, unsealed

"""The metrics that compare texts."""

# What can be evaluated


@pytest.mark.parametrize("kind", ["lora", "fb", "compact", "full"])
def test_every_kind_of_run_answers_its_own_held_out_records(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    result = evaluate_run(trained[kind], output_dir=str(tmp_path / "out"))
    held_out = read_jsonl(RunDirectory(trained[kind]).test_records)
    lines = read_jsonl(EvaluationDirectory(tmp_path / "out").predictions)
    assert [line["reference"] for line in lines] == [record["output"] for record in held_out]
    assert all(record["instruction"] in line["prompt"] for record, line in zip(held_out, lines, strict=True))
    assert result.record["metrics"]["rouge1"]["n"] == HELD_OUT == len(lines)


def test_references_that_the_tokenizer_changes_are_counted(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [{"instruction": "Which city?", "output": text} for text in ("Paris", "rome  it is", "oslo")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changing = shutil.copytree(tiny_model, tmp_path / "model")
    for model, said in ((tiny_model, False), (changing, True)):
        evaluate_model(model, tmp_path / "d.jsonl", tmp_path / f"out-{said}")
        assert ("3 records, 1 with a reference that the tokenizer changes" in capfd.readouterr().err) == said
        file = changing / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))


def test_references_that_two_end_tokens_follow_are_not_said_to_be_changed(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({**settings, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    )
    tokens = json.loads((model / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] &= token["content"] != "<|im_end|>"
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|><|endoftext|>{% endfor %}"
    )
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "Which city?", "output": "Paris"}))
    evaluate_model(model, tmp_path / "d.jsonl", tmp_path / "out")
    assert "that the tokenizer changes" not in capfd.readouterr().err


@pytest.mark.parametrize(("encoder", "layer", "named"), [("no/such-encoder", 2, "no/such-encoder"), (None, None, "CORA_CACHE")])
def test_a_metric_whose_encoder_or_word_list_cannot_be_had_ends_an_evaluation_before_anything_is_answered(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str | None, layer: int | None, named: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CORA_CACHE", str(tmp_path / "file"))
    group = "bertscore" if encoder else "meteor"
    with pytest.raises(CoraError, match=named):
        evaluate_run(run, metrics=(group,), bertscore_model=encoder, bertscore_layer=layer)
    assert not (run / "eval").exists()


def test_the_share_of_a_change_that_merging_lost_is_recorded_with_the_answers(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "say_rounded_away", lambda *_: 0.85)
    evaluate_run(run)
    assert read_json(run / "eval" / "generation.json")["rounded_away"] == 0.85
    evaluate_run(run, merge=False, overwrite=True)
    assert "rounded_away" not in read_json(run / "eval" / "generation.json")


def test_the_default_place_is_eval_in_the_run_directory(run: Path) -> None:
    evaluate_run(run)
    assert {path.name for path in (run / "eval").iterdir()} == {
        "generation.json",
        "metrics.json",
        "predictions.jsonl",
        "scores.jsonl",
    }


@pytest.mark.parametrize("kind", ["lora", "fb", "compact"])
def test_merged_and_unmerged_adapters_answer_equally_and_differ_from_the_base(
    trained: dict[str, Path], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    test = RunDirectory(trained[kind]).test_records
    evaluate_run(trained[kind], output_dir=str(tmp_path / "merged"))
    evaluate_run(trained[kind], output_dir=str(tmp_path / "unmerged"), merge=False)
    evaluate_model(tiny_model, test, tmp_path / "base")
    assert answers(tmp_path / "merged") == answers(tmp_path / "unmerged")
    assert answers(tmp_path / "merged") != answers(tmp_path / "base")
    merged = [read_json(tmp_path / name / "generation.json")["settings"]["merged"] for name in ("merged", "unmerged", "base")]
    assert merged == [True, False, False]


def test_a_compact_run_answers_like_the_complete_one(trained: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("fb", "compact"):
        evaluate_run(trained[kind], output_dir=str(tmp_path / kind))
    assert answers(tmp_path / "compact") == answers(tmp_path / "fb")


def test_a_compact_run_finds_a_moved_basis_by_its_flag_only(
    tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path: Path
) -> None:
    basis = Path(shutil.copy(tiny_basis, tmp_path / "basis.safetensors"))
    run = make_run(tiny_model, tiny_data, tmp_path / "run", mode="fb", rank=8, basis=str(basis), compact=True)
    moved = basis.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CoraError, match="pass its path with --basis"):
        evaluate_run(run)
    assert evaluate_run(run, basis=str(moved)).record["metrics"]["rouge1"]["n"] == HELD_OUT


def test_an_adapter_directory_answers_as_its_run(trained: dict[str, Path], tmp_path: Path) -> None:
    run = RunDirectory(trained["lora"])
    evaluate_run(run.root, output_dir=str(tmp_path / "run"))
    evaluate_model(run.adapter, run.test_records, tmp_path / "adapter")
    assert answers(tmp_path / "adapter") == answers(tmp_path / "run")


def test_another_data_set_and_a_built_in_one_replace_the_held_out_records(
    trained: dict[str, Path], records: Path, tmp_path: Path
) -> None:
    own = evaluate_run(trained["lora"], dataset=str(records), output_dir=str(tmp_path / "own"), template="plain")
    assert own.record["metrics"]["rouge1"]["n"] == 7
    built_in = evaluate_run(trained["lora"], dataset="builtin:task-sql", limit=3, output_dir=str(tmp_path / "builtin"))
    assert built_in.record["metrics"]["rouge1"]["n"] == 3
    expected = load_test_records("builtin:task-sql")[0][:3]
    lines = read_jsonl(tmp_path / "builtin" / "predictions.jsonl")
    assert [line["reference"] for line in lines] == [record["output"] for record in expected]


def test_a_prediction_keeps_the_special_tokens_of_references_and_neither_has_the_end_token(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "records.jsonl"
    ended = "c<|endoftext|>"  # by a token that ends answers by the model's own configuration
    writing.write_jsonl(records, [{"prompt": "q", "completion": text} for text in ("a<file_sep>b<|im_end|>", ended)])
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    GenerationConfig(eos_token_id=[0, 2]).save_pretrained(model)
    requests: list[Any] = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda *given: (requests.extend(given[3]), generate(*given))[1])
    evaluate_model(model, records, tmp_path / "out")
    kept = frozenset({AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("<file_sep>")})
    assert [(request.reference, request.keeps) for request in requests] == [("a<file_sep>b", kept), ("c", kept)]


def test_an_answer_ends_also_with_the_token_that_ends_references_which_call_tools(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    ended = "{% if m.tool_calls %}call<file_sep>{% else %}{{ m.content }}<|im_end|>{% endif %}"
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: " + ended + "\n{% endfor %}")
    records = tmp_path / "records.jsonl"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}]
    writing.write_jsonl(records, [{"messages": talk}])
    evaluate_model(model, records, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<file_sep>"])
    assert read_json(tmp_path / "out" / "generation.json")["end_tokens"] == sorted(ends)


def test_prompts_longer_than_the_context_are_cut_at_the_start_and_counted(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 512 positions less 12 new tokens leave room for 500.
    words = [f"{n} " + "so " * n for n in (3, 490, 505, 700)]
    writing.write_jsonl(tmp_path / "long.jsonl", [{"prompt": f"{text}what", "completion": "x"} for text in words])
    evaluate_model(tiny_model, tmp_path / "long.jsonl", tmp_path / "out", max_new_tokens=12)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [tokenizer(f"{text}what")["input_ids"] for text in words]
    assert [len(prompt) > 500 for prompt in ids] == [False, False, True, True]
    assert read_json(tmp_path / "out" / "generation.json")["prompts_cut"] == 2
    assert "2 prompts were cut at the start" in capsys.readouterr().err
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    kept = torch.tensor([ids[-1][-500:]])
    output = model.generate(kept, attention_mask=torch.ones_like(kept), max_new_tokens=12, do_sample=False)
    assert answers(tmp_path / "out")[-1] == tokenizer.decode(output[0, 500:], skip_special_tokens=True)


def test_a_model_without_sdpa_answers_too(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    evaluate_model(tmp_path / "gemma", records, tmp_path / "out")
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) > 0


def test_a_model_whose_output_is_no_number_has_no_answers(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, with products that are not
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match=r"the model's output is not finite \(NaN or infinity\), so it has no answers"):
        evaluate_model(model, records, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_settings_of_the_model_for_its_answers_that_decoding_leaves_out_are_named(
    tiny_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    said = "sets repetition_penalty 1.5, suppress_tokens [5, 6] for its answers, which are left out here"
    path = model / "generation_config.json"
    own = json.loads(path.read_text())
    for changed in (
        {"repetition_penalty": 1.5, "suppress_tokens": [5, 6], "num_beams": 1, "temperature": 0.6, "do_sample": True},
        {},
    ):
        path.write_text(json.dumps({**own, **changed}))
        evaluate_model(model, records, tmp_path / f"out-{len(changed)}", limit=2)
        assert (said in capsys.readouterr().err) == bool(changed)
    answers = [read_jsonl(EvaluationDirectory(tmp_path / f"out-{count}").predictions) for count in (5, 0)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("there", [True, False])
def test_answers_are_not_those_of_other_ends_in_the_base_of_an_adapter_with_its_own_tokenizer(
    there: bool, tiny_model: Path, records: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    ends = base / "generation_config.json"
    own = json.loads(ends.read_text())
    if not there:
        ends.unlink()
    evaluate_model(tmp_path / "adapter", records, tmp_path / "out", limit=2)
    ends.write_text(json.dumps({**own, "eos_token_id": [2, 7]}))
    with pytest.raises(CoraError, match=r"holds an evaluation with other settings \(base_generation_config_sha256\)"):
        evaluate_model(tmp_path / "adapter", records, tmp_path / "out", limit=2)


def test_settings_for_answers_in_the_configuration_of_a_text_part_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "repetition_penalty": 1.5}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    say_left_out(ModelPath("m", tmp_path, None))
    assert "m sets repetition_penalty 1.5 for its answers" in capsys.readouterr().err


def test_no_room_for_any_prompt_is_refused(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match="--max-new-tokens 512 leaves no room"):
        evaluate_model(tiny_model, records, tmp_path / "out", max_new_tokens=512)


@pytest.mark.usefixtures("no_model")
def test_an_empty_prompt_is_refused_before_a_model_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    writing.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    with pytest.raises(CoraError, match=r"data\.jsonl, record 2: the prompt is empty"):
        evaluate_model(tiny_model, tmp_path / "data.jsonl", tmp_path / "out")


# What is refused


@pytest.mark.usefixtures("no_model")
def test_directories_without_a_finished_run_are_refused_before_a_model_is_loaded(
    run: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained["fb"], tmp_path / "runs" / "fb")
    said = {
        "empty": r"empty is not a cora run \(no run\.json of cora\)\. To evaluate a model or adapter: .*--model .*empty --dataset FILE",
        "nowhere": r"nowhere does not exist; name run directories of `cora train`\. .*--model .*nowhere --dataset FILE",
        "runs": r"runs is not a cora run \(no run\.json of cora\); name the runs below it, such as: cora evaluate .*runs/fb$",
    }
    for name, why in said.items():
        with pytest.raises(CoraError, match=why):
            evaluate(EvaluateConfig(runs=(str(trained["fb"]), str(tmp_path / name)), **FAST))
    record = RunDirectory(run).record
    writing.write_json(record, {**unsealed(record), "status": "failed"})
    with pytest.raises(CoraError, match=r"is not finished \(status failed\).*--resume"):
        evaluate(EvaluateConfig(runs=(str(trained["fb"]), str(run)), **FAST))
    assert not (trained["fb"] / "eval").exists()


@pytest.mark.usefixtures("no_model")
def test_two_runs_of_one_name_are_not_written_to_one_directory(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other" / "run")
    with pytest.raises(CoraError, match="two runs have the same name"):
        evaluate(EvaluateConfig(runs=(str(run), str(other)), output_dir=str(tmp_path / "out"), **FAST))
    with pytest.raises(CoraError, match="a run is named twice"):
        evaluate(EvaluateConfig(runs=(str(run), f"{run}/../{run.name}"), **FAST))


@pytest.mark.parametrize("damage", ["missing", "foreign"])
def test_an_adapter_with_keys_that_cannot_be_loaded_is_refused(run: Path, records: Path, tmp_path: Path, damage: str) -> None:
    path = shutil.copytree(RunDirectory(run).adapter, tmp_path / "alone") / "adapter_model.safetensors"
    state = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensor = state.pop(key)
    if damage == "foreign":
        state |= {key: tensor, key.replace("layers.1", "layers.7"): tensor.clone()}
    save_file(state, path)
    with pytest.raises(CoraError, match=r"1 keys do not fit the model, the first, .*q_proj\.lora_B"):
        evaluate_model(path.parent, records, tmp_path / "out")


@pytest.mark.usefixtures("no_model")
def test_a_base_model_that_changed_since_training_is_refused(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run = make_run(base, tiny_data, tmp_path / "run", mode="lora", rank=2, max_steps=1)
    state = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoraError, match="another model, or it has changed"):
        evaluate_run(run)
    with pytest.raises(CoraError, match="another model, or it has changed"):
        evaluate_model(run / "adapter", RunDirectory(run).test_records, tmp_path / "out")


@pytest.mark.usefixtures("no_model")
def test_other_files_in_the_output_directory_are_left_alone(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "out" / "thesis.txt", tmp_path / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with pytest.raises(CoraError, match="holds other files"):
        evaluate_model(tiny_model, records, tmp_path / "out")
    with pytest.raises(CoraError, match="is a file"):
        evaluate_model(tiny_model, records, tmp_path / "file", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of: run directories, --model, or --from"),
        ({"runs": ("a",), "from_predictions": "b"}, "exactly one of: run directories, --model, or --from"),
        ({"model": "a", "output_dir": "b"}, "--model needs --dataset"),
        ({"model": "a", "dataset": "b"}, "--model needs --dataset .* and --output-dir"),
        ({"from_predictions": "a", "limit": 3}, "--limit has no effect with --from"),
        ({"from_predictions": "a", "dataset": "b"}, "--dataset has no effect with --from"),
        ({"from_predictions": "a", "backend": "vllm"}, "--backend vllm has no effect with --from"),
        ({"from_predictions": "a", "template": "plain"}, "--template plain has no effect with --from"),
        ({"from_predictions": "a", "max_new_tokens": 8}, "--max-new-tokens has no effect with --from"),
        ({"from_predictions": "a", "batch_size": 8}, "--batch-size has no effect with --from"),
        ({"from_predictions": "a", "merge": False}, "--no-merge has no effect with --from"),
        ({"from_predictions": "a", "exclude_trained": False}, "--no-exclude-trained has no effect with --from"),
        ({"from_predictions": "a", "dtype": "bf16"}, "--dtype bf16 has no effect with --from"),
        ({"from_predictions": "a", "trust_remote_code": True}, "--trust-remote-code has no effect with --from"),
        ({"runs": ("a",), "metrics": ("rouge",), "bertscore_layer": 3}, "--bertscore-layer has no effect without bertscore"),
        ({"runs": ("a",), "metrics": ("rouge",), "bleu_tokenize": "zh"}, "--bleu-tokenize zh has no effect without bleu"),
        ({"runs": ("a",), "batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"runs": ("a",), "max_new_tokens": -1}, "--max-new-tokens must be at least 1, not -1"),
        ({"runs": ("a",), "bootstrap": 99}, "--bootstrap must be at least 100, not 99"),
        ({"runs": ("a",), "limit": 0}, "--limit must be at least 1, not 0"),
        ({"runs": ("a",), "metrics": ("chrf",)}, "unknown metric 'chrf'"),
    ],
)
def test_invalid_requests_are_usage_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(**given)


# Metrics


def test_a_result_records_its_predictions_and_settings(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    result = evaluate_model(tiny_model, records, tmp_path / "out")
    assert unsealed(tmp_path / "out" / "metrics.json") == result.record
    settings = result.record["generation"]["settings"]
    assert (settings["batch_size"], settings["dtype"], settings["attention"]) == (4, "fp32", "transformers' default")
    assert (settings["model"], settings["adapter_sha256"], settings["decoding"]) == (str(tiny_model), None, "greedy")
    predictions = tmp_path / "out" / "predictions.jsonl"
    assert (
        result.record["predictions_sha256"]
        == result.record["generation"]["predictions_sha256"]
        == hashing.sha256_file(predictions)
    )
    reasons = [line["finish_reason"] for line in read_jsonl(predictions)]
    assert result.record["shortcomings"].get("cut", 0) == reasons.count("length")
    assert len(read_jsonl(tmp_path / "out" / "scores.jsonl")) == 7


def test_metrics_are_recomputed_from_predictions_without_a_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_run(run)
    monkeypatch.setattr(backend, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    predictions = str(run / "eval" / "predictions.jsonl")
    for output, more in ((None, {}), (str(tmp_path / "elsewhere"), {"copied_from": predictions})):
        config = EvaluateConfig(from_predictions=predictions, output_dir=output, **SCORING)
        # The full record: it still has the run and settings of the predictions.
        assert evaluate(config)[0].record == first.record | more
    for name in ("predictions.jsonl", "scores.jsonl"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (run / "eval" / name).read_bytes()


def test_entries_of_foreign_predictions_that_nothing_reads_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"index": 0, "prompt": "p", "reference": "a", "prediction": "b", "references": ["b", "c"], "new_tokens": 1}
    writing.write_jsonl(tmp_path / "predictions.jsonl", [line])
    evaluate(EvaluateConfig(from_predictions=str(tmp_path / "predictions.jsonl"), metrics=("rouge1",), bootstrap=100))
    assert f"{tmp_path}/predictions.jsonl: entries that are not used: references\n" in capsys.readouterr().err


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_alpha(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 80}))


@pytest.mark.parametrize(("name", "damage"), [("adapter_model.safetensors", flip_a_bit), ("adapter_config.json", change_alpha)])
@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_result_that_was_changed_after_the_training_is_refused_by_every_command(
    run: Path, name: str, damage: Any, part: str
) -> None:
    damage(run / "adapter" / name)
    with pytest.raises(CoraError, match=rf"adapter.{name} was changed after its training had finished"):
        resolve_model(str(run / part))  # what evaluate, merge, export, extract-basis and inspect call first


def test_held_out_records_that_were_changed_are_refused(run: Path) -> None:
    lines = (run / "test.jsonl").read_text().splitlines(keepends=True)
    (run / "test.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(CoraError, match=r"test.jsonl was changed after it was written"):
        evaluate_run(run)
    assert evaluate_run(run, dataset=str(run / "test.jsonl")).record["metrics"]["rouge1"]["n"] == len(lines) // 2


def test_edited_predictions_are_scored_without_a_generation_record_and_it_says_so(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(run)
    path = run / "eval" / "predictions.jsonl"
    writing.write_jsonl(path, [{**line, "prediction": line["reference"]} for line in read_jsonl(path)])
    edited = evaluate(EvaluateConfig(from_predictions=str(path), **SCORING))[0]
    assert edited.record["metrics"]["rouge1"]["value"] == 1
    assert edited.record["generation"] == {}
    assert edited.name == "eval"
    assert "predictions.jsonl is not the file that generation.json describes" in capfd.readouterr().err


def from_lines(directory: Path, text: str, **settings: Any) -> Evaluation:
    (directory / "predictions.jsonl").write_text(text, encoding="utf-8")
    return evaluate(EvaluateConfig(from_predictions=str(directory / "predictions.jsonl"), **{**SCORING, **settings}))[0]


GOOD = json.dumps({"prediction": "a b", "reference": "a c"}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"prediction": \n', r"predictions\.jsonl, line 2: not valid JSON"),
        (
            GOOD + GOOD + '{"prediction": "a"}\n',
            r"predictions\.jsonl, line 3: expected text under \"prediction\" and \"reference\"",
        ),
        (GOOD + '{"prediction": "a", "reference": null}\n', r"line 2: .* found \{.*\"reference\": null\}"),
        (GOOD + '{"prediction": 7, "reference": "a"}\n', r"line 2: .* found \{\"prediction\": 7"),
        (GOOD + '["a", "b"]\n', r"predictions\.jsonl, line 2: .* found \[\"a\", \"b\"\]"),
        (GOOD + '{"prediction": "\\ud800", "reference": "a"}\n', "half of a character and no text"),
        ("", "nothing to score: there are 0 predictions"),
        (
            '{"index": 4, "prediction": "a", "reference": "b"}\n\n'
            + GOOD
            + '{"index": 4, "prediction": "b", "reference": "b"}\n',
            r"predictions\.jsonl: lines 1 and 4 both answer the record with index 4; remove one of them",
        ),
    ],
)
def test_malformed_predictions_are_refused_naming_file_and_record(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CoraError, match=message):
        from_lines(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predictions_must_be_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(CoraError, match="is not a file; --from needs the predictions"):
            evaluate(EvaluateConfig(from_predictions=str(path), **SCORING))


@pytest.fixture
def encoder_without_limit(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERTScore's encoder with a tokenizer without a maximum length."""
    whole, copy = embedded.encoder_directory(), tmp_path_factory.mktemp("encoder")
    for path in whole.iterdir():
        (copy / path.name).symlink_to(path)
    stated = json.loads((whole / "tokenizer_config.json").read_text())
    del stated["model_max_length"]
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps(stated))
    assert AutoTokenizer.from_pretrained(copy).model_max_length > 10**9
    monkeypatch.setattr(embedded, "encoder_directory", lambda: copy)


@pytest.mark.usefixtures("encoder_without_limit")
def test_every_metric_of_empty_and_endless_predictions_has_value_interval_n_and_signature(tmp_path: Path) -> None:
    endless = " ".join(f"word{n}" for n in range(4_000))
    pairs = [("", "a b c"), (endless, "word1 word2 word3"), ("  \n", "a"), ("a b", ""), ("a cat", "a cat")]
    lines = "".join(json.dumps({"prediction": p, "reference": r}) + "\n" for p, r in pairs)
    result = from_lines(tmp_path, lines, metrics=("rouge", "meteor", "bleu", "bertscore"))
    assert (
        tuple(result.record["metrics"]) == TEXT_NAMES == ("rouge1", "rouge2", "rougeL", "meteor", "sacrebleu", "bertscore_f1")
    )
    scores = read_jsonl(tmp_path / "scores.jsonl")
    assert [tuple(line) for line in scores] == [TEXT_NAMES] * 5
    for name, metric in result.record["metrics"].items():
        assert set(metric) == {"value", "ci95", "n", "unscorable", "signature"}
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
        assert metric["n"] == 5
        assert metric["signature"].startswith(f"{name}|")
        assert "|bs:100|seed:0|" in metric["signature"]
        assert scores[0][name] == scores[2][name] == scores[3][name] == 0
        assert scores[1][name] < scores[4][name]
        if name != "sacrebleu":
            assert metric["value"] == pytest.approx(sum(line[name] for line in scores) / 5)
    assert result.record["shortcomings"] == {"empty": 2}
    assert result.record["generation"] == {}


# Comparing


def test_runs_are_compared_on_the_same_records_only(trained: dict[str, Path], records: Path, tmp_path: Path) -> None:
    names = tuple(str(trained[kind]) for kind in ("lora", "fb"))
    one, other = evaluate(EvaluateConfig(runs=names, output_dir=str(tmp_path / "two"), **FAST))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["fb", "lora"]
    differences = paired_differences(other, one)
    for name, difference in differences.items():
        gap = other.record["metrics"][name]["value"] - one.record["metrics"][name]["value"]
        assert difference.difference == pytest.approx(gap)
        assert difference.n == HELD_OUT
    fewer = evaluate_run(trained["fb"], output_dir=str(tmp_path / "fewer"), limit=3)
    with pytest.raises(CoraError, match="did not answer the same records"):
        paired_differences(fewer, one)


def test_an_adapter_that_cannot_be_merged_is_evaluated_as_it_is(
    tiny_model: Path, records: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_bias=True)
    torch.manual_seed(0)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if name.endswith("lora_B.default.bias"):
                weight.fill_(3.0)
    adapted.save_pretrained(tmp_path / "adapter")
    evaluate_model(tmp_path / "adapter", records, tmp_path / "merged")
    said = f"{tmp_path / 'adapter'} is evaluated without merging it, which is slower: "
    assert said in capfd.readouterr().err
    assert "no bias" in json.loads((tmp_path / "merged" / "generation.json").read_text())["not_merged"]
    evaluate_model(tmp_path / "adapter", records, tmp_path / "apart", merge=False)
    evaluate_model(tiny_model, records, tmp_path / "base")
    assert answers(tmp_path / "merged") == answers(tmp_path / "apart") != answers(tmp_path / "base")
