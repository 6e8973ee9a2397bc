"""Whatever a file holds: an equal result, or one sentence and exit code 1 or 2."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.fuzzing import CASES, Case, Outcome, damage, fault_of, make_workspace, put, restore, run

EXAMPLES = int(os.environ.get("CORA_FUZZ_EXAMPLES", "60"))
QUICK = 20
TEXT = (".json", ".jsonl", ".yaml")


Workspace = tuple[Path, Path, dict[Case, Outcome]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The undamaged directory, its working copy, and what the commands that were asked for do with it."""
    before, place = Path.cwd(), tmp_path_factory.mktemp("place")
    os.chdir(place)
    make_workspace(place)
    pristine = tmp_path_factory.mktemp("pristine") / "copy"
    shutil.copytree(place, pristine)
    yield pristine, place, {}
    os.chdir(before)


def undamaged(workspace: Workspace, case: Case) -> Outcome:
    """What the command of a case does where nothing is damaged."""
    pristine, place, outcomes = workspace
    if case not in outcomes:
        restore(pristine, place)
        outcomes[case] = run(case)
        assert outcomes[case].code == 0, (case, outcomes[case].screen)
        assert outcomes[case].result is not None, case
    return outcomes[case]


def check(workspace: Workspace, case: Case, seed: int) -> None:
    """Damage the file of a case and run its command."""
    expected = undamaged(workspace, case)
    pristine, place, _ = workspace
    restore(pristine, place)
    path = place / case.file
    content = damage(path.read_bytes(), random.Random(seed), path.suffix in TEXT)
    put(path, content)
    after = run(case)
    shown = "a directory" if content is None else repr(content[:3000])
    assert (fault := fault_of(case, expected, after)) is None, f"{fault}: {case}\n{shown}\n{after.screen[-3000:]}"


def settings_for(examples: int) -> settings:
    """The same examples in every run."""
    return settings(
        derandomize=True, max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@settings_for(QUICK)
@given(st.sampled_from(CASES), st.integers(0, 2**32))
def test_a_damaged_file_gives_the_same_result_or_one_sentence(workspace: Workspace, case: Case, seed: int) -> None:
    check(workspace, case, seed)


@pytest.mark.slow
@settings_for(EXAMPLES)
@given(st.sampled_from(CASES), st.integers(0, 2**32))
def test_more_damaged_files_give_the_same_result_or_one_sentence(workspace: Workspace, case: Case, seed: int) -> None:
    check(workspace, case, seed)
