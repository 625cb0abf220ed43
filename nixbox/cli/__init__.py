"""The command line: parse, call, render, exit codes. Everything else is in session and below.

stdout is for data, stderr for people. Modules are imported inside the commands that need them: a command pays
for what it uses.
"""

from __future__ import annotations

import os
import signal
import sys

from nixbox.cli import quick
from nixbox.cli.common import Interrupted, PipeClosed, Stopped, drop_displays
from nixbox.errors import ExitCode, NixboxError


def _show(error: NixboxError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    for fault in getattr(error, "faults", ()):
        print(f"  {fault}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _stand_firm() -> None:
    """Make sure of three standard streams, and of an orderly end on SIGTERM and on a closed terminal."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    # A file opened in the place of a closed stream would be overwritten in children: the machine's lock, for one.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for sig in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sig) is signal.SIG_DFL:  # nohup(1) ignores SIGHUP, and so do we then
            signal.signal(sig, stop)


def main() -> None:
    """The program: runs a command and turns every failure into words and an exit code."""
    debug = "--debug" in sys.argv[1:2]
    if debug:
        del sys.argv[1]
    _stand_firm()
    try:
        sys.exit(_run(sys.argv[1:]))
    except NixboxError as error:
        if debug:
            raise
        _show(error)
        sys.exit(error.exit_code)
    except (Interrupted, KeyboardInterrupt) as error:
        print("interrupted", file=sys.stderr)
        sys.exit(getattr(error, "code", ExitCode.INTERRUPTED))
    except (PipeClosed, BrokenPipeError):
        # Nothing more can be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(ExitCode.FAILURE)
    except Exception as error:
        _other(error, debug)


def _run(words: list[str]) -> int:
    try:
        commands = quick.table()
        plain = quick.call(commands or {}, words)
        if plain is None:
            from nixbox.cli import parser

            code = parser.run(words, keeps=commands is None)
        else:
            from nixbox.cli import machines

            function, given = plain
            code = getattr(machines, function)(**given)
        return code if isinstance(code, int) else 0
    finally:
        drop_displays()


def _other(error: Exception, debug: bool) -> None:
    """Bad usage, as the parser says it; anything else is a fault of ours."""
    import typer

    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, typer.Abort):
        print("nothing was done", file=sys.stderr)
        sys.exit(ExitCode.FAILURE)
    # The parser's exceptions (click's, or typer's own copy of them) know how to show themselves.
    show = getattr(error, "show", None)
    if show is not None and not debug:
        show()
        sys.exit(ExitCode.USAGE)
    if debug:
        raise error
    print(f"error: this is a fault in nixbox: {type(error).__name__}: {error}", file=sys.stderr)
    print("hint: `nixbox --debug …` shows where; please report it", file=sys.stderr)
    sys.exit(ExitCode.FAILURE)
