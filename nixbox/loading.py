"""The configuration with all that it takes to read it: plugins from GitHub, and files in Nix's language."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nixbox.config import cache
from nixbox.report import Reporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.config.settings import Loaded, Overrides
    from nixbox.config.sources import Sources


def load(
    workspace: Path,
    overrides: Overrides | None = None,
    reporter: Reporter | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    locked: bool = False,
    fetch: bool = True,
) -> Loaded:
    """The merged, validated configuration of a workspace; what is pinned and not here is fetched if `fetch` is set.

    `environ` is what a config in Nix's language sees, `locked` forbids new pins. Raises ConfigError with every fault.
    """
    return cache.load(workspace, overrides, sources(workspace, reporter, environ, locked=locked, fetch=fetch))


def sources(
    workspace: Path,
    reporter: Reporter | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    locked: bool = False,
    fetch: bool = True,
) -> Sources:
    """What serves plugins from GitHub and files in Nix's language."""
    from nixbox.config.sources import Sources

    def pinned(refs: Sequence[str]) -> Mapping[str, Path]:
        from nixbox.image import pins

        if not fetch:
            return pins.present(workspace, refs)
        return pins.ensure(workspace, refs, reporter or Reporter(), locked=locked)

    def plugin(path: Path) -> Mapping[str, Any]:
        from nixbox.image import nixeval

        return nixeval.plugin(path)

    def config(path: Path) -> Mapping[str, Any]:
        from nixbox.image import nixeval

        return nixeval.config(path, os.environ if environ is None else environ)

    return Sources(pinned, plugin, config)
