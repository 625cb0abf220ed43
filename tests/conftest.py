"""What machines in tests/vm and hosts in tests/kvm share: one home, one lock, one image."""

from __future__ import annotations

import pytest

from tests.vm.conftest import make_home

home = pytest.fixture(scope="session", name="home")(make_home)
