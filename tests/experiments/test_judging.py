"""A grid whose answers are judged: one judging per data set, which waits for all answers and pays for none twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.errors import UsageError
from cora_cli.experiments.inputs import references
from cora_cli.experiments.preset import small
from cora_cli.experiments.steps import StepFlags, make_plan
from cora_cli.reading import read_json
from tests.evaluation.judge.server import serving
from tests.experiments.helpers import BASE, PretendLauncher, grid_of, inputs_of, plan_of, run_plan

pytestmark = pytest.mark.usefixtures("quick")

JUDGE = {"judge_model": "judge", "rubric": ["paper"], "limit": 2}
ROWS = ({"mode": "base"}, {"mode": ["fb", "lora"]})


def with_judge(judge: Any, **changes: Any) -> dict[str, Any]:
    return {"defaults": {**BASE["defaults"], "judge": judge, **changes}}


def test_one_judging_needs_the_answers_of_every_row_of_its_data_set() -> None:
    plan = plan_of(grid_of(*ROWS, **with_judge(JUDGE)))
    step = plan.steps["judge-data"]
    evaluations = {name for name, other in plan.steps.items() if other.kind == "evaluate"}
    assert set(step.needs) == evaluations
    assert len(evaluations) == 3
    assert step.argv[1:3] == ("out/runs/cora-fb_r4_n3_lr3e-4_seed0", "out/runs/lora_r4_lr3e-4_seed0")
    base = step.argv[step.argv.index("--base") + 1]
    assert base.startswith("out/evaluations/")
    some, every = (plan.needed_for([row.name for row in rows]) for rows in (plan.grid.rows[:2], plan.grid.rows))
    assert "judge-data" not in some
    assert "judge-data" in every


def test_other_metrics_ask_the_judge_for_nothing_new() -> None:
    def key(**evaluate: Any) -> str:
        grid = grid_of(*ROWS, **with_judge(JUDGE, evaluate={**BASE["defaults"]["evaluate"], **evaluate}))
        return plan_of(grid).steps["judge-data"].key

    assert key() == key(metrics=["rouge", "meteor"])
    assert key() != key(max_new_tokens=7)


def test_another_model_in_the_folder_of_the_judge_judges_again() -> None:
    grid = grid_of(*ROWS, **with_judge(JUDGE))
    assert "judge" in references(grid)[0]

    def key(**changed: Any) -> str:
        inputs = inputs_of()
        inputs.models["judge"] = dataclasses.replace(inputs.models["base"], **changed)
        flags = StepFlags("cpu", "fp32", trust_remote_code=True)
        return make_plan(grid, Path("out"), inputs, flags).steps["judge-data"].key

    others: list[dict[str, Any]] = [{"sha256": "b"}, {"tokenizer_sha256": "b"}, {"ends": (7,)}, {"has_own_code": True}]
    assert len({key(), *(key(**changed) for changed in others)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_judge({"judge": "gpt-4"}), "defaults: judge: give one judge"),
        (with_judge({**JUDGE, "rubric": ["kindness"]}), "--rubric must be paper, readability, preference or a YAML file"),
        (with_judge({**JUDGE, "base": "x"}), "defaults: judge: unknown key 'base'"),
        (with_judge(JUDGE, evaluate=False), "there are no answers to judge, since evaluate is false"),
        ({**with_judge(JUDGE), "confirm": {"seeds": [1, 2, 3]}}, "cannot judge; run `cora judge` on its confirmed runs"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        grid_of(*ROWS, **changes)
    assert message in str(caught.value)


def test_the_small_preset_judges_with_its_own_model(tiny_model: Path) -> None:
    endpoint = {"endpoint": "https://example.org/v1", "judge": "gpt-4", "rubric": ["readability"]}
    reduced = small({**BASE, **with_judge(endpoint), "grid": [{"mode": "lora"}]}, str(tiny_model), False)
    judge = reduced["defaults"]["judge"]
    assert (judge["judge_model"], judge["rubric"]) == (str(tiny_model), ["readability"])
    assert "endpoint" not in judge
    assert any(sentence.startswith(f"The judge is {tiny_model}") for sentence in reduced["conditions"])


@pytest.mark.parametrize(
    ("identity", "missing", "asks_again"),
    [({"endpoint": "https://x.org/v1"}, 3, True), ({"endpoint": "https://x.org/v1"}, 0, False), ({}, 3, False)],
)
def test_the_next_call_asks_an_endpoint_for_the_judgments_that_it_did_not_give(
    identity: dict[str, str], missing: int, asks_again: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(grid_of(*ROWS, **with_judge(JUDGE)), tmp_path / "out")

    def carry_out(missing: int) -> list[str]:
        launcher = PretendLauncher()
        rubric = {**{"sha256": "", "pass_mark": 50.0, "criteria": {}, "pairs": None, "disqualified": []}, "asked": 8}
        launcher.judging = {
            **{
                "format": 1,
                "judge": {"model": "gpt-4", **identity},
                "served_models": [],
                "records": 2,
                "retest": False,
                "seed": 0,
            },
            **{"systems": [], "rubrics": {"paper": {**rubric, "failed": {"base": missing}}}, "tokens": {}, "cost": None},
            "judgments_sha256": "",
        }
        assert not run_plan(plan, launcher).failed
        return [argv[0] for argv in launcher.submitted]

    assert carry_out(missing)[-1] == "judge"
    notes = [line for line in capsys.readouterr().err.splitlines() if "judge-data: done" in line]
    said = "; not all judgments were obtained, and the same command asks for the others"
    assert [said in note for note in notes] == [asks_again]
    assert carry_out(0) == (["judge"] if asks_again else [])
    assert carry_out(0) == []


@pytest.mark.slow
def test_a_grid_is_judged_once_and_reported_with_the_papers_names(tiny_model: Path, tmp_path: Path) -> None:
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    with serving() as server:
        values = {
            **{"name": "judged", "model": str(tiny_model), "datasets": {"code": str(data)}, "paper_table": "gpt4_judge"},
            "defaults": {
                "train": {"rank": 4, "max_steps": 1, "batch_size": 2, "test_size": 8},
                "evaluate": {"limit": 8, "max_new_tokens": 4, "metrics": ["rouge"]},
                "judge": {"endpoint": server.url, "judge": "gpt-4", "rubric": ["paper"], "backoff": 0},
            },
            "grid": [{"mode": "base"}, {"mode": "lora", "printed": "CoRA_code_FB_5"}],
        }

        def run(*words: str) -> str:
            grid.write_text(yaml.safe_dump(values, sort_keys=False))
            result = CliRunner().invoke(app, [*words])
            assert result.exit_code == 0, result.output
            return result.output

        ablate = ("ablate", str(grid), "-o", str(out), "--device", "cpu")
        run(*ablate)
        judged = read_json(out / "judgings" / "code" / "judge.json", dict[str, Any])
        assert [system["name"] for system in judged["systems"]] == ["base", "lora_r4_lr3e-4_seed0"]
        asked = len(server.requests)
        assert asked >= 2 * 8 * 3  # two judgments of each answer; the two models may give the same ones
        report = run("report", str(out))
        assert "gpt-4, which answered as planted-1, rubric paper: scores" in report
        # The paper's fluency stands only in the row with that name, although the base model gave the same answers.
        assert report.count("(87.53)") == 1
        run(*ablate)
        assert len(server.requests) == asked
        (out / "judgings" / "code" / "judge.json").write_text("{}")
        assert "judgings/code are left out" in run("report", str(out))
        run(*ablate)
        assert len(server.requests) == asked
        assert "gpt-4, which answered as planted-1, rubric paper: scores" in run("report", str(out))
