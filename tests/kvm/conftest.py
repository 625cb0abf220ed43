"""One emulated KVM host is booted and saved for the whole session; every test goes on from there."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from tests.kvm import box as boxes
from tests.vm.conftest import Home


@pytest.fixture(scope="session")
def saved(home: Home, tmp_path_factory: pytest.TempPathFactory) -> boxes.Saved:
    """The box before it has anybody's files."""
    if platform.machine() != "x86_64":
        pytest.skip("QEMU emulates nested virtualization of AMD only")
    directory = tmp_path_factory.mktemp("box")
    kernel, initrd = boxes.build(boxes.lock_of(home.lock), directory)
    return boxes.save(kernel, initrd, directory)


@pytest.fixture
def box(saved: boxes.Saved) -> Iterator[boxes.Box]:
    """A KVM host of the test's own."""
    with boxes.restored(saved) as box:
        yield box
