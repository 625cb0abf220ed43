"""`nixbox update`: what the lock pins moves on, and what moved is shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nixbox.cli.common import Json, print_json, reporter
from nixbox.config.names import shown
from nixbox.errors import ConfigError, NixboxError


class _Named(Exception):
    """The config was read as far as was wanted."""


def references(workspace: Path) -> list[str]:
    """The plugins from GitHub that a workspace's config names, as written.

    Raises ConfigError with every fault of a config that names none.
    """
    import dataclasses

    from nixbox import loading
    from nixbox.config import load

    found: list[str] = []

    def collect(refs: Sequence[str]) -> dict[str, Path]:
        found.extend(refs)
        raise _Named  # what is pinned now may be what cannot be had, and is to be moved

    with contextlib.suppress(_Named):
        load.load(workspace, sources=dataclasses.replace(loading.sources(workspace), pinned=collect))
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
    """The pinned plugins of the workspace, for shell completion."""
    from nixbox import paths
    from nixbox.image import pins

    try:
        known = pins.read(paths.find_workspace(Path.cwd()))
    except NixboxError:
        return []
    return sorted({pin.place.name for pin in known.values() if pin.place.name.startswith(incomplete)})


def update(
    plugins: Annotated[
        list[str] | None,
        typer.Argument(
            help="Plugins from GitHub; default: all.", metavar="[PLUGIN…]", autocompletion=complete_pinned
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would move.")] = False,
    as_json: Json = False,
) -> None:
    """Move plugins from GitHub to what their branch or tag is now, and show what changed."""
    from dataclasses import asdict

    from nixbox import paths
    from nixbox.image import pins

    workspace = paths.find_workspace(Path.cwd())
    refs = references(workspace)
    chosen = choose(plugins, refs) if plugins else None
    changes = pins.update(workspace, refs, reporter(), chosen=chosen, dry_run=dry_run)
    reporter().done()
    if as_json:
        print_json([asdict(change) for change in changes])
        return
    for change in changes:
        print(change)
    if not changes:
        print("nothing to update", file=sys.stderr)
