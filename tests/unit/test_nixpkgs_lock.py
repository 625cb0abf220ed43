"""A lock of the nixpkgs base: what it may hold, when it does not fit, and what `nixbox update` does around it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nixbox.cli import update as command
from nixbox.config import load
from nixbox.errors import ConfigError
from nixbox.image import ensure, lock, nixpkgs, store, update
from nixbox.image.lock import NixpkgsLock, NixpkgsPin
from nixbox.image.lockfile import Pin
from nixbox.machine.record import MachineDir
from nixbox.plan.model import ImageSpec
from nixbox.plan.resolve import resolve
from nixbox.report import Reporter

HASH = "sha256-" + "A" * 43 + "="
SOURCE = "github:NixOS/nixpkgs@nixos-unstable"
PIN = NixpkgsPin(owner="NixOS", repo="nixpkgs", ref="nixos-unstable", rev="1" * 40, hash=HASH, date="2026-07-04")
OTHER = "github:NixOS/nixpkgs@x"
SPEC = ImageSpec("nixpkgs", "trixie", ("jq", "python3Packages.requests"), (), False, nixpkgs=SOURCE)


def a_lock(**changes: Any) -> NixpkgsLock:
    values: dict[str, Any] = {"format": 1, "base": "nixpkgs", "arch": "amd64", "requested": SPEC.packages}
    return NixpkgsLock(**(values | {"nixpkgs": PIN} | changes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / ".nixbox").mkdir()
    return ensure.lock_path(tmp_path)


# --- the file --------------------------------------------------------------------------------------------


def test_it_is_read_as_it_was_written(file: Path) -> None:
    value = a_lock(plugins=(Pin("github:o/tools", "2" * 40, HASH),))
    lock.save(value, file)
    assert lock.load(file) == value
    assert json.loads(file.read_text())["nixpkgs"]["rev"] == "1" * 40
    assert '"krun"' not in file.read_text()
    assert file.read_text() == lock.dump(lock.load(file))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rev": "1" * 39}, "nixpkgs.rev"),
        ({"hash": "sha256-x"}, "nixpkgs.hash"),
        ({"hash": "sha512-" + "A" * 43 + "="}, "nixpkgs.hash"),
        ({"date": "yesterday"}, "nixpkgs.date"),
        ({"owner": "../x"}, "no owner on GitHub"),
        ({"repo": ".."}, "no repository on GitHub"),
        ({"repo": "a/b"}, "of a repository"),
        ({"ref": "--upload-pack=x"}, "no branch, tag or commit"),
        ({"ref": ""}, "no branch, tag or commit"),
        ({"ref": "2" * 40}, "another commit"),
        ({"url": "https://evil.example"}, "nixpkgs.url"),
    ],
)
def test_every_bad_field_of_the_pin_is_named(file: Path, changes: dict[str, str], words: str) -> None:
    data = json.loads(lock.dump(a_lock()))
    data["nixpkgs"] |= changes
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is damaged") as caught:
        lock.load(file)
    assert words in "\n".join(caught.value.faults)


def test_a_lock_of_one_base_holds_nothing_of_the_other(file: Path) -> None:
    data = json.loads(lock.dump(a_lock()))
    file.write_text(json.dumps(data | {"suite": "trixie"}))
    with pytest.raises(ConfigError, match="is damaged"):
        lock.load(file)
    file.write_text(json.dumps(data | {"base": "debian"}))
    with pytest.raises(ConfigError, match="is damaged") as caught:
        lock.load(file)
    assert any("nixpkgs" in fault for fault in caught.value.faults)


def test_what_a_new_lock_changes() -> None:
    moved = PIN.model_copy(update={"rev": "2" * 40, "date": None})
    found = lock.changes(a_lock(), a_lock(requested=("jq", "tree"), nixpkgs=moved))
    assert found.lines() == [
        "+ tree of nixpkgs",
        "- python3Packages.requests of nixpkgs",
        f"~ nixpkgs {'1' * 12} (2026-07-04) → {'2' * 12}",
    ]


# --- whether it fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (SPEC, None),
        (replace(SPEC, packages=SPEC.packages[::-1]), None),
        (replace(SPEC, suite="sid"), None),
        (replace(SPEC, ld_libraries=("zlib",), allow_unfree=True), None),
        (replace(SPEC, packages=("jq", "tree")), "new: tree; gone: python3Packages.requests"),
        (
            replace(SPEC, nixpkgs=OTHER),
            f"the lock is for another nixpkgs than {OTHER}",
        ),
        (replace(SPEC, base="debian"), "the lock is for nixpkgs, the config says debian"),
        (replace(SPEC, krun=True), "the lock has no kernel for libkrun yet"),
    ],
)
def test_when_it_does_not_fit(file: Path, spec: ImageSpec, why: str | None) -> None:
    lock.save(a_lock(), file)
    assert ensure.stale(file.parents[1], spec) == why


def test_other_packages_leave_the_revision(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.save(a_lock(plugins=(Pin("github:o/tools", "2" * 40, HASH),)), file)
    monkeypatch.setattr(nixpkgs, "resolve", lambda *_: pytest.fail("the revision was asked for anew"))
    spec = replace(SPEC, packages=("tree",))
    changed = ensure.relock(file.parents[1], spec, None, None, Reporter())
    assert changed[0] == "+ tree of nixpkgs"
    found = lock.load(file)
    assert isinstance(found, NixpkgsLock)
    assert (found.nixpkgs, found.requested, len(found.plugins)) == (PIN, ("tree",), 1)


# --- from the config -------------------------------------------------------------------------------------


def test_a_plan_knows_who_asked_for_a_name(tmp_path: Path) -> None:
    directory = tmp_path / ".nixbox"
    (directory / "profiles").mkdir(parents=True)
    (directory / "plugins/web").mkdir(parents=True)
    (directory / "plugins/web/plugin.toml").write_text('packages = ["jq"]\nld_libraries = ["zlib"]\n')
    (directory / "profiles/dev.toml").write_text('packages = { nixpkgs = ["gdb"], debian = ["gdb-x"] }\n')
    text = 'plugins = ["web"]\nprofile = "dev"\npackages = ["tree"]\nld_libraries = ["openssl"]\n'
    (directory / "config.toml").write_text('base = "nixpkgs"\n' + text)
    image = resolve(load.load(tmp_path)).image
    assert dict(image.asked) == {
        "jq": "plugin web",
        "gdb": "profile dev",
        "tree": "config.toml",
        "zlib": "plugin web",
        "openssl": "config.toml",
    }
    assert (image.packages, image.ld_libraries) == (("jq", "gdb", "tree"), ("zlib", "openssl"))
    assert (image.nixpkgs, image.allow_unfree) == (SOURCE, False)
    (directory / "config.toml").write_text(text + "[nixpkgs]\nallow_unfree = true\n")
    other = resolve(load.load(tmp_path)).image
    assert (other.base, other.nixpkgs, other.ld_libraries, other.allow_unfree) == ("debian", "", (), False)


def test_a_build_of_nixpkgs_asks_the_cache() -> None:
    features = ("--extra-experimental-features", "nix-command flakes")
    none = ("--option", "substituters", "")
    other = ("--option", "sandbox", "true")
    found = store.NixSetup("2.99", (*features, *other, *none), ())
    assert found.options_of_nixpkgs == (*features, *other)
    assert store.NixSetup("2.99", (*features, *none, *other), ()).options_of_nixpkgs == (*features, *other)
    assert store.NixSetup("2.99", features, ()).options_of_nixpkgs == features


# --- update ----------------------------------------------------------------------------------------------


def test_a_lock_that_does_not_fit_is_not_moved(file: Path) -> None:
    workspace = file.parents[1]
    assert not update.is_locked(workspace)
    file.write_text('{"format": 1, "plugins": []}')
    assert not update.is_locked(workspace)
    lock.save(a_lock(), file)
    assert update.is_locked(workspace)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="does not fit the config: new: tree"):
        update.base(workspace, replace(SPEC, packages=(*SPEC.packages, "tree")), None, None, Reporter())
    assert file.read_bytes() == before


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """A workspace with a machine that is alive, as far as its lock says, and one that is not."""
    for name in ("live", "down"):
        machine = MachineDir(tmp_path, name)
        machine.path.mkdir(parents=True)
        (machine.path / "machine.json").write_text("{}")
    with MachineDir(tmp_path, "live").hold_lock():
        yield tmp_path


def test_machines_on_the_old_image_are_named(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command._warn_running(running)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "note: `live` is running on the old image: nixbox down live; nixbox up live\n"
