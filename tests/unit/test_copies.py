"""What forks, snapshots and ephemeral machines rest on, without a VM."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from nixbox.errors import ConfigError
from nixbox.machine import snapshot
from nixbox.machine.record import MachineDir
from nixbox.session.copies import claim_names


def test_names_are_claimed_by_one_only(tmp_path: Path) -> None:
    (tmp_path / ".nixbox/machines/web-2").mkdir(parents=True)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(claim_names(tmp_path, "web", 20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [name for claimed in found for name in claimed]
    assert len(set(names)) == len(names) == 80 and "web-2" not in names
    assert sorted(names, key=lambda name: int(name[4:]))[:2] == ["web-1", "web-3"]
    assert all((tmp_path / ".nixbox/machines" / name).stat().st_mode & 0o777 == 0o700 for name in names)
    with pytest.raises(ConfigError):
        claim_names(tmp_path, "not a name", 1)


def test_a_snapshot_that_was_gone_on_from_in_another_life_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = snapshot.Manifest("a", "b", "c", "d", "e")
    assert "resumed before the host's last start" not in "".join(snapshot.reasons(tmp_path, kept, kept))
    assert not snapshot.went_on(tmp_path)
    snapshot.going_on(tmp_path)
    assert snapshot.went_on(tmp_path)
    assert "resumed before the host's last start" not in "".join(snapshot.reasons(tmp_path, kept, kept))
    monkeypatch.setattr(snapshot, "_boot_id", lambda: "another")
    assert "it was resumed before the host's last start" in snapshot.reasons(tmp_path, kept, kept)


def test_only_what_nobody_works_on_is_swept(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path, "run-0123abcd")
    with machine.busy(lambda: None):
        machine.remove_if_idle()
        assert machine.path.exists()
    machine.remove_if_idle()
    assert not machine.path.exists()
    # One that is just being made, or removed, has no lock yet, or no more.
    machine.path.mkdir(parents=True)
    machine.remove_if_idle()
    assert machine.path.exists()
    old = time.time() - 3600
    os.utime(machine.path, (old, old))
    machine.remove_if_idle()
    assert not machine.path.exists()
    machine.remove_if_idle()
