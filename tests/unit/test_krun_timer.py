"""A call to KVM that libkrun's process answers by itself: that one, of that process, and no other."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable

import pytest

from nixbox.machine import krun_timer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp(2)")
_NO_NEW_PRIVS = 38  # linux/prctl.h: without rights, a filter is for who gains none
_NEIGHBOUR = krun_timer.REINJECT_CONTROL + 1


def answer(request: int) -> int:
    """The error number of such an ioctl to what is no machine of KVM's."""
    try:
        fcntl.ioctl(0, request, bytes(64))
    except OSError as error:
        return error.errno or -1
    return 0


def in_process(body: Callable[[], list[int]]) -> list[int]:
    """What `body` finds in a process of its own: a filter stays for good."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = b"failed"
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
            found = " ".join(map(str, body())).encode()
        finally:
            os.write(into, found)
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return [int(word) for word in said.split()]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64's timer chip")
def test_that_call_succeeds_without_being_made() -> None:
    def body() -> list[int]:
        before = answer(krun_timer.REINJECT_CONTROL)
        krun_timer.skip(krun_timer.REINJECT_CONTROL, os.uname().machine)
        found = [before, answer(krun_timer.REINJECT_CONTROL), answer(_NEIGHBOUR)]
        later = threading.Thread(target=lambda: found.append(answer(krun_timer.REINJECT_CONTROL)))
        later.start()
        later.join()
        return found

    assert in_process(body) == [errno.ENOTTY, 0, errno.ENOTTY, 0]


def test_elsewhere_nothing_is_changed() -> None:
    def body() -> list[int]:
        krun_timer.skip(krun_timer.REINJECT_CONTROL, "aarch64")
        return [answer(krun_timer.REINJECT_CONTROL)]

    assert in_process(body) == [errno.ENOTTY]
