"""What tests of pins share: a server that stands for GitHub, and workspaces that reach it."""

from __future__ import annotations

import pytest

from tests.github import make_box, make_repository, make_world

world = pytest.fixture(scope="module", name="world")(make_world)
box = pytest.fixture(name="box")(make_box)
repository = pytest.fixture(name="repository")(make_repository)
