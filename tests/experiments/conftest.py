"""What the tests of grids share."""

import pytest


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the rate of this machine takes half a second."""
    for name in ("matmul_rate", "planned_rate"):
        monkeypatch.setattr(f"cora_cli.experiments.ablate.{name}", lambda device: (1e11, "a known rate"))
