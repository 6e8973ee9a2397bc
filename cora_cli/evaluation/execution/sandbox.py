"""Start Python in a sandbox of bubblewrap: namespaces, a filter of system calls, a read-only system, no home and no environment.

The process sets the rest of its limits on itself (`inside.confine`), and `run` watches what no limit of a single process bounds.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.inside.confine import UID
from cora_cli.evaluation.execution.seccomp import filter_program

MEMORY = 512 << 20
"""Bytes of address space of each process."""
PROCESSES = 32
"""Processes and threads of a program."""
FILE_SIZE, DISK = 16 << 20, 64 << 20
"""Bytes of each file, and of the only directory that can be written, which is in memory."""
FILES = 64
NOBODY = 65534
"""The user outside that UID stands for where root starts the sandbox."""
_INSIDE = Path(__file__).parent / "inside"
_REMEDY = (
    "--execute-code needs bubblewrap on Linux: install it (`apt install bubblewrap`, `dnf install bubblewrap`); in a container, allow user "
    "namespaces (`docker run --security-opt seccomp=unconfined --cap-add SYS_ADMIN …`), or score elsewhere with `cora evaluate --from`"
)


def limits(seconds: int) -> dict[str, int]:
    """The arguments of `confine` for a limit in processor seconds."""
    return {"seconds": seconds, "memory": MEMORY, "processes": PROCESSES, "file_size": FILE_SIZE, "files": FILES}


@functools.cache
def require_sandbox() -> None:
    """Raise `CoraError` with the remedy if this machine has no working sandbox."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        raise CoraError(f"{'bwrap is not installed' if sys.platform == 'linux' else 'this is not Linux'}; {_REMEDY}")
    try:
        with started(
            "import confine, json, sys; confine.confine((), **json.loads(sys.argv[1]))",
            {},
            limits(5),
            (),
            stderr=subprocess.PIPE,
        ) as process:
            _, said = process.communicate(timeout=60)
    except (CoraError, OSError, subprocess.TimeoutExpired) as error:
        raise CoraError(f"the sandbox does not start ({error}); {_REMEDY}") from error
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise CoraError(f"the sandbox does not start ({lines[-1]}); {_REMEDY}")


def script(name: str) -> str:
    """The text of a file of `inside/`."""
    return (_INSIDE / name).read_text(encoding="utf-8")


@contextlib.contextmanager
def started(
    code: str, files: Mapping[str, str], options: object, descriptors: Sequence[int], stderr: int = subprocess.DEVNULL
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `code` in a sandbox with `files` in /cora, `options` as JSON in its first argument, and open `descriptors`; kill it at the end."""
    files = {
        **files,
        **{name: script(name) for name in ("confine.py", "judging.py", "wire.py")},
        "main.py": f"import sys; sys.path.insert(0, '/cora')\n{code}",
    }
    with contextlib.ExitStack() as stack:
        command = [shutil.which("bwrap") or "bwrap", *_mounts()]
        passed = list(descriptors)
        for name, text in files.items():
            passed.append(_in_memory(stack, text.encode("utf-8", "replace")))
            command += ["--ro-bind-data", str(passed[-1]), f"/cora/{name}"]
        passed.append(_in_memory(stack, filter_program()))
        command += ["--seccomp", str(passed[-1]), "--remount-ro", "/"]
        users = _Users(stack) if os.geteuid() == 0 else None
        if users is not None:
            command += users.arguments
            passed += users.descriptors
        else:
            command += ["--uid", str(UID), "--gid", str(UID)]
        # -I and -S: no user's packages, no environment variables; -B: no bytecode
        command += ["--", sys._base_executable, "-I", "-S", "-B", "/cora/main.py", json.dumps(options)]  # type: ignore[attr-defined]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=passed, cwd="/", env={}
        )
        try:
            if users is not None:
                users.map(process)
            yield process
        finally:
            process.kill()  # bwrap takes everything inside with it (--die-with-parent, and the end of the process namespace)
            process.wait()
            if process.stderr:
                process.stderr.close()


def _in_memory(stack: contextlib.ExitStack, content: bytes) -> int:
    """A file without a name, positioned at its start."""
    descriptor = os.memfd_create("cora")
    stack.callback(os.close, descriptor)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@functools.cache
def _mounts() -> tuple[str, ...]:
    """The namespaces, and the file system: the system's programs and libraries, Python, an empty /tmp, and nothing else."""
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr", "/usr"),
    ]
    for name in ("bin", "lib", "lib32", "lib64", "sbin"):
        place = Path("/", name)
        if place.is_symlink():
            arguments += ["--symlink", str(place.readlink()), str(place)]
        elif place.is_dir():
            arguments += ["--ro-bind", str(place), str(place)]
    arguments += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        # bwrap would give them the modes that they have outside, which may keep the other user out.
        for parent in reversed(prefix.parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", str(prefix), str(prefix)]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--perms", "0755", "--dir", "/cora"]
    arguments += ["--perms", "0777", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return tuple(arguments)


@dataclasses.dataclass
class _Users:
    """The two users of a sandbox that root starts: itself, to prepare it, and one without any rights for the program.

    bwrap alone would map only one, and the kernel does not hold root to a number of processes, under whichever name.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        (self._told, tell), (wait, self._go) = os.pipe(), os.pipe()
        for descriptor in (self._told, tell, wait, self._go):
            stack.callback(os.close, descriptor)
        self.descriptors = (tell, wait)
        self._tell = tell
        self.arguments = [
            *("--uid", "0", "--gid", "0", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
            *("--info-fd", str(tell), "--userns-block-fd", str(wait)),
        ]

    def map(self, process: "subprocess.Popen[bytes]") -> None:
        """Give the sandbox its users once it exists. Raises `CoraError` if it does not come to exist."""
        told = b""
        while b"}" not in told:
            if process.poll() is not None or not (part := _read_soon(self._told)):
                raise CoraError("bwrap ended before it began; see `bwrap --unshare-user --ro-bind / / true`")
            told += part
        child = json.loads(told)["child-pid"]
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text(f"0 0 1\n{UID} {NOBODY} 1\n", encoding="ascii")
        os.write(self._go, b"1")


def _read_soon(descriptor: int) -> bytes:
    import select

    ready, _, _ = select.select([descriptor], [], [], 30)
    return os.read(descriptor, 4096) if ready else b""
