"""What the tests of grids share."""

import pytest

from cora_cli.device import select_hardware


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the rate of this machine takes half a second; it is still one of a device that must be here."""

    def rate(device: str) -> tuple[float, str]:
        select_hardware(device, "auto")
        return 1e11, "a known rate"

    for module in ("estimate", "ablate"):
        monkeypatch.setattr(f"cora_cli.experiments.{module}.matmul_rate", rate)
