"""Names of machines, workspaces and profiles. Kept apart from the models: every command needs a machine's name,
and few need all of pydantic.
"""

from __future__ import annotations

import re
from pathlib import Path

from nixbox.errors import ConfigError

_NAME = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def shown(value: str, most: int = 40) -> str:
    """`value` in backquotes, made safe for a terminal and cut after `most` characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value[:most])
    return f"`{text}…`" if len(value) > most else f"`{text}`"


def name_fault(value: str) -> str | None:
    """What is wrong with a name, or None."""
    if not value:
        return "is empty"
    if len(value) > 63:
        return f"{shown(value)} has {len(value)} characters; at most 63 fit"
    if not re.fullmatch(_NAME, value):
        return f"{shown(value)} may hold only letters, digits and hyphens, with no hyphen at either end"
    return None


def is_name(value: object) -> bool:
    """Whether `value` may name a machine, workspace or profile."""
    return isinstance(value, str) and name_fault(value) is None


def check_name(value: str, what: str) -> str:
    """Return `value` if it may name `what` ("machine name", …): it becomes a path and a host name (RFC 1123).

    Raises ConfigError that says what is wrong with it.
    """
    fault = name_fault(value)
    if fault is None:
        return value
    hint = "a name becomes a directory and a host name: 1 to 63 letters, digits and hyphens, such as `web-1`"
    raise ConfigError(f"the {what} {fault}", hint)


def default_name(workspace: Path) -> str:
    """The directory's name made into a valid machine name; "nixbox" when nothing is left of it."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", workspace.name)
    return words.strip("-")[:63].strip("-") or "nixbox"
