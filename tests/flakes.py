"""What the tests of the flake share: a clone of it, with a store of its own and without a network, and stand-ins."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nixbox.errors import NixboxError
from nixbox.image import store
from nixbox.run import run

REPO = Path(__file__).resolve().parents[1]
HELLO_LOCK = REPO / "nix" / "flake" / "hello.lock"
FILES = ("flake.nix", "flake.lock", "pyproject.toml", "nix", "examples", "nixbox", "plugins")
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
        onlyLinux = [ "apt" "libkrun" "libkrunfw" "nftables" "passt" "util-linux" "virtiofsd" ];
        isLinux = builtins.match ".*-linux" system != null;
        python = plain [
          "cffi" "hatchling" "hypothesis" "mypy" "nix-prefetch-github" "pydantic" "pytest" "pytest-timeout" "pyyaml"
          "sh" "tomlkit" "typer" "types-pyyaml"
        ];
      in
      plain [ "e2fsprogs" "git" "gnumake" "nix" "nixfmt" "nixfmt-tree" "openssh" "qemu" "ruff" ]
      // (if isLinux then plain onlyLinux else { }) // {
        lib = {
          makeBinPath = packages: builtins.concatStringsSep ":" (map (package: "${package}/bin") packages);
          licenses.asl20 = { };
          optionals = condition: list: if condition then list else [ ];
        };
        stdenv.hostPlatform = { inherit isLinux; };
        mkShell = { name, packages }: made name { inherit packages; };
        runCommand = name: { nativeBuildInputs }: script: made name { inherit nativeBuildInputs script; };
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
    }) [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" ]);
  };
}
"""


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone of the flake in `repo`; `nix` runs there with no network, and with nothing in its store."""

    top: Path
    unshare: tuple[str, ...]
    program: tuple[str, ...] = ("nix",)

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
        argv = [*self.unshare, *self.program, *options, *words]
        return run(argv, cwd=cwd or self.repo, env=self.env, timeout_s=TIMEOUT_S).stdout

    def eval(self, *words: str) -> Any:
        return json.loads(self.nix("eval", "--json", *words))

    def physical(self, path: str) -> Path:
        """Where a path of this clone's store lies."""
        # Newer Nix gives a path that begins with the store's own directory already.
        return Path(path) if path.startswith(str(self.store)) else Path(f"{self.store}{path}")

    def value(self, expression: str, name: str = "value") -> Any:
        """What an expression is; `flake` in it is this clone's."""
        file = self.top / f"{name}.nix"
        file.write_text(f"let flake = builtins.getFlake (toString {self.repo}); in\n{expression}\n")
        return self.eval("--impure", "--file", str(file))


def make_clone(top: Path) -> Clone:
    """A clone below an empty directory. Skips the test where the host cannot have one."""
    for program in ("nix", "git", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this host")
    unshare = ("unshare", "-n") if os.geteuid() == 0 else ("unshare", "-rn")
    try:
        run([*unshare, "true"], timeout_s=TIMEOUT_S)
    except NixboxError as error:
        pytest.skip(f"this host allows no network namespace: {error}")
    made = Clone(top, unshare)
    (made.top / "home").mkdir()
    made.repo.mkdir()
    for name in FILES:
        if (REPO / name).is_dir():
            # As in a clone: without what running the example, or a test, leaves there.
            ignored = shutil.ignore_patterns("machines", "__pycache__")
            shutil.copytree(REPO / name, made.repo / name, ignore=ignored)
        else:
            shutil.copy(REPO / name, made.repo / name)
    made.git("init", "--quiet")
    made.git("add", "--all")
    made.git("commit", "--quiet", "--message", "flake")
    return made
