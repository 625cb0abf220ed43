"""Plain command lines, taken apart without the parser: its import is half of what `nixbox run` needs by itself.

The parser stays the only place that says what a command takes: when it runs, it writes that down for the commands of
`machines` (`keep`), and the next command line of theirs is read by that (`call`). All that is not plain is the
parser's: help, an error, an option in another spelling. See docs/decisions/037-without-the-parser.md.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

from nixbox import __version__, paths
from nixbox.digests import sha256
from nixbox.errors import NixboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, NamedTuple

    class Option(NamedTuple):
        """The parameter's name, its type, the value of a flag (whose type is ``""``), whether it may come again."""

        name: str
        type: str
        flag: bool
        multiple: bool

    class Command(NamedTuple):
        """A function of `machines`: its options by their spellings, and its one argument.

        `many`: all that follows is its value, a list. `interspersed`: options may come after it.
        """

        function: str
        options: Mapping[str, Option]
        argument: str | None
        many: bool
        required: bool
        interspersed: bool

else:  # without what `typing` costs

    def Option(*fields):
        return fields

    Command = Option

_SOURCES = ("machines.py", "options.py", "quick.py")  # what is written down follows from these
# As the parser calls them, of one version and another. One with bounds has another name.
_TYPES = {"str": "text", "text": "text", "int": "integer", "integer": "integer", "float": "float"}


def _ident() -> str:
    """Of the program that a table is made by and for. Raises OSError."""
    digest = sha256(f"{__version__} {sys.hexversion}\n".encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _file() -> Path:
    return paths.cache_dir() / "commands"


def table() -> Mapping[str, Command] | None:
    """What the parser wrote down; None when it has not, or that of another nixbox has."""
    try:
        kept = json.loads(_file().read_text())
        return kept["commands"] if kept["of"] == _ident() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(commands: Mapping[str, Any]) -> None:
    """Write down what the parser (its commands, by name) takes for functions of `machines`."""
    found = described(commands)
    with suppress(OSError, NixboxError):  # a cache that cannot be written is none
        _file().parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomic(_file(), json.dumps({"of": _ident(), "commands": found}), mode=0o600, synced=False)


def described(commands: Mapping[str, Any]) -> dict[str, Command]:
    """The parser's commands (click.Command) as they are written down, but for those that need more than this can."""
    return {name: found for name, one in commands.items() if (found := _described(one))}


def _described(command: Any) -> Command | None:
    options: dict[str, Option] = {}
    arguments: list[tuple[str | None, bool, bool]] = []
    for one in command.params:
        plain = not (one.envvar or one.callback)
        if one.param_type_name == "argument":
            if not plain or arguments or _TYPES.get(one.type.name) != "text" or one.nargs not in (1, -1):
                return None
            arguments.append((one.name, one.nargs == -1, one.required))
        elif one.required:
            return None
        elif plain and one.is_flag:
            for flag, words in ((True, one.opts), (False, one.secondary_opts)):
                options |= dict.fromkeys(words, Option(one.name, "", flag, False))
        elif plain and one.nargs == 1 and one.type.name in _TYPES:
            options |= dict.fromkeys(one.opts, Option(one.name, _TYPES[one.type.name], False, one.multiple))
    argument, many, required = arguments[0] if arguments else (None, False, False)
    interspersed = command.context_settings.get("allow_interspersed_args", True)
    return Command(command.callback.__name__, options, argument, many, required, interspersed)


def call(commands: Mapping[str, Command], words: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The function of `machines` that a command line means, and what it is called with; None: ask the parser."""
    found = commands.get(words[0]) if words else None
    if found is None:
        return None
    function, options, argument, many, required, interspersed = found
    given: dict[str, Any] = {}
    values: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if word == "--":
            values += rest
        elif word[:1] != "-":
            values.append(word)
            if not interspersed:
                values += rest
        else:
            spelling, equals, text = word.partition("=")
            if spelling not in options or (equals and spelling[:2] != "--"):
                return None
            name, kind, flag, multiple = options[spelling]
            if not kind:
                if equals:
                    return None
                given[name] = flag
                continue
            if not equals:
                text = next(rest, "-")
                if text[:1] == "-":  # none, or an option, or a value of an unusual kind
                    return None
            value = _value(kind, text)
            if value is None:
                return None
            if multiple:
                given.setdefault(name, []).append(value)
            else:
                given[name] = value
    if values if argument is None else (required and not values) or (len(values) > 1 and not many):
        return None
    if values:
        assert argument is not None
        given[argument] = values if many else values[0]
    return function, given


def _value(kind: str, text: str) -> str | int | float | None:
    """A value of one of the parser's types; None for one that is not written plainly."""
    if kind == "text":
        return text
    if not text.isascii() or not text.replace(".", "", kind == "float").isdecimal():
        return None
    return int(text) if kind == "integer" else float(text)
