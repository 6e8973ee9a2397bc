"""Programs that try to leave the sandbox, to exhaust the machine, or to pass without being right; each is bounded by itself.

None of them is a right answer to `PROBLEM`, so that "passed" is always a fault. One that reaches what it should not raises `BREACH`.
"""

from dataclasses import dataclass

from cora_cli.evaluation.execution.problems import Problem

PROBLEM = Problem(
    "hostile",
    "def f(x):\n    return x + 1\n",
    "assert f(1) == 2\nassert abs(f(2.5) - 3.5) < 1e-6\nassert all(map(lambda pair: f(pair[0]) == pair[1], [(3, 4), (5, 6)]))\nassert 8 in [f(7)]",
)
BREACH = "BREACH"
SECRET = "a-secret-of-the-host"
"""In the environment and in a file of the host while the programs run."""
ANYTHING = ("wrong", "exception", "timeout", "memory", "refused", "not code")


@dataclass(frozen=True)
class Hostile:
    """A program, what it tries, and the fates that it may have."""

    name: str
    tries: str
    source: str
    fates: tuple[str, ...]


_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(*args):\n    found = libc.syscall(*args)\n    if found < 0: raise OSError(ctypes.get_errno(), 'syscall')\n    raise Exception('BREACH')\n"
_FRAMES = """
import json, os, struct
def tell(message):
    frame = json.dumps(message).encode()
    for descriptor in range(3, 64):
        try: os.write(descriptor, struct.pack('>I', len(frame)) + frame)
        except OSError: pass
"""


def _system_call(name: str, number: int, *arguments: str) -> Hostile:
    """A call by its number on x86_64."""
    return Hostile(f"syscall {name}", f"call {name}", f"{_LIBC}call({', '.join([str(number), *arguments])})", ("refused",))


def _lie(name: str, tries: str, message: str) -> Hostile:
    return Hostile(
        name, tries, f"{_FRAMES}def f(x):\n    for _ in range(20): tell({message})\n    return x", ("wrong", "exception")
    )


EXHAUSTION = [
    Hostile("fork bomb", "start 200 processes", "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(20); os._exit(0)\nraise Exception('BREACH')", ("refused",)),
    Hostile("fork tree", "start processes that start processes", "import os, time\nfor _ in range(7):\n    os.fork()\ntime.sleep(1)\nraise Exception('BREACH' if len([one for one in os.listdir('/proc') if one.isdigit()]) > 40 else 'held')", ANYTHING),
    Hostile("daemon", "leave a process behind", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(300)\n    os._exit(0)\ndef f(x): return x", ("wrong",)),
    Hostile("thread flood", "start 200 threads", "import threading, time\nfor _ in range(200):\n    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()\nraise Exception('BREACH')", ("refused",)),
    Hostile("disk, one file", "write 200 MB into one file", "with open('/tmp/x', 'wb') as file:\n    for _ in range(200):\n        file.write(bytes(1 << 20))\nraise Exception('BREACH')", ("refused",)),
    Hostile("disk, many files", "write 200 MB into 20 files", "for number in range(20):\n    with open(f'/tmp/{number}', 'wb') as file:\n        for _ in range(10):\n            file.write(bytes(1 << 20))\nraise Exception('BREACH')", ("refused",)),
    Hostile("disk, shared memory", "write into /dev/shm", "open('/dev/shm/x', 'wb').write(bytes(1 << 20))\nraise Exception('BREACH')", ("refused",)),
    Hostile("memory", "take 10 GB", "x = bytearray(10 << 30)\nraise Exception('BREACH')", ("memory",)),
    Hostile("memory, step by step", "take memory until there is none", "x = []\nwhile True: x.append(bytearray(1 << 20))", ("memory",)),
    Hostile("memory, in children", "take 100 MB in each of 20 processes", "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        x = bytearray(b'1') * (100 << 20); time.sleep(20); os._exit(0)\ntime.sleep(20)", ("memory",)),
    Hostile("huge integer", "compute for hours", "x = 7 ** (10 ** 9)", ("timeout", "memory")),
    Hostile("endless loop", "never return", "def f(x):\n    while True: pass", ("timeout",)),
    Hostile("endless loop, deaf", "ignore the signal of the time limit", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", ("timeout",)),
    Hostile("endless loop, in children", "hand the loop on to new processes", "import os\nfor _ in range(4): os.fork()\nwhile True: pass", ("timeout",)),
    Hostile("sleep", "wait for ever", "import time\ndef f(x): time.sleep(10 ** 6)", ("timeout",)),
    Hostile("stopped", "stop itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", ("timeout",)),
    Hostile("endless output", "print for ever", "while True: print('x' * 10000)", ("timeout",)),
    Hostile("regular expression", "backtrack for ever", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", ("timeout",)),
    Hostile("recursion", "recurse without end", "def f(x): return f(x)", ("exception",)),
    Hostile("stack", "overflow the stack of C", "import ctypes\nctypes.string_at(0)", ("exception",)),
    Hostile("nested source", "break the parser", "f = " + "(" * 20000 + ")" * 20000, ("not code",)),
    Hostile("limits", "raise the limits", "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))\nraise Exception('BREACH')", ("exception", "refused")),
    Hostile("priority", "ask for real-time scheduling", "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\nraise Exception('BREACH')", ("refused",)),
]  # fmt: skip

ESCAPE = [
    Hostile("home", "read the home", "import os\nfor top in ('/root', '/home', '/srv', '/mnt', '/var'):\n    for path, folders, files in os.walk(top):\n        folders[:] = set(folders) - {'lib', 'bin', 'include', 'share', 'versions'}\n        if files: raise Exception('BREACH')\nraise Exception('nothing')", ("exception",)),
    Hostile("environment", "read the environment", "import os\ntext = repr(os.environ)\nfor name in os.listdir('/proc'):\n    if name.isdigit():\n        try: text += open(f'/proc/{name}/environ').read()\n        except OSError: pass\nraise Exception('BREACH' if 'secret' in text or 'PATH' in text else 'nothing')", ("exception",)),
    Hostile("passwords", "read /etc/shadow", "open('/etc/shadow').read()\nraise Exception('BREACH')", ("exception",)),
    Hostile("passwd", "read /etc/passwd", "open('/etc/passwd').read()\nraise Exception('BREACH')", ("exception",)),
    Hostile("secret file", "read a file in the host's /tmp", "import os\nfor path, _, files in os.walk('/tmp'):\n    for name in files: raise Exception('BREACH')\nraise Exception('nothing')", ("exception",)),
    Hostile("loopback", "connect to a server of the host", "import socket\nsocket.create_connection(('127.0.0.1', int('{port}')), 2)\nraise Exception('BREACH')", ("refused",)),
    Hostile("socket, IPv6", "open a socket", "import socket\nsocket.socket(socket.AF_INET6)\nraise Exception('BREACH')", ("refused",)),
    Hostile("socket, netlink", "talk to the kernel about the network", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nraise Exception('BREACH')", ("refused",)),
    Hostile("socket, local", "talk to a service of the host", "import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')\nraise Exception('BREACH')", ("refused",)),
    Hostile("names", "ask for an address", "import socket\nsocket.getaddrinfo('example.com', 80)\nraise Exception('BREACH')", ("refused", "exception")),
    Hostile("kill parent", "kill the process above", "import os\nos.kill(os.getppid(), 9)\ndef f(x): return x", ANYTHING),
    Hostile("kill all", "kill every process", "import os\nos.kill(-1, 9)\ndef f(x): return x", ANYTHING),
    Hostile("write outside", "write into the system", "open('/usr/lib/x', 'w')\nraise Exception('BREACH')", ("refused",)),
    Hostile("write to the root", "write into /", "open('/x', 'w')\nraise Exception('BREACH')", ("refused",)),
    Hostile("kernel settings", "write into /proc/sys", "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')\nraise Exception('BREACH')", ("refused",)),
    Hostile("sysrq", "reboot the machine", "open('/proc/sysrq-trigger', 'w').write('b')\nraise Exception('BREACH')", ("refused", "exception")),
    Hostile("memory of process 1", "read another process's memory", "open('/proc/1/mem', 'rb').read(1)\nraise Exception('BREACH')", ("refused",)),
    Hostile("root of process 1", "leave through /proc", "import os\nraise Exception('BREACH' if set(os.listdir('/proc/1/root')) - set(os.listdir('/')) else 'nothing')", ("exception", "refused")),
    Hostile("files of process 1", "open the files of another process", "import os\nfor name in os.listdir('/proc/1/fd'): open(f'/proc/1/fd/{name}')\nraise Exception('BREACH')", ("refused",)),
    Hostile("processes", "find processes of the host", "import os\nfound = [open(f'/proc/{name}/cmdline').read() for name in os.listdir('/proc') if name.isdigit()]\nraise Exception('BREACH' if any('pytest' in one or 'hostile_campaign' in one or 'problem.json' in one and 'source.py' not in one for one in found) else 'nothing')", ("exception",)),
    Hostile("descriptors", "use a file that was left open", "import os\nfor number in range(3, 64):\n    try: target = os.readlink(f'/proc/self/fd/{number}')\n    except OSError: continue\n    if not target.startswith(('pipe:', '/proc/')): raise Exception('BREACH')\nraise Exception('nothing')", ("exception",)),
    Hostile("symbolic link", "reach a file through a link", "import os\nos.symlink('/etc/passwd', '/tmp/x')\nopen('/tmp/x').read()\nraise Exception('BREACH')", ("exception",)),
    Hostile("symbolic link, up", "reach a file by going up", "import os\nos.symlink('../../../../../etc/shadow', '/tmp/x')\nopen('/tmp/x').read()\nraise Exception('BREACH')", ("exception",)),
    Hostile("hard link", "link a file of the system", "import os\nos.link('/cora/main.py', '/tmp/x')\nraise Exception('BREACH')", ("refused", "exception")),
    Hostile("root", "become root", "import os\nos.setuid(0)\nraise Exception('BREACH')", ("refused",)),
    Hostile("device", "make a device", "import os, stat\nos.mknod('/tmp/x', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\nraise Exception('BREACH')", ("refused",)),
    Hostile("disk device", "read a disk", "import os\nfor name in ('sda', 'vda', 'nvme0n1', 'mem', 'kmem', 'kmsg'):\n    try: open('/dev/' + name, 'rb')\n    except FileNotFoundError: continue\n    raise Exception('BREACH')\nraise Exception('nothing')", ("exception",)),
    Hostile("terminal", "type into the user's terminal", "import fcntl, termios\nwith open('/dev/tty', 'w') as file:\n    fcntl.ioctl(file, termios.TIOCSTI, b'x')\nraise Exception('BREACH')", ("exception", "refused")),
    Hostile("setuid program", "run a program with more rights", "import os, subprocess\nprint(subprocess.run(['/usr/bin/su', '-c', 'id'], check=True))\nraise Exception('BREACH')", ("exception", "refused")),
    Hostile("clock", "set the clock", "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0.0)\nraise Exception('BREACH')", ("refused",)),
    _system_call("ptrace", 101, "16", "os.getppid()", "0", "0"),
    _system_call("process_vm_readv", 310, "os.getppid()", "0", "0", "0", "0", "0"),
    _system_call("mount", 165, "0", "b'/tmp'", "b'tmpfs'", "0", "0"),
    _system_call("unshare", 272, "0x10000000"),
    _system_call("clone into a user namespace", 56, "0x10000000 | 17", "0", "0", "0", "0"),
    _system_call("clone3", 435, "0", "0"),
    _system_call("setns", 308, "0", "0"),
    _system_call("chroot", 161, "b'/tmp'"),
    _system_call("bpf", 321, "0", "0", "0"),
    _system_call("perf_event_open", 298, "0", "0", "0", "0", "0"),
    _system_call("keyctl", 250, "0", "0", "0"),
    _system_call("io_uring_setup", 425, "1", "0"),
    _system_call("userfaultfd", 323, "0"),
    _system_call("shmget", 29, "0", "1 << 20", "0o1666"),
    _system_call("memfd_create", 319, "b'x'", "0"),
    _system_call("pidfd_getfd", 438, "0", "0", "0"),
    _system_call("kexec_load", 246, "0", "0", "0", "0"),
    _system_call("getpid by x32", 0x40000000 + 39),
]  # fmt: skip

_CRAFTS = """
import gc, __main__
peer = next(one for one in gc.get_objects() if isinstance(one, __main__.Program))
def equal(*_): return made
def f(x):
    global made
    made = False
    methods = {'__eq__': equal, '__ne__': equal, '__hash__': lambda *_: 0, '__call__': lambda *_: True}
    classes = peer.request('call', map, (type, ['int'], [(int,)], [methods]), ())
    one = peer.request('next', peer.request('next', peer.request('call', map, (iter, classes, [0]), ())))
    made = True
    return one
"""

PRETENCE = [
    Hostile("exit", "end with success before the tests", "import sys\nsys.exit(0)", ("exception",)),
    Hostile("exit at once", "end without Python noticing", "import os\nos._exit(0)", ("exception",)),
    Hostile("exit in the function", "end with success in a test", "import os\ndef f(x): os._exit(0)", ("exception",)),
    Hostile("exit status of a timeout", "end with the status of another fate", "import os\nos._exit(137)", ("exception",)),
    Hostile("SystemExit", "raise SystemExit in a test", "def f(x): raise SystemExit(0)", ("exception",)),
    Hostile("killed", "kill itself", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", ("exception",)),
    Hostile("assert", "replace AssertionError", "import builtins\nbuiltins.AssertionError = type('Nothing', (Exception,), {'__init__': lambda self, *args: None})\ndef f(x): return x", ("wrong",)),
    Hostile("built-in functions", "replace abs, all, map and print", "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\nbuiltins.map = lambda *args: []\ndef abs(x): return 0\ndef f(x): return x if x != 1 else 2", ("wrong",)),
    Hostile("optimised", "switch assertions off", "import sys\nsys.flags = None\n__debug__x = False\nimport builtins\nbuiltins.compile = lambda *args, **kwargs: ''\nbuiltins.exec = lambda *args, **kwargs: None\ndef f(x): return x", ("wrong",)),
    Hostile("equal to everything", "return an object that equals everything", "class Any:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\ndef f(x): return Any()", ("wrong",)),
    Hostile("near to everything", "return an object that is near to every number", "class Any(float):\n    def __eq__(self, other): return True\n    def __sub__(self, other): return self\n    __rsub__ = __sub__\n    def __abs__(self): return self\n    def __lt__(self, other): return True\ndef f(x): return 2 if x == 1 else Any(0)", ("wrong", "exception")),
    Hostile("equal list", "return a list that equals everything", "class Any(list):\n    def __eq__(self, other): return True\n    def __contains__(self, other): return True\ndef f(x): return Any()", ("wrong",)),
    Hostile("stands for the answer", "return an object that computes with the expected value", "class Any:\n    def __sub__(self, other): return 0.0\n    def __eq__(self, other): return True\ndef f(x): return 2 if x == 1 else Any()", ("wrong", "exception")),
    Hostile("stop iteration", "end the loop of the tests", "def f(x):\n    if x == 1: return 2\n    if x == 2.5: return 3.5\n    raise StopIteration", ("exception",)),
    Hostile("assertion", "raise AssertionError", "def f(x): raise AssertionError('passed')", ("exception",)),
    Hostile("interrupt", "raise KeyboardInterrupt", "def f(x): raise KeyboardInterrupt", ("exception",)),
    Hostile("marker on the output", "print the runner's own verdict", "import os, sys\nfor stream in (sys.stdout, sys.stderr):\n    print('[\"started\", \"\"]\\n[\"passed\", \"\"]', file=stream, flush=True)\ndef f(x): return x", ("wrong",)),
    Hostile("marker on every file", "write the runner's own verdict to every open file", "import os\nfor number in range(1, 64):\n    try: os.write(number, b'[\"started\", \"\"]\\n[\"passed\", \"\"]\\n')\n    except OSError: pass\ndef f(x): return x", ("exception",)),
    Hostile("equal object of the tests", "have the tests make an object that equals everything", _CRAFTS, ("exception",)),
    _lie("answers in advance", "answer what was not asked", "{'value': 2}"),
    _lie("answers with a marker", "send a verdict", "{'loaded': None, 'value': 'passed'}"),
    _lie("code in a name", "have its text executed as a named tuple", "{'value': ['named', 'x(): pass\\nimport os #', ['a'], [1]]}"),
    _lie("code in a value", "have a function called as a value", "{'value': ['text', 'os', 'system', 'true']}"),
    _lie("function as an exception", "have a function called as an exception", "{'error': {'classes': [['builtins', 'eval']], 'args': ['1'], 'text': '', 'errno': None}}"),
    _lie("asks back", "call what it was not given", "{'do': 'call', 'with': [['builtin', 'eval'], ['tuple', ['1']], ['tuple', []]]}"),
    _lie("asks for objects", "use objects of the tests by name", "{'do': 'call', 'with': [['yours', 't1'], ['tuple', []], ['tuple', []]]}"),
    _lie("deep message", "break the reader of messages", "json.loads('[' * 900 + ']' * 900) and {'value': json.loads('[' * 900 + ']' * 900)}"),
    Hostile("garbage", "send bytes that are no message", "import os\nfor number in range(3, 64):\n    try: os.write(number, os.urandom(1 << 12))\n    except OSError: pass\ndef f(x): return x", ("exception",)),
    Hostile("closed", "close the connection", "import os\nos.closerange(3, 64)\nwhile True: pass", ("timeout",)),
    Hostile("deletes its tests", "delete everything it can", "import os, shutil\nfor path in ('/cora/problem.json', '/cora/main.py', '/cora/wire.py'):\n    try: os.remove(path)\n    except OSError: pass\nshutil.rmtree('/cora', ignore_errors=True)\ndef f(x): return x", ("wrong",)),
    Hostile("reads its tests", "find the tests in memory and on disk", "import gc, os, sys\ntext = ''\nfor path, _, files in os.walk('/cora'):\n    for name in files: text += open(os.path.join(path, name)).read() if name != 'source.py' else ''\nfor one in gc.get_objects():\n    if isinstance(one, (dict, list, tuple)) and '3.' + '5' in repr(one)[:2000] and 'ass' + 'ert f' in repr(one)[:2000]: text += 'ass' + 'ert f'\nraise Exception('BREACH' if 'ass' + 'ert f(' in text else 'nothing')", ("exception", "refused")),
    Hostile("patches the runner", "replace the runner's own functions", "import __main__\n__main__.Program.answer = lambda self, request: True\n__main__.Program._plain = staticmethod(lambda value: (2,))\ndef f(x): return x", ("wrong", "exception")),
    Hostile("traces the runner", "change results with a trace function", "import sys, wire\nsys.setprofile(lambda *args: None)\nwire._SHARED.clear()\nwire.struct.pack = lambda *args: b'\\0\\0\\0\\2'\ndef f(x): return x", ("wrong", "exception")),
    Hostile("endless iterator", "return what never ends", "import itertools\ndef f(x): return itertools.count()", ("wrong",)),
    Hostile("endless recursion in the answer", "return a list that contains itself", "def f(x):\n    found = []\n    found.append(found)\n    return found", ("wrong", "exception", "timeout")),
    Hostile("deep answer", "return a very deep list", "def f(x):\n    found = []\n    for _ in range(100000): found = [found]\n    return found", ("wrong", "exception", "timeout")),
    Hostile("large answer", "return 100 MB", "def f(x): return 'x' * (100 << 20)", ("exception", "memory", "timeout")),
    Hostile("prose", "answer in words", "Certainly! Here is the function that you asked for.", ("not code",)),
    Hostile("comment", "answer with a comment", "# def f(x): return x + 1", ("not code",)),
]  # fmt: skip

HOSTILE = [*EXHAUSTION, *ESCAPE, *PRETENCE]
