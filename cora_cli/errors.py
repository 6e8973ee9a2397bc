"""The two exceptions that `cora` shows to its users.

Anything a user can cause (a bad file, a bad flag, a full disk) is raised as one of these, with one plain sentence that says
what is wrong, where, and what would work. Programming errors remain ordinary exceptions.
"""

import re


class CoraError(Exception):
    """A command failed. Only the message is shown, without a traceback, and the process exits with `exit_code`."""

    exit_code = 1


class UsageError(CoraError):
    """The request itself is invalid (unknown option, contradictory flags); no work was started."""

    exit_code = 2


def reason(error: BaseException) -> str:
    """The message of a library's error as one line of at most 300 characters, to end a sentence with.

    A refused pickle gets its own message, because torch's advises the user to load it anyway; so does the code of a model, which transformers
    would run by another setting than a flag of `cora`.
    """
    text = " ".join(str(error).split())
    if "weights_only" in text or "Weights only load failed" in text:
        return "the pickle contains more than tensors and could run code, so it was not loaded; use a safetensors copy"
    if "trust_remote_code" in text:
        return "it needs Python code of its own, which cora runs with --trust-remote-code only; read that code first"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return "a name in it has characters that are none in this locale, whose encoding is not UTF-8; set PYTHONUTF8=1"
    if isinstance(error, KeyError) and text:
        return f"there is no {text[:280]}"
    return text[:300] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of this machine or its GPU does not suffice; torch raises a bare `RuntimeError` on a CPU.

    A library that does not fit below `ulimit -v` cannot be imported, and oneDNN does not say why it cannot compile a product of matrices.
    """
    unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)
    uncompiled = isinstance(error, RuntimeError) and str(error) == "could not create a primitive"
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return (
        named
        or unmapped
        or uncompiled
        or any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that the processes of a run could not exchange data; gloo raises a bare `RuntimeError`."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "NCCL error" in str(error)))


def lost_process(error: BaseException) -> CoraError:
    """What to say of an error for which `is_lost_process` holds."""
    detail = re.sub(r"^\[\S*\] ", "", reason(error).partition(". This is ")[0])  # gloo begins with a line of its source
    return CoraError(f"another process of this run ended or cannot be reached, and its own message says why ({detail})")
