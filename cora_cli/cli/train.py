"""`cora train`: train one base model on one data set in one mode, and write a run directory."""

from pathlib import Path
from typing import Any

import typer

from cora_cli.cli.command import all_or_nothing, command
from cora_cli.cli.next_step import say_next
from cora_cli.environment import is_first_process
from cora_cli.render.table import with_interval
from cora_cli.rundir import RunDirectory
from cora_cli.terminal import show
from cora_cli.training.config import TrainConfig


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "train", TrainConfig, run, what_is_saved, spreads=True)


def what_is_saved(config: TrainConfig) -> str:
    """What an interrupted training leaves, and how it goes on."""
    from cora_cli.training.checkpoints import checkpoints_in, step_of

    out = RunDirectory(Path(config.output_dir))
    if config.probe is not None:
        return all_or_nothing(config.probe)
    if config.dry_run or not out.exists():
        return "nothing was written"
    kept = checkpoints_in(out.checkpoints)
    point = f"step {step_of(kept[-1])}" if kept else "the start, since there is no checkpoint yet"
    return f"{out.root} goes on from {point} with the same command and --resume"


def run(config: TrainConfig) -> None:
    """Fine-tune a model with CoRA or a baseline.

    CoRA is LoRA whose B is a basis, frozen (fb) or trained (tb). --dry-run shows what a run would take, and --probe what it begins with.
    """
    if config.dry_run:
        from cora_cli.training.preflight import preflight
        from cora_cli.training.preflight_text import describe

        plan = preflight(config)
        if is_first_process():
            show(describe(plan))
        return
    if config.probe is not None:
        _probe(config)
        return
    from cora_cli.training.run import train

    record = train(config)
    if is_first_process():
        show(summary(record))
        if record["status"] == "finished":
            say_next(f"{config.output_dir} is written", "evaluate", config.output_dir, "--with-base")


def _probe(config: TrainConfig) -> None:
    from cora_cli.errors import UsageError
    from cora_cli.lock import own_output

    assert config.probe is not None
    output = Path(config.probe)
    if output.exists():
        raise UsageError(f"{output} exists already; choose a new file for --probe")
    from cora_cli.training import proposal
    from cora_cli.training.probe import describe, require_alone, write_probe, write_proposal
    from cora_cli.training.proposal import AUTO

    require_alone(config, "--probe")  # before the lock, which only one of several processes gets
    with own_output(output):
        auto = config.learning_rate == AUTO
        record = write_proposal(config) if auto else write_probe(config)
        show(describe(record))
        if auto:
            show(proposal.describe(record["proposal"], config.mode))


def summary(record: dict[str, Any]) -> str:
    """Summarize the record (`run.json`) of a run that has finished, or stopped at `--stop-at`, in a few lines."""
    if record["status"] == "stopped":
        validation = record["validation"]
        loss = with_interval(validation["loss"], validation["ci95"], 4)
        return (
            f"stopped at step {record['speed']['steps']}: validation loss {loss} (nats per token, 95 % bootstrap interval over n = "
            f"{validation['n']} records); --resume continues"
        )
    speed, memory = record["speed"], record["peak_memory_bytes"] / 2**30
    rate = f"{speed['tokens_per_second']:.0f} tokens/s, " if speed["tokens_per_second"] else ""
    steps = f"{speed['steps']} step{'' if speed['steps'] == 1 else 's'}"
    lines = [f"mode {record['mode']}: {steps}, {rate}peak memory {memory:.2f} GiB"]
    if heldout := record["heldout"]:
        before, after, change = heldout["before"], heldout["after"], heldout["change"]
        lines.append(
            f"held-out loss {with_interval(before['loss'], before['ci95'], 4)} -> {with_interval(after['loss'], after['ci95'], 4)}"
            f", change {with_interval(change['value'], change['ci95'], 4)}"
            f" (nats per token, 95 % bootstrap intervals over n = {after['n']} records)"
        )
    if validation := record.get("validation"):
        lines.append(
            f"validation loss {with_interval(validation['loss'], validation['ci95'], 4)} (n = {validation['n']} records, for "
            "model selection)"
        )
    if record["largest_angle_rad"] is not None:
        lines.append(f"largest principal angle between B and its initial value: {record['largest_angle_rad']:.4f} rad")
    if record["is_base_model"]:
        lines.append("no parameter could be trained: this run equals the base model")
    return "\n".join(lines)
