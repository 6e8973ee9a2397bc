"""Load a program, and name its fate by what its tests raised."""

import ast
import errno
import io
import sys
import traceback
import types

_REFUSED = {
    getattr(errno, name)
    for name in (
        "EPERM",
        "EACCES",
        "EROFS",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EMFILE",
        "ENFILE",
        "EAGAIN",
        "ENOSYS",
        "ENETUNREACH",
        "ENETDOWN",
    )
}


def load(source: str, module: types.ModuleType) -> str | None:
    """Execute the program; returns "not code" if it is none."""
    try:
        if not ast.parse(source).body:
            return "not code"
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "not code"
    exec(code, module.__dict__)
    return None


def run_tests(tests: str, module: types.ModuleType) -> None:
    """Execute the tests in `module` as the main program; they may end it with success, as `unittest.main()` does.

    Their assertions hold whatever the options of Python are.
    """
    code = compile(tests, "tests.py", "exec", dont_inherit=True, optimize=0)
    sys.argv, sys.modules["__main__"] = ["tests.py"], module
    module.__dict__["__name__"] = "__main__"
    try:
        exec(code, module.__dict__)
    except SystemExit as error:
        if error.code or raised_by_program(error):
            raise


def raised_by_program(error: BaseException) -> bool:
    """Whether an exception comes from the program, which may be in this process."""
    frames = traceback.extract_tb(error.__traceback__)
    return getattr(error, "raised_by_program", False) or any(frame.filename == "program.py" for frame in frames)


def fate_of(error: BaseException, tests: str, *, of_tests: bool) -> tuple[str, str]:
    """The fate of a program with a detail, by an exception that the tests themselves raised (`of_tests`), or the program."""
    name = type(error).__name__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
    line = list(io.StringIO(tests, newline=None))[lines[-1] - 1].strip() if lines and lines[-1] else ""
    if of_tests and isinstance(error, AssertionError | SystemExit):
        return "wrong", line[:200]
    if isinstance(error, MemoryError):
        return "memory", ""
    try:
        text = str(error)
    except BaseException:  # an exception of a class whose `__str__` needs what was not sent
        text = ""
    detail = f"{name}: {text}"[:200] if text else name
    if not of_tests and (getattr(error, "errno", None) in _REFUSED or "can't start new thread" in text):
        return "refused", detail
    return "exception", detail
