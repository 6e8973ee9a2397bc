"""Refuses to compare what was measured on different records or with different settings."""

from typing import Any

from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import NAMES, comparable_signature
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.results import Result

_HELD_OUT = "held-out records"
"""What the held-out loss was measured on, as `check_comparable` names it."""


def check_comparable(results: list[Result]) -> None:
    """Raise `CoraError` if two rows of a group were evaluated on different records or measured with different settings."""
    for what in ("references", *NAMES, LOSS, _HELD_OUT):
        first: tuple[Result, Any] | None = None
        for result in results:
            measure = result.measures.get(what)
            if what == "references":
                key: Any = result.references
            elif what == LOSS:
                key = None if measure is None else measure.statistics[:, 1].tolist()
            elif what == _HELD_OUT:
                # Different records can have as many tokens. Early versions did not record the hash.
                key = result.record["data"].get("test_sha256") if result.record and LOSS in result.measures else None
            else:
                key = None if measure is None else comparable_signature(measure.signature)
            if key is None:
                continue
            if first is None:
                first = (result, key)
            elif key != first[1]:
                names = f"{first[0].row.name} and {result.row.name}"
                if what in NAMES:
                    raise CoraError(
                        f"{names} measured {what} with different settings ({first[1]} and {key}); score both again with "
                        "`cora evaluate --from`, or exclude it with --metrics"
                    )
                if what == "references":
                    if first[0].generation["unordered_sha256"] == result.generation["unordered_sha256"]:
                        raise CoraError(
                            f"{names} have their records in another order, so they cannot be compared record by record; bring the lines of one "
                            "predictions.jsonl into the order of the other, and score it with `cora evaluate --from`"
                        )
                    raise CoraError(
                        f"{names} were evaluated on different records, so they cannot be compared; evaluate both on the same ones, or report "
                        "them separately"
                    )
                raise CoraError(
                    f"{names} measured their held-out loss on {_unlike_losses(first[0], result)}, so they cannot be compared; report them separately"
                )


def _unlike_losses(one: Result, other: Result) -> str:
    """On what the held-out losses of two runs, which cannot be compared, were measured."""
    held_out = {each.record.get("data", {}).get("test_sha256") for each in (one, other)}
    sizes = [each.measures[LOSS].n for each in (one, other)]
    if len(held_out) > 1 or None in held_out:
        return "different records"
    if sizes[0] != sizes[1]:
        return f"{sizes[0]} and {sizes[1]} of equal records, as by another --eval-limit or --max-length"
    return "different tokens of equal records, as by another --template or --max-length"
