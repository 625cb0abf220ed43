"""The program: `nixbox`, and `python -m nixbox`."""

from __future__ import annotations

import gc
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def program() -> NoReturn:
    """Run the command line and leave at once: everything begun was ended, and tearing modules down takes time."""
    # What modules are made of stays: to look for garbage among it again and again is a tenth of a command's start.
    gc.set_threshold(50_000)
    # Until the command line can answer it, Ctrl-C ends us as it ends any program, without a traceback of imports.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # and not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nixbox.cli import main

    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    code: object = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it, or it was closed
            code = code or 1
    # Not sys.exit: after an interrupt inside exec() Python would end itself with SIGINT, though it was handled.
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    program()
