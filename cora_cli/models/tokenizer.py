"""Load and write tokenizers, and say where their files contradict each other or what transformers makes of them."""

import inspect
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from cora_cli import writing
from cora_cli.errors import CoraError, reason
from cora_cli.models.configuration import load_configuration
from cora_cli.models.model_path import ModelPath
from cora_cli.progress import note
from cora_cli.reading import read_foreign, read_json, read_text, refuse_pointer

_OF_ALL_KINDS = (
    "It's 1,234 or 2026: naïve café\n\n    def f(x):\treturn x + 10  # 中文 Привет 😀 DON'T"
    " HelloWorld x_y http://x.y/a?b=1 (...)!!\n) 12345678 'll\r\n \n"
    " cafe\u0301 \u212b ＡＢ１２（ｶﾞ）？ ﬁ ½ x² ™ ㈱ …"
    " हिन्दी ไทย עִבְרִית العربيّة 한국어"
    " a\u00a0b\u3000c\u200bd\u200de\u00ad  f   "
)
"""A text of what tokenizers split in different ways: numbers, apostrophes, capital letters within a word, signs in front of a new line; letters of several
alphabets, and their marks; what the normal forms of Unicode (NFC, NFKC) write otherwise; white space."""
_WITHOUT_VOCABULARY = frozenset({"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"})
_ADDED = 100
"""How many of a tokenizer's added tokens are tried; some reserve thousands."""


def load_tokenizer(model: ModelPath, trust_remote_code: bool = False, adapter: ModelPath | None = None) -> Any:
    """Load a model's tokenizer, or that of `adapter`, which is on the model, if its directory holds one, or a chat template.

    It gets no padding token that it does not have, since it is written next to merged models. Raises `CoraError` if the tokenizer cannot
    be loaded or has no end token.
    """
    base = model
    if adapter is not None and adapter.has_tokenizer:
        model = adapter
    tokenizer = _load(model, trust_remote_code)
    is_other = _gives_other_tokens(model, tokenizer)
    if is_other and model != base and _is_of_transformers(tokenizer):
        # The program that trained the adapter wrote the file. Without config.json transformers goes by the class in tokenizer_config.json, which for some
        # types it knows to be wrong, and not by settings of the class that it has not written.
        tokenizer, is_other = PreTrainedTokenizerFast.from_pretrained(model.path), False
        tokenizer("")  # as in `_load`; the file may keep the padding and the length of an earlier use, which end with a call
    _refuse_empty(model, tokenizer)
    _say_other_templates(model, tokenizer)
    if adapter is not None and not adapter.has_tokenizer and adapter.chat_template.is_file():
        tokenizer.chat_template = read_text(adapter.chat_template)
        adapter.require_unchanged()
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if template.startswith("\ufeff"):
            raise CoraError(
                f"the chat template of {(adapter or model).reference} starts with a byte order mark, which it would write into every prompt; save "
                "it as UTF-8 without one"
            )
    _say_special_tokens(model, tokenizer)
    if is_other:
        note(
            f"{model.reference}: transformers splits text as its {type(tokenizer).__name__} does, into other tokens than tokenizer.json describes; "
            "other programs, and other versions of transformers, may split it as that file says"
        )
    _refuse_without_end(model, tokenizer)
    return tokenizer


def _load(model: ModelPath, trust_remote_code: bool) -> Any:
    """The tokenizer of a directory. Raises `CoraError` if it cannot be loaded."""
    if trust_remote_code and (model.path / "config.json").exists():
        # Transformers goes on without a configuration whose code the hub does not give, after long retries, which would follow again and again.
        load_configuration(model, trust_remote_code)
    # A chat template may be any text, and so may a vocabulary, which is not read where there is a tokenizer.json.
    for file in model.tokenizer_files():
        if file.suffix == ".jinja" or not (model.path / "tokenizer.json").exists():
            refuse_pointer(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=trust_remote_code, mistral_format=False)
        tokenizer("")  # some of its settings are read only now; no letter, since it may know none but those of DNA
    except Exception as error:  # unrelated types, as in `load_model`
        for file in model.tokenizer_files():
            refuse_pointer(file)
        if (model.path / "config.json").exists():
            load_configuration(model, trust_remote_code)  # which transformers reads to find the kind of tokenizer
        if not model.vocabulary_files():
            raise CoraError(
                f"{model.reference} holds no tokenizer; copy the files of its tokenizer, such as tokenizer.json, into that directory"
            ) from error
        if {file.name for file in model.vocabulary_files()} <= _WITHOUT_VOCABULARY:
            raise _lacks_vocabulary(model, "is incomplete") from error
        _refuse_sentencepiece(model)
        raise CoraError(f"tokenizer of {model.reference} cannot be loaded: {reason(error)}") from error
    model.require_unchanged()
    return tokenizer


def _is_of_transformers(tokenizer: Any) -> bool:
    """Whether a tokenizer is of a class of transformers, and not of code that comes with a model."""
    return type(tokenizer).__module__.startswith("transformers.")


def _refuse_without_end(model: ModelPath, tokenizer: Any) -> None:
    """Raise `CoraError` where no token ends a text."""
    if tokenizer.eos_token_id is not None:
        return
    stated = model.generation_config().get("eos_token_id")
    known = stated if isinstance(stated, int) else tokenizer.sep_token_id
    such = f", such as {json.dumps(tokenizer.convert_ids_to_tokens(known), ensure_ascii=False)}" if known is not None else ""
    raise CoraError(
        f"tokenizer of {model.reference} has no end-of-sequence token, so no answer would learn to stop; set eos_token in tokenizer_config.json to "
        f"the token that ends its texts{such}"
    )


def _refuse_empty(model: ModelPath, tokenizer: Any) -> None:
    """Raise `CoraError` where the vocabulary is missing: transformers then gives a tokenizer of special tokens, to which a text is none."""
    if tokenizer.vocab_size > 256:  # a look through a large vocabulary is slow
        return
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if not tokenizer.get_vocab().keys() - added - {*tokenizer.all_special_tokens, "▁"}:  # which stands for a space
        raise _lacks_vocabulary(model, "knows no tokens but special ones")


def _lacks_vocabulary(model: ModelPath, what: str) -> CoraError:
    instead = "remove tokenizer_config.json to have that of the base" if model.is_adapter else "download the model again"
    return CoraError(
        f"the tokenizer of {model.reference} {what}: a file of its vocabulary is missing, such as tokenizer.json; copy it into that directory, or {instead}"
    )


def _refuse_sentencepiece(model: ModelPath) -> None:
    """Raise `CoraError` for a tokenizer of SentencePiece whose packages are missing: transformers then takes the file for another kind's, and names the
    package of that."""
    # A file of tiktoken is text, whose first line is no empty one.
    files = [file for file in model.tokenizer_files() if file.suffix == ".model" and file.read_bytes()[:1] == b"\n"]
    if files and not (is_sentencepiece_available() and is_protobuf_available()):
        raise CoraError(
            f"tokenizer of {model.reference} cannot be loaded: {files[0].name} is one of SentencePiece, whose packages are not installed; install them with "
            "`pip install sentencepiece protobuf`"
        )


def save_tokenizer(tokenizer: Any, directory: Path, output: Path) -> None:
    """Write the files of a tokenizer into `directory`, which is to become `output`, with its own code where it has some, so that `load_tokenizer` reads
    them. Says so where transformers will read them as another tokenizer."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    written = read_foreign(path, dict[str, Any])
    # Some of what a class takes transformers does not write, such as Llama's `legacy`, which decides what a space behind a control token is.
    taken: dict[str, Any] = {
        name: value
        for name, parameter in inspect.signature(type(tokenizer).__init__).parameters.items()
        if name not in written and isinstance(value := getattr(tokenizer, name, None), bool) and value != parameter.default
    }
    own = written.get("auto_map")
    if isinstance(own, dict) and isinstance(name := own.get("AutoTokenizer"), str):
        # transformers writes one name, but reads those of a slow and of a fast tokenizer.
        pair = [None, name] if tokenizer.is_fast else [name, None]
        taken["auto_map"] = {**own, "AutoTokenizer": pair}
    if taken:
        writing.write_json(path, {**written, **taken})
    if _is_of_transformers(tokenizer):
        _say_read_otherwise(tokenizer, directory, output)


def _say_read_otherwise(tokenizer: Any, directory: Path, output: Path) -> None:
    """Say so where transformers takes what was written into `directory` for another tokenizer: next to a model, it goes by the type."""
    again = _load(ModelPath(str(output), directory, None), trust_remote_code=False)
    texts = _texts_of_all_kinds(tokenizer.added_tokens_decoder.values())
    if any(_tokens(again, text) != _tokens(tokenizer, text) for text in texts):
        note(
            f"{output}: transformers reads this tokenizer as its {type(again).__name__}, which gives other tokens than the tokenizer of "
            f"{tokenizer.name_or_path}, from which it was written; PreTrainedTokenizerFast.from_pretrained reads tokenizer.json as it is"
        )


def _say_special_tokens(model: ModelPath, tokenizer: Any) -> None:
    """Say which special tokens two files of the tokenizer state differently, and which one is taken."""
    paths = [model.path / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if not all(path.exists() for path in paths):
        return
    stated = [read_foreign(path, dict[str, Any]) for path in paths]
    for name in ("eos_token", "bos_token", "unk_token", "pad_token"):
        one, other = (token.get("content") if isinstance(token := each.get(name), dict) else token for each in stated)
        if None not in (one, other) and one != other:
            note(
                f"{model.reference}: {name} is {one!r} in {paths[0].name}, but {other!r} in {paths[1].name}; {getattr(tokenizer, name)!r} is used"
            )


def _texts_of_all_kinds(added: Iterable[Any]) -> list[str]:
    """Texts by which tokenizers can be told apart, one with their `added` tokens: some tokenizers differ only around a control token, as in every chat."""
    spelled = "".join(f"{token.content}It is {token.content} \n" for token in itertools.islice(added, _ADDED))
    return [_OF_ALL_KINDS, spelled, " It is", "\nIt is"]


def _tokens(tokenizer: Any, text: str) -> list[int] | None:
    """The tokens of a text, without a change to the tokenizer: CodeLlama's is another one after a text with its token for infilling.

    None where it has none for some character, such as those of DNA.
    """
    try:
        if isinstance(tokenizer, Tokenizer):
            return [*tokenizer.encode(text).ids]
        if tokenizer.is_fast:
            return _tokens(tokenizer.backend_tokenizer, text)
        return [*tokenizer(text)["input_ids"]]
    except Exception:  # the library raises nothing more special
        return None


def _gives_other_tokens(model: ModelPath, tokenizer: Any) -> bool:
    """Whether a tokenizer gives other tokens than its tokenizer.json describes.

    For some types of models transformers takes only the vocabulary from there, and splits text as the class of the type does.
    """
    path = model.path / "tokenizer.json"
    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast or not path.is_file():
        return False
    described = Tokenizer.from_file(str(path))
    described.no_truncation()
    described.no_padding()
    return any(
        _tokens(described, text) != _tokens(tokenizer, text)
        for text in _texts_of_all_kinds(described.get_added_tokens_decoder().values())
    )


def _named_templates(templates: list[Any], path: Path) -> dict[str, Any]:
    """Chat templates by name, from a list of them. Raises `CoraError` for a name that occurs twice, of which transformers takes the last one."""
    named = [(str(one.get("name")), one.get("template")) for one in templates if isinstance(one, dict)]
    if repeated := next((name for name, count in Counter(name for name, _ in named).items() if count > 1), None):
        raise CoraError(f"{path} has two chat templates of the name {repeated!r}; remove one of them")
    return dict(named)


def _say_other_templates(model: ModelPath, tokenizer: Any) -> None:
    """Say where a file of the directory holds another chat template than the one that is taken: an older one, or one that only processors read."""
    used = tokenizer.chat_template
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = model.path / name
        stated = read_json(path) if path.exists() else None
        other = stated.get("chat_template") if isinstance(stated, dict) else None
        if isinstance(other, list):
            other = _named_templates(other, path)
        if (
            not other
            or not isinstance(other, str | dict)
            or other in (used, used.get("default") if isinstance(used, dict) else None)
        ):
            continue
        if used is None:
            note(
                f"{model.reference}: the chat template of {name} is for processors, so it is not used; copy its text to {model.chat_template.name}"
            )
        else:
            taken = model.chat_template.name if model.chat_template.is_file() else "tokenizer_config.json"
            note(f"{model.reference}: {name} holds another chat template than {taken}, which is used")
