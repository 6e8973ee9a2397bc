"""Turn a Python function into a record: a request in words, a stub or a bug to repair, and assertions computed by running it.

The code families define what a function does; this module words the request.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from cora_cli.data.builtin.build import Dice, Draft

Case = tuple[Any, ...]

# The verbs that follow the first one in `Task.does` lose their -s with it.
FURTHER_VERB = re.compile(r"(, | and | or )(return|keep|make|skip|leave|raise|collect)s ")


@dataclass(frozen=True)
class Task:
    """A function to be written.

    `does` continues "a function that ..." and starts with a verb in -s; `body` is unindented; `cases` are argument lists for the
    assertions; `combination` names function and variation and is held out as one unit; `bug` replaces a part of the body by a wrong one.
    """

    combination: str
    name: str
    parameters: str
    does: str
    body: str
    cases: Sequence[Case]
    imports: str = ""
    bug: tuple[str, str] | None = None

    @property
    def request(self) -> str:
        """`does` as an imperative: "returns the sum" becomes "Return the sum"."""
        verb, rest = self.does.split(" ", 1)
        stem = verb[:-3] + "y" if verb.endswith("ies") else verb[:-1]
        return FURTHER_VERB.sub(r"\1\2 ", f"{stem.capitalize()} {rest}")

    def code(self, docstring: bool = False, body: str = "") -> str:
        """The source text, with another body if one is given."""
        lines = [f"def {self.name}({self.parameters}):"]
        if docstring:
            lines.append(f'    """{self.request}."""')
        lines.append(indent(body or self.body, "    "))
        return "\n".join([*([self.imports, "", ""] if self.imports else []), *lines])


def run(source: str) -> dict[str, Any]:
    """Run a generated program and return the names that it defines."""
    names: dict[str, Any] = {}
    exec(source, names)
    return names


def assertions(task: Task) -> tuple[str, ...]:
    """One assert statement per case, with the result of the reference code."""
    function: Callable[..., Any] = run(task.code())[task.name]
    stated = []
    for case in task.cases:
        call = f"{task.name}({', '.join(map(repr, case))})"  # written first: a function may change its arguments
        result = function(*case)
        stated.append(
            f"assert {call} is {result}" if result is None or isinstance(result, bool) else f"assert {call} == {result!r}"
        )
    return tuple(stated)


def fails(source: str, checks: Sequence[str]) -> bool:
    """Whether `source` fails at least one of the assertions, as a bug must."""
    try:
        run("\n".join([source, *checks]))
    except Exception:
        return True
    return False


def present(dice: Dice, task: Task) -> Draft:
    """A record for `task`: a request in words, by example, as a stub to complete, or as a bug to repair."""
    checks = assertions(task)
    head = f"{task.name}({task.parameters})"
    broken = task.code(body=task.body.replace(*task.bug, 1)) if task.bug else ""
    if broken and dice.chance(0.25) and fails(broken, checks):
        lead = dice.choice((
            f"This function {task.does}, but it has a bug. Fix it.", f"Find and repair the mistake: `{task.name}` should {_lower(task.request)}.",
        ))  # fmt: skip
        return Draft(lead, task.code(), broken, task.combination, checks)
    if dice.chance(0.18):
        stub = task.code(docstring=True, body="...").replace("\n    ...", "")
        lead = dice.choice(
            (
                "Complete this function.",
                "Write the body of this function.",
                "Implement the function below as its docstring says.",
            )
        )
        return Draft(lead, task.code(docstring=True), stub, task.combination, checks)
    lead = dice.choice((
        f"Write a Python function `{head}` that {task.does}.", f"{task.request}. Write it as a Python function `{head}`.",
        f"Implement `{head}` in Python: it {task.does}.", f"I need a Python function named `{task.name}` that {task.does}. Its signature is `{head}`.",
        f"Create a function `{head}` which {task.does}.", f"{task.request}. Use this signature: `def {head}:`",
    ))  # fmt: skip
    if dice.chance(0.35):
        call, _, result = (
            checks[0].removeprefix("assert ").rpartition(" is " if checks[0].endswith(("None", "True", "False")) else " == ")
        )
        if len(call) + len(result) < 90:
            lead += f" For example, `{call}` gives `{result}`."
    return Draft(lead, task.code(docstring=dice.chance(0.3)), "", task.combination, checks)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
