"""A process that has imported what stands beside a machine and waits: what it is asked for, it becomes, by fork.

To start Python and to import is most of what a machine's guard and libkrun's process need before they are of use.
This one does that while the command that began it still reads the config, knows nothing of it, and has its allow-list
of the environment. It ends when that command does. See docs/decisions/035-a-fork-server.md, and `programs` for the
other side.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import marshal
import os
import sys

from nixbox import light, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_ORDER_BYTES = 1 << 16
_STATE, _ARG_START, _ARG_END = 3, 48, 49  # fields of /proc/self/stat (proc(5))


def main() -> None:
    """`forkserver`: its orders come on a socket that is its standard input, until that ends.

    An order is either the name of a module, whose `prepare` is called with the rest, or the name of one to become
    (`main` is called), the label that a list of processes shows, its arguments, and numbers: those of the descriptors
    that come with it after its standard streams. The answer to the latter is the process's number, and a pidfd of it.
    """
    orders = light.Socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    while True:
        data, fds = light.receive_fds(orders, _ORDER_BYTES, linux.MOST_FDS)
        if not data:
            os._exit(0)
        order = marshal.loads(data)  # noqa: S302 (of programs.Programs, which started it)
        if not fds:
            module, *arguments = order
            _imported(module).prepare(*arguments)
            continue
        gc.freeze()  # what the children share with us is nothing for them to look through
        pid = os.fork()
        if pid == 0:
            module, label, arguments, numbers = order
            _become(module, label, arguments, dict(zip((0, 1, 2, *numbers), fds, strict=True)))
        pidfd = os.pidfd_open(pid)  # nobody has waited for it yet: the number is still its own
        light.send_fds(orders, b"%d" % pid, [pidfd])
        for fd in (pidfd, *fds):
            os.close(fd)
        _reap()


def _imported(name: str) -> Any:
    """A module. (`importlib` would have to be imported itself.)"""
    __import__(name)
    return sys.modules[name]


def _reap() -> None:
    """Let go of children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _become(module: str, label: str, arguments: list[str], wanted: dict[int, int]) -> NoReturn:
    """In the child: its own session, just these descriptors (see _take), its name, and then `main` of the module."""
    code = 1
    try:
        os.setsid()
        _take(wanted)
        rename(label)
        sys.argv[1:] = [label, *arguments]
        _imported(module).main()  # it is there, if it was expected
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _take(wanted: dict[int, int]) -> None:
    """Have each descriptor (the value) at its number (the key), and no other but these."""
    beyond = max((*wanted, *wanted.values())) + 1
    aside = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for number, fd in wanted.items()}
    for number, fd in aside.items():
        os.dup2(fd, number, inheritable=number <= 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError:
                continue  # that which listed them


def rename(label: str) -> None:
    """Let lists of processes show `label` as this one's command line: it is what was there before, overwritten."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = (int(fields[number - _STATE]) for number in (_ARG_START, _ARG_END))
    length = end - start
    if length > 1:
        ctypes.memmove(start, os.fsencode(label)[: length - 1].ljust(length, b"\0"), length)
    linux.set_name(label)
