"""The nixpkgs base against a strict stand-in for nixpkgs: what it uses of it, what comes out, and how faults read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from nixbox.errors import ConfigError, NixboxError
from nixbox.image import build, lock, nixpkgs, store
from nixbox.image.lock import KrunKernel, NixpkgsLock, NixpkgsPin
from nixbox.plan.model import ImageSpec, Script
from nixbox.run import CommandError, run
from tests import nixpkgs as standin

pytestmark = pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="no nix-instantiate on this host")

INTERFACE = Path(__file__).resolve().parents[2] / "docs" / "nixpkgs-interface.md"
HANG_S = 120.0


KRUN = KrunKernel(
    file="libkrunfw.so.5",
    origin="smolmachines 1.0",
    size=99,
    sha256="1" * 64,
    offset=9,
    length=90,
    load=1000,
    entry=1001,
    release="6.18.55",
)
SPEC = ImageSpec("nixpkgs", "trixie", ("jq", "extra.tree"), (), False, nixpkgs="github:stand-in/nixpkgs@trunk")
BUILD = (Script("profile dev", "echo '${x}' >/etc/built\n"),)


@dataclass(frozen=True)
class World:
    """A Nix store of the test's own with the stand-in in it."""

    place: Path
    pin: NixpkgsPin

    def lock(self, *names: str, **changes: Any) -> NixpkgsLock:
        values: dict[str, Any] = {"format": 1, "base": "nixpkgs", "arch": "amd64", "nixpkgs": self.pin}
        return NixpkgsLock(**(values | {"requested": names} | changes))

    def evaluate(self, what: str, spec: ImageSpec = SPEC, *, nix: Path | None = None, **changes: Any) -> str:
        """An attribute of the image of `spec`, as the expression that nixbox generates gives it."""
        file = self.place / "nixbox.lock"
        lock.save(self.lock(*spec.packages, **changes), file)
        with pytest.MonkeyPatch.context() as patched:
            if nix is not None:
                patched.setattr(paths, "nix_dir", lambda: nix)
            text = build.expression(spec, file, {})
        argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
        found: str = json.loads(run(argv, stdin=f"({text}).{what}", timeout_s=HANG_S, env=store.env()).stdout)
        return found

    def ask(self, expression: str) -> tuple[Any, str]:
        """What an expression comes to with the stand-in as `pkgs`, and what Nix traced."""
        tree = f'builtins.fetchTarball {{ name = "source"; url = "x:"; sha256 = "{self.pin.hash}"; }}'
        arguments = '{ system = "x86_64-linux"; config = { allowUnfree = false; }; overlays = [ ]; }'
        argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
        text = f"let pkgs = import ({tree}) {arguments}; in {expression}"
        done = run(argv, stdin=text, timeout_s=HANG_S, env=store.env())
        return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("nixpkgs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "private_root", lambda: place / "root")
        yield World(place, standin.pin(standin.write_tree(place / "source", standin.debian_lock())))
    run(["chmod", "-R", "u+w", str(place / "root")], timeout_s=HANG_S)
    shutil.rmtree(place / "root")


# --- the interface ---------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """The attributes of docs/nixpkgs-interface.md with their types."""
    rows = re.findall(r"^\| `([^`]+)` \| (package|function|text)\b", INTERFACE.read_text(), re.MULTILINE)
    assert len(rows) > 40
    assert [name for name, _ in rows] == sorted((name for name, _ in rows), key=lambda name: name.replace(".", " "))
    return dict(rows)


def offered(world: World) -> set[str]:
    """What the stand-in has to be asked for, and the base does not use."""
    text = (standin.STAND_IN / "offered.nix").read_text()
    body = text[text.index("\n{\n") :]
    return set(re.findall(r"^  ([a-z]+) =", body, re.MULTILINE)) | {"jq"}


def test_the_list_is_what_the_stand_in_has(world: World) -> None:
    names, _ = world.ask("builtins.attrNames pkgs")
    assert set(names) - offered(world) == {name.partition(".")[0] for name in documented()}
    # Of sets that are no packages, nothing that is not listed.
    for path, inner in (("pkgsStatic", ["busybox"]), ("shadow", ["su"]), ("stdenv", ["cc"])):
        assert world.ask(f"builtins.attrNames pkgs.{path}")[0] == inner
    assert world.ask("builtins.attrNames pkgs.stdenv.cc")[0] == ["bintools", "cc"]


def test_the_types_are_those_of_the_list(world: World) -> None:
    kind = """value:
      if builtins.isFunction value then "function"
      else if builtins.isString value then "text"
      else if value.type or "" == "derivation" && builtins.isString value.outPath then "package"
      else "set" """
    listed = documented()
    rows = " ".join(f'"{name}" = kind pkgs.{name};' for name in listed)
    assert world.ask(f"let kind = {kind}; in {{ {rows} }}")[0] == listed


def test_the_base_uses_exactly_the_list(tmp_path: Path, world: World) -> None:
    # The same stand-in, but it tells what is looked at.
    tree = standin.write_tree(tmp_path / "source", standin.debian_lock())
    (tree / "default.nix").rename(tree / "told.nix")
    (tree / "default.nix").write_text("""
      arguments:
      let
        tell = prefix: builtins.mapAttrs (name: value:
          let inner = if builtins.elem name [ "pkgsStatic" "shadow" "stdenv" ] || prefix == "stdenv." && name == "cc"
            then tell "${prefix}${name}." value else value;
          in builtins.trace "uses ${prefix}${name}" inner);
      in tell "" (import ./told.nix arguments)
    """)
    pin = standin.pin(tree)
    file = tmp_path / "nixbox.lock"
    lock.save(world.lock(nixpkgs=pin, krun=KRUN), file)
    text = build.expression(replace(SPEC, packages=(), build=BUILD), file, {})
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    asked = f"let made = {text}; in [ made.image.drvPath made.inputs.drvPath ]"
    said = run(argv, stdin=asked, timeout_s=HANG_S, env=store.env()).stderr
    used = set(re.findall(r"^trace: uses (\S+)$", said, re.MULTILINE)) - {"pkgsStatic", "shadow", "stdenv"}
    used -= {"stdenv.cc", "stdenv.cc.bintools"} if "stdenv.cc.bintools.dynamicLinker" in documented() else set()
    wanted = set(documented()) - {"linux.modDirVersion", "stdenv.cc.bintools.dynamicLinker"}
    assert used == wanted


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("root.nix", "pkgs.erofs-utils", "pkgs.erofs-utilz", "erofs-utilz"),
        ("root.nix", "nix sqlite sudo", "nix sqlite3 sudo", "sqlite3"),
        (
            "root.nix",
            "ignoreCollisions = true;",
            "ignoreCollisions = true; allowedSomething = 1;",
            "allowedSomething",
        ),
        ("root.nix", "{ rootPaths = contents; }", "{ rootPaths = contents; more = 1; }", "more"),
        ("packages.nix", '"bashInteractive"', '"bashInteractiv"', "bashInteractiv"),
        ("packages.nix", "overlays = [ ];", "", "overlays"),
        ("packages.nix", "config = { inherit allowUnfree; };", "config = { };", "assertion"),
        ("kernel.nix", "kernel.modDirVersion", "kernel.modVersion", "modVersion"),
    ],
)
def test_what_is_not_listed_fails(world: World, tmp_path: Path, file: str, old: str, new: str, words: str) -> None:
    shutil.copytree(paths.nix_dir(), tmp_path / "nix")
    place = tmp_path / "nix/bases/nixpkgs" / file
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new))
    with pytest.raises(CommandError, match=words):
        world.evaluate("image.drvPath", nix=tmp_path / "nix")


# --- the image -------------------------------------------------------------------------------------------


def test_what_changes_the_image_and_what_does_not(world: World) -> None:
    base = world.evaluate("image.outPath")
    assert base.endswith("-nixbox-image")
    changed = {
        "packages": world.evaluate("image.outPath", replace(SPEC, packages=("jq",))),
        "ld_libraries": world.evaluate("image.outPath", replace(SPEC, ld_libraries=("libjq",))),
        "build": world.evaluate("image.outPath", replace(SPEC, build=BUILD)),
        "network": world.evaluate("image.outPath", replace(SPEC, build=BUILD, build_network=True)),
        "krun": world.evaluate("image.outPath", krun=KRUN),
        "unfree": world.evaluate("image.outPath", replace(SPEC, packages=("costly",), allow_unfree=True)),
    }
    assert len({base, *changed.values()}) == len(changed) + 1
    for same in (replace(SPEC, allow_unfree=True), replace(SPEC, build_network=True), replace(SPEC, suite="sid")):
        assert world.evaluate("image.outPath", same) == base


def test_keys_are_as_fine(world: World) -> None:
    text = lock.dump(world.lock("jq"))
    other = replace(SPEC, ld_libraries=("libjq",)), replace(SPEC, allow_unfree=True), replace(SPEC, build=BUILD)
    assert len({build.key(spec, text) for spec in (SPEC, *other)}) == 4
    assert build.key(replace(SPEC, asked=(("jq", "plugin x"),)), text) == build.key(SPEC, text)


def test_the_image_says_what_it_is(world: World) -> None:
    spec = replace(SPEC, build=BUILD, build_network=True, ld_libraries=("libjq",))
    meta = json.loads(world.evaluate("image.imageJson", spec))
    versions = {row["name"]: row["version"] for row in meta.pop("packages")}
    assert {"jq": "2.0", "extra.tree": "2.0", "nix": "2.0", "linux": "2.0"}.items() <= versions.items()
    assert meta == {
        "format": 1,
        "arch": "amd64",
        "base": "nixpkgs",
        "suite": None,
        "requested": ["jq", "extra.tree"],
        "build": ["profile dev"],
        "reproducible": False,
        "nixpkgs": world.pin.model_dump(),
        "ldLibraries": ["libjq"],
    }


def test_inputs_keep_the_tree_that_evaluation_reads(world: World) -> None:
    assert world.evaluate("inputs.source") == str(nixpkgs.tree(world.pin))
    assert world.evaluate("inputs.outPath") != world.evaluate("inputs.outPath", replace(SPEC, packages=()))


def test_another_tree_is_never_taken(world: World) -> None:
    # The right revision, and a hash that nothing here has: Nix would have to fetch it, and cannot.
    other = world.pin.model_copy(update={"hash": "sha256-" + "A" * 43 + "="})
    with pytest.raises(CommandError, match=rf"stand-in/nixpkgs/archive/{world.pin.rev}\.tar\.gz"):
        world.evaluate("image.outPath", nixpkgs=other)


def test_other_architectures_have_their_own(world: World) -> None:
    assert world.evaluate("image.system") == "x86_64-linux"
    assert world.evaluate("image.system", arch="arm64") == "aarch64-linux"


# --- names that cannot be had ----------------------------------------------------------------------------


def faults(world: World, *names: str, asked: tuple[tuple[str, str], ...] = (), **changes: Any) -> tuple[str, ...]:
    spec = replace(SPEC, packages=names, asked=asked, **changes)
    with pytest.raises(ConfigError) as caught:
        nixpkgs.check(world.lock(*names), spec)
    return caught.value.faults


def test_every_name_that_cannot_be_had_is_named_with_who_asked(world: World) -> None:
    asked = (("jqq", "plugin web"), ("jqq", "profile dev"), ("gone", "config.toml"), ("libj", "plugin web"))
    names = ("jq", "jqq", "extra.tre", "exta.tree", "extra", "gone", "faulty", "costly", "jq.x.y", "stdenv")
    assert faults(world, *names, asked=asked, ld_libraries=("libjq", "libj")) == (
        "packages: there is no package `jqq` (did you mean `jq`?) (from plugin web and profile dev)",
        "packages: there is no package `extra.tre`: `extra` has no `tre` (did you mean `tree`?)",
        "packages: there is no package `exta.tree` (did you mean `extra`?)",
        "packages: `extra` is no package but a set of them: name one, as in `extra.NAME`",
        "packages: nixpkgs refuses `gone`: it is gone or cannot be evaluated (from config.toml)",
        "packages: nixpkgs refuses `faulty`: it is broken",
        "packages: `costly` has a licence that is not free: [nixpkgs] allow_unfree = true in config.toml allows it",
        "packages: there is no package `jq.x.y`: `jq` has no `x`",
        "packages: `stdenv` is no package but a set of them: name one, as in `stdenv.NAME`",
        "ld_libraries: there is no package `libj` (did you mean `libjq` or `zlib`?) (from plugin web)",
    )


def test_what_can_be_had_is_no_fault(world: World) -> None:
    names = ("jq", "extra.tree", "extra.depth.of.three", "costly")
    nixpkgs.check(world.lock(*names), replace(SPEC, packages=names, ld_libraries=("libjq",), allow_unfree=True))
    nixpkgs.check(world.lock(), replace(SPEC, packages=()))


def test_an_unfree_package_is_refused_by_nixpkgs_too(world: World) -> None:
    with pytest.raises(CommandError, match="unfree"):
        world.evaluate("image.drvPath", replace(SPEC, packages=("costly",)))


def test_versions_are_those_of_the_image(world: World) -> None:
    found = nixpkgs.versions(world.lock("jq"), ["jq", "gone", "libjq"])
    assert (found["jq"], found["nix"], "gone" in found, "linux" in found) == ("2.0", "2.0", False, True)


def test_a_tree_that_is_no_nixpkgs_is_said_to_be_none(world: World, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/default.nix").write_text('throw "I am no package set"')
    other = world.lock("jq", nixpkgs=standin.pin(tmp_path / "source"))
    with pytest.raises(NixboxError, match="I am no package set") as caught:
        nixpkgs.check(other, SPEC)
    assert "[nixpkgs] source" in (caught.value.hint or "")
