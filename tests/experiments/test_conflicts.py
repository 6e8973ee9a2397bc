"""Which results of an earlier call a grid keeps, and which it refuses to mix with those to come."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.experiments.execute import refuse_conflicts, write_plan
from cora_cli.experiments.steps import Plan, StepFlags, make_plan
from cora_cli.reading import read_json
from cora_cli.settings import DtypeName
from tests.experiments.helpers import BASE, FB, LORA, ROWS, PretendLauncher, carry_out, grid_of, inputs_of, plan_of

pytestmark = pytest.mark.usefixtures("quick")


def test_results_of_other_settings_are_refused_unless_they_may_be_replaced(plan: Plan) -> None:
    carry_out(plan)
    other = changed(plan, max_steps=5)
    with pytest.raises(CoraError, match="created with other settings") as error:
        refuse_conflicts(other, set(other.steps), overwrite=False)
    assert f"runs/{LORA} (max_steps)" in str(error.value)
    refuse_conflicts(other, set(other.steps), overwrite=True)
    old = plan.out / "runs" / LORA / "checkpoints" / "step"
    writing.write_text(old, "of the old run")
    # The fine-tune, the basis and the base model's evaluation have their own settings.
    assert sorted(carry_out(other)[1]) == sorted(f"{kind}-{row}" for kind in ("train", "evaluate") for row in (FB, LORA))
    assert not old.exists()


def changed(plan: Plan, **train: Any) -> Plan:
    defaults = {**BASE["defaults"], "train": {**BASE["defaults"]["train"], **train}}
    return plan_of(grid_of(*ROWS, defaults=defaults), plan.out)


def test_a_failed_run_may_be_replaced_by_one_of_other_settings(plan: Plan) -> None:
    carry_out(plan, PretendLauncher(fails=lambda argv: "diverged" if argv[0] == "train" else None))
    refuse_conflicts(changed(plan, learning_rate=1e-5), set(plan.steps), overwrite=False)


def test_another_choice_of_metrics_is_not_a_conflict_and_scores_again(tmp_path: Path) -> None:
    plans = [
        plan_of(grid_of({"mode": "lora"}, {"mode": "base"}, defaults={"evaluate": {"metrics": metrics}}), tmp_path / "out")
        for metrics in (["rouge"], ["rouge", "bleu"])
    ]
    carry_out(plans[0])
    refuse_conflicts(plans[1], set(plans[1].steps), overwrite=False)
    assert sorted(carry_out(plans[1])[1]) == ["evaluate-base", "evaluate-lora_r48_lr3e-4_seed0"]
    longer = plan_of(grid_of({"mode": "lora"}, defaults={"evaluate": {"max_new_tokens": 7}}), tmp_path / "out")
    with pytest.raises(CoraError, match=r"evaluation \(max_new_tokens\)"):
        refuse_conflicts(longer, set(longer.steps), overwrite=False)


def test_another_seed_is_a_conflict_where_answers_are_drawn(tmp_path: Path) -> None:
    def drawn(seed: int, **settings: Any) -> Plan:
        evaluate = {"metrics": ["rouge"], "seed": seed, **settings}
        return plan_of(grid_of({"mode": "lora"}, defaults={"evaluate": evaluate}), tmp_path / f"out{len(settings)}")

    for settings in ({}, {"temperature": 0.8}):
        carry_out(drawn(0, **settings))
        other = drawn(1, **settings)
        with pytest.raises(CoraError, match=r"evaluation \(seed\)") if settings else contextlib.nullcontext():
            refuse_conflicts(other, set(other.steps), overwrite=False)


def test_a_grid_is_not_continued_with_another_tokenizer(plan: Plan) -> None:
    first, other = (dataclasses.replace(plan, tokenizer=digest) for digest in ("one", "other"))
    write_plan(first)
    refuse_conflicts(other, set(plan.steps), overwrite=False)  # nothing is finished yet
    carry_out(first, rows=[LORA])
    refuse_conflicts(first, set(plan.steps), overwrite=False)
    with pytest.raises(
        CoraError, match=rf"the tokenizer of base, .* has changed since runs/{LORA} was finished, .*; restore it, or"
    ):
        refuse_conflicts(other, set(plan.steps), overwrite=True)
    write_plan(other)  # as it is after the grid was continued without this row
    with pytest.raises(CoraError, match=rf"the tokenizer of base, .* has changed since runs/{LORA} was finished"):
        refuse_conflicts(other, set(plan.steps), overwrite=False)
    refuse_conflicts(first, set(plan.steps), overwrite=False)
    _forget_texts(plan)
    write_plan(first)  # as an earlier version does
    with pytest.raises(CoraError, match="the tokenizer of base"):
        refuse_conflicts(other, set(plan.steps), overwrite=False)
    write_plan(plan)  # as a still earlier one does
    refuse_conflicts(other, set(plan.steps), overwrite=False)


def test_a_grid_is_not_continued_where_a_machine_computes_in_another_type(plan: Plan) -> None:
    carry_out(plan, rows=["base"])
    (base,) = plan.steps_of["base"]
    place = plan.out / plan.steps[base].output
    writing.write_json(place / "generation.json", {"name": "base", "settings": {"dtype": "fp32"}})
    everything = set(plan.steps)
    for dtype in ("fp32", None):
        refuse_conflicts(plan, everything, overwrite=False, dtype=dtype)
    with pytest.raises(CoraError, match=r"evaluations/\w+ was computed in fp32, and this machine would compute .* in bf16"):
        refuse_conflicts(plan, everything, overwrite=True, dtype="bf16")
    refuse_conflicts(plan, {base}, overwrite=False, dtype="bf16")  # nothing is left to compute


def test_the_base_model_is_evaluated_again_in_another_type_that_is_asked_for(tmp_path: Path) -> None:
    asked: tuple[DtypeName, ...] = ("auto", "bf16", "fp32")
    grid = grid_of({"mode": "base"})
    steps = [make_plan(grid, tmp_path, inputs_of(), StepFlags("cpu", dtype)).of_kind("base", "evaluate") for dtype in asked]
    assert len({step.output for step in steps if step is not None}) == 3


def _forget_texts(plan: Plan) -> None:
    """Make the records of the steps those of a version that noted the tokenizer in the plan alone."""
    for path in (plan.out / "steps").glob("*.json"):
        writing.write_json(path, {key: value for key, value in read_json(path).items() if key not in ("texts", "sha256")})


@pytest.mark.parametrize("ends", [(2,), ()], ids=["others", "none"])
def test_a_grid_is_not_continued_where_other_tokens_end_an_answer(ends: tuple[int, ...], plan: Plan) -> None:
    first, other, earlier = (dataclasses.replace(plan, ends=known) for known in (ends, (2, 7), None))
    write_plan(first)
    carry_out(first, rows=[LORA])
    refuse_conflicts(first, set(plan.steps), overwrite=False)
    with pytest.raises(
        CoraError, match=r"the eos_token_id in generation_config.json of base has changed since .*; restore it, or"
    ):
        refuse_conflicts(other, set(plan.steps), overwrite=True)
    _forget_texts(plan)
    write_plan(earlier)  # as an earlier version does
    refuse_conflicts(other, set(plan.steps), overwrite=False)


def test_a_basis_of_adapters_is_not_used_after_their_base_has_changed(plan: Plan) -> None:
    basis = next(step for step in plan.steps.values() if step.kind == "basis")
    adapter = basis.facts["sources"][0]
    first, other = (dataclasses.replace(plan, bases={adapter: digest}) for digest in ("one", "other"))
    write_plan(first)
    carry_out(first)
    for same in (first, dataclasses.replace(plan, bases={"of another row": "other"})):
        refuse_conflicts(same, set(plan.steps), overwrite=False)
    said = rf"the base model of an adapter among the source models has changed since {basis.output} was finished"
    with pytest.raises(CoraError, match=said):
        refuse_conflicts(other, set(plan.steps), overwrite=True)
    _forget_texts(plan)
    write_plan(plan)  # as an earlier version does
    refuse_conflicts(other, set(plan.steps), overwrite=False)
