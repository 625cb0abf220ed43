"""What every part of the command line uses."""

from __future__ import annotations

import json
from pathlib import Path

from nixbox.errors import NixboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.report import Reporter
    from nixbox.session import Sandbox


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that everything begun is ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Interrupted(Exception):
    """Ctrl-C and the like, in a shape that the parser does not turn into an exit code of its own."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class PipeClosed(Exception):
    """Whoever read our output has gone, likewise."""


_made: list[Reporter] = []  # the one reporter of this process: `main` takes its live display away, whatever happens


def reporter(*, quiet: bool = False) -> Reporter:
    """The reporter of this command."""
    from nixbox import report

    if not _made:
        _made.append(report.for_stderr(quiet=quiet))
    return _made[0]


def sandbox(name: str | None = None, **overrides: Any) -> Sandbox:
    """The machine that is meant: `name` of the current workspace, with what the command line says instead."""
    from nixbox.session import Sandbox

    chosen = None
    if any(value not in (None, (), []) for value in overrides.values()):
        from nixbox.config.settings import Overrides

        chosen = Overrides(**{key: value for key, value in overrides.items() if value is not None})
    return Sandbox.open(Path.cwd(), name, overrides=chosen, reporter=reporter())


def drop_displays() -> None:
    """Take the live display away, whatever happened."""
    for one in _made:
        one.done()


def complete_machine(incomplete: str) -> list[str]:
    """Machine names of the workspace, for shell completion."""
    from nixbox import paths
    from nixbox.machine.record import all_machines

    try:
        workspace = paths.find_workspace(Path.cwd())
    except NixboxError:
        return []
    return [m.name for m in all_machines(workspace) if m.name.startswith(incomplete)]


def print_json(data: object) -> None:
    """Data on stdout, for machines."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
