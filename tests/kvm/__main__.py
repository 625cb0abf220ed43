"""`make box`: a shell in an emulated KVM host, with this host's files read-only below a tmpfs."""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
import tempfile
import termios
import threading
import tty
from contextlib import closing, contextmanager
from pathlib import Path

from tests.kvm import box as boxes
from tests.vm.conftest import make_home

# A port is no terminal: one is made in the box.
_SHELL = """
import os, pathlib, pty, sys
for port in pathlib.Path("/sys/class/virtio-ports").iterdir():
    if (port / "name").read_text().strip() == "box.shell":
        fd = os.open("/dev/" + port.name, os.O_RDWR)
for n in (0, 1, 2):
    os.dup2(fd, n)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", "stty rows ROWS columns COLUMNS; exec bash -i"])))
"""
_LONGEST_S = 24 * 3600.0


def _shuttle(port: socket.socket, ended: threading.Event) -> None:
    """Bytes both ways between our terminal and the box, until its shell has ended."""
    while not ended.is_set():
        ready, _, _ = select.select([port, sys.stdin], [], [], 0.2)
        if port in ready:
            data = port.recv(65536)
            if not data:
                return
            os.write(1, data)
        if sys.stdin in ready:
            port.sendall(os.read(0, 4096))


def _shell(box: boxes.Box) -> int:
    size = shutil.get_terminal_size()
    code = _SHELL.replace("ROWS", str(size.lines)).replace("COLUMNS", str(size.columns))
    ended, codes = threading.Event(), [1]

    def run() -> None:
        try:
            done = box.run([sys.executable, "-I", "-S", "-c", code], cwd=str(Path.cwd()), timeout_s=_LONGEST_S)
            codes[0] = done.code
        finally:
            ended.set()

    before = termios.tcgetattr(0)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    tty.setraw(0)
    try:
        with closing(box.terminal()) as port:
            _shuttle(port, ended)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
    thread.join(5)
    return codes[0]


def main() -> int:
    """Build, boot and enter it."""
    if not sys.stdin.isatty():
        print("a shell needs a terminal", file=sys.stderr)
        return 2
    print("the lock, the kernel and the initrd …", file=sys.stderr)
    with contextmanager(make_home)() as home, tempfile.TemporaryDirectory(prefix="nbxbox") as name:
        directory = Path(name)
        saved = boxes.save(*boxes.build(boxes.lock_of(home.lock), directory), directory)
        with boxes.restored(saved) as box:
            print("an emulated KVM host; your files are read-only below a tmpfs, /box is shared", file=sys.stderr)
            return _shell(box)


if __name__ == "__main__":
    sys.exit(main())
