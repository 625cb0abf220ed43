"""A program of lib.mkSandbox as its user runs it: any directory becomes a workspace on the image that is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixbox.image import store
from nixbox.plan import nixexpr
from tests.vm.conftest import UP_TIMEOUT_S, Home, Workspace, _end

REPO = Path(__file__).resolve().parents[2]
BUILD_S = 300.0
SANDBOX = """
let
  lock = %s;
  locked = builtins.fromJSON (builtins.readFile lock);
  fetch = import %s/nix/bases/debian/fetch.nix { mirrors = { }; };
  tools = import %s/nix/bases/debian/tools.nix {
    lock = locked;
    system = { amd64 = "x86_64-linux"; arm64 = "aarch64-linux"; }.${locked.arch};
    inherit (fetch) fetchDeb;
  };
in
import %s/nix/flake/sandbox.nix ({ inherit lock; inherit (tools) runBusybox busybox; } // %s)
"""


@dataclass(frozen=True)
class Program:
    """bin/NAME, and the image that it brings."""

    path: Path
    image: str
    env: dict[str, str]

    def __call__(
        self, *words: str | Path, code: int = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.path, *words],
            cwd=cwd or self.path.parent,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=UP_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def sandbox(home: Home) -> Iterator[Program]:
    if store.private_root() is not None:
        pytest.skip("in a store of one's own a program of it runs only by `nix run`")
    top = Path(tempfile.mkdtemp(prefix="s", dir=home.path))
    # This checkout's nixbox, called as that of a flake is.
    program = top / "nixbox/bin/nixbox"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nixbox "$@"\n')
    program.chmod(0o755)
    (top / "lock").write_text(home.lock)
    given: dict[str, nixexpr.Value] = {
        "name": "demo",
        "nixbox": str(top / "nixbox"),
        "plugins": [{"name": "mine", "scripts": ["echo from the plugin >/tmp/plugin"]}],
        "profile": {"name": "dev", "setup": "echo from the profile | sudo tee /etc/profiled"},
        "config": {"mounts": [], "resources": {"vcpus": 1, "memory": "320MiB", "disk": "1GiB"}},
    }
    (top / "sandbox.nix").write_text(SANDBOX % (top / "lock", REPO, REPO, REPO, nixexpr.render(given)))
    argv = ["nix", *store.setup().options, "build", "--json", "--no-link", "-f", str(top / "sandbox.nix")]
    built = subprocess.run(argv, env=home.env, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert built.returncode == 0, built.stderr
    out = Path(json.loads(built.stdout)[0]["outputs"]["out"])
    asked = ["nix", *store.setup().options, "eval", "--json", "-f", str(top / "sandbox.nix"), "image.outPath"]
    image = subprocess.run(asked, env=home.env, capture_output=True, text=True, timeout=BUILD_S, check=True).stdout
    yield Program(out / "bin/demo", json.loads(image), dict(home.env))
    shutil.rmtree(top)


@pytest.fixture
def directory(home: Home) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="d", dir=home.path))
    yield path
    _end(Workspace(path, home.env))


def test_any_directory_becomes_a_machine_of_its_image(sandbox: Program, directory: Path) -> None:
    (directory / "mine.txt").write_text("mine")
    up = sandbox(directory)
    # Not fetched, not built: what the flake brought.
    assert f"image {sandbox.image}" in up.stderr
    assert "building" not in up.stderr and "fetching" not in up.stderr
    assert sorted(path.name for path in directory.iterdir()) == [".nixbox", "mine.txt"]
    said = sandbox(directory, "run", "--no-tty", "--", "cat", "/tmp/plugin", "/etc/profiled")
    assert said.stdout == "from the plugin\nfrom the profile\n"
    record = json.loads((directory / ".nixbox/machines/demo/machine.json").read_text())
    assert record["image"] == sandbox.image

    # Again: what is there is left as it is.
    before = {path: path.stat().st_mtime_ns for path in (directory / ".nixbox").glob("*.toml")}
    sandbox(cwd=directory)
    assert {path: path.stat().st_mtime_ns for path in (directory / ".nixbox").glob("*.toml")} == before


def test_what_is_the_user_s_is_never_overwritten(sandbox: Program, directory: Path) -> None:
    (directory / ".nixbox/profiles").mkdir(parents=True)
    (directory / ".nixbox/profiles/dev.toml").write_text("# mine\n")
    refused = sandbox(directory, code=2).stderr
    assert f"{directory}/.nixbox/profiles/dev.toml is another one than demo's" in refused
    assert [path.name for path in (directory / ".nixbox").rglob("*") if path.is_file()] == ["dev.toml"]

    shutil.rmtree(directory / ".nixbox")
    (directory / "elsewhere").mkdir()
    (directory / ".nixbox").symlink_to("elsewhere")
    assert "is a link" in sandbox(directory, code=2).stderr
    (directory / ".nixbox").unlink()
    (directory / ".nixbox").mkdir()
    (directory / ".nixbox/profiles").symlink_to("../elsewhere")
    assert "is a link" in sandbox(directory, code=2).stderr
    assert list((directory / "elsewhere").iterdir()) == []
    assert [path.name for path in (directory / ".nixbox").iterdir()] == ["profiles"]
    assert "there is no directory" in sandbox(directory / "none", code=2).stderr
    assert "unknown option" in sandbox("--up", code=2).stderr
    assert "usage: demo" in sandbox("--help").stdout


def test_only_the_image_that_building_would_give_is_taken(sandbox: Program, workspace: Workspace) -> None:
    workspace("image", "use", sandbox.image)
    assert workspace("build").stdout.strip() == sandbox.image
    (workspace.path / ".nixbox/profiles").mkdir(exist_ok=True)
    (workspace.path / ".nixbox/profiles/other.toml").write_text('build = "touch /other"\n')
    other = workspace("image", "use", "--profile", "other", sandbox.image, code=2).stderr
    assert "is not the image of this workspace" in other
    kernel = str((Path(sandbox.image) / "vmlinux").resolve().parent)
    assert "is not the image of this workspace" in workspace("image", "use", kernel, code=2).stderr
    lock = workspace.path / ".nixbox/nixbox.lock"
    lock.write_text(lock.read_text().replace('"requested": []', '"requested": ["jq"]'))
    assert "the lock does not fit the config: gone: jq" in workspace("image", "use", sandbox.image, code=2).stderr


def test_an_image_that_is_not_in_the_store_is_named(workspace: Workspace) -> None:
    """Of this lock with another build script: Nix knows its path, and nobody has built it."""
    (workspace.path / ".nixbox/profiles").mkdir(exist_ok=True)
    (workspace.path / ".nixbox/profiles/other.toml").write_text('build = "touch /never-built"\n')
    refused = workspace("image", "use", "--profile", "other", "/nix/store/x", code=2).stderr
    path = refused.split("which is ")[1].split()[0]
    assert path.endswith("-nixbox-image")
    missing = workspace("image", "use", "--profile", "other", path, code=2).stderr
    assert f"{path} is not in the Nix store" in missing
