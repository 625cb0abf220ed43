"""Which machine of a workspace is meant where none is named."""

from __future__ import annotations

from pathlib import Path

from nixbox import paths
from nixbox.config import names


def default_machine(workspace: Path) -> str:
    """The name of a workspace's default machine, without reading more of the config than that.

    A config that cannot be read or names something impossible is loaded in full, which raises ConfigError.
    """
    import tomllib

    file = workspace / paths.CONFIG_DIR / paths.CONFIG_FILE
    try:
        name = tomllib.loads(file.read_text(encoding="utf-8")).get("name", names.default_name(workspace))
    except (OSError, ValueError):
        name = None
    if isinstance(name, str) and names.is_name(name):
        return name
    from nixbox.loading import load

    return load(workspace).settings.name


def meant(workspace: Path) -> str:
    """The machine that a hook or a plugin's command which called us works for, else the default one."""
    from nixbox.session.hooks import called_for

    name = called_for(workspace)
    return name if name is not None and names.is_name(name) else default_machine(workspace)
