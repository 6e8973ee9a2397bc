"""What a command line names is looked for before anything heavy is imported, so that a misspelled path is refused at once.

A setting says by `names` what its value has to name. Nothing is read here, and nothing is asked of the hub.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cora_cli.data.readers import check_place
from cora_cli.evaluation.config import check_predictions, check_run
from cora_cli.models.references import check_reference
from cora_cli.reporting.inventory import not_an_output
from cora_cli.rundir import require_basis
from cora_cli.settings import Named


def check_inputs(config: Any) -> None:
    """Raise `CoraError` for the first setting of `config` that names what cannot exist."""
    for field in dataclasses.fields(config):
        named, value = field.metadata["names"], getattr(config, field.name)
        if named is not None and value is not None:
            for name in value if isinstance(value, tuple) else (value,):
                _CHECKS[named](name)


def _check_model_or_basis(name: str) -> None:
    if not Path(name).is_file():
        check_reference(name)


def _check_output(name: str) -> None:
    if not Path(name).exists():
        raise not_an_output(Path(name))


_CHECKS: Mapping[Named, Callable[[str], None]] = {
    "model": check_reference,
    "model or basis": _check_model_or_basis,
    "dataset": check_place,
    "basis": lambda name: require_basis(Path(name)),
    "run": check_run,
    "predictions": check_predictions,
    "output": _check_output,
}
