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
