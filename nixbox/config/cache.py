"""The checked configuration, kept between commands: reading and checking it anew costs more than a restore.

What is kept is used only when every file that was read has the same bytes, no file has appeared that would be read
instead, and nixbox is the same. It holds no literal value of `env`; those are read from config.toml each time.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from nixbox import paths, trees
from nixbox.config.settings import (
    TEMPLATE_LIMIT_MIB,
    Command,
    EnvEntry,
    Hook,
    Loaded,
    Mount,
    Overrides,
    Published,
    Seed,
    Settings,
    Used,
)
from nixbox.digests import sha256
from nixbox.errors import NixboxError
from nixbox.values import asdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.config.schema import UserSettings
    from nixbox.config.sources import Sources

_MOST = 250  # of a few KiB each


def load(workspace: Path, overrides: Overrides | None = None, sources: Sources | None = None) -> Loaded:
    """As load.load; nothing is kept for a command line that sets the environment. Raises ConfigError."""
    overrides = overrides or Overrides()
    if overrides.env or overrides.env_from_host:
        from nixbox.config import load as loading

        return loading.load(workspace, overrides, sources)
    workspace = workspace.resolve()
    place = f"{workspace}\0{overrides!r}"  # without an environment, that is all that the command line says
    kept = paths.cache_dir() / "config" / f"{sha256(place.encode()).hexdigest()[:24]}.json"
    return _read(kept, workspace) or _fresh(kept, workspace, overrides, sources)


def _fresh(kept: Path, workspace: Path, overrides: Overrides, sources: Sources | None) -> Loaded:
    from nixbox.config import load as loading

    loaded = loading.load(workspace, overrides, sources)
    if not loaded.lasting:
        return loaded
    settings = asdict(loaded.settings)
    settings["env"] = [{"name": entry.name, "from_host": entry.from_host} for entry in loaded.settings.env]
    data = {
        "digest": _digest(loaded),
        "files": [str(path) for path in loaded.files],
        "absent": [str(path) for path in loaded.absent],
        "unserved": loaded.unserved,
        "plugins": [asdict(used) for used in loaded.plugins],
        "settings": settings,
        "origins": loaded.origins,
    }
    with contextlib.suppress(OSError, NixboxError):  # a cache that cannot be written is none
        paths.cache_dir().mkdir(parents=True, exist_ok=True)
        paths.private_dir(kept.parent)
        paths.write_atomic(kept, json.dumps(data, default=str), mode=0o600)
        _bound(kept)
    return loaded


def _bound(written: Path) -> None:
    """Keep what was just written and the newest others, _MOST in all: nothing tells which are of no use any more."""
    others = [entry for entry in os.scandir(written.parent) if entry.name != written.name]
    others.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns, reverse=True)
    for entry in others[_MOST - 1 :]:
        Path(entry).unlink(missing_ok=True)


def _digest(loaded: Loaded) -> str | None:
    """Of all that the checked configuration depends on; None when it must be read anew."""
    digest = sha256()
    try:
        for module in sorted(Path(__file__).parent.glob("*.py")):
            info = module.stat()
            digest.update(f"{module} {info.st_size} {info.st_mtime_ns}\n".encode())
        for path in loaded.files:
            data = path.read_bytes()
            digest.update(f"{path} {len(data)}\n".encode() + data)
        for used in loaded.plugins:
            if not used.directory.is_dir():
                return None
            if used.directory != used.source:  # guests may write there: all of it counts
                digest.update(trees.Tree.read(used.source).digest.encode())
    except (OSError, ValueError):
        return None
    return None if any(path.exists() for path in loaded.absent) else digest.hexdigest()


def _read(kept: Path, workspace: Path) -> Loaded | None:
    try:
        data: dict[str, Any] = json.loads(kept.read_text())
        literals = _literals(workspace) if any(not entry["from_host"] for entry in data["settings"]["env"]) else {}
        loaded = Loaded(
            workspace,
            _settings(data["settings"], literals),
            data["origins"],
            tuple(Path(path) for path in data["files"]),
            tuple(Path(path) for path in data["absent"]),
            tuple(map(_used, data["plugins"])),
            unserved=tuple((origin, name) for origin, name in data["unserved"]),
        )
        return loaded if data["digest"] is not None and data["digest"] == _digest(loaded) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _literals(workspace: Path) -> dict[str, Any]:
    """`[env]` of config.toml. Raises OSError, ValueError."""
    import tomllib

    config = workspace / paths.CONFIG_DIR / paths.CONFIG_FILE
    env: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8")).get("env", {})
    return env


def _used(data: dict[str, Any]) -> Used:
    commands = tuple(Command(**command) for command in data["commands"])
    places = {name: Path(data[name]) for name in ("directory", "source")}
    return Used(**{**data, **places, "commands": commands})


def _settings(values: dict[str, Any], env: dict[str, Any]) -> Settings:
    """The settings from JSON, which has lists for tuples."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    fields = {name: tuples(value) for name, value in values.items()}
    fields["mounts"] = tuple(Mount(**mount) for mount in values["mounts"])
    fields["published"] = tuple(Published(**port) for port in values["published"])
    fields["hooks"] = {event: tuple(Hook(**hook) for hook in hooks) for event, hooks in values["hooks"].items()}
    fields["seeds"] = tuple(Seed(**{**seed, "exclude": tuple(seed["exclude"])}) for seed in values["seeds"])
    fields["env"] = tuple(
        EnvEntry(entry["name"], None if entry["from_host"] else env[entry["name"]], entry["from_host"])
        for entry in values["env"]
    )
    return Settings(**fields)


def template_limit_bytes() -> int:
    """How much of the disk templates may take: `[templates] limit` of the user's settings.toml, else 20 GiB.

    Raises one ConfigError with every fault of that file.
    """
    settings = _user_settings()
    return (TEMPLATE_LIMIT_MIB if settings is None else settings.templates.limit) << 20


def krun_library() -> str | None:
    """`[krun] library` of the user's settings.toml. Raises one ConfigError with every fault of that file."""
    settings = _user_settings()
    return None if settings is None else settings.krun.library


def _user_settings() -> UserSettings | None:
    """The user's settings.toml, which is seldom there."""
    path = paths.user_config_dir() / paths.SETTINGS_FILE
    if not path.exists():
        return None
    from nixbox.config.load import user_settings

    return user_settings(path)
