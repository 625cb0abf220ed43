"""What every unit test has: a state and a place for sockets of its own, so that none writes into the user's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", name="place_of_sockets")
def _place_of_sockets() -> Iterator[str]:
    """A short path, as sockets need it: not pytest's, which may be too long to be taken."""
    with tempfile.TemporaryDirectory(prefix="nbx") as directory:
        yield directory


@pytest.fixture(autouse=True)
def _own_state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, place_of_sockets: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("XDG_RUNTIME_DIR", place_of_sockets)
