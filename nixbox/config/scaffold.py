"""`nixbox init`: a commented `.nixbox/config.toml` that shows every field, and the `.gitignore` beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from string import Template

from nixbox import paths
from nixbox.config import names, schema
from nixbox.errors import ConfigError

# `#word` is an option to uncomment, `# word` is prose. Defaults are filled in from the models.
_CONFIG = Template("""\
# nixbox: the sandbox of this directory. Remove a `#` to change a default; `nixbox config` shows the result.
# Lists add to those of plugins and the profile; every other value here wins over theirs.

# The machine's name: letters, digits and hyphens. By default the directory's name.
${name}

# What the image is made from: "debian" or "nixpkgs".
${base}

# A profile bakes packages into the image and sets a fresh machine up: .nixbox/profiles/dev.toml,
# or profiles/dev.toml in ~/.config/nixbox. By default there is none.
#profile = "dev"

# Plugins by name, or by directory: "./tools/my-plugin".
#plugins = []

# Packages in the image; or for each base: packages = { debian = ["jq"], nixpkgs = ["jq"] }
#packages = []

# Shell scripts that run in the guest on every `nixbox up`, in order.
#scripts = []

# Ports of the guest that this host's loopback has as well: [{ host = 8080, guest = 80 }]
#ports = []

[resources]
#vcpus = ${vcpus}
#memory = "${memory}"
# The disk for everything that changes in the guest; sparse, so that only what is used takes space.
#disk = "${disk}"
# true: memory that the guest frees goes back to the host, and the machine shares none with others like it.
#return_memory = ${return_memory}

# Directories of this host that the guest sees. What is written here replaces the default below.
#[[mounts]]
#source = "${mount_source}"
#target = "${mount_target}"
#readonly = ${mount_readonly}

[network]
# "off": nothing leaves the guest. "filtered": only the domains below with their subdomains, at these TCP ports
# (80 and 443 if there are none). "open": the internet.
#mode = "${mode}"
#domains = []
#ports = []
# true: private and link-local addresses too. This host's own loopback is never reached.
#allow_private = ${allow_private}

# Variables for the guest: a literal, or a variable of this host. This file is committed, so name secrets
# by from_host.
[env]
#EDITOR = "vi"
#API_TOKEN = { from_host = "API_TOKEN" }

# Commands that run on this host, in the workspace, around `nixbox up` and `nixbox down`.
[hooks]
#pre-up = []
#post-up = []
#pre-down = []
#post-down = []

[debian]
# By default the mirrors of this host's apt sources.
#mirror = "http://mirror.example/debian"
#security_mirror = "http://mirror.example/debian-security"
#suite = "${suite}"

[machine]
# "auto" takes the best of "kvm", "hvf" and "tcg" that works here (`nixbox doctor` says which).
#accelerator = "${accelerator}"
""")

_GITIGNORE = """\
# What belongs in git; the rest (machines, their disks and keys) does not.
/*
!/.gitignore
!/config.toml
!/nixbox.lock
!/profiles/
"""


def init(directory: Path, *, name: str | None = None, base: str = "debian") -> Path:
    """Make `directory` a workspace and return the path of its new config.toml.

    A `.gitignore` that is there already stays as it is. Raises ConfigError for a bad name or base, when there
    is a config.toml already, and when a file cannot be written.
    """
    text = config_text(name=name, base=base)
    place = directory / paths.CONFIG_DIR
    config, ignore = place / paths.CONFIG_FILE, place / ".gitignore"
    try:
        new = not _is_there(place)
        place.mkdir(parents=True, exist_ok=True)
        if _is_there(config):
            raise ConfigError(f"{config} exists already", hint="edit it, or remove it to start anew")
        if not _is_there(ignore):
            _write(ignore, _GITIGNORE)
        _write(config, text)  # last: it is what makes a workspace
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or place}: {error.strerror}") from error
    if new and not paths.known().served(directory.resolve()):  # else a guest may have had its hand in it
        paths.remember(directory.resolve())
    return config


def config_text(*, name: str | None = None, base: str = "debian") -> str:
    """The commented config.toml; raises ConfigError for a bad name or base."""
    if name is not None:
        names.check_name(name, "machine name")
    if base not in schema.BASES:
        raise ConfigError(
            f"{names.shown(base)} is not a base{schema.near(base, schema.BASES)}",
            hint=f"the bases are {' and '.join(schema.BASES)}",
        )
    default = schema.Config()
    mount = default.mounts[0]
    return _CONFIG.substitute(
        name='#name = "my-machine"' if name is None else f"name = {json.dumps(name)}",
        base=f"{'#' if base == default.base else ''}base = {json.dumps(base)}",
        vcpus=default.resources.vcpus,
        return_memory=str(default.resources.return_memory).lower(),
        memory=schema.format_size(default.resources.memory),
        disk=schema.format_size(default.resources.disk),
        mount_source=mount.source,
        mount_target=mount.target,
        mount_readonly=json.dumps(mount.readonly),
        mode=default.network.mode,
        allow_private=str(default.network.allow_private).lower(),
        suite=default.debian.suite,
        accelerator=default.machine.accelerator,
    )


def _is_there(path: Path) -> bool:
    # lstat: a dangling link counts, it would be written through or replaced.
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    """Write a whole file or none: to a new file beside it, to the disk, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
