"""The kept configuration is the one that would be read, and holds no secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nixbox.config import cache, load
from nixbox.config.settings import Overrides
from nixbox.config.sources import Sources
from nixbox.errors import ConfigError

CONFIG = """name = "web"
profile = "dev"
plugins = ["./tools/one"]
mounts = [{ source = ".", target = "~/w", readonly = true }]
scripts = ["echo up"]
[network]
domains = ["example.org"]
ports = [443]
[env]
LITERAL = "planted-secret"
TAKEN = { from_host = "TOKEN" }
[hooks]
pre-up = ["true"]
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    place = tmp_path / "w"
    (place / ".nixbox/profiles").mkdir(parents=True)
    (place / "tools/one").mkdir(parents=True)
    (tmp_path / "config/nixbox/profiles").mkdir(parents=True)
    (place / ".nixbox/config.toml").write_text(CONFIG)
    (tmp_path / "config/nixbox/profiles/dev.toml").write_text('packages = ["jq"]\nsetup = "true"\nsetup_env = true\n')
    (place / "tools/one/plugin.toml").write_text('packages = ["tree"]\n')
    return place


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache/nixbox/config").glob("*"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the files are really read and checked."""
    reads: list[int] = []
    real = load.load

    def reading(workspace: Path, overrides: Overrides | None = None, sources: Sources | None = None) -> object:
        reads.append(1)
        return real(workspace, overrides, sources)

    monkeypatch.setattr(load, "load", reading)
    return reads


def test_what_is_kept_is_what_would_be_read(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = load.load(workspace)
    reads = counted(monkeypatch)
    assert cache.load(workspace) == fresh
    assert cache.load(workspace) == fresh and len(reads) == 1
    (file,) = kept(tmp_path)
    assert file.stat().st_mode & 0o077 == 0
    assert "planted-secret" not in file.read_text()


def test_every_change_is_seen(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    changes = [
        (workspace / ".nixbox/config.toml", CONFIG.replace("echo up", "echo down")),
        (workspace / ".nixbox/config.toml", CONFIG.replace("planted-secret", "other")),
        (workspace / "tools/one/plugin.toml", 'packages = ["file"]\n'),
        (tmp_path / "config/nixbox/profiles/dev.toml", 'packages = ["less"]\n'),
        (workspace / ".nixbox/profiles/dev.toml", 'packages = ["nearer"]\n'),  # it comes before the user's own
    ]
    cache.load(workspace)
    for number, (path, text) in enumerate(changes, 2):
        path.write_text(text)
        assert cache.load(workspace) == load.load(workspace)
        assert len(reads) == 2 * number - 1, path
    (workspace / ".nixbox/profiles/dev.toml").unlink()
    assert "less" in cache.load(workspace).settings.packages


def test_a_fault_is_said_each_time(workspace: Path) -> None:
    cache.load(workspace)
    (workspace / ".nixbox/config.toml").write_text(CONFIG + "[resources]\nvcpus = 0\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="fault"):
            cache.load(workspace)


def test_each_command_line_is_kept_for_itself(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (None, Overrides(vcpus=7), Overrides(vcpus=3, memory="1GiB"), Overrides(backend="krun"))
    fresh = [load.load(workspace, overrides) for overrides in said]
    assert len({repr(loaded) for loaded in fresh}) == len(said)
    reads = counted(monkeypatch)
    for _ in range(2):
        assert [cache.load(workspace, overrides) for overrides in said] == fresh
    assert len(reads) == len(said)
    (workspace / ".nixbox/config.toml").write_text(CONFIG.replace("echo up", "echo down"))
    assert cache.load(workspace, said[1]) == load.load(workspace, said[1]) != fresh[1]


def test_an_environment_on_the_command_line_is_not_kept(workspace: Path, tmp_path: Path) -> None:
    assert cache.load(workspace, Overrides(env=(("A", "b"),))).settings.env[-1].value == "b"
    cache.load(workspace, Overrides(vcpus=7, env_from_host=("A",)))
    assert kept(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": 3}', '{"files": [], "absent": [], "digest": null}'])
def test_a_damaged_cache_is_none(workspace: Path, tmp_path: Path, text: str) -> None:
    fresh = cache.load(workspace)
    (file,) = kept(tmp_path)
    file.write_text(text)
    assert cache.load(workspace) == fresh


def test_a_cache_that_cannot_be_written_is_none(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/nixbox").mkdir(mode=0o700)
    (tmp_path / "cache/nixbox/config").write_text("in the way")
    assert cache.load(workspace).settings.name == "web"


@pytest.mark.parametrize("year", [1971, 2200])  # the clock may have been ahead when they were written
def test_the_newest_are_kept(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    monkeypatch.setattr(cache, "_MOST", 3)
    directory = tmp_path / "cache/nixbox/config"
    cache.load(workspace)
    (first,) = kept(tmp_path)
    for number in range(5):
        other = directory / f"{number:024}.json"
        other.write_text("{}")
        at = (year - 1970) * 31_556_952 + number
        os.utime(other, (at, at))
    (directory / "dangling").symlink_to("nowhere")
    os.utime(directory / "dangling", (0, 0), follow_symlinks=False)
    reads = counted(monkeypatch)
    for _ in range(2):
        cache.load(workspace, Overrides(profile="dev"))
    assert len(reads) == 1  # it was kept
    left = kept(tmp_path)
    assert len(left) == 3 and directory / f"{4:024}.json" in left
    assert (first in left) == (year < 2000)
