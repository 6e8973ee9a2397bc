"""Which base model an adapter belongs to, and whether the one at hand is that model."""

from collections.abc import Sequence
from pathlib import Path

from cora_cli.adapters.facts import read_facts
from cora_cli.errors import CoraError
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import EMBEDDED_MODEL, recorded_base, resolve_model
from cora_cli.progress import note


def base_of(adapter: ModelPath, weights: bool = True) -> ModelPath:
    """The base model that an adapter names; `weights` as in `resolve_model`.

    Raises `CoraError` where it names none, where that cannot be found, and where it is an adapter itself.
    """
    reference, facts = recorded_base(adapter.adapter_config()), read_facts(adapter.path)
    if not reference:
        raise CoraError(f"adapter {adapter.path} does not say what its base model is; pass its path with --base")
    if (
        facts is not None
        and not facts.base_revision
        and reference != EMBEDDED_MODEL
        and not Path(reference).expanduser().is_dir()
    ):
        # A model of the hub would have a revision, so this one is not searched for there.
        raise CoraError(
            f"adapter {adapter.path} was trained on the model in the directory {reference}, which is not there; pass its path with --base"
        )
    try:
        base = resolve_model(reference, weights)
    except CoraError as error:
        raise CoraError(
            f"the base model of adapter {adapter.path} cannot be found (pass its path with --base): {error}"
        ) from error
    if base.is_adapter:
        raise CoraError(
            f"adapter {adapter.path} names {reference} as its base model, which is an adapter too; write that as a model with `cora merge`, and "
            "pass its path with --base"
        )
    return base


def check_base(adapter: ModelPath, base: ModelPath) -> None:
    """Raise `CoraError` where `base` is not the model that a `cora` adapter was trained on; of others, only the name is known, so this says it."""
    if other := _other_base(adapter, base):
        raise CoraError(other)
    _say_other_name(adapter, base)


def say_other_base(adapter: ModelPath, base: ModelPath) -> None:
    """Say so where the base that the user names is not the one of `check_base`; it may be the same model in another precision."""
    if other := _other_base(adapter, base):
        note(other)
    _say_other_name(adapter, base)


def say_different_bases(models: Sequence[ModelPath]) -> None:
    """Say so where adapters of `cora` among `models` were trained on different base models."""
    known = {facts.base_sha256: (model, facts) for model in models if model.is_adapter and (facts := read_facts(model.path))}
    if len(known) > 1:
        (one, on), (other, on_other) = list(known.values())[:2]
        note(
            f"{one.reference} was trained on {on.base} and {other.reference} on {on_other.base}, which have other weights; a common subspace is one "
            "of fine-tunes of one base model"
        )


def _say_other_name(adapter: ModelPath, base: ModelPath) -> None:
    """Say so where an adapter without the record of `cora` names a base model whose name does not occur in the reference of `base`."""
    named = recorded_base(adapter.adapter_config())
    if read_facts(adapter.path) is not None or not named:
        return
    last = Path(named.partition("@")[0]).name
    if not any(
        part == last or part.endswith(f"--{last}") for part in (*Path(base.reference.partition("@")[0]).parts, *base.path.parts)
    ):
        note(f"{adapter.reference} names {named} as its base model; {base.reference} is taken in its place")


def _other_base(adapter: ModelPath, base: ModelPath) -> str | None:
    facts = read_facts(adapter.path)
    if facts is None or facts.base_sha256 in base.content_hashes():
        return None
    return (
        f"{adapter.reference} was trained on {facts.base} with content hash {facts.base_sha256}, but {base.path} has {base.content_hash()}: "
        "it is another model, or it has changed"
    )
