"""The two exceptions a user of `cora` can meet, and nothing else.

Anything that a user can cause (a bad file, a bad flag, a full disk) is raised as one of these with one plain sentence that
says what is wrong, where, and what would work. Programming errors stay ordinary exceptions.
"""


class CoraError(Exception):
    """A command could not do what was asked; the message is shown alone and the process exits with `exit_code`."""

    exit_code = 1


class UsageError(CoraError):
    """The request itself makes no sense (unknown option, contradictory flags); nothing was started."""

    exit_code = 2


def reason(error: BaseException) -> str:
    """What a library's error says, as the end of a sentence: one line, at most 300 characters.

    A pickle that was refused is named as such: torch's own words advise to open it all the same.
    """
    text = " ".join(str(error).split())
    if "weights_only" in text or "Weights only load failed" in text:
        return "its pickle holds more than tensors and was not opened, since it could run code; use a safetensors copy"
    return text[:300] or type(error).__name__
