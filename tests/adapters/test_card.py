"""The model card next to what a run trained: what it says, who can load the files by it, and that no hash depends on it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from cora_cli import hashing
from cora_cli.adapters.card import card, carry_card
from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from cora_cli.reading import read_json
from cora_cli.rundir import RunDirectory
from cora_cli.training.run import train
from tests.adapters.helpers import IDS
from tests.evaluation.helpers import unsealed
from tests.training.helpers import config_for


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("card") / "run"
    train(config_for(tiny_model, tiny_data, output, save_tokenizer=True))
    return output


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


def from_hub(record: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The record as of a run whose base model came from the hub."""
    return {**record, "model": {"reference": "org/base@main", "revision": "0123abc"}, **more}


def card_of(run: Path) -> str:
    return (run / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_trained_adapter_has_a_card_of_its_record(run: Path) -> None:
    text, record = card_of(run), read_json(run / "run.json")
    assert metadata(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["cora", "lora", "arxiv:2106.09685"],
    }
    assert "`lora`: B = 0, A random ([arXiv 2106.09685]" in text
    loss = record["heldout"]["after"]
    low, high = loss["ci95"]
    assert f"{loss['loss']:.4f} [{low:.4f}, {high:.4f}]" in text
    assert re.search(r"\| training +\| +36 \|", text)
    for digest in (record["fingerprint"]["data_sha256"], record["fingerprint"]["model_sha256"], record["result_sha256"]):
        assert digest in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert str(run.parent) not in text
    assert "license" not in text


def test_held_out_prompts_that_the_models_behind_it_know_are_counted(run: Path) -> None:
    record = unsealed(run / "run.json")
    known = card(run / "adapter", {**record, "data": {**record["data"], "held_out_trained_on": 3}})
    said = f"were trained on the prompts of 3 of these {record['heldout']['after']['n']} held-out records"
    assert said in known
    assert said not in card(run / "adapter", record)


def test_a_base_and_a_data_set_of_the_hub_are_named_in_the_metadata(run: Path) -> None:
    record = unsealed(run / "run.json")
    text = card(run / "adapter", from_hub(record, data={**record["data"], "dataset": "org/data"}))
    assert metadata(text)["base_model"] == "org/base"
    assert metadata(text)["datasets"] == ["org/data"]
    assert 'from_pretrained("org/base", revision="0123abc")' in text


def test_the_code_that_a_training_ran_is_asked_for_where_the_adapter_is_loaded(run: Path) -> None:
    record = from_hub(unsealed(run / "run.json"))
    assert "trust" not in card(run / "adapter", record)
    record["fingerprint"]["settings"]["trust_remote_code"] = True
    text = card(run / "adapter", record)
    assert text.count('from_pretrained("org/base", revision="0123abc", trust_remote_code=True)') == 2
    assert "vllm serve org/base --revision 0123abc --trust-remote-code --enable-lora" in text


def test_which_part_of_a_data_set_was_read_is_named(run: Path) -> None:
    record = unsealed(run / "run.json")
    data = {**record["data"], "dataset": "org/data", "subset": "main", "split": "small", "test_dataset": "/home/me/test.jsonl"}
    text = card(run / "adapter", from_hub(record, data=data))
    assert "`org/data`, subset `main`, split `small` (held-out records: `test.jsonl`), template " in text


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"dataset": "org/other"}, "`org/other`"),
        ({"dataset": "org/other", "subset": "main", "split": "test"}, "`org/other`, subset `main`, split `test`"),
        ({"dataset": "/home/me/other.jsonl"}, "`other.jsonl`"),
        ({}, ""),
    ],
)
def test_scores_on_other_records_than_the_held_out_ones_name_their_data_set(
    run: Path, made: dict[str, str], named: str
) -> None:
    metric = {"value": 0.5, "ci95": [0.4, 0.6], "n": 3, "signature": "rouge"}
    evaluation = {"metrics": {"rouge1": metric}, "generation": made}
    text = card(run / "adapter", from_hub(read_json(run / "run.json")), evaluations={"eval": evaluation})
    assert (f"The scores of `eval` are of the records of {named}." in text) == bool(named)
    assert ("The scores of" in text) == bool(named)


def test_a_metric_of_two_signatures_says_which_evaluation_has_which(run: Path) -> None:
    def scored(bleu: str) -> dict[str, Any]:
        shown = {"rouge1": "rouge", "sacrebleu": bleu}
        metrics = {name: {"value": 0.5, "ci95": None, "n": 3, "signature": said} for name, said in shown.items()}
        return {"metrics": metrics, "generation": {}}

    evaluations = {"eval": scored("tok:13a"), "eval-base": scored("tok:13a"), "eval-char": scored("tok:char")}
    text = card(run / "adapter", from_hub(read_json(run / "run.json")), evaluations=evaluations)
    assert "- rouge1: `rouge`\n- sacrebleu of `eval`, `eval-base`: `tok:13a`\n- sacrebleu of `eval-char`: `tok:char`" in text


def test_the_code_of_the_card_loads_the_adapter_in_peft_and_in_transformers(run: Path, tiny_model: Path) -> None:
    text = card(run / "adapter", from_hub(read_json(run / "run.json")), str(run / "adapter"))
    found = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM}
        exec(block.replace('"org/base", revision="0123abc"', f'"{tiny_model}"'), names)
        found.append(names["model"].eval()(IDS).logits)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert len(found) == 2
    assert torch.equal(*found)
    assert not torch.equal(found[0], base(IDS).logits)
    assert "vllm serve org/base --revision 0123abc --enable-lora --max-lora-rank 8 --lora-modules adapter=" in text


@pytest.mark.parametrize(
    ("settings", "library", "says"),
    [
        ({"mode": "dora"}, "peft", "transformers alone and vLLM cannot load it as it is stored; `cora merge` writes the base"),
        ({"mode": "vera"}, "peft", "transformers alone and vLLM cannot load it as it is stored; `cora export` writes it"),
        ({"mode": "mora-6"}, "cora", "PEFT, transformers and vLLM cannot load it as it is stored; `cora merge` writes the base"),
        ({"mode": "fb", "b_init": "orthonormal", "compact": True}, "cora", "cannot load it as it is stored; `cora export`"),
        ({"mode": "full", "learning_rate": 1e-4}, "transformers", "vllm.LLM("),
    ],
)  # fmt: skip
def test_the_card_says_which_programs_cannot_load_the_form(
    settings: dict[str, Any], library: str, says: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1, **settings))
    text = (RunDirectory(tmp_path / "run").result / "README.md").read_text(encoding="utf-8")
    assert metadata(text)["library_name"] == library
    assert says in text
    # The base model is a directory, which another machine has elsewhere. Its file names `BASE` only next to code that takes it.
    assert ("cora evaluate --model PATH --base BASE --dataset DATA" in text) is (library == "cora")
    # What the method's summary says of B is not what a run with a random one has.
    assert ("# fb orthonormal adapter of tiny" in text) is ("b_init" in settings)
    assert ("- start: B as orthonormal instead of basis in this run\n" in text) is ("b_init" in settings)


def test_no_hash_covers_the_card_so_that_people_may_edit_it(
    run: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    record = unsealed(run / "run.json")
    assert record["result_sha256"] == hashing.sha256_json(record["result_files"])
    assert "README.md" not in record["result_files"]
    edited = card_of(run) + "\nMore about it.\n"
    (run / "adapter" / "README.md").write_text(edited, encoding="utf-8")
    resolve_model(str(run))
    assert train(config_for(tiny_model, tiny_data, run, save_tokenizer=True, resume=True)) == record
    assert card_of(run) == edited


def test_a_changed_file_is_named(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CoraError, match=r"adapter/adapter_config\.json was changed after its training had finished"):
        resolve_model(str(damaged))


def test_the_tokenizer_is_stored_on_request(run: Path, tiny_model: Path) -> None:
    ours = AutoTokenizer.from_pretrained(run / "adapter")
    assert ours("Count to 3.").input_ids == AutoTokenizer.from_pretrained(tiny_model)("Count to 3.").input_ids


def test_files_are_readable_by_others(run: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (run / "adapter").iterdir()} == {0o666 & ~mask}


def test_exports_and_merges_of_a_run_have_cards_of_their_own(run: Path, tmp_path: Path) -> None:
    adapter = resolve_model(str(run))
    export_adapter(adapter, tmp_path / "lora")
    merge_adapter(adapter, tmp_path / "merged")
    exported, merged = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("lora", "merged"))
    assert "# LoRA equal to a lora adapter of tiny" in exported
    assert "# tiny with a merged lora adapter" in merged
    assert metadata(merged)["library_name"] == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in merged


def test_the_card_of_a_merge_into_another_base_says_so(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapter, base = resolve_model(str(run)), tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    other = resolve_model(str(base))
    for name, chosen in (("same", resolve_model(str(tiny_model))), ("other", other)):
        merge_adapter(adapter, tmp_path / name, base=chosen)
    same, text = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("same", "other"))
    assert (
        f"It is merged into `bf16` with the SHA-256 `{other.content_hash()}`, another model than the one of the training"
        in text
    )
    assert "It is merged into" not in same


def test_the_card_of_a_merge_that_rounds_the_change_away_says_so(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    train(config_for(base, tiny_data, tmp_path / "run", max_steps=1, learning_rate=1e-6))
    adapter = resolve_model(str(tmp_path / "run"))
    merge_adapter(adapter, tmp_path / "rounded")
    merge_adapter(adapter, tmp_path / "exact", dtype="fp32")
    rounded, exact = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("rounded", "exact"))
    assert re.search(r"\d+% of the adapter's change is lost here, .*; these losses are those of the adapter\.", rounded)
    assert "is lost here" not in exact


def test_the_card_of_a_merge_has_no_word_on_losses_that_were_not_measured(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="dylora", max_steps=1, test_size=0.0))
    adapter, base = resolve_model(str(tmp_path / "run")), tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    (tmp_path / "there").mkdir()
    carry_card(tmp_path / "there", adapter, resolve_model(str(base)), rank=1, lost=0.97)
    text = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "another model than the one of the training." in text
    assert "97% of the adapter's change is lost here, where weights are rounded to their type." in text
    assert "losses" not in text.split("no loss was measured.")[1].split("## How")[0]


def test_the_card_of_the_first_ranks_says_that_the_losses_are_those_of_all(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="dylora", max_steps=1))
    adapter = resolve_model(str(tmp_path / "run"))
    export_adapter(adapter, tmp_path / "cut", rank=1)
    export_adapter(adapter, tmp_path / "all")
    cut, complete = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("cut", "all"))
    assert "These are the losses of all 4 ranks, of which this has the first 1." in cut
    assert "These are the losses" not in complete


def test_the_card_says_that_the_losses_are_those_of_the_base_in_4_bits(run: Path) -> None:
    record = read_json(run / "run.json")
    settings = {**record["fingerprint"]["settings"], "load_in_4bit": True}
    held_in_four = {**record, "fingerprint": {**record["fingerprint"], "settings": settings}}
    assert "They were measured on the base in 4 bits" in card(run / "adapter", held_in_four)
    assert "in 4 bits" not in card_of(run)


@pytest.mark.parametrize(
    ("own", "settings", "alpha"),
    [
        ({"peft_type": "LORA", "r": 2, "lora_alpha": 32}, '{"peft_type": "LORA", "r": 2, "lora_alpha": 32}', 32.0),
        ({"peft_type": "LORA", "r": 2}, '{"peft_type": "LORA", "r": 2}', float(LoraConfig().lora_alpha)),
        ({"peft_type": "IA3", "feedforward_modules": []}, '{"peft_type": "IA3", "feedforward_modules": []}', 6.0),
    ],
)
def test_the_card_of_a_method_of_peft_has_the_settings_of_its_file(
    own: dict[str, Any], settings: str, alpha: float, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "peft.json"
    file.write_text(json.dumps({**own, "target_modules": ["q_proj"]}), encoding="utf-8")
    train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="peft", peft_config=str(file), rank=3, max_steps=1))
    text = card_of(tmp_path / "run")
    assert f"- settings: `{settings}`, on `q_proj`\n" in text
    assert "rank and alpha" not in text
    assert read_json(tmp_path / "run" / "run.json")["plan"]["alpha"] == alpha


def test_what_is_written_of_a_training_says_by_which_tokens_its_answers_end(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    own = read_json(base / "generation_config.json")
    assert own["eos_token_id"] == 2
    (base / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": 7}), encoding="utf-8")
    train(config_for(base, tiny_data, tmp_path / "run", max_steps=1))
    train(config_for(base, tiny_data, tmp_path / "full", mode="full", learning_rate=1e-4, max_steps=1))
    merge_adapter(resolve_model(str(tmp_path / "run")), tmp_path / "merged")
    for model in (tmp_path / "full" / "model", tmp_path / "merged"):
        assert AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id == [7, 2]
    said = "lack some of the tokens that end its answers; `generate` stops at all of them with `eos_token_id=[7, 2]`"
    assert said in card_of(tmp_path / "run")


def test_nothing_is_said_of_end_tokens_that_the_base_has(run: Path, tmp_path: Path) -> None:
    merge_adapter(resolve_model(str(run)), tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id == 2
    assert "eos_token_id" not in card_of(run)


def test_the_card_of_a_run_resumed_with_other_versions_has_both(run: Path) -> None:
    record = read_json(run / "run.json")
    assert "; begun with torch 2.0.0.\n" in card(run / "adapter", {**record, "versions_before": {"torch": "2.0.0"}})
    assert "begun with" not in card_of(run)


def test_held_out_records_whose_loss_is_not_measured_are_not_counted_as_all(run: Path) -> None:
    record = read_json(run / "run.json")
    limited = {**record["fingerprint"], "settings": {**record["fingerprint"]["settings"], "eval_limit": 2}}
    assert re.search(r"\| held-out, measured +\|", card(run / "adapter", {**record, "fingerprint": limited}))
    assert re.search(r"\| held-out +\|", card_of(run))


def test_an_adapter_of_another_program_is_exported_without_a_card(tiny_sources: tuple[str, str], tmp_path: Path) -> None:
    export_adapter(resolve_model(tiny_sources[0]), tmp_path / "lora")
    assert not (tmp_path / "lora" / "README.md").exists()
