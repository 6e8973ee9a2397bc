"""Resolve a model reference to a local directory: a hub id with a revision, a path, a run directory or the embedded model.

`model_path` says what the directory holds. Reading weights is done by `weights`, loading a model by `loading`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import rundir, writing
from cora_cli.environment import behind_hub_error, proxy_to_hub
from cora_cli.errors import CoraError
from cora_cli.models.model_path import VOCABULARIES, WEIGHT_ENDINGS, ModelPath
from cora_cli.records import read_sealed

EMBEDDED_MODEL = "builtin:smollm2"
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_FILE_ENDINGS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jsonl", ".yaml", ".yml"})
"""Endings of files, which no name on the hub has."""
_SHARED_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", *VOCABULARIES, "*.py", "SHA256SUMS"]


def resolve_model(reference: str, weights: bool = True) -> ModelPath:
    """Find a model on the local disk; download it first if `reference` is a hub id.

    `reference` is a directory, a `cora train` run directory, `builtin:smollm2`, or a hub id with an optional `@revision`.
    Without `weights` a download has only the configuration and the tokenizer. Raises `CoraError` if it does not name a model or the
    download fails.
    """
    if reference == EMBEDDED_MODEL:
        from cora_cli import embedded

        return ModelPath(reference, embedded.model_directory(), None)
    path = Path(reference).expanduser()
    if path.is_dir():
        reference = absolute(reference)
        run = rundir.run_of_result(path)
        if rundir.RunDirectory(path).exists():
            path = rundir.RunDirectory(path).result
        model = ModelPath(reference, path, None)
        model.require_unchanged()  # from here on
        if run is not None:
            read_sealed(run.record)
            run.check_result()
        model.check_links()
        if not any((path / name).exists() for name in rundir.MODEL_FILES):
            raise CoraError(
                f"{reference} is not a model: {path} has neither config.json nor adapter_config.json{_inside(path)}"
            )
        return _checked(model)
    check_reference(reference)
    hub_id, _, revision = reference.partition("@")
    return _fetch(reference, hub_id, revision or None, weights)


def _inside(path: Path) -> str:
    """How a sentence ends about a directory that is no model: with those in it, such as the snapshots of the hub's cache, or checkpoints."""
    found = [
        file.parent
        for below in ("*", "snapshots/*")
        for file in path.glob(f"{below}/*config.json")
        if file.name in rundir.MODEL_FILES
    ]
    names = list(dict.fromkeys(str(folder) for folder in sorted(found)))
    return (
        f"; {names[-1]} in it is one"
        if len(names) == 1
        else f"; choose one of those in it: {', '.join(names[:8])}"
        if names
        else ""
    )


def check_reference(reference: str) -> None:
    """Raise `CoraError` for a reference that cannot name a model: no directory on this disk, and no name that the hub could have."""
    if not reference.strip():
        raise CoraError("the model name is empty; give a directory, a hub id or builtin:smollm2")
    path = Path(reference).expanduser()
    if reference == EMBEDDED_MODEL or path.is_dir():
        return
    if path.is_file():
        raise CoraError(f"{reference} is a file; name the directory of the model that holds it")
    writing.refuse_broken_link(path)
    if path.suffix in _FILE_ENDINGS:
        raise CoraError(f"{reference} does not exist")
    if path.is_absolute() or reference.startswith((".", "~")) or not _HUB_ID.match(reference.partition("@")[0]):
        raise CoraError(f"model {reference!r} is neither a directory on this disk nor a hub id such as org/name@revision")


def absolute(reference: str) -> str:
    """A reference to record: the absolute path of a local file or directory; any other reference unchanged."""
    path = Path(reference).expanduser()
    return str(writing.absolute(path)) if path.exists() else reference


def location(reference: str) -> str:
    """Where other programs find a model: of a run of `cora train` in the directory of its result; any other reference unchanged."""
    run = rundir.RunDirectory(Path(reference).expanduser())
    return str(run.result) if run.exists() else reference


def recorded_base(config: Mapping[str, Any]) -> str | None:
    """The reference of the base model that an `adapter_config.json` names; a local directory has no revision. None if it names none."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision and not Path(name).expanduser().is_dir() else name


def resolve_base(reference: str | None, weights: bool = True) -> ModelPath | None:
    """The complete model that `--base` names, or None without `--base`; `weights` as in `resolve_model`.

    Raises `CoraError` for an adapter, and as `resolve_model` does.
    """
    base = resolve_model(reference, weights) if reference else None
    if base is not None and base.is_adapter:
        raise CoraError(f"--base {reference} is an adapter, not a complete model; merge it first with `cora merge {reference}`")
    return base


def _fetch(reference: str, hub_id: str, revision: str | None, weights: bool) -> ModelPath:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_SHARED_PATTERNS, *patterns]))

    try:
        for patterns in [[f"*.{ending}"] for ending in WEIGHT_ENDINGS] if weights else [[]]:
            path = snapshot(*patterns)
            if all(any(path.glob(pattern)) for pattern in patterns):
                break
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ") if str(error).strip() else type(error).__name__
        proxy = behind_hub_error(error) or ("" if isinstance(error, HfHubHTTPError) else proxy_to_hub())
        raise CoraError(
            f"model {reference!r} is not a local directory and could not be downloaded from the hub: {reason}{proxy}"
        ) from error
    return _checked(ModelPath(reference, path, path.name))


def _checked(model: ModelPath) -> ModelPath:
    model.require_unchanged()
    model.check_links()
    model.check_unambiguous()
    model.check_unmarked()
    return model
