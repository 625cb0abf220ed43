"""The plugins that come with nixbox: they load, they say what they do, and what they bring is well-formed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from nixbox.config.fields import domain_fault
from nixbox.config.load import RESERVED, load
from nixbox.config.settings import Loaded

ROOT = Path(__file__).parents[2] / "plugins"
NAMES = sorted(place.name for place in ROOT.iterdir() if place.is_dir())
NEW = ("aws", "claude-code", "node", "python-uv", "rust", "scala-sbt")
# Every place that a plugin may name: none of them is one of a company's or of the machine that this was written on.
PUBLIC = (
    *("amazonaws.com", "api.aws", "awsapps.com", "api.anthropic.com", "claude.ai", "platform.claude.com"),
    *("console.anthropic.com", "registry.npmjs.org", "registry.yarnpkg.com", "pypi.org", "files.pythonhosted.org"),
    *("crates.io", "repo1.maven.org", "repo.maven.apache.org", "central.sonatype.com", "oss.sonatype.org"),
    *("repo.scala-sbt.org", "repo.typesafe.com", "github.com"),
)


BASHISMS = r"(?m)\[\[\s|^\s*(?:function|local|source|declare)\s|[= ]\$'|<<<|\w\+=|(?<!\d)&>|\$\{\w+(?://|\^|,)"


def toml(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name / "plugin.toml").read_text())


def programs() -> list[Path]:
    return sorted(path for path in ROOT.glob("*/commands/*") if path.is_file())


def scripts() -> list[tuple[str, str]]:
    """Every piece of shell in a plugin.toml, with its title; what `build` writes into the image is among them."""
    found = []
    for name in NAMES:
        plugin = toml(name)
        found += [(f"{name} script {i}", text) for i, text in enumerate(plugin.get("scripts", []))]
        for event, hooks in plugin.get("hooks", {}).items():
            found += [(f"{name} {event} {i}", text) for i, text in enumerate(hooks)]
        if build := plugin.get("build"):
            found.append((f"{name} build", build))
            found += [
                (f"{name} program {i}", text)
                for i, text in enumerate(re.findall(r"<<'END'\n(.*?)END\n", build, re.S))
            ]
    return found


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Loaded:
    """All of them in one workspace, for the base that the test's parameter names."""
    monkeypatch.setattr(paths, "plugins_dir", lambda: ROOT)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / ".nixbox").mkdir()
    config = f'base = "{request.param}"\nplugins = {NAMES!r}\n'.replace("'", '"')
    (tmp_path / ".nixbox" / "config.toml").write_text(config)
    return load(tmp_path)


@pytest.mark.parametrize("loaded", ["debian", "nixpkgs"], indirect=True)
def test_all_load_together_for_both_bases(loaded: Loaded) -> None:
    settings = loaded.settings
    assert [used.name for used in loaded.plugins] == NAMES
    assert set(NEW) <= set(NAMES)
    tools = {"debian": {"awscli", "npm", "cargo"}, "nixpkgs": {"awscli2", "claude-code", "uv", "sbt"}}[settings.base]
    assert tools <= set(settings.packages)
    targets = [seed.target for seed in settings.seeds]
    assert sorted(targets) == ["~/.cache/coursier", "~/.cache/uv", "~/.cargo/registry", "~/.ivy2", "~/.npm"]
    assert {seed.target for seed in settings.seeds if not seed.on_up} == {"~/.cache/coursier", "~/.ivy2"}
    assert not settings.requires_env
    assert {hook.plugin for hooks in settings.hooks.values() for hook in hooks} == {"scala-sbt"}


def test_every_plugin_has_a_readme_that_names_its_commands() -> None:
    for name in NAMES:
        text = (ROOT / name / "README.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert f'plugins = ["{name}"]' in text
        assert toml(name)["description"]
        for command in toml(name).get("commands", []):
            assert f"nixbox {name} {command['name']}" in text
        for seed in toml(name).get("seeds", []):
            assert f"`{seed['target']}`" in text


def test_domains_are_well_formed_and_public() -> None:
    for name in NAMES:
        for domain in toml(name).get("network", {}).get("domains", []):
            assert domain_fault(domain) is None
            assert domain in PUBLIC, domain


def test_no_plugin_names_a_host_or_a_directory_of_some_machine() -> None:
    allowed = (*PUBLIC, "corp.awsapps.com")
    for path in (path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        text = path.read_text()
        for host in re.findall(r"https?://([^/\s\"'`$]+)", text):
            assert host.endswith(allowed), f"{path}: {host}"
        assert not re.search(r"(?<![\w~.$])/(root|work|home/\w+|Users/\w+)/", text), path


def test_commands_are_executable_and_begin_with_their_interpreter() -> None:
    known = {
        ROOT / name / f"commands/{command['name']}" for name in NAMES for command in toml(name).get("commands", [])
    }
    assert set(programs()) == known
    for path in programs():
        assert path.stat().st_mode & 0o111 == 0o111
        first = path.read_text().splitlines()[0]
        assert first in ("#!/bin/sh", "#!/usr/bin/env nixbox-python")
        assert path.parents[1].name not in RESERVED


@pytest.mark.parametrize("path", programs(), ids=lambda path: f"{path.parents[1].name}-{path.name}")
def test_commands_can_be_parsed(path: Path) -> None:
    text = path.read_text()
    if text.startswith("#!/bin/sh"):
        assert_shell(text)
    else:
        compile(text, str(path), "exec")


@pytest.mark.parametrize(("title", "text"), scripts(), ids=[title for title, _ in scripts()])
def test_scripts_can_be_parsed(title: str, text: str) -> None:
    assert_shell(text, "bash" if text.startswith("#!/bin/bash") else "sh")
    assert "set -x" not in text


def assert_shell(text: str, shell: str = "sh") -> None:
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if shell == "sh":
        # What is bash's own, and yet passes as words.
        assert not re.search(BASHISMS, code_of(text))


def code_of(text: str) -> str:
    """Shell without here-documents and comments."""
    without = re.sub(r"<<'END'\n.*?END\n", "\n", text, flags=re.S)
    return "\n".join(line for line in without.splitlines() if not line.lstrip().startswith("#"))


def test_what_looks_for_bashisms_finds_them() -> None:
    assert_shell("echo fine\n")
    for text in ("x+=1\n", "[[ a = b ]]\n", "f() {\n  local x\n}\n", "echo ${x//a/b}\n", "x=$'a'\n"):
        with pytest.raises(AssertionError):
            assert_shell(text)
    with pytest.raises(AssertionError):
        assert_shell("if true; then\n")


# --- warm-cache: which caches it asks for ----------------------------------------------------------------


@pytest.fixture
def warm(tmp_path: Path) -> Any:
    """Run warm-cache with a `nixbox` that prints its arguments; the host has both caches unless told."""

    def run(*words: str, pending: str | None = None, has: tuple[str, ...] = (".cache/coursier", ".ivy2")) -> str:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        (programs / "nixbox").write_text('#!/bin/sh\necho "$@"\n')
        (programs / "nixbox").chmod(0o755)
        home = tmp_path / "-".join(("home", *has)).replace("/", "_")
        for cache in has:
            (home / cache).mkdir(parents=True, exist_ok=True)
        env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(home)}
        if pending is not None:
            env["NIXBOX_SEEDS_PENDING"] = pending
        command = ROOT / "scala-sbt" / "commands" / "warm-cache"
        done = subprocess.run([command, *words], env=env, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    return run


def test_warm_cache_asks_for_what_the_host_has(warm: Any) -> None:
    assert warm() == "seed ~/.cache/coursier ~/.ivy2\n"
    assert warm("--force") == "seed --force ~/.cache/coursier ~/.ivy2\n"
    assert warm(has=(".ivy2",)) == "seed ~/.ivy2\n"
    assert "nothing to copy" in warm(has=())
    assert "nothing to copy" in warm("--force", has=())


def test_the_hook_asks_for_what_the_machine_lacks_and_says_nothing_else(warm: Any) -> None:
    assert warm("--pending", pending="") == ""
    assert warm("--pending") == ""
    assert warm("--pending", pending="~/.npm ~/.ivy2") == "seed ~/.ivy2\n"
    assert warm("--pending", pending="~/.cache/coursier ~/.ivy2") == "seed ~/.cache/coursier ~/.ivy2\n"
    assert warm("--pending", pending="~/.ivy2x ~/.cache/coursier/v1") == ""
    assert warm("--pending", pending="~/.ivy2", has=(".cache/coursier",)) == ""
