"""Which measure before training predicts the held-out loss that a B reaches: measured on the runs of a finished grid.

    cora ablate configs/prediction.yaml --jobs 2
    python benchmarks/prediction.py runs/prediction --probes probes --jobs 2 -o docs/results/prediction.json --plot docs

For each data set, a LoRA is trained for a few steps with a seed of its own: its ΔW is the target's. Each start of B in the grid is then measured
before its first step: the share of that ΔW's norm and of its function inside B, the gradient's energy there, and λmax. A start that the seed does
not change is measured once. The folder of probes keeps what was measured, so that an interrupted measurement goes on; the grid is only read.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import rankdata
from starts import OF_THE_SEED, Begun, Settings, end_with_parent, measured, target_of

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.inspection.rank_correlation import ENOUGH, LEAST, Correlation, Stratum, correlate
from cora_cli.methods.registry import method_of
from cora_cli.render.canvas import Palette, plot_files, render
from cora_cli.render.markdown_table import markdown_table
from cora_cli.reporting.collect import collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import read_plan
from cora_cli.reporting.results import Result
from cora_cli.rundir import RunDirectory

PREDICTORS = {
    "energy": "captured energy of ΔW",
    "function": "captured function of ΔW",
    "gradient": "gradient energy inside B",
    "curvature": "λmax",
}


def begun(result: Result) -> Begun | None:
    """What a finished run of the grid is here; None for a method whose B has no choice of start."""
    row, plan = result.row, result.record.get("plan") or {}
    if row.run is None or LOSS not in result.measures or not plan or not method_of(plan["mode"]).b_init_is_free:
        return None
    words = [row.label.removeprefix(row.mode).strip()]
    words += [f"n={row.n_models}"] if row.n_models is not None and f"n={row.n_models}" not in row.label else []
    assert row.learning_rate is not None
    return Begun(
        row.group,
        row.mode,
        " ".join(filter(None, words)),
        row.seed,
        row.learning_rate,
        result.measures[LOSS].value,
        plan["b_init"],
        RunDirectory(row.run),
    )


def finished_runs(grid: Path) -> list[Begun]:
    """The confirmed runs of the grid. Raises `CoraError` while some are missing."""
    found = collect(read_plan(grid))
    if found.missing:
        first = found.missing[0]
        raise CoraError(f"{len(found.missing)} rows of {grid} are not finished, such as {first.row.name} ({first.reason})")
    runs = [one for result in found.results if (one := begun(result)) is not None]
    if not runs:
        raise CoraError(f"{grid} has no finished run whose B has a choice of start, as in the modes fb and tb")
    check_complete(runs)
    return runs


def check_complete(runs: Sequence[Begun]) -> None:
    """Raise `CoraError` unless every stratum has all bases with all seeds, once each."""
    counts = Counter((one.stratum, one.basis, one.seed) for one in runs)
    for stratum in strata(runs):
        for basis in bases(runs):
            for seed in seeds(runs):
                if (count := counts[stratum, basis, seed]) != 1:
                    raise CoraError(f"the grid has {count} runs, not one, of B = {basis} with {stratum} and seed {seed}")


def strata(runs: Sequence[Begun]) -> list[str]:
    """The names of the strata, in the order of the grid."""
    return list(dict.fromkeys(one.stratum for one in runs))


def bases(runs: Sequence[Begun]) -> list[str]:
    """The names of the bases, in the order of the grid."""
    return list(dict.fromkeys(one.basis for one in runs))


def seeds(runs: Sequence[Begun]) -> list[int]:
    """The seeds that confirm, ascending."""
    return sorted({one.seed for one in runs})


def measured_on(run: Begun, runs: Sequence[Begun]) -> Begun:
    """The run whose start stands for that of `run`: its own, or the first of its method where no seed changes B."""
    alike = [one for one in runs if (one.stratum, one.basis) == (run.stratum, run.basis)]
    return run if run.start in OF_THE_SEED else min(alike, key=lambda one: one.seed)


def predictors(found: Mapping[str, Any]) -> dict[str, float]:
    """The four values of a measured start."""
    return {
        "energy": found["inside"]["held"]["energy"],
        "function": found["inside"]["held"]["function"],
        "gradient": found["inside"]["gradient"]["total"],
        "curvature": found["curvature"]["largest_eigenvalue"],
    }


def processor_seconds(targets: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> float:
    """What all measures cost; one that two modes share counts once."""
    parts = [*targets, *(part for one in found for part in one.values())]
    return sum({hashing.sha256_json(part["inputs"]): part["processor_seconds"] for part in parts}.values())


def correlations(runs: Sequence[Begun], values: Mapping[Path, Mapping[str, float]]) -> dict[str, Correlation]:
    """The correlation of each predictor with the negative loss; `values` has the predictors by run."""
    places = {(one.stratum, one.basis, one.seed): one for one in runs}
    found = {}
    for predictor in PREDICTORS:
        tables = {}
        for stratum in strata(runs):
            rows = [[places[stratum, basis, seed] for seed in seeds(runs)] for basis in bases(runs)]
            tables[stratum] = Stratum(
                np.array([[values[one.run.root][predictor] for one in row] for row in rows]),
                np.array([[one.loss for one in row] for row in rows]),
            )
        found[predictor] = correlate(tables)
    return found


def summary(runs: Sequence[Begun], values: Mapping[Path, Mapping[str, float]]) -> dict[str, Any]:
    """Everything that was measured, and the correlations, as JSON."""
    found = correlations(runs, values)
    return {
        "rule": {"correlation": ENOUGH, "lower_end": LEAST},
        "seeds": seeds(runs),
        "strata": {
            stratum: {
                basis: {
                    "learning_rate": next(one.rate for one in own if one.basis == basis),
                    "losses": {str(one.seed): one.loss for one in own if one.basis == basis},
                    **{name: fmean(values[one.run.root][name] for one in own if one.basis == basis) for name in PREDICTORS},
                }
                for basis in bases(runs)
            }
            for stratum in strata(runs)
            for own in [[one for one in runs if one.stratum == stratum]]
        },
        "correlations": {name: {**dataclasses.asdict(one), "is_earned": one.is_earned} for name, one in found.items()},
    }


def tables(result: Mapping[str, Any]) -> str:
    """The correlations, what they allow to say, and the bases, in Markdown."""
    names = list(result["strata"])
    rows = []
    for name, one in result["correlations"].items():
        low, high = one["interval"]
        rows.append(
            [
                PREDICTORS[name],
                f"{one['rho']:+.2f} [{low:+.2f}, {high:+.2f}]",
                *(f"{one['strata'][stratum]:+.2f}" for stratum in names),
            ]
        )
    first = next(iter(result["correlations"].values()))
    lines = [
        markdown_table(["measure before training", "ρ with a lower loss", *names], rows),
        "",
        f"Spearman's ρ over {first['bases']} bases, mean over {len(names)} {'stratum' if len(names) == 1 else 'strata'}, with its 95 % interval over bases and {first['seeds']} seeds. "
        + verdict(result),
        "",
    ]
    for stratum, found in result["strata"].items():
        body = [
            [
                f"`{basis}`",
                f"{one['learning_rate']:.2g}",
                f"{fmean(one['losses'].values()):.4f}",
                *(f"{one[name]:.1%}" for name in ("energy", "function", "gradient")),
                f"{one['curvature']:.3g}",
            ]
            for basis, one in sorted(found.items(), key=lambda item: fmean(item[1]["losses"].values()))
        ]
        lines += [markdown_table([f"{stratum}: B", "rate", "held-out loss", *PREDICTORS.values()], body), ""]
    return "\n".join(lines).rstrip()


def verdict(result: Mapping[str, Any]) -> str:
    """Which measures may be called predictions, in a sentence."""
    earned = [PREDICTORS[name] for name, one in result["correlations"].items() if one["is_earned"]]
    rule = f"a correlation of at least {result['rule']['correlation']} whose interval lies above {result['rule']['lower_end']}"
    if not earned:
        return f"None of the measures has {rule}, so none predicts the winner here."
    return f"Measures with {rule}: {', '.join(earned)}."


def plot(result: Mapping[str, Any], directory: Path) -> None:
    """For each measure, the ranks of the bases in it and in the loss, within each stratum."""

    def draw(figure: Any) -> None:
        palette = Palette(list(result["strata"]))
        for axes, (name, title) in zip(figure.subplots(1, len(PREDICTORS), sharey=True), PREDICTORS.items(), strict=True):
            for stratum, found in result["strata"].items():
                losses = [fmean(one["losses"].values()) for one in found.values()]
                across, up = rankdata([one[name] for one in found.values()]), rankdata(losses)
                axes.plot(across, up, palette.marker(stratum), color=palette.color(stratum), label=stratum, linestyle="none")
            one = result["correlations"][name]
            axes.set_title(f"ρ {one['rho']:+.2f} [{one['interval'][0]:+.2f}, {one['interval'][1]:+.2f}]")
            axes.set_xlabel(f"rank in {title}")
        figure.axes[0].set_ylabel("rank in held-out loss")
        figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    writing.write_together(
        plot_files([render("prediction", "Measures before training and the loss after it", "", draw, (11.0, 3.0))], directory)
    )


def main() -> None:
    """Measure what is missing, then print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="output directory of `cora ablate`")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the measures")
    parser.add_argument("--jobs", type=int, default=1, help="starts to measure at a time")
    parser.add_argument("--examples", type=int, default=8, help="training examples for the gradient")
    parser.add_argument("--curvature-examples", type=int, default=4, help="training examples for λmax")
    parser.add_argument("--products", type=int, default=6, help="most Hessian-vector products for an eigenvalue")
    parser.add_argument("--lora-steps", type=int, default=8, help="steps of the LoRA whose ΔW is the target's")
    parser.add_argument("--lora-rate", type=float, default=3e-3, help="its learning rate")
    parser.add_argument("--lora-seed", type=int, default=1000, help="its seed, which no run of the grid has")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="begin no further measure after so many seconds")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the result")
    parser.add_argument("--plot", type=Path, help="folder for the plot")
    options = parser.parse_args()
    settings = Settings(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings) if field.name != "until"},
        until=time.time() + options.stop_after,
    )
    runs = finished_runs(options.grid)
    options.probes.mkdir(parents=True, exist_ok=True)
    groups = {one.group: one for one in reversed(runs)}
    starts = list({one.run.root: one for run in runs for one in [measured_on(run, runs)]}.values())
    # By mode, so that what the modes share is known when the second one needs it.
    starts.sort(key=lambda one: one.mode)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        about = functools.partial(target_of, probes=options.probes, settings=settings)
        targets = dict(zip(groups, pool.map(about, groups.values()), strict=True))
        measure = functools.partial(measured, probes=options.probes, settings=settings)
        records = list(pool.map(measure, starts, [targets[one.group] for one in starts]))
    found = {one.run.root: record for one, record in zip(starts, records, strict=True) if record is not None}
    if len(found) < len(starts):
        print(f"{len(found)} of {len(starts)} starts are measured; start it again to go on")
        return
    values = {run.run.root: predictors(found[measured_on(run, runs).run.root]) for run in runs}
    result: dict[str, Any] = {
        "grid": read_plan(options.grid).name,
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "until"},
        "processor_seconds": processor_seconds([target for target in targets.values() if target], list(found.values())),
        "targets": {
            group: {name: target[name] for name in ("nothing", "itself")} for group, target in targets.items() if target
        },
        **summary(runs, values),
    }
    result["markdown"] = tables(result)
    print(result["markdown"])
    if options.output:
        writing.write_text(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
