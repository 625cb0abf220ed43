"""Values of Nix as nix/eval/read.nix describes them, and how to read them: every fault at once, none raised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nixbox.config.names import shown
from nixbox.values import dataclass, field

PACKAGE = r"/nixbox-package:([^:]+):"  # the store path of a package, as nix/eval/read.nix makes it up
_MOST_SCRIPT_BYTES = 1 << 20
_MARK = re.compile(r"-nixbox-(package|variable)(?:\.(.*))?$")


@dataclass(frozen=True, slots=True)
class Node:
    """One value of Nix: `kind` is text, path, list, set, plain (a number, bool or null), package, call, function
    or deep (nested without end); `line` and `file` are where its attribute stands.
    """

    kind: str
    value: Any = None
    marks: tuple[str, ...] = ()  # of a text: the store paths in its context
    line: int | None = None
    file: str | None = None

    @property
    def variables(self) -> list[str]:
        """The host's variables that the text was made of."""
        return [match[2] for mark in self.marks if (match := _MARK.search(mark)) and match[1] == "variable"]

    @property
    def files(self) -> list[str]:
        """Store paths that the text holds and that are no marks of ours."""
        return [mark for mark in self.marks if not _MARK.search(mark)]

    @property
    def has_packages(self) -> bool:
        """Whether the text was made of a package's store path."""
        return any((match := _MARK.search(mark)) and match[1] == "package" for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is: its own directory, the workspace (of a plugin: that directory too), and what getEnv saw."""

    directory: Path
    workspace: Path
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    of_plugin: bool = False

    def owns(self, path: str) -> bool:
        """Whether a path is below the file's own directory."""
        return Path(path).is_relative_to(self.directory)


def decode(tree: Any, line: int | None = None, file: str | None = None) -> Node:
    """The description that nix/eval/read.nix gives, as nodes."""
    kind, *rest = tree
    if kind == "list":
        return Node(kind, [decode(entry, line, file) for entry in rest[0]], (), line, file)
    if kind == "set":
        entries = {name: decode(value, at[1] if at else line, at[0] if at else file) for name, at, value in rest[0]}
        return Node(kind, entries, (), line, file)
    if kind == "text":
        return Node(kind, rest[0], tuple(rest[1]), line, file)
    return Node(kind, rest[0] if rest else None, (), line, file)


def merged(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Both lists without doubles; what was no value is a fault already."""
    return [entry for entry in dict.fromkeys([*first, *second]) if entry is not None]


class Reader:
    """Reads values; every fault found on the way is in `faults`, with file, line and field."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.found: list[tuple[int, str]] = []

    def fault(self, node: Node, name: str, message: str) -> None:
        where = Path(node.file) if node.file else None
        if where and where.is_relative_to(self.place.directory):
            where = where.relative_to(self.place.directory)
        place = f"{where}: line {node.line}: " if where else ""
        self.found.append((node.line or 0, f"{place}{name}: {message}" if name else f"{place}{message}"))

    @property
    def faults(self) -> list[str]:
        """All of them, in the order of the lines."""
        return [text for _, text in sorted(self.found, key=lambda fault: fault[0])]

    def wrong(self, node: Node, name: str, accepted: str) -> None:
        """A value of another kind than what is accepted."""
        if node.kind == "call":
            given = f"what the function {shown(node.value)} gives, which takes all of nixpkgs to know"
        elif node.kind == "plain":
            given = {bool: "true or false", type(None): "null"}.get(type(node.value), "a number")
        else:
            words = {"text": "text", "set": "an attribute set", "deep": "sets in sets without end"}
            given = words.get(node.kind, f"a {node.kind}")
        self.fault(node, name, f"must be {accepted}, not {given}")

    def unknown(self, node: Node, name: str, last: str, spellings: Mapping[str, str]) -> None:
        """A field that means nothing; of those that do, and mean the same, the first is shown."""
        from nixbox.config.fields import near  # with pydantic, which takes long to import

        first = {meant: spelling for spelling, meant in reversed(list(spellings.items()))}
        known = [spelling for spelling in spellings if spelling in first.values()]
        self.fault(node, name, "unknown field" + (near(last, spellings) or f" (known here: {', '.join(known)})"))

    def table(
        self, node: Node, name: str, spellings: Mapping[str, str], accepted: str
    ) -> list[tuple[str, str, Node]]:
        """The known entries of a set: field of the TOML, path as written, value."""
        if node.kind != "set":
            self.wrong(node, name, accepted)
            return []
        found = []
        for key, entry in node.value.items():
            if key in spellings:
                found.append((spellings[key], f"{name}.{key}", entry))
            else:
                self.unknown(entry, f"{name}.{key}", key, spellings)
        return found

    def entries(self, node: Node, name: str, accepted: str) -> list[tuple[str, Node]]:
        """The entries of a list, or a single value as the only one where a list is meant."""
        if node.kind == "list":
            return [(f"{name}[{i}]", entry) for i, entry in enumerate(node.value)]
        self.wrong(node, name, accepted)
        return []

    # --- texts -------------------------------------------------------------------------------------------

    def unmarked(self, node: Node, name: str) -> bool:
        """Whether a text is free of what must not be written down; else a fault."""
        if node.variables:
            first = node.variables[0]
            if first == "HOME":
                mend = "write $HOME in scripts and hooks, and `~` at the beginning of a path"
            elif self.place.of_plugin:
                mend = f"a plugin is given none; name it in requires_env, and write ${first} in a script"
            else:
                call = f'env.{first} = builtins.getEnv "{first}"'
                mend = f"its value would be written down; write {call}, and ${first} here"
            self.fault(node, name, f"holds the host's variable {', '.join(node.variables)}: {mend}")
        elif node.files:
            self.fault(node, name, "holds the store path of a file: use builtins.readFile, or the path alone")
        elif node.has_packages:
            self.fault(node, name, "holds the store path of a package, and no nixpkgs is evaluated here")
        return not node.marks

    def plain_text(self, node: Node, name: str) -> str | None:
        if node.kind != "text":
            self.wrong(node, name, "text")
            return None
        return node.value if self.unmarked(node, name) else None

    def plain_texts(self, node: Node, name: str) -> list[str]:
        texts = [self.plain_text(entry, path) for path, entry in self.entries(node, name, "a list of texts")]
        return [text for text in texts if text is not None]

    def flag(self, node: Node, name: str) -> bool | None:
        if node.kind == "plain" and isinstance(node.value, bool):
            return node.value
        self.wrong(node, name, "true or false")
        return None

    def content(self, node: Node, name: str) -> str | None:
        """The text of a file that a path means: one of the plugin's own, or of the config's workspace."""
        path = Path(node.value)
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self.place.workspace):
                self.fault(node, name, f"{path} is outside of {self.place.workspace}, and is not read")
                return None
            if not real.is_file() or real.stat().st_size > _MOST_SCRIPT_BYTES:
                self.fault(node, name, f"{path.name} is no file of at most {_MOST_SCRIPT_BYTES >> 20} MiB")
                return None
            return real.read_bytes().decode()
        except OSError as error:
            self.fault(node, name, f"{path.name} cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            self.fault(node, name, f"{path.name} is not valid UTF-8 text")
        return None

    def number(self, node: Node, name: str) -> int | None:
        if node.kind == "plain" and isinstance(node.value, int) and not isinstance(node.value, bool):
            return node.value
        if node.kind == "text" and re.fullmatch(r"[0-9]{1,9}", node.value):
            return int(node.value) if self.unmarked(node, name) else None
        self.wrong(node, name, "a whole number")
        return None
