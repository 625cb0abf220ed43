"""`nixbox update`: what the lock pins moves on, and what moved is shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nixbox.cli.common import print_json, reporter, sandbox
from nixbox.cli.options import Json
from nixbox.config.names import shown
from nixbox.errors import ConfigError, NixboxError

if TYPE_CHECKING:
    from nixbox.image.update import Move

BASES = ("nixpkgs", "debian")


class _Named(Exception):
    """The config was read as far as was wanted."""


def references(workspace: Path) -> list[str]:
    """The plugins from GitHub that a workspace's config names, as written.

    Raises ConfigError with every fault of a config that names none.
    """
    from nixbox import loading
    from nixbox.config import load
    from nixbox.values import replace

    found: list[str] = []

    def collect(refs: Sequence[str]) -> dict[str, Path]:
        found.extend(refs)
        raise _Named  # what is pinned now may be what cannot be had, and is to be moved

    with contextlib.suppress(_Named):
        load.load(workspace, sources=replace(loading.sources(workspace), pinned=collect))
    return found


def choose(words: Sequence[str], refs: Sequence[str]) -> list[str]:
    """Those of `refs` that the words of a command line mean: as written, without `@REF` or `github:`, or the name.

    Raises ConfigError naming each word that means none.
    """
    from nixbox.config.refs import parse

    by_word: dict[str, list[str]] = {}
    for ref in refs:
        place = parse(ref)
        short = ref.partition("@")[0]
        for word in {ref, short, short.removeprefix("github:"), place.name}:
            by_word.setdefault(word, []).append(ref)
    unknown = ", ".join(shown(word, most=100) for word in words if word not in by_word)
    if unknown:
        hint = f"the config pins {', '.join(refs)}" if refs else "the config names no plugin from GitHub"
        raise ConfigError(f"not pinned from GitHub: {unknown}", hint=hint)
    chosen = [ref for word in words for ref in by_word[word]]
    return list(dict.fromkeys(chosen))


def complete_pinned(incomplete: str) -> list[str]:
    """The bases and the pinned plugins of the workspace, for shell completion."""
    from nixbox import paths
    from nixbox.image import pins

    try:
        known = pins.read(paths.find_workspace(Path.cwd()))
    except NixboxError:
        return []
    return sorted(name for name in {*BASES, *(p.place.name for p in known.values())} if name.startswith(incomplete))


def update(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="nixpkgs or debian, whichever the image is made of, and plugins from GitHub; default: all.",
            metavar="[nixpkgs|debian|PLUGIN…]",
            autocompletion=complete_pinned,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would move.")] = False,
    as_json: Json = False,
) -> None:
    """Move what the lock pins to what there is now, and show what changed: packages, and plugins from GitHub."""
    from nixbox import paths
    from nixbox.image import pins
    from nixbox.values import asdict

    workspace = paths.find_workspace(Path.cwd())
    words = list(dict.fromkeys(names or ()))
    base = [word for word in words if word in BASES]
    plugins = [word for word in words if word not in BASES]
    changes: list[pins.Change] = []
    if plugins or not words:
        refs = references(workspace)
        chosen = choose(plugins, refs) if plugins else None
        changes = pins.update(workspace, refs, reporter(), chosen=chosen, dry_run=dry_run)
    move = _update_base(workspace, base, dry_run) if base or not words else None
    reporter().done()
    if as_json:
        print_json([asdict(change) for change in changes] + ([move.as_json()] if move else []))
    else:
        for line in [*map(str, changes), *(move.lines() if move else ())]:
            print(line)
    if not changes and not move:
        if not as_json:
            print("nothing to update", file=sys.stderr)
    elif not dry_run:
        _warn_running(workspace)


def _update_base(workspace: Path, named: Sequence[str], dry_run: bool) -> Move | None:
    """Move the packages of the image, those of a base that is `named` or, if it is locked, of whichever it is."""
    from nixbox.image import update as moving

    if not named and not moving.is_locked(workspace):
        return None
    box = sandbox()
    loaded = box.load()
    settings = loaded.settings
    if other := [word for word in named if word != settings.base]:
        raise ConfigError(
            f"there is no {other[0]} to update: the image is made of {settings.base}",
            hint=f'`nixbox update {settings.base}`; or base = "{other[0]}" in config.toml',
        )
    mirrors = settings.debian_mirror, settings.debian_security_mirror
    return moving.base(workspace, box.plan(loaded).image, *mirrors, box.report, dry_run=dry_run)


def _warn_running(workspace: Path) -> None:
    """Say which machines go on with what was before."""
    from nixbox.machine.record import all_machines

    for machine in all_machines(workspace):
        if machine.alive():
            again = f"nixbox down {machine.name}; nixbox up {machine.name}"
            print(f"note: `{machine.name}` is running on the old image: {again}", file=sys.stderr)
