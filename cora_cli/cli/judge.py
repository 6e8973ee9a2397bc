"""`cora judge`: have a language model score or compare answers, among anchors that show what the judge is worth."""

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.errors import CoraError
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.progress import say
from cora_cli.records import missing_judgments
from cora_cli.terminal import columns, show


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "judge", JudgeConfig, run, what_is_saved)


def what_is_saved(config: JudgeConfig) -> str:
    """What an interrupted judging leaves, and how it goes on."""
    if config.dry_run:
        return "nothing was written"
    return "replies that have come are kept, and the same command asks for the others"


def run(config: JudgeConfig) -> None:
    """Have a language model judge answers by a rubric.

    Reference answers, shuffled ones and repetitions are blind among them, and show what the judge is worth.
    """
    from cora_cli.evaluation.judge.judge import judge, price

    if config.dry_run:
        found = price(config)
        cost = "no price is given" if found.cost is None else f"at most about {found.cost:.4g}"
        show(f"requests: {found.requests} ({found.answered} more are answered already)")
        show(f"tokens: about {found.tokens_in:,} in, at most {found.tokens_out:,} out")
        show(f"price: {cost}")
        if config.tries > 1 and found.requests:
            show(f"malformed replies are asked again: with --tries {config.tries}, up to {config.tries} times as much in all")
        return
    from cora_cli.render.text import terminal
    from cora_cli.reporting.judge_section import judge_section

    record, out = judge(config)
    show(terminal(judge_section(record), columns()), end="")
    say(f"{out.result} and {out.judgments.name} are written")
    missing, asked = missing_judgments(record)
    if missing == asked:
        raise CoraError("no judgment was obtained, for the reason above; the same command asks again")
    say_next(None, "report", out.root, "-o", "report")
