"""Resolve a model reference to a local directory: a hub id with a revision, a path, a run directory or the embedded model.

This module finds the directory and lists the files of the model. Reading weights is done by `weights`, loading a model by
`loading`.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import rundir
from cora_cli.errors import CoraError

EMBEDDED_MODEL = "builtin:smollm2"
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_SHARED_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class ModelPath:
    """A model on the local disk.

    `reference` is what the user wrote, but absolute for a local directory, so that records of it hold in every folder. `revision` is
    the hub commit (None for local directories).
    """

    reference: str
    path: Path
    revision: str | None

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter rather than a complete model."""
        return (self.path / "adapter_config.json").exists()

    def config(self) -> dict[str, Any]:
        """The model's `config.json`. Raises `CoraError` if it is missing or malformed."""
        return rundir.read_json(self.path / "config.json")

    def adapter_config(self) -> dict[str, Any]:
        """The adapter's `adapter_config.json`. Raises `CoraError` if it is missing or malformed."""
        return rundir.read_json(self.path / "adapter_config.json")

    def weight_files(self) -> list[Path]:
        """The weight files: safetensors if there are any, else `.bin`. Raises `CoraError` if there are none.

        For an adapter these are `adapter_model.*`, or the file of `cora`'s compact form, which holds only A.
        """
        stem = "adapter_*" if self.is_adapter else "*"
        for ending in ("safetensors", "bin"):
            found = sorted(file for file in self.path.glob(f"{stem}.{ending}") if file.name != "training_args.bin")
            if found:
                return found
        raise CoraError(f"{self.path} holds no weights: it has no *.safetensors or *.bin file")

    def content_hash(self) -> str:
        """SHA-256 over the names and contents of the weight files and the configuration.

        For an adapter it includes `cora.json`, from which the B of a compact adapter is recomputed.
        """
        names = ("adapter_config.json", "cora.json") if self.is_adapter else ("config.json",)
        return rundir.sha256_files([*self.weight_files(), *(self.path / name for name in names if (self.path / name).exists())])


def resolve_model(reference: str) -> ModelPath:
    """Find a model on the local disk; download it first if `reference` is a hub id.

    `reference` is a directory, a `cora train` run directory, `builtin:smollm2`, or a hub id with an optional `@revision`.
    Raises `CoraError` if it does not name a model or the download fails.
    """
    if not reference.strip():
        raise CoraError("the model name is empty; give a directory, a hub id or builtin:smollm2")
    if reference == EMBEDDED_MODEL:
        from cora_cli import embedded

        return ModelPath(reference, embedded.model_directory(), None)
    path = Path(reference).expanduser()
    if path.is_dir():
        reference = absolute(reference)
        run = rundir.RunDirectory(path)
        if run.exists():
            path = run.model if run.model.exists() else run.adapter
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise CoraError(f"{reference} is not a model: {path} has neither config.json nor adapter_config.json")
        return ModelPath(reference, path, None)
    hub_id, _, revision = reference.partition("@")
    if path.is_absolute() or reference.startswith((".", "~")) or not _HUB_ID.match(hub_id):
        raise CoraError(f"model {reference!r} is neither a directory on this disk nor a hub id such as org/name@revision")
    return _fetch(reference, hub_id, revision or None)


def absolute(reference: str) -> str:
    """A reference to record: the absolute path of a local file or directory; any other reference unchanged."""
    path = Path(reference).expanduser()
    # Links stay: in the hub's cache they lead to files without an ending.
    return os.path.abspath(path) if path.exists() else reference  # noqa: PTH100


def recorded_base(config: Mapping[str, Any]) -> str | None:
    """The reference of the base model that an `adapter_config.json` names; a local directory has no revision. None if it names none."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision and not Path(name).expanduser().is_dir() else name


def resolve_base(reference: str | None) -> ModelPath | None:
    """The complete model that `--base` names, or None without `--base`.

    Raises `CoraError` for an adapter, and as `resolve_model` does.
    """
    base = resolve_model(reference) if reference else None
    if base is not None and base.is_adapter:
        raise CoraError(f"--base {reference} is an adapter, not a complete model; merge it first with `cora merge {reference}`")
    return base


def _fetch(reference: str, hub_id: str, revision: str | None) -> ModelPath:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_SHARED_PATTERNS, *patterns]))

    try:
        path = snapshot("*.safetensors")
        if not list(path.glob("*.safetensors")):
            path = snapshot("*.bin")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoraError(
            f"model {reference!r} is not a local directory and could not be downloaded from the hub: {reason}"
        ) from error
    return ModelPath(reference, path, path.name)
