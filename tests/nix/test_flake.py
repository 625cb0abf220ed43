"""The flake, from a clone of its own, with a store of its own and without a network: what works then, works
without nixpkgs, which is in neither."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixbox.image import build, lock
from nixbox.image.resolve import BASE_REQUEST
from nixbox.plan.model import ImageSpec, Script
from nixbox.run import CommandError
from tests.flakes import HELLO_LOCK, REPO, STAND_IN, Clone, make_clone

IMAGE = ".#packages.x86_64-linux.image-hello-debian"

# The flake's function beside nixbox's own expression (./own.nix), all for one lock.
COMPARE = """
let
  make = (builtins.getFlake (toString ./repo)).lib.mkDebianImage;
  own = import ./own.nix;
  lock = ./repo/nix/flake/hello.lock;
  more = builtins.fromJSON (builtins.readFile ./more.json);
  paths = made: [ made.image.drvPath made.inputs.drvPath ];
in
{
  own = paths own;
  byPath = paths (make ({ inherit lock; } // more));
  byContent = paths (make ({ lock = builtins.fromJSON (builtins.readFile lock); } // more));
  ownImage = own.image.outPath;
  elsewhere = (make ({ inherit lock; } // more // { mirrors = { }; })).image.outPath;
}
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    made = make_clone(tmp_path_factory.mktemp("flake"))
    yield made
    # In particular flake.lock: Nix found nothing to add to it.
    assert made.git("status", "--porcelain") == ""


def test_the_lock_is_a_real_pin() -> None:
    pin = json.loads((REPO / "flake.lock").read_text())["nodes"]["nixpkgs"]
    assert re.fullmatch(r"[0-9a-f]{40}", pin["locked"]["rev"])
    assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", pin["locked"]["narHash"])
    original = pin["original"]
    url = f'"{original["type"]}:{original["owner"]}/{original["repo"]}/{original["ref"]}"'
    assert f"inputs.nixpkgs.url = {url};" in (REPO / "flake.nix").read_text()


def test_the_hello_image_is_the_example_s_and_names_no_host() -> None:
    config = tomllib.loads((REPO / "examples/hello/.nixbox/config.toml").read_text())
    committed = lock.load(HELLO_LOCK)
    assert isinstance(committed, lock.Lock)
    mend = f"renew it: `nixbox lock` in a copy of examples/hello, then copy its .nixbox/nixbox.lock to {HELLO_LOCK}"
    held = (committed.suite, sorted(committed.requested), committed.base_requested)
    assert held == ("trixie", sorted(config["packages"]), BASE_REQUEST), mend
    assert not re.search(r"://|\b[a-z0-9-]+\.(org|com|net|io|dev)\b", HELLO_LOCK.read_text())


def test_metadata_gives_the_pin(clone: Clone) -> None:
    shown = json.loads(clone.nix("flake", "metadata", "--json"))
    pinned = json.loads((REPO / "flake.lock").read_text())
    assert shown["locks"]["nodes"]["nixpkgs"] == pinned["nodes"]["nixpkgs"]


def test_show_needs_no_nixpkgs(clone: Clone) -> None:
    shown = json.loads(clone.nix("flake", "show", "--json"))
    assert shown["packages"]["x86_64-linux"]["image-hello-debian"]["name"] == "nixbox-image"
    programs = {"default", "nixbox", "nixbox-debian"}
    assert set(shown["packages"]["x86_64-linux"]) == programs | {"image-hello", "image-hello-debian"}
    assert set(shown["packages"]["aarch64-linux"]) == programs
    for output in ("packages", "apps", "checks"):
        assert set(shown[output]) == {"x86_64-linux", "aarch64-linux"}
    for output in ("devShells", "formatter"):
        assert set(shown[output]) == {"x86_64-linux", "aarch64-linux", "aarch64-darwin"}
    assert set(shown["checks"]["aarch64-linux"]) == {"ruff", "mypy", "unit", "nix"}
    assert {"default", "nixbox"} <= set(shown["nixosModules"])
    assert {"default", "flake"} <= set(shown["templates"])


def test_what_needs_nixpkgs_asks_for_the_pinned_one(clone: Clone) -> None:
    rev = json.loads((REPO / "flake.lock").read_text())["nodes"]["nixpkgs"]["locked"]["rev"]
    with pytest.raises(CommandError, match=rf"unable to download .*{rev}"):
        clone.nix("eval", ".#packages.x86_64-linux.nixbox.drvPath")


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"build": [{"origin": "profile dev", "script": "echo hi >/etc/hi\n"}]}, id="build"),
        pytest.param({"build": [{"origin": "a", "script": "b"}], "buildNetwork": True}, id="network"),
    ],
)
def test_the_library_makes_what_nixbox_makes(clone: Clone, more: dict[str, Any]) -> None:
    mirrors = {"debian": "http://mirror.invalid/debian", "security": "http://mirror.invalid/security"}
    scripts = tuple(Script(s["origin"], s["script"]) for s in more.get("build", ()))
    spec = ImageSpec("debian", "trixie", ("jq",), scripts, more.get("buildNetwork", False))
    (clone.top / "own.nix").write_text(build.expression(spec, HELLO_LOCK, mirrors))
    (clone.top / "more.json").write_text(json.dumps({"mirrors": mirrors, **more}))
    (clone.top / "compare.nix").write_text(COMPARE)
    made = clone.eval("--file", str(clone.top / "compare.nix"))
    assert made["byPath"] == made["own"]
    assert made["byContent"] == made["own"]
    # Another mirror is another derivation of each download, but not another image.
    assert made["elsewhere"] == made["ownImage"]
    if not more:
        assert clone.eval(f"{IMAGE}.outPath") == made["ownImage"]
        assert clone.eval(f"{IMAGE}.drvPath").endswith("-nixbox-image.drv")


@pytest.mark.parametrize("system", ["x86_64-linux", "aarch64-linux", "aarch64-darwin"])
def test_the_rest_evaluates_with_a_stand_in_for_nixpkgs(clone: Clone, tmp_path: Path, system: str) -> None:
    (tmp_path / "flake.nix").write_text(STAND_IN)
    stand_in = ("--override-input", "nixpkgs", f"path:{tmp_path}", "--no-write-lock-file")

    outputs = [f"devShells.{system}.default", f"formatter.{system}"]
    if system.endswith("-linux"):
        outputs += [f"packages.{system}.nixbox"]
        outputs += [f"checks.{system}.{name}" for name in ("ruff", "mypy", "unit", "nix")]
    for output in outputs:
        name = clone.eval(*stand_in, f".#{output}.name")
        drv = clone.eval(*stand_in, f".#{output}.drvPath")
        assert Path(drv).name[33:] == f"{name}.drv", "the name that is shown is not the derivation's"
    if system.endswith("-linux"):
        program = clone.eval(*stand_in, f".#apps.{system}.default.program")
        assert program == clone.eval(*stand_in, f".#packages.{system}.default.outPath") + "/bin/nixbox"


def test_the_application_has_the_dependencies_of_pyproject(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "flake.nix").write_text(STAND_IN)
    output = ".#packages.x86_64-linux.nixbox"
    stand_in = ("--override-input", "nixpkgs", f"path:{tmp_path}", "--no-write-lock-file")
    drv = clone.eval(*stand_in, f"{output}.drvPath")
    env = json.loads(clone.nix("show-derivation", drv))[drv]["env"]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=!~ \[]", line)[0] for line in project["dependencies"]}
    assert {path[44:] for path in env["dependencies"].split()} == wanted
    assert env["name"] == f"nixbox-{project['version']}"


def test_the_template_is_a_workspace(clone: Clone) -> None:
    # Not by `nix flake init`: Nix 2.8 looks for a template in the wrong place when the store is elsewhere.
    path = clone.eval(".#templates.default.path")
    config = clone.physical(path) / ".nixbox" / "config.toml"
    assert config.read_text() == (REPO / "examples/hello/.nixbox/config.toml").read_text()
