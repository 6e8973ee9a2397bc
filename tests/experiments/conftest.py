"""What the tests of grids share."""

from pathlib import Path

import pytest

from cora_cli.device import select_hardware
from cora_cli.experiments.steps import Plan
from tests.experiments.helpers import ROWS, grid_of, plan_of


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid whose steps only pretend to run waits for none."""
    monkeypatch.setattr("cora_cli.experiments.execute._POLL_SECONDS", 0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(grid_of(*ROWS), tmp_path / "out")


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the rate of this machine takes half a second; it is still one of a device that must be here."""

    def rate(device: str) -> tuple[float, str]:
        select_hardware(device, "auto")
        return 1e11, "a known rate"

    for module in ("estimate", "ablate"):
        monkeypatch.setattr(f"cora_cli.experiments.{module}.matmul_rate", rate)
