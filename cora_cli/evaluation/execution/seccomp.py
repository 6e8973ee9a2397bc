"""The system calls that a sandboxed program may not make, as a filter in the kernel's BPF.

A filter is a list of 8-byte instructions (linux/filter.h: code, jump if true, jump if false, constant), which the kernel runs on the number,
architecture and arguments of each system call (linux/seccomp.h: `struct seccomp_data`). Everything that is not named here is allowed: the
namespaces and limits of the sandbox hold without the filter, which takes away what could be turned against the kernel itself.
"""

import errno
import platform
import struct

from cora_cli.errors import CoraError

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data; the low half of an argument comes first
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
"""On x86_64, the bit that marks the calls of the x32 interface, whose numbers would slip through the comparisons."""
_NEW_NAMESPACE = 0x7E020000
"""The flags of clone(2) that create namespaces: CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET."""
_AF_UNIX = 1

_KILLED: dict[str, tuple[int | None, int | None]] = {  # numbers on x86_64 and aarch64
    # Other processes, and the kernel's own inspection of them
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # File systems and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "quotactl": (179, 60), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225),
    # The machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92), "syslog": (103, 116), "vhangup": (153, 58),
    # Memory that no limit of a process counts
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
_MISSING: dict[str, tuple[int, int]] = {
    # Programs and the C library have another way to do the same, which the filter can judge or the limits can count.
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
_CLONE, _SOCKET = (56, 220), (41, 198)


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a processor, by default this one. A refused call kills the process with SIGSYS.

    Raises `CoraError` for a processor whose numbers of system calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise CoraError(
            f"generated code can be run on {' and '.join(_ARCHITECTURES)} only, not on {machine}: its system calls are not known"
        )
    place = list(_ARCHITECTURES).index(machine)
    # A test jumps over `return kill` or `return errno` where it does not hold; the accumulator keeps the call's number.
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in _KILLED.values():
        if (number := numbers[place]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _KILL)]
    for missing in _MISSING.values():
        lines += [(_EQUAL, 0, 1, missing[place]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    # clone(flags, …): processes and threads, but no namespaces
    lines += [
        (_EQUAL, 0, 4, _CLONE[place]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACE),
        (_RETURN, 0, 0, _KILL),
    ]
    lines += [(_RETURN, 0, 0, _ALLOW)]
    # socket(family, …): the C library asks name services through AF_UNIX, and takes an error for an answer
    lines += [(_EQUAL, 0, 4, _SOCKET[place]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, _KILL)]
    lines += [(_RETURN, 0, 0, _ERRNO | errno.EACCES), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
