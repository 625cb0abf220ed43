"""`nixbox plugin new`: a plugin that works, to begin with."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from string import Template

from nixbox import paths
from nixbox.config import names
from nixbox.config.load import RESERVED
from nixbox.errors import ConfigError

_TOML = Template("""\
# A plugin of nixbox: `nixbox plugin reference` shows all that this file may say.
description = "say here in one line what $name is for"

# What the image gets: a list, or one for each base.
[packages]
debian = ["file"]
nixpkgs = ["file"]

# What its tools have to reach, where the user's mode is "filtered".
[network]
domains = []

# On this host, in the workspace. One that fails is told and passed over, unless it is required.
[hooks]
post-up = ['echo "$$NIXBOX_PLUGIN: $$NIXBOX_NAME is up ($$NIXBOX_HOW)"']

# A directory of this host that the guest gets a copy of, on its own disk.
#[[seeds]]
#source = "~/.cache/$name"
#target = "~/.cache/$name"

# A program on this host: nixbox $name hello
[[commands]]
name = "hello"
description = "Say where the guest is."
""")

_HELLO = """\
#!/bin/sh
# Runs on the host, in the workspace. What it is told: NIXBOX_NAME (the machine), NIXBOX_WORKSPACE, NIXBOX_PLUGIN,
# NIXBOX_PLUGIN_DIR. `nixbox` means that machine here. In Python: `#!/usr/bin/env nixbox-python`, and
# `from nixbox.plugin import sandbox`.
set -eu
exec nixbox run -- sh -c 'echo "hello $1 from $(uname -n)"' sh "${1:-you}"
"""

_README = Template("""\
# $name

What it is for, and what it needs of the user.

    plugins = ["$ref"]

| command | what it does |
| --- | --- |
| `nixbox $name hello [WHO]` | says where the guest is |

`./test` tries it in a machine of its own.
""")

_TEST = Template("""\
#!/bin/sh
# Tries the plugin in a machine of its own, which is gone afterwards. Needs what `nixbox up` needs.
set -eu
plugin=$$(cd "$$(dirname "$$0")" && pwd)
work=$$(mktemp -d)
trap 'cd "$$work" && nixbox rm --yes >/dev/null 2>&1; cd / && rm -rf "$$work"' EXIT
mkdir "$$work/.nixbox"
cat >"$$work/.nixbox/config.toml" <<END
name = "try"
plugins = ["$$plugin"]
mounts = []
resources = { vcpus = 1, memory = "320MiB", disk = "1GiB" }
END
cd "$$work"
nixbox up
nixbox run -- file /bin/sh
test "$$(nixbox $name hello world)" = "hello world from try"
echo "$name: all is well"
""")


def place(name: str, workspace: Path | None, directory: Path | None) -> tuple[Path, str]:
    """Where a new plugin goes, and how config.toml names it there. Raises ConfigError."""
    names.check_name(name, "plugin's name")
    if name in RESERVED:
        raise ConfigError(f"`{name}` is nixbox's own command, so no plugin's commands could be called by it")
    if directory is not None:
        path = (directory / name).absolute()
        if workspace is not None and path.is_relative_to(workspace):
            return path, f"./{path.relative_to(workspace)}"
        return path, str(path)
    if workspace is None:
        raise ConfigError("this is no workspace", hint="`nixbox init` makes it one; or say where: --in DIRECTORY")
    return workspace / paths.CONFIG_DIR / "plugins" / name, name


def write(name: str, place: Path, ref: str) -> None:
    """Write the plugin's directory, whole or not at all. Raises ConfigError when there is one, or it cannot be."""
    if os.path.lexists(place):
        raise ConfigError(f"{place} exists already", hint="take another name, or remove it")
    files = {
        "plugin.toml": _TOML.substitute(name=name),
        "README.md": _README.substitute(name=name, ref=ref),
        "commands/hello": _HELLO,
        "test": _TEST.substitute(name=name),
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place.parent))
        try:
            made.chmod(0o755)
            for relative, text in files.items():
                path = made / relative
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
                path.chmod(0o755 if text.startswith("#!") else 0o644)
            made.rename(place)
        except BaseException:
            shutil.rmtree(made)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error.strerror}") from None
