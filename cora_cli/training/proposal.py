"""A learning rate proposed before the first step from the curvature of the loss, for `--learning-rate auto`: c / √λmax.

`docs/rates.md` has the sweep that c comes from, and how far the proposals for methods that had no part in c lay from their best rates.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cora_cli.errors import CoraError
from cora_cli.records import Proposed, read_sealed

AUTO: Literal["auto"] = "auto"
"""What --learning-rate is set to for a proposal."""
EXAMPLES, PRODUCTS = 4, 8
"""The training examples, and the most products of the Hessian with a vector, with which c was measured."""
CONSTANT = 3.42e-3
"""c: the geometric mean of best rate · √λmax over the methods of `configs/baselines.yaml`."""
VECTORS = 4
"""Vectors of all trained parameters that are held while curvature is measured, beyond those of a training step with its optimizer."""
STEP = math.sqrt(10)
"""The ratio of neighbouring rates in those sweeps."""
NEAR, METHODS = 41, 46
"""How many methods had their best rate within one step of the proposal from the others, of how many."""
FAR = frozenset({"lora+", "lora-rite", "lori", "increlora", "randlora"})
"""The others. The curvature knows nothing of the rate that lora+ has for B, nor of the optimizer of lora-rite."""
_DIGITS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def proposed_rate(largest_eigenvalue: float) -> float:
    """c / √λmax, `rounded`. Raises `CoraError` where the loss curves upwards in no direction."""
    if not 0 < largest_eigenvalue < math.inf:
        raise CoraError(
            f"--learning-rate auto needs a loss that curves upwards, and its largest eigenvalue is {largest_eigenvalue:.3g}; give a number"
        )
    return rounded(CONSTANT / math.sqrt(largest_eigenvalue))


def rounded(rate: float) -> float:
    """The nearest of 1, 1.5, 2, 3, 5 and 7 times a power of ten, so that seeds seldom differ."""
    power = math.floor(math.log10(rate))
    near = [float(f"{digit:g}e{power}") for digit in (*_DIGITS, 10.0)]
    return min(near, key=lambda one: abs(math.log(one / rate)))


def proposal_from(curvature: Mapping[str, Any]) -> dict[str, Any]:
    """The proposal that follows from a measured curvature, as files keep it. Raises `CoraError` as `proposed_rate` does."""
    return {
        "learning_rate": proposed_rate(curvature["largest_eigenvalue"]),
        "constant": CONSTANT,
        "examples": EXAMPLES,
        **{name: curvature[name] for name in ("largest_eigenvalue", "error", "products")},
    }


def rates_around(rate: float) -> tuple[float, float, float]:
    """The rates of a sweep around a proposal: itself, and about one step of the calibrating sweeps to each side, rounded."""
    return rounded(rate / STEP), rate, rounded(rate * STEP)


def rate_in(path: Path) -> float:
    """The learning rate in a file that `cora train --learning-rate auto --probe` wrote. Raises `CoraError` naming the file where there is none."""
    rate: float = read_sealed(path, Proposed)["proposal"]["learning_rate"]
    return rate


def describe(proposal: Mapping[str, Any], mode: str) -> str:
    """The proposal and how far to trust it, in a sentence."""
    known = (
        f"mode {mode} is one of the {METHODS - NEAR} of {METHODS} methods whose best rate lay further from such a proposal, so sweep it"
        if mode in FAR
        else f"for {NEAR} of {METHODS} methods, the best rate of a sweep lay within a factor of {STEP:.2g} of such a proposal"
    )
    return (
        f"learning rate {proposal['learning_rate']:g}, from the largest Hessian eigenvalue {proposal['largest_eigenvalue']:.3g} before the first "
        f"step; {known}"
    )
