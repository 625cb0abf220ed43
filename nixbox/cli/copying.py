"""`nixbox cp`: files between this host and a guest."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from nixbox.cli.common import reporter, sandbox
from nixbox.cli.options import Machine
from nixbox.errors import ConfigError

_USAGE = "nixbox cp SOURCE… TARGET, where the guest's paths begin with guest: (or a machine's name and a colon)"


def sides(words: list[str], machines: list[str]) -> tuple[list[str], str, str | None, bool]:
    """Sources, target, the machine that is named (None: the default), and whether it is the sources' side.

    Raises ConfigError unless exactly one side is the guest's.
    """
    parsed = [_side(word, machines) for word in words]
    if len(parsed) < 2:
        raise ConfigError("`cp` wants something to copy, and where to", hint=_USAGE)
    *sources, target = parsed
    guests = {machine for machine, _ in sources}
    if len(guests) > 1:
        raise ConfigError("the sources are not all of one side", hint=_USAGE)
    source = guests.pop()
    if (source is None) == (target[0] is None):
        where = "on this host" if source is None else "in guests"
        raise ConfigError(f"source and target are both {where}", hint=_USAGE)
    named = source if source is not None else target[0]
    return [path for _, path in sources], target[1], named or None, source is not None


def _side(word: str, machines: list[str]) -> tuple[str | None, str]:
    """None for the host, "" for the default machine, or a machine's name; and the path."""
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.*)", word, re.DOTALL)
    if match is None:
        return None, word
    if match[1].lower() == "host":
        return None, match[2] or "."
    if match[1].lower() == "guest":
        return "", match[2]
    return (match[1], match[2]) if match[1] in machines else (None, word)


def cp(
    words: Annotated[list[str], typer.Argument(metavar="SOURCE… TARGET", help="guest:PATH is in the guest.")],
    machine: Machine = None,
) -> None:
    """Copy files between this host and the running guest: nixbox cp data guest:/srv, nixbox cp guest:out.log ."""
    from nixbox import paths, view
    from nixbox.guest import copy
    from nixbox.machine.record import all_machines

    known = [found.name for found in all_machines(paths.find_workspace(Path.cwd()))]
    sources, target, named, from_guest = sides(words, known)
    if named and machine and named != machine:
        raise ConfigError(f"two machines are named: {named} and {machine}")
    endpoint = sandbox(named or machine).require_running()
    report = reporter()
    if from_guest:
        done = copy.receive(endpoint, sources, Path(target), report)
    else:
        done = copy.send(endpoint, sources, target, report)
    skipped = "".join(f", {count} × {what} left out" for what, count in done.skipped.items())
    print(f"{done.files} files, {view.size(done.bytes)} in {done.seconds:.1f} s{skipped}", file=sys.stderr)
