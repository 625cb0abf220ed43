"""The name of a workspace's machine, found without the reader of TOML, is what that would find."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from nixbox.config import scaffold
from nixbox.session import which

PLAIN = [
    "",
    'name = "box"',
    'name="box"  # the name\nbase = "debian"\n',
    '# name = "no"\n\n  name = "box"\r\n[env]\nname = "other"\n',
    '[machine]\nname = "not-this"\n',
    'base = "debian"\n\n[[mounts]]\nsource = "."\n',
    'packages = [\n  "a",\n]\nname = "box"\n',
]
UNSURE = [
    '"name" = "box"',
    "'name' = 'box'",
    "name = 'box'",
    'name = "b\\u006fx"',
    'text = """\nname = "not-this"\n"""\nname = "box"\n',
    "text = '''\n[table]\n'''\nname = \"box\"\n",
    'name = """box"""',
    'names = "x"\nname = "box"',
]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    found = tmp_path / "work"
    (found / ".nixbox").mkdir(parents=True)
    return found


@pytest.mark.parametrize("text", [*PLAIN, *UNSURE])
def test_it_is_what_toml_says(workspace: Path, text: str) -> None:
    (workspace / ".nixbox" / "config.toml").write_bytes(text.encode())
    assert which.default_machine(workspace) == tomllib.loads(text).get("name", "work")


@pytest.mark.parametrize("text", PLAIN)
def test_it_is_found_without(workspace: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / ".nixbox" / "config.toml").write_text(text)
    monkeypatch.delattr(tomllib, "loads")
    assert which.default_machine(workspace) == ("box" if 'name = "box"' in text or 'name="box"' in text else "work")


def test_so_it_is_in_a_new_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "fresh"
    directory.mkdir()
    scaffold.init(directory, name=None, base="debian")
    monkeypatch.delattr(tomllib, "loads")
    assert which.default_machine(directory) == "fresh"
