"""`nixbox init`: a commented `.nixbox/config.toml` that shows every field, and the `.gitignore` beside it."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from nixbox import paths
from nixbox.config import fields, names, schema
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

# Plugins by name, by directory ("./tools/my-plugin"), or from GitHub ("github:owner/repo/subdir@v1"):
# `nixbox plugin list` shows those that are here.
#plugins = []

# Packages in the image; or for each base: packages = { debian = ["jq"], nixpkgs = ["jq"] }
#packages = []

# Shell scripts that run in the guest on every `nixbox up`, in order.
#scripts = []

# Directories of this host that the guest gets a copy of, on its own disk: caches, for one. By default none.
# [{ source = "~/.npm", target = "~/.npm", exclude = ["*.tmp"] }]
#seeds = []

# Attributes of nixpkgs whose libraries programs from elsewhere find; for base = "nixpkgs" only.
#ld_libraries = []

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

# Commands that run on this host, in the workspace, around `nixbox up` and `nixbox down`. One that fails is told and
# passed over; `up` or `down` fails with { run = "make check", required = true }.
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

[nixpkgs]
# For base = "nixpkgs": a branch, tag or commit; nixbox.lock has the revision, and `nixbox update nixpkgs` moves it.
#source = "${nixpkgs}"
# true: also packages whose licence is not free.
#allow_unfree = ${allow_unfree}

[machine]
# "auto" takes the best of "kvm", "hvf" and "tcg" that works here (`nixbox doctor` says which).
#accelerator = "${accelerator}"
# The hypervisor: "qemu", or with KVM also "krun" (libkrun) and "cloud-hypervisor". "auto" takes QEMU if it is there.
#backend = "${backend}"
""")

_GITIGNORE = """\
# What belongs in git; the rest (machines, their disks and keys) does not.
/*
!/.gitignore
!/config.nix
!/config.toml
!/nixbox.lock
!/plugins/
!/profiles/
"""


def init(directory: Path, *, name: str | None = None, base: str = "debian") -> Path:
    """Make `directory` a workspace and return the path of its new config.toml.

    A `.gitignore` that is there already stays as it is. Raises ConfigError for a bad name or base, when there
    is a config.toml already, and when a file cannot be written.
    """
    return _make(directory, config_text(name=name, base=base))


def from_nix(directory: Path, data: Mapping[str, Any], origin: str = "config.nix") -> Path:
    """Make `directory` a workspace with what `image.nixeval.config` gave, and return the path of its config.toml.

    `origin` is what the file's first comment calls the source. Raises ConfigError as `init` does, and with every
    fault of the data before anything is written.
    """
    base = str(data.get("base", schema.Config().base))
    found, faults = schema.validate(schema.Config, data, base)
    if found is None:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"{origin}: {fault}" for fault in faults]
        raise ConfigError(f"{origin} has {count}", "mend it there, and convert it again", lines)
    text = _converted_text(data, origin)
    if tomllib.loads(text) != data:
        raise ConfigError(f"{origin} holds text that config.toml cannot", hint="write the config.toml by hand")
    return _make(directory, text)


_CONVERTED = """\
nixbox: the sandbox of this directory, converted from {origin} by `nixbox init --from`.
Conditions are as they came out on that day and host. No secret is here: a variable of the host is named by from_host,
and its value is read at each `nixbox up`.
`nixbox config` shows the result; `nixbox init` in an empty directory writes a file that shows every field."""


def _converted_text(data: Mapping[str, Any], origin: str) -> str:
    import tomlkit  # 40 ms that nothing else here pays

    document = tomlkit.document()
    for line in _CONVERTED.format(origin=ascii(origin)[1:-1]).splitlines():
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    said = {name: data[name] for name in schema.Config.model_fields if data.get(name) not in (None, [], {})}
    tables = {name: value for name, value in said.items() if isinstance(value, Mapping) and name != "packages"}
    # Plain fields first: in TOML what follows a table's header belongs to the table.
    for name, value in said.items():
        if name not in ("mounts", *tables):
            document.add(name, _toml(value))
    for name, value in tables.items():
        table = tomlkit.table()
        for key, entry in value.items():
            table.add(key, _toml(entry))
        document.add(name, table)
    if "mounts" in said:
        mounts = tomlkit.aot()
        for mount in said["mounts"]:
            mounts.append(tomlkit.item(dict(mount)))
        document.add("mounts", mounts)
    return tomlkit.dumps(document)


def _toml(value: Any) -> Any:
    """A value as a person would write it: a script over several lines, a long list with a line for each entry."""
    import tomlkit

    if isinstance(value, str):
        return tomlkit.string(value, multiline="\n" in value.strip("\n") and "\r" not in value)
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        for name, entry in value.items():
            table.append(name, entry if isinstance(entry, bool | int) else _toml(entry))
        return table
    if isinstance(value, list):
        entries = [_toml(entry) for entry in value]
        array = tomlkit.array()
        array.extend(entries)
        return array.multiline(len(entries) > 1 and len(array.as_string()) > 80)
    return value


def _make(directory: Path, text: str) -> Path:
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
            f"{names.shown(base)} is not a base{fields.near(base, schema.BASES)}",
            hint=f"the bases are {' and '.join(schema.BASES)}",
        )
    default = schema.Config()
    mount = default.mounts[0]
    return _CONFIG.substitute(
        name='#name = "my-machine"' if name is None else f"name = {json.dumps(name)}",
        base=f"{'#' if base == default.base else ''}base = {json.dumps(base)}",
        vcpus=default.resources.vcpus,
        return_memory=str(default.resources.return_memory).lower(),
        memory=fields.format_size(default.resources.memory),
        disk=fields.format_size(default.resources.disk),
        mount_source=mount.source,
        mount_target=mount.target,
        mount_readonly=json.dumps(mount.readonly),
        mode=default.network.mode,
        allow_private=str(default.network.allow_private).lower(),
        suite=default.debian.suite,
        nixpkgs=default.nixpkgs.source,
        allow_unfree=json.dumps(default.nixpkgs.allow_unfree),
        accelerator=default.machine.accelerator,
        backend=default.machine.backend,
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
