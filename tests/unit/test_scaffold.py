"""`nixbox init` writes a config that loads, shows every field with its default, and overwrites nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from nixbox.config import schema
from nixbox.config.load import flatten, load
from nixbox.config.scaffold import config_text, init
from nixbox.errors import ConfigError

# A mount's lines need each other; they are covered by the whole file uncommented.
OPTIONS = [x for x in config_text().splitlines() if re.match(r"#(?!source|target|readonly)[\w-]", x)]


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)


def test_the_new_config_loads_and_says_nothing(tmp_path: Path) -> None:
    config = init(tmp_path)
    assert config == tmp_path / ".nixbox/config.toml"
    loaded = load(tmp_path)
    assert set(loaded.origins.values()) == {"default"}
    left = {path for path, value in flatten(tomllib.loads(config.read_text())).items() if value != {}}
    assert left == set()


def test_every_option_uncommented_loads_too(tmp_path: Path) -> None:
    config = init(tmp_path)
    config.write_text(uncommented(config.read_text()))
    (tmp_path / ".nixbox/profiles").mkdir()
    (tmp_path / ".nixbox/profiles/dev.toml").write_text("")
    loaded = load(tmp_path)
    assert loaded.settings.profile == "dev"
    assert {e.name: e.from_host for e in loaded.settings.env} == {"EDITOR": None, "API_TOKEN": "API_TOKEN"}


def test_every_field_is_shown_with_its_default() -> None:
    shown = tomllib.loads(uncommented(config_text()))
    config, faults = schema.validate(schema.Config, shown)
    assert config is not None, faults
    said = flatten(config.model_dump(by_alias=True, exclude_unset=True))
    default = flatten(schema.Config().model_dump(by_alias=True))
    without_default = {"name", "profile", "debian.mirror", "debian.security_mirror"}
    assert {path for path in said if not path.startswith("env.")} == set(default)
    assert {path for path, value in default.items() if value is None} == without_default
    assert {p: said[p] for p in default if p not in without_default} == {
        p: value for p, value in default.items() if p not in without_default
    }


@pytest.mark.parametrize("line", OPTIONS)
def test_each_option_alone_is_valid(line: str) -> None:
    text = config_text()
    _, faults = schema.validate(schema.Config, tomllib.loads(text.replace(f"\n{line}\n", f"\n{line[1:]}\n")))
    assert faults == []


def test_name_and_base_are_written_as_given(tmp_path: Path) -> None:
    init(tmp_path, name="web-1", base="nixpkgs")
    loaded = load(tmp_path)
    assert (loaded.settings.name, loaded.settings.base) == ("web-1", "nixpkgs")
    assert loaded.origins["name"] == loaded.origins["base"] == "config.toml"


@pytest.mark.parametrize(("name", "base"), [("..", "debian"), ("", "debian"), ("ok", "debain")])
def test_bad_names_and_bases_write_nothing(tmp_path: Path, name: str, base: str) -> None:
    with pytest.raises(ConfigError):
        init(tmp_path, name=name, base=base)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    init(tmp_path, name="first")
    before = (tmp_path / ".nixbox/config.toml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        init(tmp_path, name="second")
    assert (tmp_path / ".nixbox/config.toml").read_text() == before
    assert sorted(p.name for p in (tmp_path / ".nixbox").iterdir()) == [".gitignore", "config.toml"]


def test_a_dangling_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / ".nixbox").mkdir()
    (tmp_path / ".nixbox/config.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists already"):
        init(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_without_config_is_completed(tmp_path: Path) -> None:
    (tmp_path / ".nixbox/machines").mkdir(parents=True)
    (tmp_path / ".nixbox/.gitignore").write_text("mine\n")
    init(tmp_path)
    assert load(tmp_path)
    assert (tmp_path / ".nixbox/.gitignore").read_text() == "mine\n"


def test_a_file_in_the_way_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / ".nixbox").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        init(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        init(tmp_path)
    assert list((tmp_path / ".nixbox").iterdir()) == []


def test_git_keeps_what_belongs_to_it(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git on this host")
    init(tmp_path)
    kept = ["config.toml", "nixbox.lock", ".gitignore", "profiles/dev.toml"]
    ignored = ["machines/box/overlay.img", "machines/config.toml", "machines/box/ssh/key", "other"]
    for name in kept + ignored:
        path = tmp_path / ".nixbox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run([git, "init", "-q"], cwd=tmp_path, env=env, check=True)
    listed = subprocess.run(
        [git, "ls-files", "--others", "--exclude-standard"],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert sorted(listed.stdout.split()) == sorted(f".nixbox/{name}" for name in kept)
