"""The methods paragraph counts what was trained and says what was averaged."""

import dataclasses
from typing import Any

from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.methods_section import methods_paragraphs
from cora_cli.reporting.report_rows import Experiment
from cora_cli.reporting.results import Collection
from cora_cli.reporting.summary import summarise
from tests.reporting.helpers import result

LOSSES = [[1.0, 2.0], [2.0, 2.0], [1.5, 2.0]]


def run(seed: int, **settings: Any) -> dict[str, Any]:
    """As much of a `run.json` as the paragraph needs, and as tells two runs apart."""
    return {"model": {"revision": None}, "seeds": {"seed": seed}, "fingerprint": {"settings": settings}}


def paragraph(*results: Any) -> str:
    experiment = Experiment("tiny", "Tiny", None, None, (), tuple(one.row for one in results))
    return methods_paragraphs(summarise(Collection(experiment, list(results), [])))[0]


def test_members_of_an_ensemble_that_are_no_rows_themselves_are_counted():
    single = result("lora", record=run(0), **{LOSS: LOSSES})
    average = dataclasses.replace(
        result("ensemble lora", nll=[1.0, 2.0, 1.5]),
        members=(run(0), run(1000)),
        generation={"settings": {"members": [["b", "a0"], ["b", "a1"]]}},
    )
    text = paragraph(single, average)
    assert "2 runs trained" in text
    assert "seeds 0 / 1000," in text
    assert "Averaged probabilities: ensemble lora r=4 n=1 over 2 models." in text


def test_the_optimizer_of_a_method_that_has_its_own_is_named():
    rows = [
        result(mode, record={**run(seed), "mode": mode}, **{LOSS: LOSSES}) for seed, mode in enumerate(("lora", "lora-rite"))
    ]
    assert "AdamW / LoRA-RITE, weight decay" in paragraph(*rows)
    assert "AdamW, weight decay" in paragraph(rows[0])


def test_full_fine_tuning_alone_has_neither_a_rank_nor_target_modules():
    trained = {**run(0, target_modules=["q_proj"]), "mode": "full", "plan": None}
    text = paragraph(result("full", record=trained, **{LOSS: LOSSES}))
    assert "Modes full. " in text
    assert "target modules" not in text


def test_the_number_before_a_basis_files_sources_says_that_it_counts_models():
    def basis(*names: str) -> dict[str, Any]:
        choices = {key: key for key in ("share", "merge", "source", "side", "method", "component", "rank")}
        return {"basis": {"sha256": names[0] * 64, "choices": choices, "sources": [{"reference": name} for name in names]}}

    rows = [
        result(f"fb {seed}", record={**run(seed), **basis(*names)}, **{LOSS: LOSSES}) for seed, names in enumerate(("ab", "c"))
    ]
    assert "; from 2 models (a, b) / 1 model (c)." in paragraph(*rows)


def test_draws_dropout_and_a_base_in_four_bits_are_named():
    drawn = dataclasses.replace(
        result("scalabl", record=run(0, dropout=0.1, load_in_4bit=True), **{LOSS: LOSSES}),
        generation={"settings": {"draws": [10]}},
    )
    text = paragraph(drawn)
    assert "in 4 bits (NF4)" in text
    assert "dropout 0.1," in text
    assert "Averaged probabilities: scalabl r=4 n=1 over 10 draws of the weights." in text


def test_a_base_in_four_bits_is_said_of_those_runs_alone_that_had_one():
    runs = [result(mode, record=run(0, load_in_4bit=mode == "dora"), **{LOSS: LOSSES}) for mode in ("lora", "dora")]
    assert "in 4 bits (NF4) in 1 of the runs)" in paragraph(*runs)
