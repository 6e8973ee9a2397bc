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
TEXT = (".json", ".jsonl", ".yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, dict[Case, Outcome]]]:
    """The undamaged directory, its working copy, and what every command does with it."""
    before, place = Path.cwd(), tmp_path_factory.mktemp("place")
    os.chdir(place)
    make_workspace(place)
    pristine = tmp_path_factory.mktemp("pristine") / "copy"
    shutil.copytree(place, pristine)
    outcomes = {}
    for case in CASES:
        restore(pristine, place)
        outcomes[case] = run(case)
        assert outcomes[case].code == 0, (case, outcomes[case].screen)
        assert outcomes[case].result is not None, case
    yield pristine, place, outcomes
    os.chdir(before)


@settings(derandomize=True, max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(CASES), st.integers(0, 2**32))
def test_a_damaged_file_gives_the_same_result_or_one_sentence(
    workspace: tuple[Path, Path, dict[Case, Outcome]], case: Case, seed: int
) -> None:
    pristine, place, outcomes = workspace
    restore(pristine, place)
    path = place / case.file
    content = damage(path.read_bytes(), random.Random(seed), path.suffix in TEXT)
    put(path, content)
    after = run(case)
    shown = "a directory" if content is None else repr(content[:3000])
    assert (fault := fault_of(case, outcomes[case], after)) is None, f"{fault}: {case}\n{shown}\n{after.screen[-3000:]}"
