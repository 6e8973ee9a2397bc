"""Calibration: the probabilities of the reference tokens, the three metrics on them, and where they are stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cora_cli import hashing, writing
from cora_cli.data.encode import Example
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation import evaluate as module
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.evaluation.metrics import score_all
from cora_cli.evaluation.reference_tokens import reference_tokens
from cora_cli.evaluation.scoring import paired_differences
from cora_cli.reading import read_json, read_jsonl
from cora_cli.records import answers_hashes
from cora_cli.reporting.report import report
from cora_cli.rundir import EvaluationDirectory

from .helpers import FAST, HELD_OUT, evaluate_model, evaluate_run, unsealed

CALIBRATION = ("nll", "brier", "ece")


def random_tokens(records: int, seed: int = 0) -> list:
    """Numbers as a model could give them, for references of different lengths."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(records):
        count = int(generator.integers(1, 9))
        found.append(
            {
                "nll": generator.exponential(size=count).tolist(),
                "brier": (2 * generator.random(count)).tolist(),
                "confidence": generator.random(count).tolist(),
                "correct": (generator.random(count) < 0.6).tolist(),
            }
        )
    return found


def scored(tokens: list, **settings):
    texts = [str(index) for index in range(len(tokens))]
    return score_all(CALIBRATION, texts, texts, tokens=tokens, **settings)


def test_the_values_are_those_of_a_loop_over_all_tokens():
    tokens = random_tokens(40)
    nll, brier, confidence, correct = (
        [value for one in tokens for value in one[key]] for key in ("nll", "brier", "confidence", "correct")
    )
    error = 0.0
    for bin_ in range(15):
        inside = [place for place, value in enumerate(confidence) if bin_ / 15 < value <= (bin_ + 1) / 15]
        if inside:
            accuracy = sum(correct[place] for place in inside) / len(inside)
            error += len(inside) / len(nll) * abs(accuracy - sum(confidence[place] for place in inside) / len(inside))
    found = scored(tokens).metrics
    assert found["nll"]["value"] == pytest.approx(sum(nll) / len(nll))
    assert found["brier"]["value"] == pytest.approx(sum(brier) / len(brier))
    assert found["ece"]["value"] == pytest.approx(error)
    for metric in found.values():
        assert metric["ci95"][0] < metric["value"] < metric["ci95"][1] or metric is found["ece"]
        assert f"|tokens:{len(nll)}|" in metric["signature"]


@pytest.mark.parametrize(("correct", "expected"), [(True, 0.0), (False, 1.0)])
def test_certainty_is_calibrated_where_it_is_right_and_wholly_wrong_where_not(correct: bool, expected: float):
    tokens = [{"nll": [0.0], "brier": [0.0], "confidence": [1.0], "correct": [correct]}] * 3
    assert scored(tokens, bootstrap=10).metrics["ece"]["value"] == expected


def test_the_numbers_are_those_of_the_plain_model_on_each_record(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 3), (12, 1), (40, 20), (7, 9)]
    examples = [
        Example(torch.randint(3, 4000, (prompt + response,), generator=generator).tolist(), prompt)
        for prompt, response in lengths
    ]
    found = reference_tokens(model.float(), examples)
    model = model.double()
    for example, numbers in zip(examples, found, strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            p = model(ids).logits[0, example.prompt_length - 1 : -1].softmax(-1)
        target = ids[0, example.prompt_length :]
        certain = torch.nn.functional.one_hot(target, p.shape[1])
        assert numbers["nll"] == pytest.approx((-(p * certain).sum(-1).log()).tolist(), rel=1e-4)
        assert numbers["brier"] == pytest.approx((p - certain).square().sum(-1).tolist(), rel=1e-4)
        assert numbers["confidence"] == pytest.approx(p.max(-1).values.tolist(), rel=1e-4)
        assert numbers["correct"] == (p.argmax(-1) == target).tolist()


@pytest.mark.parametrize("settings", [{}, {"merge": False}])
def test_the_nll_is_the_held_out_loss_of_the_run(run: Path, tmp_path: Path, settings: dict):
    result = evaluate_run(run, metrics=("calibration",), output_dir=str(tmp_path / "out"), **settings)
    loss = read_json(run / "run.json")["heldout"]["after"]
    metric = result.record["metrics"]["nll"]
    assert metric["value"] == pytest.approx(loss["loss"], rel=1e-5)
    assert metric["n"] == HELD_OUT
    assert f"|tokens:{loss['tokens']}|" in metric["signature"]
    lines = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert sum(len(line["reference_tokens"]["nll"]) for line in lines) == loss["tokens"]


def test_calibration_is_added_to_answers_that_exist_and_scored_from_them_without_a_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = str(tmp_path / "out")
    before = evaluate_run(run, output_dir=out)
    with pytest.raises(CoraError, match=r"also holds rouge1, sacrebleu, which --metrics calibration leaves out"):
        evaluate_run(run, output_dir=out, metrics=("calibration",))
    with pytest.raises(
        CoraError, match="nll needs the probabilities of the reference tokens, which these predictions come without"
    ):
        evaluate(EvaluateConfig(from_predictions=f"{out}/predictions.jsonl", metrics=("nll",), bootstrap=100, overwrite=True))
    monkeypatch.setattr(module, "generate", None)
    result = evaluate_run(run, output_dir=out, metrics=(*FAST["metrics"], "calibration"))
    assert list(result.record["metrics"]) == [*FAST["metrics"], *CALIBRATION]
    assert result.record["metrics"]["rouge1"] == before.record["metrics"]["rouge1"]
    monkeypatch.setattr(module, "_open", None)
    again = evaluate_run(run, output_dir=out, metrics=(*FAST["metrics"], "calibration"))
    assert again.record["metrics"] == result.record["metrics"]
    copied = evaluate(
        EvaluateConfig(
            from_predictions=f"{out}/predictions.jsonl",
            output_dir=str(tmp_path / "copy"),
            metrics=("calibration",),
            bootstrap=100,
        )
    )[0]
    assert copied.record["metrics"] == {name: result.record["metrics"][name] for name in CALIBRATION}


def test_two_models_are_compared_over_the_same_records(run: Path, tiny_model: Path, tmp_path: Path):
    tuned = evaluate_run(run, metrics=("calibration",))
    base = evaluate_model(tiny_model, run / "test.jsonl", tmp_path / "base", metrics=("calibration",))
    difference = paired_differences(tuned, base)["nll"]
    values = [one.record["metrics"]["nll"]["value"] for one in (tuned, base)]
    assert difference.difference == pytest.approx(values[0] - values[1])
    assert difference.ci95[0] < difference.difference < difference.ci95[1]


def test_a_report_shows_calibration_and_finds_numbers_that_were_changed(run: Path, tmp_path: Path):
    evaluate_run(run, metrics=(*FAST["metrics"], "calibration"))
    text = report([str(run)], "markdown")
    header = next(line for line in text.splitlines() if line.startswith("| method") and "nll" in line)
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["method", "held-out loss", *FAST["metrics"], *CALIBRATION]
    assert "lower is better: brier, ece, nll" in text
    metrics = read_json(run / "eval" / "metrics.json")["metrics"]
    assert f"{metrics['ece']['value']:.3f}" in text
    out = EvaluationDirectory(run / "eval")
    lines = read_jsonl(out.predictions)
    lines[0]["reference_tokens"]["nll"][0] += 1
    writing.write_jsonl(out.predictions, lines)
    writing.write_json(out.metrics, {**unsealed(out.metrics), "predictions_sha256": hashing.sha256_file(out.predictions)})
    assert "does not give the nll in metrics.json" in report([str(run)], "markdown")


def test_a_model_whose_logits_are_not_finite_has_no_calibration(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(CoraError, match="gives a token of a reference no probability: its logits are not finite there"):
        reference_tokens(model, [Example([5, 6, 7], 1)])


def test_prompts_that_are_cut_for_their_references_are_counted(tiny_model: Path, tmp_path: Path, capfd):
    records = [{"prompt": "say " * 300, "completion": "so " * 300}, {"prompt": "say", "completion": "so"}]
    writing.write_jsonl(tmp_path / "long.jsonl", records)
    evaluate_model(tiny_model, tmp_path / "long.jsonl", tmp_path / "out", metrics=("nll",), max_new_tokens=1)
    assert (
        "1 prompts were cut at the start, so that they fit the context together with their references" in capfd.readouterr().err
    )


def test_an_adapter_that_changes_the_input_has_no_calibration_and_answers_nothing_before(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, no_model: None
):
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", base_model_name_or_path=str(tiny_model))
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoraError, match="calibration does not support adapters of PROMPT_TUNING, which change the input"):
        evaluate_model(tmp_path / "adapter", tiny_data, tmp_path / "out", metrics=("calibration",))


def test_what_cannot_be_measured_is_refused(run: Path, tiny_model: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--metrics calibration needs --backend transformers"):
        EvaluateConfig(runs=("run",), backend="vllm", metrics=("ece",))
    writing.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "say", "completion": "so " * 600}])
    with pytest.raises(
        CoraError, match=r"long.jsonl, line 1: the reference has \d+ tokens, which leaves no room .* of 512 tokens"
    ):
        evaluate_model(tiny_model, tmp_path / "long.jsonl", tmp_path / "out", metrics=("calibration",))
    evaluate_run(run, metrics=("calibration",))
    lines = read_jsonl(run / "eval" / "predictions.jsonl")
    del lines[1]["reference_tokens"]["brier"][0]
    writing.write_jsonl(tmp_path / "damaged.jsonl", lines)
    writing.write_jsonl(
        tmp_path / "part.jsonl", [*lines[:1], {key: value for key, value in lines[1].items() if key != "reference_tokens"}]
    )
    with pytest.raises(
        CoraError, match=r"part.jsonl, record 2 has no reference_tokens, although others have; evaluate the model"
    ):
        evaluate(
            EvaluateConfig(from_predictions=str(tmp_path / "part.jsonl"), metrics=("nll",), output_dir=str(tmp_path / "o"))
        )
    with pytest.raises(
        CoraError, match=r"damaged.jsonl, record 2: reference_tokens must have lists of numbers of equal length"
    ):
        evaluate(
            EvaluateConfig(from_predictions=str(tmp_path / "damaged.jsonl"), metrics=("nll",), output_dir=str(tmp_path / "o"))
        )


def test_answers_with_a_number_that_json_lacks_are_known_by_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"index": NaN, "prediction": "a", "reference": "a", "reference_tokens": {}}\n')
    assert answers_hashes(path) == (hashing.sha256_file(path),)
