"""`nixbox doctor`: what this host has, what it lacks, and the mend for each."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nixbox import paths, run
from nixbox.errors import NixboxError
from nixbox.values import dataclass

if TYPE_CHECKING:
    from nixbox.config.settings import Loaded

Level = Literal["ok", "warning", "missing"]
_FREE_WARNING_GIB = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `missing` is what `up` cannot do without."""

    level: Level
    what: str
    detail: str
    hint: str | None = None


def examine() -> Iterator[Finding]:
    """Look at the host, one finding at a time."""
    yield from _nix()
    yield from _qemu()
    yield _accelerator()
    yield _libkrun()
    for program, why in (("ssh", "reaches the guest"), ("ssh-keygen", "makes its keys"), ("mke2fs", "its disk")):
        yield _program(program, why)
    yield _apt()
    yield _git()
    yield from _mirror()
    yield from _namespaces()
    yield from _network()
    yield from _mounts()
    yield from _plugins()
    yield from _space()


def _program(name: str, why: str) -> Finding:
    try:
        return Finding("ok", name, run.tool(name))
    except NixboxError as error:
        return Finding("missing", name, f"{error.message} ({why})", error.hint)


def _nix() -> Iterator[Finding]:
    from nixbox.image import store

    try:
        setup = store.setup()
    except NixboxError as error:
        yield Finding("missing", "nix", error.message, error.hint)
        return
    yield Finding("ok", "nix", f"version {setup.version}")
    for reason in setup.reasons:
        yield Finding("ok", "nix", f"nixbox passes an option, since {reason}")
    root = store.private_root()
    if root is not None:
        detail = f"{store.STORE} is not yours to write and no Nix daemon runs: your own store is {root}"
        yield Finding("ok", "nix store", detail)


def _qemu() -> Iterator[Finding]:
    from nixbox.machine import qemu

    try:
        yield Finding("ok", "qemu", f"version {qemu.Qemu().version()}")
    except NixboxError as error:
        yield Finding("missing", "qemu", error.message, error.hint)


def _accelerator() -> Finding:
    from nixbox.machine import accelerator

    choice = accelerator.choose("auto")
    level: Level = "warning" if choice.accelerator == "tcg" else "ok"
    return Finding(level, "accelerator", f"{choice.accelerator}: {choice.reason}", choice.hint)


def _libkrun() -> Finding:
    from nixbox.config.cache import krun_library
    from nixbox.machine import libkrun

    try:
        return Finding("ok", "libkrun", f"{libkrun.find(krun_library())}, for `--backend krun`")
    except NixboxError as error:
        return Finding("ok", "libkrun", f"not used: {error.message}", error.hint)


def _apt() -> Finding:
    if run.find_tool("apt-get") and run.find_tool("apt-helper"):
        return Finding("ok", "apt", "resolves and fetches Debian packages")
    detail = "no apt on this host: a lock can be built from (Nix fetches), but not made"
    return Finding("warning", "apt", detail, "make the lock on a Debian machine and commit it")


def _git() -> Finding:
    if run.find_tool("git"):
        return Finding("ok", "git", "asks GitHub for the revisions of plugins")
    detail = "not on this host: plugins from GitHub can be used as they are pinned, but not pinned anew"
    return Finding("warning", "git", detail, "apt install git")


def _mirror() -> Iterator[Finding]:
    from nixbox.image import apt

    mirrors = apt.host_mirrors()
    if mirrors is None:
        detail = "the host's apt sources name no Debian mirror"
        yield Finding("warning", "mirror", detail, "set [debian] mirror in .nixbox/config.toml")
    else:
        security = "with security updates" if mirrors.security else "without a security repository"
        yield Finding("ok", "mirror", f"{mirrors.debian} ({security})")


def _namespaces() -> Iterator[Finding]:
    if sys.platform != "linux":
        return
    if not run.find_tool("unshare"):
        yield Finding("warning", "user namespaces", "not looked at: `unshare` is missing", "apt install util-linux")
        return
    done = run.run(["unshare", "-Urm", "true"], timeout_s=10, check=False)
    if done.code == 0:
        yield Finding("ok", "user namespaces", "allowed, so images can be built")
    else:
        hint = "sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or ask who runs this host"
        yield Finding("missing", "user namespaces", f"forbidden on this host: {done.stderr.strip()}", hint)


def _network() -> Iterator[Finding]:
    """What a machine's network is made of; every mode needs the first two, and those that let out the third."""
    if sys.platform != "linux":
        yield Finding("missing", "network", "machines have a network on Linux hosts only in this version")
        return
    import ctypes

    from nixbox.network import namespace, watch

    try:
        with namespace.create():
            yield Finding("ok", "network namespaces", "allowed, with a device for the guest (/dev/net/tun)")
    except NixboxError as error:
        yield Finding("missing", "network namespaces", error.message, error.hint)
    try:
        ctypes.CDLL(watch.library())
        yield Finding("ok", "nftables", "filters what leaves a guest")
    except OSError:
        yield Finding(
            "missing", "nftables", f"the library {watch.library()} is not on this host", "apt install nftables"
        )
    yield _program("pasta", "connects a guest with the outside, in modes `open` and `filtered`")


def _mounts() -> Iterator[Finding]:
    """What shares directories, and directories that are better not shared."""
    from nixbox.mounts import daemon, health, places

    try:
        yield Finding("ok", "virtiofsd", f"this host has {daemon.program(None).path}")
    except NixboxError:
        yield Finding("ok", "virtiofsd", "not on this host; images of Debian trixie and newer bring theirs")
    loaded = _loaded()
    if loaded is None:
        return
    workspace, mounts = loaded.workspace, loaded.settings.mounts
    from nixbox.machine.record import all_machines, holders

    for mount in mounts:
        source = (workspace / Path(mount.source).expanduser()).resolve()
        if places.looks_like_cache(source):
            hint = "let the guest have a cache of its own: on its disk it is several times as fast"
            yield Finding("warning", "mount", f"{source} looks like a cache, which tools open file by file", hint)
    for machine in all_machines(workspace):
        record = machine.load_or_none()
        for one in record.shared if record is not None else ():
            lock = health.lock_file(machine.runtime, one.tag)
            many = max((health.descriptors(pid) for pid in holders(lock)), default=0)
            if many > health.MANY_DESCRIPTORS:
                detail = f"the guest of `{machine.name}` has {many} files of {one.real} in its memory"
                yield Finding("warning", "mount", detail, "a cache? Let the guest have one of its own")


def _loaded() -> Loaded | None:
    """The configuration of the workspace that we are in; None without one, or with one that has faults."""
    from nixbox import loading

    try:
        return loading.load(paths.find_workspace(Path.cwd()))
    except NixboxError:
        return None


def _plugins() -> Iterator[Finding]:
    """The plugins of the workspace, and the variables that they need of the user."""
    loaded = _loaded()
    if loaded is None or not loaded.plugins:
        return
    given = {entry.name: entry.from_host for entry in loaded.settings.env}
    fine = True
    for origin, name in loaded.settings.requires_env:
        if name not in given:
            fine = False
            hint = f'in config.toml, [env]: {name} = {{ from_host = "{name}" }}'
            yield Finding("missing", origin, f"needs the variable {name}, which the config does not name", hint)
        elif (source := given[name]) is not None and source not in os.environ:
            fine = False
            yield Finding(
                "missing", origin, f"needs {name}, and this host's {source} is not set", f"export {source}=…"
            )
    if fine:
        yield Finding("ok", "plugins", ", ".join(used.name for used in loaded.plugins))


def _space() -> Iterator[Finding]:
    for what, place in (("the Nix store", Path("/nix")), ("the cache", paths.cache_dir())):
        while not place.exists():
            place = place.parent
        free_gib = shutil.disk_usage(place).free / 2**30
        level: Level = "ok" if free_gib >= _FREE_WARNING_GIB else "warning"
        hint = None if level == "ok" else "an image takes about 1 GiB while it is built: `nixbox image gc`"
        yield Finding(level, "disk", f"{free_gib:.1f} GiB free for {what}", hint)
