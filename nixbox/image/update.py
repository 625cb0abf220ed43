"""`nixbox update` for what an image is made of: another revision of nixpkgs, or Debian's packages of today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nixbox.errors import ConfigError
from nixbox.image import ensure, lock, lockfile, nixpkgs
from nixbox.image.lock import AnyLock, Changes, NixpkgsLock
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter
from nixbox.values import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """What `update` does to a base: `old` and `new` are revisions with their days, or Debian's suite.

    `changes` are the packages of the image whose versions differ; none where only tools of the build do.
    """

    base: str
    old: str
    new: str
    changes: Changes
    pins: tuple[Mapping[str, str | None], Mapping[str, str | None]] | None = None

    def lines(self) -> list[str]:
        """For people: from where to where, then a package a line."""
        if self.pins:
            title = f"{self.base}: {self.old} → {self.new}"
        else:
            count = len(self.changes.lines())
            moved = f"{count} package{'' if count == 1 else 's'}" if count else "tools of the build alone"
            title = f"{self.base} {self.new}: {moved}"
        return [title, *(f"  {line}" for line in self.changes.lines())]

    def as_json(self) -> dict[str, Any]:
        """As a row of a plugin's pin, with what becomes of the packages."""
        old, new = self.pins or (None, None)
        changes = self.changes
        packages = {"added": changes.added, "removed": changes.removed, "changed": changes.changed}
        return {"ref": self.base, "old": old, "new": new, "packages": packages}


def is_locked(workspace: Path) -> bool:
    """Whether the workspace's lock holds an image's inputs. Raises ConfigError for what is no lock."""
    file = lockfile.path(workspace)
    try:
        return not lockfile.only_pins(lockfile.parse(file.read_text(), file))
    except FileNotFoundError:
        return False


def base(
    workspace: Path,
    spec: ImageSpec,
    mirror: str | None,
    security: str | None,
    reporter: Reporter,
    *,
    dry_run: bool = False,
) -> Move | None:
    """Move what the lock has of the base to what there is now; None when it is that already.

    With `dry_run` the lock stays as it is; a new revision of nixpkgs is fetched all the same, for its versions are in
    it. Raises ConfigError when the lock does not fit the config or nixpkgs lacks a package by now, and NixboxError.
    """
    with lockfile.one_at_a_time(workspace):
        file = lockfile.path(workspace)
        why = ensure.stale(workspace, spec)
        if why:
            raise ConfigError(f"the lock does not fit the config: {why}", hint="`nixbox lock` first")
        old = lock.load(file)
        new: AnyLock
        if isinstance(old, NixpkgsLock):
            new, move = _nixpkgs(old, spec, reporter)
        else:
            new, move = _debian(old, spec, mirror, security, reporter)
        if move is not None and not dry_run:
            lock.save(new, file)
        return move


def _nixpkgs(old: NixpkgsLock, spec: ImageSpec, reporter: Reporter) -> tuple[NixpkgsLock, Move | None]:
    if old.nixpkgs.place.rev is not None:
        reporter.note(f"{old.nixpkgs.place} names a commit: it never moves")
        return old, None
    pin = nixpkgs.moved(old.nixpkgs, reporter.phase)
    if pin is None:
        return old, None
    new = old.model_copy(update={"nixpkgs": pin})
    nixpkgs.ensure(old.nixpkgs, reporter.phase)
    reporter.phase("looking the packages up in nixpkgs")
    nixpkgs.check(new, spec)
    names = [*spec.packages, *spec.ld_libraries]
    before, after = nixpkgs.versions(old, names), nixpkgs.versions(new, names)
    pins = tuple({"rev": one.rev, "date": one.date} for one in (old.nixpkgs, pin))
    return new, Move("nixpkgs", str(old.nixpkgs), str(pin), lock.differences(before, after), (pins[0], pins[1]))


def _debian(
    old: lock.Lock, spec: ImageSpec, mirror: str | None, security: str | None, reporter: Reporter
) -> tuple[AnyLock, Move | None]:
    found = ensure.resolved(spec, old, mirror, security, reporter)
    new = found.model_copy(update={"krun": old.krun, "plugins": old.plugins})
    if lock.dump(new) == lock.dump(old):
        return old, None
    return new, Move("debian", old.suite, spec.suite, lock.changes(old, new))
