"""Which machine of a workspace is meant where none is named."""

from __future__ import annotations

import re
from pathlib import Path

from nixbox import paths
from nixbox.config import names


def _plainly(text: str, default: str) -> str | None:
    """The name that a config says in a line of its own, or `default` where none does; None where TOML must be read.

    To import the reader of TOML is a tenth of `nixbox run`.
    """
    for line in text.split("\n"):
        line = line.strip()
        if line.startswith("["):  # what follows is a table's
            return default
        found = re.fullmatch(r'name\s*=\s*"([^"\\]*)"\s*(#.*)?', line)
        if found:
            return found[1]
        if (line.startswith(("name", '"', "'")) and "=" in line) or '"""' in line or "'''" in line:
            return None
    return default


def _read(file: Path, workspace: Path) -> object:
    """The name that a config says, or what it is without one. Raises OSError, ValueError."""
    text, default = file.read_text(encoding="utf-8"), names.default_name(workspace)
    plain = _plainly(text, default)
    if plain is not None:
        return plain
    import tomllib

    return tomllib.loads(text).get("name", default)


def default_machine(workspace: Path) -> str:
    """The name of a workspace's default machine, without reading more of the config than that.

    A config that cannot be read or names something impossible is loaded in full, which raises ConfigError.
    """
    file = workspace / paths.CONFIG_DIR / paths.CONFIG_FILE
    try:
        name = _read(file, workspace)
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
