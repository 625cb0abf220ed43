"""For plugin commands that are written in Python: the machine that they were called for.

#!/usr/bin/env nixbox-python
from nixbox.plugin import sandbox

raise SystemExit(sandbox().run(["make", "test"]))
"""

from __future__ import annotations

import os
from pathlib import Path

from nixbox.errors import ConfigError
from nixbox.session import Sandbox

__all__ = ["Sandbox", "directory", "sandbox"]


def _told(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(
            f"{name} is not set: this is a plugin's command", hint="call it by `nixbox PLUGIN COMMAND`"
        ) from None


def sandbox() -> Sandbox:
    """The machine that this command was called for. Raises ConfigError outside of a plugin's command or hook."""
    from nixbox import report

    return Sandbox(Path(_told("NIXBOX_WORKSPACE")), _told("NIXBOX_NAME"), reporter=report.for_stderr())


def directory() -> Path:
    """The plugin's own directory. Raises ConfigError outside of a plugin's command or hook."""
    return Path(_told("NIXBOX_PLUGIN_DIR"))
