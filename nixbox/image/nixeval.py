"""Plugins and configs in Nix's language, as the bash nixbox had them: `default.nix` and `config.nix`.

    plugin(Path("plugins/aws/default.nix"))          the shape of plugin.toml
    config(Path(".nixbox/config.nix"), os.environ)   the shape of config.toml

Nix evaluates the file in a world that nix/eval/read.nix makes, and nixbox.image.nixshape turns what comes out into
that shape. Whose file it is, is not known: evaluating one reads its own directory and nothing else, see
docs/decisions/020-nix-plugins-and-configs.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nixbox import paths, run
from nixbox.errors import ConfigError, TimeoutExpired
from nixbox.image import nixshape
from nixbox.image.nixvalue import Node, Place, decode
from nixbox.plan import nixexpr
from nixbox.report import harmless
from nixbox.values import dataclass

_TIMEOUT_S = 20.0
_HEAP_BYTES = 1 << 30
_MOST_TEXT_BYTES = 2 << 20  # of files in which identifiers are looked for, all together
# Where nothing is written and nothing can be built (Nix manual, "Dummy Store"; since Nix 2.4).
_NO_STORE = "dummy://"
_OPTIONS: Mapping[str, str] = {
    "restrict-eval": "true",
    "allowed-uris": "",
    "nix-path": "",
    "allow-import-from-derivation": "false",
    "allow-unsafe-native-code-during-evaluation": "false",
    "experimental-features": "nix-command",
    "substituters": "",
}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_'-]*")
_NAMED_PATH = re.compile(r"(?<![\w./])\.{1,2}(?:/[\w.+-]+)+")


def plugin(path: Path) -> dict[str, Any]:
    """A plugin's `default.nix` in the shape of plugin.toml, ready for schema.validate(Plugin, …).

    Executables in `commands/` beside it are its commands. Raises ConfigError with the place of what Nix refuses, or
    with every field that means nothing here; HostError without Nix.
    """
    directory = path.parent.resolve()
    # `~` in a plugin's mount is the user's home, and where that is, is not the plugin's to know.
    place = Place(directory, directory, {"HOME": "~"}, of_plugin=True)
    return _shaped(path.name, place, nixshape.plugin)


def config(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """A `config.nix` in the shape of config.toml, ready for schema.validate(Config, …).

    `environ` is what builtins.getEnv sees. A value of `env` that is such a call comes out as { from_host = NAME },
    and a value from there anywhere else is a fault: it would be written down. Raises as `plugin` does.
    """
    directory = path.parent.resolve()
    workspace = directory.parent if directory.name == paths.CONFIG_DIR else directory
    # What is not UTF-8 cannot be in a Nix expression; nothing but equality is asked of it.
    known = {
        name: value.encode(errors="replace").decode(errors="replace")
        for name, value in environ.items()
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    }
    return _shaped(path.name, Place(directory, workspace, known), nixshape.config)


def _shaped(name: str, place: Place, shape: nixshape.Shape) -> dict[str, Any]:
    node = _evaluate(name, place)
    data, faults = shape(node, place)
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(f"{name} has {count}", hint=nixshape.hint(place), faults=faults)
    return data


# --- asking Nix ------------------------------------------------------------------------------------------


def _evaluate(name: str, place: Place) -> Node:
    """What the file comes to. Raises ConfigError with Nix's own words and the place they are about."""
    file = place.directory / name
    names = sorted(_identifiers(file, place.directory))
    try:
        expression = _expression(file, place, names)
    except ValueError as error:  # of the renderer
        raise ConfigError(f"{file} cannot be given to Nix: {error}") from None
    argv = ["nix", "eval", "--json", "--read-only", "--show-trace", "--file", "-"]
    for option, value in _OPTIONS.items():
        argv += ["--option", option, value]
    argv += ["-I", f"nixbox-file={place.directory}"]
    env = {
        "NIX_PATH": "",
        "NIX_CONFIG": "",
        "NIX_REMOTE": _NO_STORE,
        "GC_MAXIMUM_HEAP_SIZE": str(_HEAP_BYTES),  # of the collector that Nix uses (bdw-gc, README.environment)
    }
    try:
        done = run.run(argv, timeout_s=_TIMEOUT_S, check=False, stdin=expression, env=env)
    except TimeoutExpired:
        raise ConfigError(
            f"{name} cannot be evaluated",
            hint="look for a recursion that does not end",
            faults=[f"{name}: Nix was still evaluating it after {_TIMEOUT_S:g} s"],
        ) from None
    if done.code != 0:
        raise _failure(name, place, done)
    return decode(json.loads(done.stdout))


def _expression(file: Path, place: Place, names: list[str]) -> str:
    reader = (paths.nix_dir() / "eval/read.nix").read_text(encoding="utf-8")
    machine = os.uname().machine
    argument: dict[str, nixexpr.Value] = {
        "file": file,
        "directory": str(place.directory),
        "names": names,
        "variables": dict(place.environ),
        "system": f"{'aarch64' if machine == 'arm64' else machine}-linux",  # the guest's
    }
    return f"({reader}) {nixexpr.render(argument)}\n"


def _identifiers(file: Path, directory: Path) -> set[str]:
    """Every word that can name an attribute of `pkgs`, in the file, its neighbours and what they name by path."""
    seen: set[Path] = set()
    found: set[str] = set()
    left = _MOST_TEXT_BYTES
    todo = [file, *sorted(directory.glob("*.nix"))]
    while todo:
        path = todo.pop(0)
        path = path / "default.nix" if path.is_dir() else path
        try:
            real = path.resolve(strict=True)
            if real in seen or not real.is_relative_to(directory) or not real.is_file():
                continue
            seen.add(real)
            size = real.stat().st_size
            if size > left:
                continue
            left -= size
            text = real.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found.update(_IDENTIFIER.findall(text))
        todo += [real.parent / match for match in _NAMED_PATH.findall(text)]
    return {word for word in found if not word.startswith("__")}


# --- what Nix said ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """An error of Nix: its words, and where it is (a file, line, column) as far as it says so."""

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None


_AT = re.compile(r"\bat (/.+?):(\d+):(\d+)(?=:?$|[ :,])")
_TRACED = re.compile(r"^trace: nixbox-at (.*)$")


def understand(stderr: str, directory: Path) -> Said:
    """Find the error in what Nix printed, and the nearest place in a file below `directory`.

    Nix 2.8 prints the error, its place, and the trace from the inside out. Newer ones (seen with 2.26) print the
    trace from the outside in and the error last; "error:" is alone on the first line. What `trace` said comes before.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*error: ", line)]
    if not starts:
        return Said(stderr.strip()[-500:] or "Nix says nothing")
    start = starts[-1]
    words = [lines[start].partition("error: ")[2]]
    for line in lines[start + 1 :]:
        if re.match(r"\s*(at /.+:\d+:\d+:?|at «.*|… .*|\(use .*)$", line):
            break
        words.append(line.strip())
    more = next((x.strip() for x in lines[start + 1 :] if re.match(r"\s*Did you mean .*\?$", x)), None)
    if more and more not in words:
        words += [more]
    message = "\n".join(words).strip()
    inside = str(directory) + "/"
    candidates = [message, *lines[start + 1 :], *reversed(lines[:start])]
    for line in candidates:
        for file, row, column in _AT.findall(line):
            if file.startswith(inside):
                return Said(message, file, int(row), int(column))
    traced = [match[1] for line in lines if (match := _TRACED.match(line))]
    return _last_field(message, traced[-1]) if traced else Said(message)


def _last_field(message: str, traced: str) -> Said:
    """The error of an evaluation that ended without a place, at the field that it had begun with."""
    try:
        field, *place = json.loads(traced)
        file, line = place or (None, None)
        return Said(f"{message} (in {field})", file, line)
    except (ValueError, TypeError):  # a file can trace, too
        return Said(message)


def _failure(name: str, place: Place, done: run.Completed) -> ConfigError:
    said = understand(done.stderr, place.directory)
    message = said.message.replace(f"{place.directory}/", "./")
    for secret in _secrets(place):
        message = message.replace(secret, "(hidden)")
    lines = harmless(message, "\n").splitlines()
    message = "\n".join(line[:300] for line in lines[:12])
    if done.code < 0 or "error:" not in done.stderr:
        message += f" (nix ended with {done.code})"
    where = name
    if said.file is not None:
        where = str(Path(said.file).relative_to(place.directory)) if place.owns(said.file) else said.file
    if said.line is not None:
        where += f": line {said.line}"
    if said.column is not None:
        where += f", column {said.column}"
    hint = "mend the file; Nix's language is described at https://nix.dev/manual/nix/latest/language"
    if "restricted mode" in message:
        hint = f"only what lies beside {name} can be read: put a copy of what it needs there"
    elif "is not available here" in message:
        hint = "write down what it would give: packages by their attributes in `pkgs`, texts as files beside it"
    elif "out of memory" in message.lower():
        hint = "look for a value that grows without end"
    return ConfigError(f"{name} cannot be evaluated", hint=hint, faults=[f"{where}: {message}"])


def _secrets(place: Place) -> Iterator[str]:
    """Values that an error may repeat: newer versions of Nix show the value that they did not expect."""
    if not place.of_plugin:
        values = {value for name, value in place.environ.items() if name not in ("HOME", "USER", "PWD", "LANG")}
        yield from sorted((value for value in values if len(value) >= 6), key=len, reverse=True)
