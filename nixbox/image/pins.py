"""Plugins from GitHub: which commit each reference is pinned to, and where its tree lies.

`nixbox.lock` has the pins; the trees are fixed-output paths in the Nix store, so what is used is what was recorded.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from nixbox import paths
from nixbox.config import refs as references
from nixbox.config.names import shown
from nixbox.errors import ConfigError
from nixbox.image import github, lockfile, store
from nixbox.image.lockfile import Pin
from nixbox.report import Reporter
from nixbox.values import dataclass

_OWNER_FILE = "workspace"


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit and, if known, its day."""

    rev: str
    date: str | None

    def __str__(self) -> str:
        return self.rev[:12] + (f" ({self.date})" if self.date else "")


@dataclass(frozen=True, slots=True)
class Change:
    """What `update` does to a pin; `old` is None for one that was not pinned yet."""

    ref: str
    old: Commit | None
    new: Commit

    def __str__(self) -> str:
        return f"{self.ref}: {self.old or 'not pinned'} → {self.new}"


def read(workspace: Path) -> dict[str, Pin]:
    """The pins of a workspace's lock, by reference. Raises ConfigError for a damaged lock."""
    return lockfile.pins(lockfile.path(workspace))


def present(workspace: Path, refs: Sequence[str]) -> dict[str, Path]:
    """Those plugins' directories that can be read at once: pinned, in the store, and kept there.

    Starts no process. Raises ConfigError for a damaged lock, and for a subdirectory that a plugin does not have.
    """
    pins = read(workspace) if refs else {}
    known = [pins[ref] for ref in refs if ref in pins]
    return {pin.ref: _directory(pin) for pin in known if _is_kept(workspace, pin)}


def ensure(workspace: Path, refs: Sequence[str], reporter: Reporter, *, locked: bool = False) -> dict[str, Path]:
    """The directories of plugins by reference: what is not pinned is resolved and recorded, what is missing fetched.

    `refs` are all that the config names. Raises ConfigError for what GitHub does not have, for a damaged lock, and
    for an unpinned plugin when `locked` is set; NixboxError when GitHub cannot be reached or serves other bits.
    """
    wanted = list(dict.fromkeys(refs))
    if not wanted:
        return {}
    pins = read(workspace)
    if not pins.keys() >= set(wanted):
        missing = [ref for ref in wanted if ref not in pins]
        if locked:
            names = ", ".join(shown(ref, most=100) for ref in missing)
            raise ConfigError(
                f"the lock does not fit the config: not pinned: {names}", hint="`nixbox lock`, and commit the result"
            )
        pins = _pin_missing(workspace, wanted, reporter)
    for ref in wanted:
        _keep(workspace, pins[ref], reporter)
    return {ref: _directory(pins[ref]) for ref in wanted}


def _pin_missing(workspace: Path, wanted: Sequence[str], reporter: Reporter) -> dict[str, Pin]:
    with lockfile.one_at_a_time(workspace):
        pins = read(workspace)  # another command may have been faster
        new = [_resolve(workspace, ref, reporter) for ref in wanted if ref not in pins]
        pins |= {pin.ref: pin for pin in new}
        if new:
            _record(workspace, {ref: pins[ref] for ref in wanted})
    for pin in new:
        reporter.note(f"pinned {pin.ref} to {Commit(pin.rev, pin.date)} in {paths.CONFIG_DIR}/{paths.LOCK_FILE}")
    return pins


def update(
    workspace: Path,
    refs: Sequence[str],
    reporter: Reporter,
    *,
    chosen: Sequence[str] | None = None,
    dry_run: bool = False,
) -> list[Change]:
    """Move the pins of the `chosen` plugins (default: all) to what their references mean now; all of them or none.

    `refs` are all that the config names; pins of others are dropped. Raises as `ensure` does.
    """
    wanted = list(dict.fromkeys(refs))
    with lockfile.one_at_a_time(workspace):
        pins = read(workspace)
        changes: list[Change] = []
        moved: dict[str, Pin] = {}
        for ref in dict.fromkeys(wanted if chosen is None else chosen):
            place, old = _place(ref), pins.get(ref)
            if place.rev is not None and old is not None:
                reporter.note(f"{ref} names a commit: it never moves")
                continue
            reporter.phase(f"asking GitHub for {ref}")
            rev = github.resolve(place)
            if old is not None and old.rev == rev:
                continue
            before = None if old is None else Commit(old.rev, old.date)
            if dry_run:
                changes.append(Change(ref, before, Commit(rev, github.commit_date(place, rev))))
            else:
                moved[ref] = new = _resolve(workspace, ref, reporter, rev)
                changes.append(Change(ref, before, Commit(new.rev, new.date)))
        if moved:
            _record(workspace, {ref: pin for ref, pin in (pins | moved).items() if ref in wanted})
    return changes


def _place(ref: str) -> references.Github:
    try:
        return references.parse(ref)
    except ValueError as fault:
        raise ConfigError(f"{shown(ref, most=100)} is no plugin from GitHub: {fault}") from None


def _resolve(workspace: Path, ref: str, reporter: Reporter, rev: str | None = None) -> Pin:
    """Ask GitHub what a reference means (unless `rev` says it) and fetch that."""
    place = _place(ref)
    if rev is None:
        reporter.phase(f"asking GitHub for {ref}")
        rev = github.resolve(place)
    reporter.phase(f"fetching {place.repository} at {rev[:12]}")
    pin = Pin(ref, rev, github.prefetch(place, rev), github.commit_date(place, rev))
    _directory(pin)
    _keep(workspace, pin, reporter)
    return pin


def _record(workspace: Path, pins: dict[str, Pin]) -> None:
    lockfile.save_pins(lockfile.path(workspace), pins.values())
    _drop_roots(workspace, pins)


# --- in the store ----------------------------------------------------------------------------------------


def store_path(pin: Pin) -> Path:
    """Where the tree of a pin lies in the Nix store once it is there."""
    return store.recursive_path(github.STORE_NAME, pin.hash)


def _roots(workspace: Path) -> Path:
    """The garbage collector roots of a workspace's plugins, each named as the store path that it keeps."""
    ident = hashlib.sha256(str(workspace.resolve()).encode()).hexdigest()[:24]
    return paths.cache_dir() / "plugins" / ident


def _is_kept(workspace: Path, pin: Pin) -> bool:
    """Whether the tree is there and stays: a root is made when Nix has the whole path, and keeps it whole."""
    path = store_path(pin)
    link = _roots(workspace) / path.name
    return link.is_symlink() and link.readlink() == path and store.is_there(path)


def _keep(workspace: Path, pin: Pin, reporter: Reporter) -> None:
    """Fetch the tree of a pin unless the store has it, and root it."""
    if _is_kept(workspace, pin):
        return
    path = store_path(pin)
    if store.invalid([path]):
        reporter.phase(f"fetching {pin.place.repository} at {pin.rev[:12]}")
        github.fetch(pin.place, pin.rev, pin.hash)
    roots = _roots(workspace)
    roots.mkdir(parents=True, exist_ok=True)
    paths.write_atomic(roots / _OWNER_FILE, f"{workspace.resolve()}\n")
    store.add_root(roots / path.name, path)


def _drop_roots(workspace: Path, pins: dict[str, Pin]) -> None:
    """Let go of what this workspace no longer uses, and of all that workspaces used which are gone."""
    used = {store_path(pin).name for pin in pins.values()}
    for link in _roots(workspace).glob(f"*-{github.STORE_NAME}"):
        if link.name not in used:
            link.unlink(missing_ok=True)
    for roots in _roots(workspace).parent.iterdir():
        try:
            owner = Path((roots / _OWNER_FILE).read_text().rstrip("\n"))
        except OSError:  # being made just now
            continue
        if not (owner / paths.CONFIG_DIR).is_dir():
            shutil.rmtree(roots, ignore_errors=True)


def _directory(pin: Pin) -> Path:
    """The plugin's directory, where it really lies. Raises ConfigError when the tree has none of that name."""
    tree = store.physical(store_path(pin))
    directory = (tree / pin.place.subdir).resolve()
    if not directory.is_relative_to(tree) or not directory.is_dir():
        raise ConfigError(
            f"{pin.ref}: {pin.place.repository} has no directory {shown(pin.place.subdir)} at {pin.rev[:12]}",
            hint=f"look at https://github.com/{pin.place.repository}/tree/{pin.rev}",
        )
    return directory
