"""Where a plugin is, and whether what is there is still what its user put there.

A plugin's hooks and commands run on the host, and what it mounts is the guest's. One in a directory that guests can
write is therefore used only as it was when it was the user's alone (docs/decisions/017-plugins-are-host-code.md).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nixbox import paths, trees
from nixbox.config import fields, refs
from nixbox.config.names import shown
from nixbox.errors import ConfigError, NixboxError
from nixbox.values import dataclass

TOML = "plugin.toml"
NIX = "default.nix"


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin's directory: `source` is the real one; `directory` is what is read, the same or a copy of it."""

    ref: str
    name: str
    source: Path
    directory: Path

    @property
    def file(self) -> Path:
        """What defines it."""
        toml = self.directory / TOML
        return toml if toml.is_file() else self.directory / NIX


class PluginFault(Exception):
    """Why a plugin cannot be used, in words."""


def homes(workspace: Path) -> list[Path]:
    """Where plugins are looked for by name: nixbox's own, the user's, the workspace's."""
    own = [paths.plugins_dir(), paths.user_config_dir() / "plugins"]
    return [*own, workspace / paths.CONFIG_DIR / "plugins"]


def is_plugin(directory: Path) -> bool:
    """Whether a directory is one of a plugin."""
    return (directory / TOML).is_file() or (directory / NIX).is_file()


def named(home: Path) -> list[Path]:
    """The directories of the plugins in a home, by name."""
    try:
        return sorted(place for place in home.iterdir() if is_plugin(place))
    except OSError:
        return []


def find(ref: str, workspace: Path, pinned: Mapping[str, Path]) -> Found:
    """The plugin that a well-formed reference means. Raises PluginFault."""
    if refs.is_github(ref):
        if ref not in pinned:
            raise PluginFault(f"{shown(ref, most=100)} is not fetched yet; `nixbox up` does that")
        place = pinned[ref]
        if not is_plugin(place):
            raise PluginFault(f"{shown(ref)} has no {TOML} and no {NIX} there")
        return Found(ref, refs.parse(ref).name, place, place)
    if not fields.is_plugin_path(ref):
        for place in (home / ref for home in homes(workspace)):
            if is_plugin(place):
                return Found(ref, ref, place, place)
        known = [place.name for home in homes(workspace) for place in named(home)]
        where = " and ".join(str(home) for home in homes(workspace)[:2])
        raise PluginFault(f"no plugin {shown(ref)}{fields.near(ref, known)}: looked for it in {where}")
    written = workspace / _expand(ref)
    place = written.resolve()
    if not is_plugin(place):
        file = written / TOML
        shown_file = file.relative_to(workspace) if file.is_relative_to(workspace) else file
        raise PluginFault(f"no plugin {shown(ref)}: {shown_file} is not there")
    return Found(ref, place.name, place, _guarded(place, workspace))


def _expand(ref: str) -> Path:
    try:
        return Path(ref).expanduser()
    except RuntimeError:  # without a home directory `~` stays as it is, and the file is not found
        return Path(ref)


def is_hidden(source: Path, workspace: Path) -> bool:
    """Whether no guest ever sees a directory: nixbox closes these in every mount (mounts/places.py)."""
    return any(source.is_relative_to(place) for place in (workspace / paths.CONFIG_DIR, paths.user_config_dir()))


def _guarded(source: Path, workspace: Path) -> Path:
    """From where to read a plugin whose directory guests may be able to write. Raises PluginFault."""
    if is_hidden(source, workspace):
        return source
    try:
        tree = trees.Tree.read(source)
    except (OSError, ValueError) as error:
        raise PluginFault(f"{source} cannot be used as a plugin: {error}") from None
    known = paths.known()
    if known.plugins.get(str(source)) != tree.digest:
        if known.shared(source):
            word = "changed" if str(source) in known.plugins else "new"
            raise PluginFault(
                f"{source} is {word}, and guests can write it: its hooks and commands would run on this host; look "
                "at its files, and if they are yours: nixbox trust"
            )
        _remember(source, tree)
    return _copy(tree)


def _copies() -> Path:
    return paths.state_dir() / "plugins"


def _copy(tree: trees.Tree) -> Path:
    """What was looked at, where nobody else can change it."""
    copy = paths.private_dir(_copies()) / tree.digest[:32]
    if not copy.is_dir():
        tree.write(copy)
    return copy


def _remember(source: Path, tree: trees.Tree) -> None:
    old = paths.known().plugins.get(str(source))
    paths.remember_plugin(source, tree.digest)
    if old is not None and old not in paths.known().plugins.values():
        paths.remove_tree(_copies() / old[:32])


def trust(workspace: Path) -> list[Path]:
    """Take the plugins of a workspace that are named by path as they are now; returns those that were not known so.

    Raises ConfigError while a guest can change one.
    """
    trusted = []
    for source in by_path(workspace):
        if is_hidden(source, workspace):
            continue
        try:
            tree = trees.Tree.read(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} cannot be used as a plugin: {error}") from None
        known = paths.known()
        if known.plugins.get(str(source)) == tree.digest:
            continue
        if known.served(source):
            raise ConfigError(
                f"a guest that runs can write {source}", hint="`nixbox down` its machine first, and look again"
            )
        _remember(source, tree)
        _copy(tree)
        trusted.append(source)
    return trusted


def by_path(workspace: Path) -> Iterator[Path]:
    """The real directories of the plugins that a workspace's config.toml names by path."""
    try:
        data = tomllib.loads((workspace / paths.CONFIG_DIR / paths.CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    refs = data.get("plugins", [])
    for ref in refs if isinstance(refs, list) else []:
        if fields.is_plugin_ref(ref) and fields.is_plugin_path(ref):
            source = (workspace / _expand(ref)).resolve()
            if is_plugin(source):
                yield source


def evaluated(evaluate: Callable[[Path], Mapping[str, Any]], path: Path) -> Mapping[str, Any]:
    """What Nix makes of a file. Raises PluginFault with its words, indented below the first."""
    try:
        return evaluate(path)
    except NixboxError as error:
        raise PluginFault("\n    ".join([error.message, *getattr(error, "faults", ())])) from None
