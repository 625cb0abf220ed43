"""The shape of the code: imports go down, one module starts processes, plans are pure, modules stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nixbox

PACKAGE = Path(nixbox.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("_nix", "_plugins")
}
# A unit is a directory of nixbox/, or a module beside them. Lower numbers know nothing of higher ones.
RANKS = {
    "__main__": 8,
    "cli": 7,
    "plugin": 7,
    "session": 6,
    "view": 6,
    "doctor": 6,
    "network": 5,
    "loading": 5,
    "image": 4,
    "machine": 4,
    "guest": 4,
    "mounts": 4,
    "plan": 3,
    "config": 2,
    "report": 1,
    "programs": 2,
    "run": 1,
    "forkserver": 1,
    "jails": 1,
    "paths": 1,
    "errors": 0,
    "linux": 0,
    "locks": 0,
    "ed25519": 0,
    "sparse": 0,
    "trees": 0,
    "light": -1,  # less of the standard library
    "digests": -1,  # a way to hash
    "values": -1,  # a way to write classes
}
STARTERS = {"subprocess", "multiprocessing", "pty", "sh", "_posixsubprocess", "concurrent"}
STARTING_CALLS = ("exec", "fork", "spawn", "posix_spawn", "system", "popen")
IMPURE = {"os", "socket", "time", "datetime", "random", "secrets", "shutil", "tempfile", "platform", "pwd"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, as written
    line: int
    typing_only: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a module, those inside functions and under TYPE_CHECKING included."""

    def walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno, typing_only)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "relative imports are not used here"
                for alias in names:
                    yield Import(f"{module}.{alias.name}", node.lineno, typing_only)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
                for statement in body:
                    yield from walk(statement, True)
                for statement in orelse:
                    yield from walk(statement, typing_only)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, typing_only)

    yield from walk(ast.parse(source), False)


def unit(module: str) -> str:
    """`image.apt` -> `image`; the package itself is called `__init__`."""
    return module.split(".")[0]


def direction_faults(sources: dict[str, str]) -> list[str]:
    faults = []
    for name, source in sources.items():
        here = unit(name)
        for found in imports(source):
            first, _, rest = found.module.partition(".")
            if first != "nixbox" or not rest:
                continue
            there = unit(rest)
            where = f"{name}:{found.line} imports {found.module}"
            if there not in RANKS:
                # Something that the package itself defines, such as nixbox.__version__.
                if there not in ("__version__", "Sandbox"):
                    faults.append(f"{where}: what is that?")
            elif here == "__init__":
                if there != "session":
                    faults.append(f"{where}: the package only hands out the session")
            elif here not in RANKS:
                faults.append(f"{name} is in no layer")
            elif there != here and RANKS[there] >= RANKS[here]:
                faults.append(f"{where}: upwards or sideways")
            elif (here, there) == ("plan", "config") and not found.typing_only:
                faults.append(f"{where}: a plan is made of values; it needs no models at run time")
    return faults


def process_faults(sources: dict[str, str]) -> list[str]:
    faults = []
    for name, source in sources.items():
        # The guard is a program of its own, and namespaces are entered by a child.
        if name in ("run", "forkserver", "network.guard", "network.namespace"):
            continue
        for found in imports(source):
            parts = found.module.split(".")
            if parts[0] in STARTERS or (parts[0] == "os" and parts[-1].startswith(STARTING_CALLS)):
                faults.append(f"{name}:{found.line} imports {found.module}")
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr.startswith(STARTING_CALLS):
                    faults.append(f"{name}:{node.lineno} uses os.{attr}")
    return faults


def test_every_module_has_a_layer() -> None:
    units = {unit(name) for name in SOURCES} - {"__init__"}
    assert units <= set(RANKS)
    assert {"cli", "session", "image", "machine", "guest", "plan", "config"} <= units


def test_imports_go_down() -> None:
    assert direction_faults(SOURCES) == []


def test_only_run_starts_processes() -> None:
    assert process_faults(SOURCES) == []
    assert process_faults({"other": SOURCES["run"]}) != []  # the same text anywhere else would be found


def test_plans_are_pure() -> None:
    faults = [
        f"{name}:{found.line} imports {found.module}"
        for name, source in SOURCES.items()
        if unit(name) == "plan"
        for found in imports(source)
        if found.module.split(".")[0] in IMPURE | STARTERS
    ]
    assert faults == []


def test_no_module_is_long() -> None:
    assert {name: len(text.splitlines()) for name, text in SOURCES.items() if len(text.splitlines()) > 600} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("image.apt", "from nixbox.machine import record"),
        ("machine.qemu", "def f():\n    from nixbox.image import store"),
        ("guest.ssh", "import nixbox.session"),
        ("plan.resolve", "from nixbox.config.load import Loaded"),
        ("config.load", "from nixbox.plan import model"),
        ("errors", "from nixbox import paths"),
        ("view", "from nixbox import session"),
        ("session", "from nixbox.cli import app"),
        ("run", "if TYPE_CHECKING:\n    from nixbox.image.lock import Lock"),
        ("novel", "from nixbox import errors"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert len(direction_faults({name: source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "def f():\n    from subprocess import Popen",
        "import os\nos.execvp('a', ['a'])",
        "import os\nstart = os.fork",
        "from os import posix_spawn",
        "import os\nos.system('a')",
    ],
)
def test_a_process_started_elsewhere_is_found(source: str) -> None:
    assert process_faults({"image.apt": source}) != []
