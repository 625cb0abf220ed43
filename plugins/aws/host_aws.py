"""What both commands share: the host's `aws`, and the way into the guest.

A secret travels over standard input and output only, never on a command line or in a file of the host.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nixbox.errors import ExitCode, NixboxError
from nixbox.plugin import sandbox
from nixbox.report import harmless

_ASKED_S = 120.0  # for what `aws` answers without a person
_MOST_BYTES = 1 << 20  # from a guest


class Failure(NixboxError):
    """What the user is told instead of a traceback."""


def main(command: Callable[[list[str]], None]) -> NoReturn:
    """Run a command with the words of its command line, and exit."""
    try:
        command(sys.argv[1:])
    except NixboxError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None
    raise SystemExit(0)


def usage(words: str) -> Failure:
    """A command line that means nothing."""
    failure = Failure(f"usage: nixbox aws {words}")
    failure.exit_code = ExitCode.USAGE
    return failure


def check_profile(profile: str) -> str:
    """A profile's name: in the guest it becomes a file's name and a section's. Raises Failure."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@+=,-]*", profile):
        raise Failure(
            f"the profile {profile!r} has a name that the guest cannot be given",
            hint="letters, digits and any of _ . @ + = , - after the first",
        )
    return profile


def default_profile() -> str:
    """What `aws` takes on this host if nobody names one."""
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"


def aws(*words: str) -> subprocess.CompletedProcess[str]:
    """Ask the host's `aws`. Raises Failure when there is none, or it does not answer."""
    argv = ["aws", *words]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASKED_S)
    except FileNotFoundError:
        raise _missing() from None
    except subprocess.TimeoutExpired:
        raise Failure(f"`{' '.join(argv)}` gave no answer in {_ASKED_S:g} s") from None


def aws_in_terminal(*words: str) -> int:
    """Let the host's `aws` talk with its user; what it prints goes to standard error. Returns its exit code."""
    try:
        return subprocess.run(["aws", *words], stdout=sys.stderr).returncode
    except FileNotFoundError:
        raise _missing() from None


def _missing() -> Failure:
    failure = Failure(
        "this host has no `aws`",
        hint="logging in happens here, not in the guest: install version 2 of the AWS CLI",
    )
    failure.exit_code = ExitCode.HOST
    return failure


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why `aws` failed, by its own last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def setting(name: str, profile: str) -> str:
    """A value of the profile in the host's configuration; empty if there is none."""
    done = aws("configure", "get", name, "--profile", profile)
    return done.stdout.strip() if done.returncode == 0 else ""


def check_running() -> str:
    """The machine's name. Raises NixboxError when it is not up: nobody should log in for nothing."""
    box = sandbox()
    box.require_running()
    return box.machine.name


def in_guest(script: str, words: Sequence[str] = (), stdin: str = "") -> str:
    """Run a shell script in the guest with `stdin` as its input; returns what it printed. Raises Failure.

    Both its streams count as what it printed, up to a bound: whatever runs there may have been replaced.
    """
    argv = ["nixbox", "run", "--no-tty", "--", "sh", "-euc", "exec 2>&1\n" + script, "sh", *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(stdin.encode())
        said = process.stdout.read(_MOST_BYTES + 1)
        if len(said) > _MOST_BYTES:
            process.kill()
            raise Failure("the guest answers with more than can be true")
    text = said.decode(errors="replace")
    if process.returncode != 0:
        lines = [harmless(line) for line in text.splitlines() if line.strip()]
        raise Failure(lines[-1] if lines else f"the guest does not take it: exit code {process.returncode}")
    return text
