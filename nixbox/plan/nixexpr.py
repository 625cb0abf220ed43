"""Python values as Nix text: the one place that writes Nix, so the one place that escapes.

    render(Call(Call("import", Path("/x/image.nix")), {"packages": ["jq"], "build": script}))

Data can only ever become a literal; the names of functions pass a check. Nothing here evaluates or copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

# Words that the Nix grammar takes for itself; `or` is legal as an attribute, but only just.
_KEYWORDS = frozenset(("assert", "else", "if", "in", "inherit", "let", "or", "rec", "then", "with"))
_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_'-]*"
_PLAIN_PATH = r"(/[A-Za-z0-9._+-]+)+"  # the characters of Nix's own path literals
_ESCAPE = r'\$\{|[\\"\n\r\t]'
_ESCAPED = {"${": r"\${", "\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
_INT_MAX = 2**63 - 1
_LINE_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Raw:
    """A reference such as `pkgs.jq` or `builtins.fetchurl`: identifiers joined by dots, nothing else."""

    text: str

    def __post_init__(self) -> None:
        if not all(map(_is_identifier, self.text.split("."))):
            raise ValueError(f"not a Nix reference: {self.text!r}")


@dataclass(frozen=True, slots=True)
class Call:
    """A function applied to one argument; `function` is a reference (see Raw), a path, or another call."""

    function: str | Raw | Path | Call
    argument: Value


# Of sequences only lists and tuples; `Sequence` lets a `list[str]` pass the type checker.
Value: TypeAlias = "bool | int | str | Path | Raw | Call | Sequence[Value] | Mapping[str, Value] | None"


def render(value: Value) -> str:
    """`value` as a Nix expression, indented by two spaces, without a newline at the end.

    Raises ValueError for what Nix cannot hold (NUL, lone surrogates, integers beyond 64 bits, relative paths)
    and TypeError for other types, such as floats.
    """
    return _expression(value, "")


def _expression(value: Value, indent: str) -> str:
    """The text of a value whose first line stands anywhere and whose other lines start with `indent`."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, which it is as well
        return "true" if value else "false"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, str):
        return _string(value, indent)
    if isinstance(value, Path):
        return _path(value)
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Call):
        function = Raw(value.function) if isinstance(value.function, str) else value.function
        # Application binds to the left: a call may stand bare as the function, but not as the argument.
        left = _expression(function, indent) if isinstance(function, Call) else _operand(function, indent)
        return f"{left} {_operand(value.argument, indent)}"
    if isinstance(value, list | tuple):
        return _list(value, indent)
    if isinstance(value, Mapping):
        return _attrset(value, indent)
    raise TypeError(f"no Nix for a {type(value).__name__}")


def _operand(value: Value, indent: str) -> str:
    """The text of a value that stands beside others (in a list, as an argument): one term of the grammar."""
    text = _expression(value, indent)
    compound = (
        isinstance(value, Call)
        or (isinstance(value, int) and text.startswith("-"))
        or (isinstance(value, Path) and text.startswith("/. +"))
        or (isinstance(value, str) and _is_text(value))
    )
    return f"({text})" if compound else text


def _integer(value: int) -> str:
    if not -_INT_MAX <= value <= _INT_MAX:
        # The least 64-bit integer has no literal: Nix reads its digits first and negates them later.
        raise ValueError(f"beyond the integers of Nix: {value}")
    return str(int(value))


def _string(value: str, indent: str) -> str:
    """A string in double quotes, or of several lines the sum of a list with one line of text in each.

    The indented strings of Nix are not used: they strip blanks by rules that depend on every other line.
    """
    if not _is_text(value):
        return _quoted(value)
    return 'builtins.concatStringsSep "\\n" ' + _block("[", map(_quoted, value.split("\n")), "]", indent)


def _is_text(value: str) -> bool:
    return "\n" in value.rstrip("\n")


def _quoted(text: str) -> str:
    if "\0" in text:
        raise ValueError("a Nix string cannot hold a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not text that UTF-8 can hold: {text!r}") from error
    return '"' + re.sub(_ESCAPE, lambda match: _ESCAPED[match[0]], text) + '"'


def _path(value: Path) -> str:
    if not value.is_absolute():
        raise ValueError(f"a relative path means another file wherever the text lies: {value}")
    text = str(value)
    return text if re.fullmatch(_PLAIN_PATH, text) else f"/. + {_quoted(text)}"


def _list(values: Iterable[Value], indent: str) -> str:
    inner = indent + "  "
    items = [_operand(value, inner) for value in values]
    line = " ".join(["[", *items, "]"])
    if len(indent) + len(line) <= _LINE_WIDTH and "\n" not in line:
        return line
    return _block("[", items, "]", indent)


def _attrset(values: Mapping[str, Value], indent: str) -> str:
    inner = indent + "  "
    items = [f"{_key(key)} = {_expression(value, inner)};" for key, value in values.items()]
    return _block("{", items, "}", indent) if items else "{ }"


def _block(opening: str, items: Iterable[str], closing: str, indent: str) -> str:
    return "\n".join([opening, *(f"{indent}  {item}" for item in items), indent + closing])


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"an attribute's name is a string, not {type(key).__name__}")
    return key if _is_identifier(key) else _quoted(key)


def _is_identifier(text: str) -> bool:
    return re.fullmatch(_IDENTIFIER, text) is not None and text not in _KEYWORDS
