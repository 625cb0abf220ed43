"""The one exception family of nixbox and what each exit code means."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process's exit code tells a caller (`nixbox run` passes the command's own code through)."""

    OK = 0
    FAILURE = 1  # something went wrong while working
    USAGE = 2  # a bad argument, config, profile or lock: nothing was started
    HOST = 3  # the host lacks a program, a right or a device
    NOT_RUNNING = 4  # the machine is not there or not running
    DIFFERS = 5  # `build --check`: the image was built again and is another one
    TIMEOUT = 124  # `run --timeout` ended the command (as timeout(1) does)
    RUN_FAILED = 125  # `run` itself failed, not the command (as docker and podman do)
    INTERRUPTED = 130  # Ctrl-C


class NixboxError(Exception):
    """A failure that is the user's to see: one sentence, and what to do about it.

    `message` and `hint` are plain text, shown as `error: …` and `hint: …`.
    """

    exit_code: ExitCode = ExitCode.FAILURE

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(NixboxError):
    """Bad input in a file or on the command line; `faults` holds every one of them, one line each."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, hint: str | None = None, faults: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.faults = tuple(faults)


class HostError(NixboxError):
    """The host lacks a program, a right or a device."""

    exit_code = ExitCode.HOST


class NotRunningError(NixboxError):
    """The machine does not exist or is not running."""

    exit_code = ExitCode.NOT_RUNNING


class TimeoutExpired(NixboxError):
    """A bounded wait ran out; the message says what was waited for and how long."""

    exit_code = ExitCode.TIMEOUT
