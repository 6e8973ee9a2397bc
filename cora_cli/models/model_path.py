"""A model on the local disk: what its directory holds, and whether that can be used."""

import codecs
import contextlib
import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cora_cli import hashing, rundir
from cora_cli.errors import CoraError
from cora_cli.reading import read_foreign, read_json
from cora_cli.records import AdapterConfig, GenerationConfig, ModelConfig, WeightIndex

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "prophetnet.tokenizer",
    "tekken.json",
)
"""What the tokenizers of transformers read."""
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
OWN_TYPE = "CORA_"
"""What the type of an adapter that only `cora` loads begins with: before the name of a method, or before PEFT's type, which is in capitals."""
WEIGHT_ENDINGS = ("safetensors", "bin", "pt", "pth")
"""Endings of weight files, the first ones preferred."""
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states)[\w-]*\.(bin|pt|pth|pkl)")
"""What training programs keep next to the weights."""
VOCABULARIES = ("*.tiktoken", "*.spm", "*.codes", "*.tokenizer")
_UNREAD = {".gguf", ".h5", ".msgpack", ".npz", ".onnx"}
"""Endings of weights of other programs: llama.cpp, TensorFlow, Flax, MLX, ONNX."""
_PARTS = {
    "*_model_states.pt": "DeepSpeed; gather them with its zero_to_fp32.py",
    "*.distcp": "FSDP; gather them with `accelerate merge-weights`",
}
"""Files with a part of the weights for each process, by what wrote them."""


@dataclasses.dataclass(frozen=True)
class ModelPath:
    """A model on the local disk.

    `reference` is what the user wrote, but absolute for a local directory, so that records of it hold in every folder. `revision` is
    the hub commit (None for local directories). It stands for the files as they are when it is first used: `require_unchanged` is what
    every reader of them calls.
    """

    reference: str
    path: Path
    revision: str | None

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter rather than a complete model; the weights decide, not a leftover configuration."""
        return (self.path / "adapter_config.json").exists() and bool(self._adapter_files() or not self._complete_files())

    def config(self) -> dict[str, Any]:
        """The model's `config.json`. Raises `CoraError` if it is missing or malformed."""
        return read_foreign(self.path / "config.json", ModelConfig)

    def language_config(self) -> dict[str, Any]:
        """The entries of `config.json`, with those of a nested text model where the top level has none of that name."""
        config = self.config()
        return {**(config.get("text_config") or {}), **config}

    def quantization(self) -> dict[str, Any] | None:
        """How `config.json` says that the weights are quantized; transformers takes it from a nested text model too. None if it does not."""
        config = self.config()
        return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")

    def attention_heads(self) -> int | None:
        """The number of attention heads in `config.json`, under the names that families use; None where it states none."""
        config = self.language_config()
        stated = (config.get(name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads"))
        return next((heads for heads in stated if type(heads) is int and heads > 0), None)

    def adapter_config(self) -> dict[str, Any]:
        """The adapter's `adapter_config.json`, with PEFT's own type where `cora` marked it. Raises `CoraError` if it is missing or malformed."""
        config = read_foreign(self.path / "adapter_config.json", AdapterConfig)
        stated = config.get("peft_type") or ""
        own = stated.removeprefix(OWN_TYPE)
        return {**config, "peft_type": own} if own != stated and own.isupper() else config

    @property
    def hides_from_peft(self) -> bool:
        """Whether `cora` marked the type in `adapter_config.json`, so that PEFT refuses what it would load in part."""
        stated = read_foreign(self.path / "adapter_config.json", AdapterConfig).get("peft_type")
        return stated != self.adapter_config().get("peft_type")

    def generation_config(self) -> dict[str, Any]:
        """The model's `generation_config.json`; empty if there is none. Raises `CoraError` if it is malformed."""
        path = self.path / "generation_config.json"
        found: dict[str, Any] = read_foreign(path, GenerationConfig) if path.exists() else {}
        return found

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer."""
        return any((self.path / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))

    @property
    def chat_template(self) -> Path:
        """Where the directory keeps a chat template as a file of its own."""
        return self.path / "chat_template.jinja"

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer in the directory has a chat template, in any of the places for one."""
        settings = self.path / "tokenizer_config.json"
        inside = settings.is_file() and isinstance(stated := read_json(settings), dict) and bool(stated.get("chat_template"))
        return inside or self.chat_template.is_file() or any(self.path.glob("additional_chat_templates/*.jinja"))

    def tokenizer_files(self) -> list[Path]:
        """The files that decide how text becomes tokens."""
        own = [self.path / name for name in _TOKENIZER_FILES if (self.path / name).exists()]
        return [
            *own,
            *sorted(self.path.glob("*.tiktoken")),
            *sorted(self.path.glob("additional_chat_templates/*.jinja")),
            *self._code_files("tokenizer_config.json"),
        ]

    def vocabulary_files(self) -> list[Path]:
        """Those of `tokenizer_files` that are no chat template, which alone is no tokenizer."""
        return [file for file in self.tokenizer_files() if file.suffix != ".jinja"]

    def text_hash(self) -> str:
        """SHA-256 over the files that decide how text becomes tokens."""
        return self._hash(self.tokenizer_files())

    def tokenizer_hash(self) -> str:
        """SHA-256 over the files that decide how text becomes tokens and which tokens end an answer."""
        ends = self.path / "generation_config.json"
        return self._hash([*self.tokenizer_files(), *([ends] if ends.exists() else [])])

    def weight_files(self) -> list[Path]:
        """The weight files that are read: safetensors if there are any, else `.bin`, else `.pt`, else `.pth`. Raises `CoraError` if there are none.

        For an adapter these are `adapter_model.*`, or the file of `cora`'s compact form, which holds only A. For a complete model
        the precedence is that of transformers: the single file, the files of the index, any others.
        """
        if found := self._adapter_files() if self.is_adapter else self._complete_files():
            return found
        others = sorted(file.name for file in self.path.iterdir() if file.suffix in _UNREAD)
        instead = f"; {others[0]} is of a format that is not read: use the model's own weights as safetensors" if others else ""
        for pattern, program in _PARTS.items():
            if part := next(self.path.glob(f"*/{pattern}"), None):
                instead = f"; those in {part.parent.name} are the parts of several processes of {program}"
        raise CoraError(f"{self.path} holds no weights: it has no file *.safetensors, *.bin, *.pt or *.pth{instead}")

    @property
    def has_weights(self) -> bool:
        """Whether the directory holds weights, of a complete model or of an adapter."""
        return bool(self._adapter_files() or self._complete_files())

    @property
    def has_known_layout(self) -> bool:
        """Whether transformers finds the weights of the complete model by itself: under the usual name, or through an index with `metadata`."""
        for single, index in _LAYOUTS:
            if (self.path / single).exists():
                return bool(self._named_files())
            if (self.path / index).exists():
                return bool(self._named_files()) and isinstance(
                    read_foreign(self.path / index, WeightIndex).get("metadata"), dict
                )
        return False

    def weight_index(self) -> dict[str, str]:
        """Tensor name -> file name of a sharded model's index; empty where the model has none, or a single file as well."""
        for single, index in _LAYOUTS:
            if (self.path / single).exists():
                return {}
            if (self.path / index).exists():
                named: dict[str, str] = read_foreign(self.path / index, WeightIndex)["weight_map"]
                return named
        return {}

    def other_weight_files(self) -> list[Path]:
        """Weight files next to those of an adapter, which PEFT does not read, such as `non_lora_trainables.bin` of LLaVA."""
        if not (own := self._adapter_files()):
            return []
        found = [file for ending in WEIGHT_ENDINGS for file in sorted(self.path.glob(f"*.{ending}")) if file not in own]
        return [
            file for file in found if not (file.name.startswith((".", rundir.POSTERIOR)) or _NO_WEIGHTS.fullmatch(file.name))
        ]

    def check_unambiguous(self) -> None:
        """Raise `CoraError` for a directory with the weights of both a complete model and an adapter, or of an adapter that is not PEFT's."""
        if (self.path / "adapter_config.json").exists() and not ((self.path / "config.json").exists() or self.is_adapter):
            raise CoraError(
                f"{self.reference} has an adapter_config.json, but {self._complete_files()[0].name} in place of the adapter_model.safetensors of "
                "PEFT, as other programs write it (MLX); convert it to PEFT's form first"
            )
        explicit = None
        with contextlib.suppress(CoraError):  # a damaged configuration is named where it is read
            explicit = None if self.is_adapter else self.config().get("transformers_weights")
        if explicit is not None and explicit not in [name for layout in _LAYOUTS for name in layout]:
            raise CoraError(
                f"{self.reference}: config.json has transformers load its weights from {str(explicit)[:100]} (transformers_weights), whatever else the "
                "directory holds; rename that file to model.safetensors and remove the entry"
            )
        # Without a config.json it is no complete model: TRL's PPO writes its value head as pytorch_model.bin next to the adapter.
        configured = all((self.path / name).exists() for name in ("adapter_config.json", "config.json"))
        if configured and (own := self._adapter_files()) and (model := self._named_files()):
            raise CoraError(
                f"{self.reference} holds both a complete model ({model[0].name}) and an adapter ({own[0].name}); move one of them to a "
                "directory of its own"
            )

    def check_links(self) -> None:
        """Raise `CoraError` for a file that is a symbolic link to nothing, as where a download to the hub's cache was cut off or cleared up.

        Otherwise it would count as missing: the model would go without its chat template or its end tokens.
        """
        settings = ("config.json", "generation_config.json", "adapter_config.json", "cora.json", *_TOKENIZER_FILES)
        found = [self.path / name for name in (*settings, *(index for _, index in _LAYOUTS))]
        if not any((self.path / single).exists() for single, _ in _LAYOUTS):
            found += [self.path / name for name in self.weight_index().values()] or self._adapter_files() or self._loose_files()
        for path in (*found, *sorted(self.path.glob("*.jinja"))):
            if path.is_symlink() and not path.exists():
                raise CoraError(
                    f"{path} is a symbolic link to {path.readlink()}, which does not exist; download the model again"
                )

    def check_unmarked(self) -> None:
        """Raise `CoraError` for a JSON file that begins with a byte order mark, which transformers and PEFT refuse or pass over in silence."""
        names = (
            "config.json",
            "generation_config.json",
            "adapter_config.json",
            *(index for _, index in _LAYOUTS),
            *_TOKENIZER_FILES,
        )
        for path in (self.path / name for name in names if name.endswith(".json")):
            if path.is_file() and _is_marked(path):
                raise CoraError(
                    f"{path} begins with a byte order mark, which transformers and PEFT do not read; save it as UTF-8 without one"
                )

    def _adapter_files(self) -> list[Path]:
        """The file of an adapter: that of the usual name, which alone PEFT reads, or where there is none, all those of other names."""
        found = self._named_as_adapters()
        return [file for file in found if file.stem == "adapter_model"] or found

    def _named_as_adapters(self) -> list[Path]:
        return next((found for ending in WEIGHT_ENDINGS if (found := sorted(self.path.glob(f"adapter_*.{ending}")))), [])

    def _complete_files(self) -> list[Path]:
        return self._named_files() or self._loose_files()

    def _named_files(self) -> list[Path]:
        """The weight files by which transformers recognises a complete model."""
        for single, index in _LAYOUTS:
            if (self.path / single).exists():
                self._check_one_copy(single, index)
                return [self.path / single]
            if (self.path / index).exists():
                files = [self.path / name for name in sorted(set(self.weight_index().values()))]
                for file in files:
                    if file.parent != self.path or not file.exists():
                        raise CoraError(
                            f"{self.path / index} lists {file.relative_to(self.path) if file.is_relative_to(self.path) else file}, which is not in that "
                            "directory itself; move it there and correct the index, or download the model again"
                        )
                return files
        return []

    def _check_one_copy(self, single: str, index: str) -> None:
        """Raise `CoraError` where the complete files of an index stand next to a single file: a program saved one over the other."""
        if not (self.path / index).exists():
            return
        parts = set(read_foreign(self.path / index, WeightIndex)["weight_map"].values())
        if single not in parts and all((self.path / name).exists() for name in parts):
            raise CoraError(
                f"{self.path} holds the weights twice, in {single} and in the {len(parts)} files of {index}, and they may differ; remove one of "
                "the two"
            )

    def _loose_files(self) -> list[Path]:
        """Every weight file of the directory that is neither an adapter's nor hidden."""
        for ending in WEIGHT_ENDINGS:
            names = (file for file in self.path.glob(f"*.{ending}") if not file.name.startswith(("adapter_", ".")))
            if found := sorted(file for file in names if not _NO_WEIGHTS.fullmatch(file.name)):
                return found
        return []

    def content_hash(self) -> str:
        """SHA-256 over the names and contents of the weight files, the configuration, and the code that computes the model if it is its own.

        For an adapter it includes `cora.json`, from which the B of a compact adapter is recomputed, and a posterior. It is computed once.
        """
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        return self._hash(self.hashed_files())

    def content_hashes(self, known: Mapping[str, str] | None = None) -> set[str]:
        """`content_hash`, and what earlier versions recorded: they covered weight files that are never read, and no code.

        With the `known` SHA-256 of each file by name, none is read.
        """
        files, earlier = self.weight_files(), self._named_as_adapters() if self.is_adapter else self._loose_files()
        covered = [self._with_settings(each) for each in ([files] if files == earlier else [files, earlier])]
        code = set(self._code_files())
        without = [[file for file in each if file not in code] for each in covered] if code else []
        if known is not None:
            return {hashing.sha256_json({file.name: known.get(file.name) for file in each}) for each in (*covered, *without)}
        return {self._hash(each) for each in (*covered, *without)}

    def hashed_files(self) -> list[Path]:
        """The files that `content_hash` covers."""
        return self._with_settings(self.weight_files())

    def _hash(self, files: list[Path]) -> str:
        self.require_unchanged()
        digest = hashing.sha256_files(files)
        self.require_unchanged()
        return digest

    def require_unchanged(self) -> None:
        """Raise `CoraError` if a file of the model was replaced or written to since its first use: hash and weights would be two models'.

        Weights that arrive where there were none, as those of a download do that another command began, change nothing that was read.
        """
        first, now = self._first_seen, self._seen()
        if not any(map(_holds_weights, first)):
            now = {path: state for path, state in now.items() if not _holds_weights(path)}
        changed = sorted(path for path in first.keys() | now.keys() if first.get(path) != now.get(path))
        if changed:
            raise hashing.changed_meanwhile(changed[0])

    def require_unchanged_file(self, path: Path) -> None:
        """As `require_unchanged`, for one of the files, which takes a single look at the disk."""
        if path in self._first_seen and hashing.file_state(path) != self._first_seen[path]:
            raise hashing.changed_meanwhile(path)

    @cached_property
    def _first_seen(self) -> dict[Path, tuple[int, ...]]:
        return self._seen()

    def _seen(self) -> dict[Path, tuple[int, ...]]:
        """The state of every file that decides what is loaded, read or hashed."""
        weights: list[Path] = []
        with contextlib.suppress(CoraError):  # such as an index without its files, which the reader of the weights names
            weights = [*self._adapter_files(), *(self._named_files() or self._loose_files())]
        names = (
            *rundir.MODEL_FILES,
            "generation_config.json",
            "cora.json",
            rundir.POSTERIOR,
            *(index for _, index in _LAYOUTS),
        )
        others = [self.path / name for name in (*names, *_TOKENIZER_FILES)]
        patterns = ("*.jinja", "additional_chat_templates/*.jinja", "*.py", *VOCABULARIES)
        others += [path for pattern in patterns for path in self.path.glob(pattern)]
        return {path: state for path in (*weights, *others) if (state := hashing.file_state(path)) is not None}

    @property
    def has_own_code(self) -> bool:
        """Whether a configuration names classes that transformers runs with `trust_remote_code` only: files here or of another repository."""
        return any(self._names_code(name) for name in ("config.json", "tokenizer_config.json"))

    def _with_settings(self, files: list[Path]) -> list[Path]:
        names = ("adapter_config.json", "cora.json", rundir.POSTERIOR) if self.is_adapter else ("config.json",)
        return [*files, *(self.path / name for name in names if (self.path / name).exists()), *self._code_files()]

    def _code_files(self, configuration: str = "config.json") -> list[Path]:
        """The directory's own Python files, where a configuration in it names classes in them, which --trust-remote-code runs."""
        return sorted(self.path.glob("*.py")) if self._names_code(configuration) else []

    def _names_code(self, configuration: str) -> bool:
        path = self.path / configuration
        stated = read_json(path) if path.exists() else None
        return isinstance(stated, dict) and bool(stated.get("auto_map"))


def _holds_weights(path: Path) -> bool:
    return path.suffix.removeprefix(".") in WEIGHT_ENDINGS


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
