"""The KVM probe on this very host, whatever its /dev/kvm is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nixbox.machine import kvm
from nixbox.machine.kvm import KvmProbe, KvmState

HANG_S = 5.0  # the probe promises about one second; the rest is for a busy host
DEVICE = Path("/dev/kvm")


def check(found: KvmProbe) -> None:
    """State and measurement agree, and the state is one that this host's device allows."""
    if not DEVICE.exists():
        assert found.state is KvmState.ABSENT
    elif not os.access(DEVICE, os.R_OK | os.W_OK):
        assert found.state in (KvmState.NO_PERMISSION, KvmState.ABSENT)
    elif found.run_ms is None:
        assert found.state is KvmState.UNUSABLE or "not timed" in found.reason
    elif found.run_ms < kvm.USABLE_BELOW_MS:
        assert found.state is KvmState.USABLE or "did not get through" in found.reason
    else:
        assert found.state is KvmState.UNUSABLE
    assert found.hint is None or found.state is not KvmState.USABLE


def test_the_state_fits_the_measurement_and_nothing_hangs() -> None:
    for _ in range(20):
        start = time.monotonic()
        found = kvm.probe()
        assert time.monotonic() - start < HANG_S, found
        check(found)


def test_it_works_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = kvm.probe()
    check(found)
    assert "exit code" not in found.reason, found


def test_no_descriptor_is_left() -> None:
    kvm.probe()  # the first may open what stays
    before = sorted(Path("/proc/self/fd").iterdir())
    kvm.probe()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_cached_answer_is_the_same(tmp_path: Path) -> None:
    first = kvm.cached_probe(tmp_path)
    check(first)
    if (tmp_path / "kvm.json").exists():
        assert kvm.cached_probe(tmp_path) == first
