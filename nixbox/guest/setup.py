"""Run the host's scripts in a guest: the profile's first-boot `setup`, and the `scripts` of every start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from nixbox import run
from nixbox.digests import sha256
from nixbox.guest.control import printable
from nixbox.guest.ssh import Endpoint, send_signal


def setup_hash(text: str) -> str:
    """What the guest's marker holds after this setup ran."""
    return sha256(text.encode()).hexdigest()


def with_shebang(text: str) -> str:
    """A script that says nothing of its interpreter is sh, and stops at the first command that fails."""
    return text if text.startswith("#!") else f"#!/bin/sh\nset -eu\n{text}\n"


def run_script(endpoint: Endpoint, title: str, text: str, log: Path | None, output: Callable[[str], None]) -> int:
    """Run a script as the guest's user and return its exit code; each line goes to `output` and to `log`.

    The script travels over standard input and runs from the guest's memory; its own standard input is empty. One
    of a title runs at a time (nix/guest/script), and Ctrl-C here ends it there.
    """
    name = sha256(title.encode()).hexdigest()[:12]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(log or os.devnull, flags if log else os.O_WRONLY, 0o600)
    with os.fdopen(fd, "w") as kept:
        kept.write(f"# {title} at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")

        def on_line(line: str) -> None:
            kept.write(line + "\n")
            kept.flush()
            output(printable(line))

        argv = [*endpoint.argv("-T"), f"/run/nixbox/script {name}"]
        try:
            done = run.stream(argv, on_out=on_line, stdin=with_shebang(text))
        except BaseException:
            send_signal(endpoint, f"script-{name}", signal.SIGTERM)
            raise
        kept.write(f"# exit code {done.code}\n")
    return done.code


def interpreter_note(text: str, code: int) -> str:
    """What to say beside exit code 126 or 127 of a script that names an interpreter; empty otherwise."""
    if code in (126, 127) and text.startswith("#!"):
        return f" (is its interpreter, {printable(text.splitlines()[0][2:].strip())}, in the image?)"
    return ""
