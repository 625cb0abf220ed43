"""The flake, from a clone of its own, with a store of its own and without a network: what works then, works
without nixpkgs, which is in neither."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nixbox.errors import NixboxError
from nixbox.image import build, lock, store
from nixbox.image.resolve import BASE_REQUEST
from nixbox.plan.model import ImageSpec, Script
from nixbox.run import CommandError, run

REPO = Path(__file__).resolve().parents[2]
HELLO_LOCK = REPO / "nix" / "flake" / "hello.lock"
IMAGE = ".#packages.x86_64-linux.image-hello-debian"
FILES = ("flake.nix", "flake.lock", "pyproject.toml", "nix", "examples")
TIMEOUT_S = 120.0

# Exactly what nix/flake/nixpkgs.nix may use of nixpkgs. Its functions name their arguments, so that one which
# they do not know is refused.
STAND_IN = """
{
  outputs = { self }: {
    legacyPackages = builtins.listToAttrs (map (system: { name = system; value =
      let
        made = name: more: derivation ({ inherit name system; builder = "/stand-in"; } // more);
        plain = names: builtins.listToAttrs (map (name: { inherit name; value = made name { }; }) names);
        python = plain [
          "cffi" "hatchling" "hypothesis" "mypy" "nix-prefetch-github" "pydantic" "pytest" "pytest-timeout" "sh"
          "tomlkit" "typer"
        ];
      in
      plain [
        "apt" "e2fsprogs" "gnumake" "nftables" "nix" "nixfmt" "nixfmt-tree" "openssh" "passt" "qemu" "ruff"
        "util-linux" "virtiofsd"
      ] // {
        lib = {
          makeBinPath = packages: builtins.concatStringsSep ":" (map (package: "${package}/bin") packages);
          licenses.asl20 = { };
        };
        mkShell = { name, packages }: made name { inherit packages; };
        python3.withPackages = choose: made "python3-env" { packages = choose python; };
        python3Packages = python // {
          buildPythonApplication =
            { pname, version, src, pyproject, build-system, dependencies, pythonRelaxDeps, pythonImportsCheck
            , makeWrapperArgs, meta }:
            made "${pname}-${version}" {
              inherit src pyproject build-system dependencies pythonRelaxDeps pythonImportsCheck makeWrapperArgs;
            };
        };
      };
    }) [ "x86_64-linux" "aarch64-linux" ]);
  };
}
"""

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


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone of the flake in `repo`; `nix` runs there with no network, and with nothing in its store."""

    top: Path
    unshare: tuple[str, ...]

    @property
    def repo(self) -> Path:
        return self.top / "repo"

    @property
    def store(self) -> Path:
        return self.top / "store"

    @property
    def env(self) -> dict[str, str]:
        who = {"NAME": "Test", "EMAIL": "test@localhost"}
        return {
            "HOME": str(self.top / "home"),
            "XDG_CACHE_HOME": str(self.top / "home" / ".cache"),
            "XDG_CONFIG_HOME": str(self.top / "home" / ".config"),
            **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()},
        }

    def git(self, *words: str) -> str:
        return run(["git", *words], cwd=self.repo, env=self.env, timeout_s=TIMEOUT_S).stdout

    def nix(self, *words: str, cwd: Path | None = None) -> str:
        # Empty: a user namespace has no build users, and nothing is built here.
        options = (*store.setup().options, "--option", "build-users-group", "", "--store", str(self.store))
        argv = [*self.unshare, "nix", *options, *words]
        return run(argv, cwd=cwd or self.repo, env=self.env, timeout_s=TIMEOUT_S).stdout

    def eval(self, *words: str) -> Any:
        return json.loads(self.nix("eval", "--json", *words))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    for program in ("nix", "git", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this host")
    unshare = ("unshare", "-n") if os.geteuid() == 0 else ("unshare", "-rn")
    try:
        run([*unshare, "true"], timeout_s=TIMEOUT_S)
    except NixboxError as error:
        pytest.skip(f"this host allows no network namespace: {error}")
    made = Clone(tmp_path_factory.mktemp("flake"), unshare)
    (made.top / "home").mkdir()
    made.repo.mkdir()
    for name in FILES:
        if (REPO / name).is_dir():
            # As in a clone: without what running the example leaves in its workspace.
            shutil.copytree(REPO / name, made.repo / name, ignore=shutil.ignore_patterns("machines"))
        else:
            shutil.copy(REPO / name, made.repo / name)
    made.git("init", "--quiet")
    made.git("add", "--all")
    made.git("commit", "--quiet", "--message", "flake")
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
    assert set(shown["packages"]["aarch64-linux"]) == {"default", "nixbox"}
    for output in ("packages", "apps", "devShells", "formatter"):
        assert set(shown[output]) == {"x86_64-linux", "aarch64-linux"}


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


@pytest.mark.parametrize("system", ["x86_64-linux", "aarch64-linux"])
def test_the_rest_evaluates_with_a_stand_in_for_nixpkgs(clone: Clone, tmp_path: Path, system: str) -> None:
    (tmp_path / "flake.nix").write_text(STAND_IN)
    stand_in = ("--override-input", "nixpkgs", f"path:{tmp_path}", "--no-write-lock-file")

    for output in (f"packages.{system}.nixbox", f"devShells.{system}.default", f"formatter.{system}"):
        name = clone.eval(*stand_in, f".#{output}.name")
        drv = clone.eval(*stand_in, f".#{output}.drvPath")
        assert Path(drv).name[33:] == f"{name}.drv", "the name that is shown is not the derivation's"
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
    # Newer ones give a path that begins with the store's own directory already.
    place = Path(path) if path.startswith(str(clone.store)) else Path(f"{clone.store}{path}")
    config = place / ".nixbox" / "config.toml"
    assert config.read_text() == (REPO / "examples/hello/.nixbox/config.toml").read_text()
