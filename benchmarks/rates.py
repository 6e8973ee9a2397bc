"""Whether curvature before training predicts the best learning rate of a method: measured on the sweep of a grid.

    python benchmarks/rates.py runs/honest --probes probes -o docs/results/rates.json --plot docs

Each method of the grid's sweep is measured as `cora train --probe` measures it, once, with the settings of one of its runs. Then each method in
turn is left out, with all methods of its λ, which begin with the same weights: the others give the constant c of the proposal c/λ^p, and the
proposal is compared with the rate that the sweep chose by validation loss. The power 0 is the control, a proposal that looks at no curvature;
"auto" is c/√λ as `--learning-rate auto` rounds it. The folder of probes keeps what was measured, so that an interrupted measurement goes on;
the grid is only read.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.inspection.prediction import spearman
from cora_cli.methods.registry import method_of
from cora_cli.progress import say
from cora_cli.records import read_probe
from cora_cli.render.canvas import INK, PALETTE, plot_files, render
from cora_cli.render.markdown_table import markdown_table
from cora_cli.reporting.report_rows import read_plan
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import config_of_run
from cora_cli.training.probe import probe
from cora_cli.training.proposal import rounded

POWERS = {"no curvature": 0.0, "c / √λ": 0.5, "auto": 0.5, "c / λ": 1.0}
ALIKE = 1e-3
"""The relative difference up to which two eigenvalues are those of one start."""
ENOUGH = 0.8
"""The share of methods whose proposal has to lie within one step of the grid."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """A method of a sweep: its label, the run to measure, its planned rates and the chosen one."""

    label: str
    run: RunDirectory
    planned: tuple[float, ...]
    best: float

    @property
    def step(self) -> float:
        """The ratio of neighbouring rates."""
        return float((self.planned[-1] / self.planned[0]) ** (1 / (len(self.planned) - 1)))


def swept_methods(grid: Path) -> list[Swept]:
    """The methods whose sweep has ended. Raises `CoraError` where there are fewer than three."""
    plan, found = read_plan(grid), []
    for sweep in plan.sweeps:
        rows = [
            row
            for row in plan.rows
            if row.stage == "sweep"
            and [row.group, row.label, row.printed, row.mode, row.rank, row.n_models] == list(sweep["method"])
            and row.run is not None
        ]
        if sweep["chosen"] is not None and rows and rows[0].run is not None and len(sweep["planned"]) > 1:
            row, run = rows[0], RunDirectory(rows[0].run)
            adapter = config_of_run(run).adapter_plan()
            if adapter is not None and not method_of(adapter.mode).can_train(adapter):
                say(f"{row.label} trains nothing, so that it has no best rate; it is left out")
                continue
            found.append(Swept(row.label, run, tuple(sorted(sweep["planned"])), float(sweep["chosen"])))
    if len(found) < 3:
        raise CoraError(f"{grid} has {len(found)} methods with a finished sweep; leaving one out needs at least 3")
    return found


def measured(method: Swept, probes: Path, examples: int, products: int) -> dict[str, Any]:
    """The probe of a method, from the folder or now."""
    kept = probes / f"{method.run.root.name}.json"
    if not kept.exists():
        say(f"measuring {method.label}")
        config = config_of_run(method.run, probe=str(kept), probe_examples=examples)
        writing.write_json(kept, probe(config, most_products=products))
    return read_probe(kept)


def proposals(rates: Sequence[float], curvatures: Sequence[float], power: float) -> list[float]:
    """For each method c/λ^p with c from the methods of another λ: the geometric mean of their rate·λ^p. Raises `CoraError` where none has another."""
    logs = [math.log(rate) + power * math.log(curvature) for rate, curvature in zip(rates, curvatures, strict=True)]
    found = []
    for curvature in curvatures:
        others = [log for log, other in zip(logs, curvatures, strict=True) if not math.isclose(curvature, other, rel_tol=ALIKE)]
        if not others:
            raise CoraError("all methods have the same λmax, so none can be left out")
        found.append(math.exp(fmean(others)) / curvature**power)
    return found


def is_near(step: float) -> bool:
    """Whether a proposal so many steps of the grid from the best rate is within one, up to rounding."""
    return abs(step) <= 1 + 1e-9


def constant(methods: Sequence[Swept], curvatures: Sequence[float]) -> float:
    """c of c/√λ from all methods."""
    return math.exp(
        fmean(math.log(one.best) + math.log(curvature) / 2 for one, curvature in zip(methods, curvatures, strict=True))
    )


def judge(methods: Sequence[Swept], curvatures: Sequence[float]) -> dict[str, Any]:
    """Each proposal's distance from the best rate in steps of the grid, the share within one step, and the root of the mean square."""
    rates, found = [method.best for method in methods], {}
    for name, power in POWERS.items():
        guesses = [rounded(guess) if name == "auto" else guess for guess in proposals(rates, curvatures, power)]
        steps = [math.log(guess / method.best) / math.log(method.step) for guess, method in zip(guesses, methods, strict=True)]
        found[name] = {
            "proposals": dict(zip((method.label for method in methods), guesses, strict=True)),
            "steps_from_best": dict(zip((method.label for method in methods), steps, strict=True)),
            "within_one_step": sum(map(is_near, steps)) / len(steps),
            "root_mean_square_steps": math.sqrt(sum(step**2 for step in steps) / len(steps)),
        }
    correlation = spearman(list(curvatures), rates)
    return {
        "methods": len(methods),
        "spearman": correlation and correlation[0],
        "constant": constant(methods, curvatures),
        "leave_one_out": found,
    }


def tables(result: Mapping[str, Any]) -> str:
    """The measures and the verdict in Markdown."""
    rows = []
    every = result["all methods"]["leave_one_out"]
    for label, one in result["measures"].items():
        guesses = (f"{every[name]['proposals'][label]:.2g} ({every[name]['steps_from_best'][label]:+.1f})" for name in POWERS)
        rows.append([f"`{label}`", f"{one['largest_eigenvalue']:.3g} ± {one['error']:.1g}", f"{one['best_rate']:g}", *guesses])
    headers = ["method", "λmax", "best rate", *(f"{name} (steps off)" for name in POWERS)]
    lines = [markdown_table(headers, rows), ""]
    shares = []
    for group in ("all methods", "adapters"):
        found = result[group]["leave_one_out"]
        shares.append(
            [
                f"{group} ({result[group]['methods']})",
                *(f"{found[name]['within_one_step']:.0%}, {found[name]['root_mean_square_steps']:.2f}" for name in POWERS),
            ]
        )
    lines.append(markdown_table(["within one step; root mean square of steps", *POWERS], shares))
    return "\n".join(lines)


def plot(result: Mapping[str, Any], directory: Path) -> None:
    """The best rates against λmax, and c/√λ of all methods with one step of the grid on both sides; methods outside are named."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        measures, judged = result["measures"], result["all methods"]
        steps = judged["leave_one_out"]["auto"]["steps_from_best"]
        curvatures = sorted(one["largest_eigenvalue"] for one in measures.values())
        planned = next(iter(measures.values()))["planned_rates"]
        step = (planned[-1] / planned[0]) ** (1 / (len(planned) - 1))
        ends = [curvatures[0] / 2, curvatures[-1] * 2]
        line = [judged["constant"] / math.sqrt(end) for end in ends]
        axes.fill_between(
            ends, [rate / step for rate in line], [rate * step for rate in line], color=PALETTE[0], alpha=0.12, linewidth=0
        )
        axes.plot(ends, line, color=PALETTE[0], label=f"{judged['constant']:.2g} / √λmax, and one step")
        for label, one in measures.items():
            near = is_near(steps[label])
            at = (one["largest_eigenvalue"], one["best_rate"])
            axes.plot(
                *at, "o" if near else "X", color=INK if near else PALETTE[1], alpha=0.6 if near else 1.0, linestyle="none"
            )
            if not near:
                axes.annotate(label, at, xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_xlabel("λmax of the loss in the trained parameters, before training")
        axes.set_ylabel("best learning rate of the sweep")
        axes.legend(loc="lower left")

    writing.write_together(plot_files([render("rates", "Best learning rate and curvature", "", draw, (6.0, 3.6))], directory))


def main() -> None:
    """Measure what is missing, then print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="output directory of `cora ablate`")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the measures")
    parser.add_argument("--examples", type=int, default=32, help="training examples to measure on")
    parser.add_argument("--products", type=int, default=20, help="most Hessian-vector products for an eigenvalue")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="begin no further measure after so many seconds")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the result")
    parser.add_argument("--plot", type=Path, help="folder for the scatter plot")
    options = parser.parse_args()
    began, methods = time.monotonic(), swept_methods(options.grid)
    found: list[Any] = []
    options.probes.mkdir(parents=True, exist_ok=True)
    for method in methods:
        if time.monotonic() - began > options.stop_after:
            print(f"{len(found)} of {len(methods)} methods are measured; start it again to go on")
            return
        found.append(measured(method, options.probes, options.examples, options.products))
    if len({one["probe"]["sha256"] for one in found}) > 1:
        raise CoraError(f"the probes in {options.probes} were measured on different examples; choose an empty folder")
    curvatures = [one["probe"]["curvature"]["largest_eigenvalue"] for one in found]
    adapters = [index for index, one in enumerate(found) if one["plan"] is not None]
    result = {
        "grid": read_plan(options.grid).name,
        "model": found[0]["model"],
        "fingerprints": {method.label: one["fingerprint"] for method, one in zip(methods, found, strict=True)},
        "probe": {key: found[0]["probe"][key] for key in ("examples", "tokens", "sha256")},
        "enough": ENOUGH,
        "measures": {
            method.label: {
                **{"best_rate": method.best, "planned_rates": list(method.planned), "seed": one["seeds"]["seed"]},
                **one["probe"]["curvature"],
                "energy": _totals(one["probe"]["energy"]),
                "seconds": one["probe"]["seconds"],
            }
            for method, one in zip(methods, found, strict=True)
        },
        "all methods": judge(methods, curvatures),
        "adapters": judge([methods[index] for index in adapters], [curvatures[index] for index in adapters]),
    }
    print(tables(result))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        plot(result, options.plot)


def _totals(energy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The energy of all matrices together, without those of each."""
    if energy is None:
        return None
    return {side: energy[side] and {key: energy[side][key] for key in ("total", "chance")} for side in ("output", "input")}


if __name__ == "__main__":
    main()
