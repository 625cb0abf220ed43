"""The saved state of one machine: its manifest, and everything after which it may not be used."""

from __future__ import annotations

import calendar
import json
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.machine import saved, snapshot
from nixbox.machine.snapshot import Manifest

FIELDS = {"imageHash", "overlayFingerprint", "envHash", "hypervisorVersion", "createdAt", "invalidateReasons"}
GOOD = Manifest("nix:abc", "sha256:1", "sha256:2", "QEMU 7.2", "2024-05-06T07:08:09Z")
ENVS = st.dictionaries(st.from_regex(r"[A-Z_]{1,5}", fullmatch=True), st.text(max_size=8), max_size=5)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A snapshot that may be used."""
    directory = tmp_path / "snapshot"
    directory.mkdir(mode=0o700)
    for name in ("memory", "state"):
        with saved.create(directory / name) as file:
            file.write(name.encode() * 1000)
    saved.seal(directory, ["memory", "state"])
    snapshot.write(directory, GOOD)
    return directory


def read(directory: Path) -> Manifest:
    found = snapshot.read(directory)
    assert found is not None
    return found


# --- the manifest ----------------------------------------------------------------------------------------


def test_the_manifest_holds_what_is_documented(kept: Path) -> None:
    data = json.loads((kept / "snapshot.json").read_text())
    assert set(data) == FIELDS
    assert data["invalidateReasons"] == []
    assert all(isinstance(data[name], str) for name in FIELDS - {"invalidateReasons"})
    assert all(f"    {name} " in (snapshot.__doc__ or "") for name in FIELDS)
    assert stat.S_IMODE((kept / "snapshot.json").stat().st_mode) == 0o600


def test_a_manifest_comes_back(kept: Path) -> None:
    assert read(kept) == GOOD
    snapshot.write(kept, replace(GOOD, invalidateReasons=("a", "b")))
    assert read(kept).invalidateReasons == ("a", "b")


def test_no_snapshot(tmp_path: Path) -> None:
    assert snapshot.read(tmp_path) is None
    assert snapshot.read(tmp_path / "nowhere") is None


WRITTEN = asdict(GOOD)
DAMAGED = {
    "empty": "",
    "half": json.dumps(WRITTEN)[:40],
    "list": "[]",
    "null": "null",
    "number": "1",
    "no fields": "{}",
    "one more": json.dumps(WRITTEN | {"colour": "red"}),
    "one less": json.dumps({name: value for name, value in WRITTEN.items() if name != "envHash"}),
    "no list": json.dumps(WRITTEN | {"invalidateReasons": "x"}),
    "binary": "\udcff",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_manifest_is_a_reason(kept: Path, text: str) -> None:
    (kept / "snapshot.json").write_bytes(text.encode(errors="surrogateescape"))
    found = read(kept)
    assert snapshot.reasons(kept, found, GOOD) == ["snapshot.json is damaged"]
    snapshot.invalidate(kept, found, ["snapshot.json is damaged"])
    assert read(kept).invalidateReasons == ("snapshot.json is damaged",)
    assert set(json.loads((kept / "snapshot.json").read_text())) == FIELDS


@pytest.mark.parametrize("name", sorted(FIELDS - {"createdAt", "invalidateReasons"}))
def test_a_field_of_another_type_is_a_change(kept: Path, name: str) -> None:
    (kept / "snapshot.json").write_text(json.dumps(WRITTEN | {name: 5}))
    assert len(snapshot.reasons(kept, read(kept), GOOD)) == 1


# --- when it may be used ---------------------------------------------------------------------------------


def test_a_snapshot_of_the_same_machine_may_be_used(kept: Path) -> None:
    assert snapshot.reasons(kept, read(kept), replace(GOOD, createdAt=snapshot.now())) == []


REASONS = {
    "imageHash": "the image has changed",
    "overlayFingerprint": "the disk was changed since",
    "envHash": "the environment has changed",
    "hypervisorVersion": "the hypervisor, the CPU or the machine's shape has changed",
}


@pytest.mark.parametrize("name", REASONS)
def test_each_change_is_a_reason_of_its_own(kept: Path, name: str) -> None:
    wanted = replace(GOOD, **{name: "other"})  # type: ignore[arg-type]
    assert snapshot.reasons(kept, read(kept), wanted) == [REASONS[name]]


def test_every_field_that_may_change_has_words() -> None:
    assert set(REASONS) == FIELDS - {"createdAt", "invalidateReasons"}


def test_every_reason_is_told(kept: Path) -> None:
    (kept / "state").write_bytes(b"short")
    wanted = Manifest("", "", "", "", "")
    assert snapshot.reasons(kept, read(kept), wanted) == [
        *REASONS.values(),
        "state has 5 bytes instead of 5000",
    ]


@pytest.mark.parametrize("name", ["memory", "state", saved.SEAL])
def test_what_is_missing_is_a_reason(kept: Path, name: str) -> None:
    (kept / name).unlink()
    assert snapshot.reasons(kept, read(kept), GOOD) == [f"{name} is missing"]


def test_what_was_said_to_be_of_no_use_stays_so(kept: Path) -> None:
    snapshot.invalidate(kept, read(kept), ["the image has changed", "the disk was changed since"])
    assert {path.name for path in kept.iterdir()} == {"snapshot.json"}
    found = read(kept)
    assert found == replace(GOOD, invalidateReasons=("the image has changed", "the disk was changed since"))
    # Even when everything is as it was again.
    assert snapshot.reasons(kept, found, GOOD) == ["the image has changed", "the disk was changed since"]
    snapshot.invalidate(kept, found, ["again"])
    assert read(kept).invalidateReasons == ("again",)


def test_a_snapshot_is_removed_used_or_not(kept: Path) -> None:
    for _ in range(2):
        snapshot.remove(kept)
        assert not kept.exists()


# --- what it is compared with ----------------------------------------------------------------------------


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A disk that was last written long ago."""
    path = tmp_path / "overlay.img"
    path.touch()
    os.truncate(path, 4 << 20)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


CHANGES: dict[str, Callable[[Path], None]] = {
    "write_first": lambda path: write(path, 0, b"x"),
    "write_last": lambda path: write(path, (4 << 20) - 1, b"x"),
    "write_the_same": lambda path: write(path, 1 << 20, b"\0"),
    "touch": lambda path: path.touch(),
    "grow": lambda path: os.truncate(path, 8 << 20),
    "shrink": lambda path: os.truncate(path, 2 << 20),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_write_changes_the_fingerprint(overlay: Path, change: Callable[[Path], None]) -> None:
    before = snapshot.overlay_fingerprint(overlay)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", before)
    change(overlay)
    assert snapshot.overlay_fingerprint(overlay) != before


@pytest.mark.parametrize("name", ["write_first", "grow", "shrink"])
def test_some_changes_are_seen_whatever_the_time_says(overlay: Path, name: str) -> None:
    before = snapshot.overlay_fingerprint(overlay)
    CHANGES[name](overlay)
    os.utime(overlay, (1_700_000_000, 1_700_000_000))
    assert snapshot.overlay_fingerprint(overlay) != before


def test_reading_and_renaming_keep_the_fingerprint(overlay: Path) -> None:
    before = snapshot.overlay_fingerprint(overlay)
    overlay.read_bytes()
    moved = overlay.rename(overlay.with_name("moved.img"))
    moved.chmod(0o600)
    assert snapshot.overlay_fingerprint(moved) == before


@given(ENVS, st.randoms(use_true_random=False))
def test_the_environment_has_no_order(env: dict[str, str], random: object) -> None:
    names = list(env)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert snapshot.env_hash("id", {name: env[name] for name in names}) == snapshot.env_hash("id", env)


@given(ENVS, ENVS)
def test_another_environment_has_another_hash(one: dict[str, str], other: dict[str, str]) -> None:
    assert (snapshot.env_hash("id", one) == snapshot.env_hash("id", other)) == (one == other)
    assert snapshot.env_hash("id", one) != snapshot.env_hash("di", one)


def test_names_and_values_are_kept_apart() -> None:
    envs: list[dict[str, str]] = [{}, {"A": "b"}, {"Ab": ""}, {"A": "", "B": ""}, {"A": "", "b": ""}, {"A": '","b'}]
    envs += [{"A": "\udcff"}, {"A": "\\udcff"}, {"A": "ÿ"}]  # bytes that are no text
    assert len({snapshot.env_hash("id", env) for env in envs}) == len(envs)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", snapshot.env_hash("id", {"A": "\udcff"}))


def test_the_image_is_named_by_its_hash() -> None:
    ident = "0123456789abcdfghijklmnpqrsvwxyz"
    assert snapshot.image_hash(f"/nix/store/{ident}-nixbox-image") == f"nix:{ident}"
    assert snapshot.image_hash(f"/elsewhere/nix/store/{ident}-other") == f"nix:{ident}"


def test_the_hypervisor_is_readable_and_whole() -> None:
    found = snapshot.hypervisor_version("QEMU emulator version 7.2.15", "emulated", ["-m", "512M"])
    assert "QEMU emulator version 7.2.15" in found
    assert "emulated" in found
    assert os.uname().machine in found
    others = [("QEMU 8", "emulated", ["-m", "512M"]), ("QEMU emulator version 7.2.15", "other", ["-m", "512M"])]
    others += [("QEMU emulator version 7.2.15", "emulated", shape) for shape in (["-m", "1G"], ["-m512M"], ["-m"])]
    assert len({found, *(snapshot.hypervisor_version(*other) for other in others)}) == 1 + len(others)


def test_the_time_is_utc_to_the_second() -> None:
    text = snapshot.now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text)
    assert abs(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 60
