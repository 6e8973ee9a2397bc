import json
import math
from pathlib import Path
from typing import get_args

import pytest

from cora_cli.errors import UsageError
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import METHODS, OPTIONAL_SETTINGS, Mode, method_notes, methods_table, taken_settings
from tests.methods.helpers import plan_of

DEFAULTS = {
    "rank": 8,
    "alpha": 16.0,
    "rslora": False,
    "target_modules": ("q_proj", "v_proj"),
    "dropout": 0.0,
    "seed": 0,
}


def plan(mode="fb", **changes) -> AdapterPlan:
    return plan_of(mode, **{**DEFAULTS, **changes})


@pytest.mark.parametrize(
    ("mode", "b_init", "a_init", "trains_b", "needs_basis"),
    [("lora", "zeros", "kaiming", True, False), ("fb", "basis", "zeros", False, True), ("tb", "basis", "zeros", True, True)],
)
def test_the_table_of_modes(mode, b_init, a_init, trains_b, needs_basis):
    made = plan(mode)
    assert (made.b_init, made.a_init, made.trains_b, made.needs_basis) == (b_init, a_init, trains_b, needs_basis)
    assert METHODS[mode].can_train(made)


def test_every_mode_of_the_command_line_is_in_the_table():
    assert set(METHODS) == set(get_args(Mode))
    assert all(taken_settings(method) <= OPTIONAL_SETTINGS for method in METHODS.values())


@pytest.mark.parametrize("mode", ["fb", "tb"])
@pytest.mark.parametrize("b_init", ["basis", "zeros", "ones", "random", "orthonormal"])
def test_the_start_of_b_can_be_chosen_where_there_is_a_basis_to_replace(mode, b_init):
    assert plan(mode, b_init=b_init).b_init == b_init
    assert plan(mode, b_init=b_init).needs_basis is (b_init == "basis")


@pytest.mark.parametrize("mode", ["lora", "fb", "tb"])
@pytest.mark.parametrize("a_init", ["zeros", "gaussian", "kaiming"])
def test_the_start_of_a_can_be_chosen_in_every_mode(mode, a_init):
    assert plan(mode, a_init=a_init).a_init == a_init


@pytest.mark.parametrize(
    ("mode", "b_init", "a_init", "stuck"),
    [
        ("fb", "zeros", None, True),
        ("fb", "zeros", "kaiming", True),
        ("tb", "zeros", None, True),
        ("tb", "zeros", "kaiming", False),
        ("lora", None, "zeros", True),
        ("lora", None, None, False),
        ("fb", "ones", None, False),
        ("fb", "orthonormal", None, False),
        ("tb", "random", None, False),
    ],
)
def test_a_start_whose_gradient_is_zero_for_ever_is_known(mode, b_init, a_init, stuck):
    assert METHODS[mode].can_train(plan(mode, b_init=b_init, a_init=a_init)) is not stuck


def test_the_scaling_is_alpha_over_rank_or_over_its_root():
    assert plan(rank=9, alpha=18.0).scaling == 2.0
    assert plan(rank=9, alpha=18.0, rslora=True).scaling == pytest.approx(18 / math.sqrt(9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "lora", "b_init": "orthonormal"}, "--b-init applies to the modes fb and tb; mode lora starts B as zeros"),
        ({"rank": 0}, "--rank must be at least 1, not 0"),
        ({"alpha": 0.0}, "--alpha must be positive, not 0.0"),
        ({"alpha": math.nan}, "--alpha must be positive, not nan"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "--dropout must be at least 0 and below 1, not -0.1"),
        ({"target_modules": ()}, "--target-modules must name at least one module"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error_that_names_flag_and_value(changes, said):
    with pytest.raises(UsageError, match=said):
        plan(**changes)


def test_a_plan_survives_json():
    made = plan("tb", b_init="random", a_init="gaussian", rslora=True, dropout=0.1)
    assert AdapterPlan.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_the_page_on_methods_holds_the_table_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"<!-- modes:begin -->\n{methods_table()}\n<!-- modes:end -->" in page, "run scripts/update_readme.py"


def test_the_page_on_methods_holds_the_notes_as_they_are():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"<!-- method-notes:begin -->\n{method_notes()}\n<!-- method-notes:end -->" in page, "run scripts/update_readme.py"
