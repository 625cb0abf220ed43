"""What it takes more than reading files for, to read a configuration; whoever can do that hands it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nixbox.errors import ConfigError
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _nothing_pinned(refs: Sequence[str]) -> Mapping[str, Path]:
    raise ConfigError(f"{refs[0]} has to be fetched first", hint="`nixbox up` does that")


def _no_nix(path: Path) -> Mapping[str, Any]:
    raise ConfigError(f"{path} has to be evaluated by Nix", hint="`nixbox up` does that")


@dataclass(frozen=True, slots=True)
class Sources:
    """The directories of plugins from GitHub, and what Nix makes of its files.

    `pinned` gives the directories of plugins from GitHub, `plugin` and `config` what Nix makes of a file, in the
    shape of plugin.toml and config.toml. Each may raise NixboxError.
    """

    pinned: Callable[[Sequence[str]], Mapping[str, Path]] = _nothing_pinned
    plugin: Callable[[Path], Mapping[str, Any]] = _no_nix
    config: Callable[[Path], Mapping[str, Any]] = _no_nix
