"""`nixbox.lock` as a file: where it is, who may change it, how its text looks, and the plugins that are pinned in it.

Apart from the models of `lock`: every command of a workspace with a pinned plugin needs this, few need pydantic.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nixbox import paths
from nixbox.config import refs
from nixbox.config.names import shown
from nixbox.errors import ConfigError
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

FORMAT: Literal[1] = 1
MEND = "restore the file from version control, or delete it and run `nixbox lock`"
_PLUGINS = "plugins"
_SHAPES = {
    "rev": r"[0-9a-f]{40}",
    "hash": r"sha256-[A-Za-z0-9+/]{43}=",
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
}


@dataclass(frozen=True, slots=True)
class Pin:
    """What a reference to GitHub was resolved to.

    `ref` is the reference as the config has it, `rev` the commit (40 hex digits), `hash` the NAR hash of its tree
    (`sha256-…`, base 64: what nixpkgs' fetchFromGitHub takes), `date` the day of the commit (`2026-07-04`; None when
    GitHub did not say).
    """

    ref: str
    rev: str
    hash: str
    date: str | None = None

    @property
    def place(self) -> refs.Github:
        """Owner, repository and subdirectory; only `ref` is recorded, so they cannot contradict it."""
        return refs.parse(self.ref)

    @property
    def row(self) -> dict[str, str]:
        """The pin as the lock has it."""
        row = {"ref": self.ref, "rev": self.rev, "hash": self.hash}
        return row | ({"date": self.date} if self.date else {})


def pin(row: object) -> Pin:
    """The pin that a row of the lock is. Raises ValueError naming the field that is wrong."""
    if isinstance(row, Pin):
        return row
    if not isinstance(row, dict):
        raise ValueError("is no table")
    if unknown := sorted(map(str, row.keys() - {"ref", *_SHAPES})):
        raise ValueError(f"{unknown[0]}: is no field of a pin")
    for name in ("ref", "rev", "hash"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name}: must be text")
    for name, shape in _SHAPES.items():
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and re.fullmatch(shape, value)):
            raise ValueError(f"{name}: {shown(str(value))} has another form")
    place = refs.parse(row["ref"])
    if place.rev not in (None, row["rev"]):
        raise ValueError(f"rev: is another commit than {shown(row['ref'], most=100)} names")
    return Pin(**row)


def path(workspace: Path) -> Path:
    """WORKSPACE/.nixbox/nixbox.lock."""
    return workspace / paths.CONFIG_DIR / paths.LOCK_FILE


@contextmanager
def one_at_a_time(workspace: Path) -> Iterator[None]:
    """One command at a time may look at a workspace's lock and change it."""
    fd = os.open(workspace / paths.CONFIG_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def parse(text: str, file: Path) -> Any:
    """The JSON of a lock; `file` is what faults call it. Raises ConfigError for no JSON and for another format."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", hint=MEND) from None
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise ConfigError(
            f"{file} has format {data.get('format')!r}; this nixbox reads format {FORMAT}",
            hint="use the nixbox that wrote it, or delete it and run `nixbox lock`",
        )
    return data


def render(data: Mapping[str, Any]) -> str:
    """A lock as text: keys in the order of `data`, a list of tables with one table a line."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list | tuple) and any(isinstance(row, dict) for row in value):
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f'  "{key}": [\n{rows}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def only_pins(data: object) -> bool:
    """Whether a lock's JSON holds pinned plugins and nothing of an image: they are read before its packages."""
    return isinstance(data, dict) and _PLUGINS in data and data.keys() <= {"format", _PLUGINS}


def image_part(text: str) -> str:
    """The text of a lock without its pinned plugins, which change no image; any other text as it is."""
    if f'"{_PLUGINS}"' not in text:
        return text
    try:
        data = json.loads(text)
    except ValueError:
        return text
    if not isinstance(data, dict) or _PLUGINS not in data:
        return text
    return render({key: value for key, value in data.items() if key != _PLUGINS})


def pins(file: Path) -> dict[str, Pin]:
    """The pinned plugins of a lock, by reference; none without a lock. Raises ConfigError naming each fault."""
    try:
        data = parse(file.read_text(), file)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not text", hint=MEND) from None
    rows = data.get(_PLUGINS, []) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f"{file} is damaged", hint=MEND, faults=[f"{file.name}: {_PLUGINS}: is no list"])
    found: dict[str, Pin] = {}
    faults = []
    for i, row in enumerate(rows):
        try:
            one = pin(row)
            if one.ref in found:
                raise ValueError(f"ref: {shown(one.ref, most=100)} is there twice")
            found[one.ref] = one
        except ValueError as fault:
            faults.append(f"{file.name}: {_PLUGINS}.{i}: {fault}")
    if faults:
        raise ConfigError(f"{file} is damaged", hint=MEND, faults=faults)
    return found


def save_pins(file: Path, wanted: Iterable[Pin]) -> None:
    """Write the pins into a lock, or into a new one, and leave all else in it. Raises ConfigError, NixboxError."""
    try:
        data = parse(file.read_text(), file)
    except FileNotFoundError:
        data = {"format": FORMAT}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is damaged", hint=MEND)
    rows = [one.row for one in sorted(wanted, key=lambda one: one.ref)]
    data.pop(_PLUGINS, None)
    paths.write_atomic(file, render(data | {_PLUGINS: rows}))
