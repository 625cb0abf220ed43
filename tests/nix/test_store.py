"""The parts of Nix that nixbox computes itself agree with the real one."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nixbox import paths
from nixbox.errors import HostError
from nixbox.image import fetch, store
from nixbox.image.lock import LockedPackage
from nixbox.run import CommandError, beside, run

pytestmark = pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store on this host")

HANG_S = 60.0
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
NAMES = st.from_regex(r"[A-Za-z0-9+_?=-][A-Za-z0-9+._?=-]{0,60}", fullmatch=True)
FEW = settings(
    max_examples=6,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # each step of shrinking would start Nix anew
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Nix that evaluates and writes nothing anywhere."""
    conf = tmp_path_factory.mktemp("nix-conf")
    (conf / "nix.conf").write_text("experimental-features = nix-command flakes\nsubstituters =\n")
    return {"NIX_CONF_DIR": str(conf), "NIX_REMOTE": "dummy://"}


def evaluate(expression: str, env: dict[str, str]) -> object:
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    return json.loads(run(argv, stdin=expression, timeout_s=HANG_S, env=env).stdout)


def nar(hex_digest: str) -> str:
    return "sha256-" + base64.b64encode(bytes.fromhex(hex_digest)).decode()


@FEW
@given(st.lists(st.tuples(NAMES, HEX), min_size=60, max_size=100))
def test_store_paths_are_those_of_nix(pure: dict[str, str], values: list[tuple[str, str]]) -> None:
    # The output paths of fixed-output derivations are the paths of fixed-output files.
    rows = json.dumps(values)
    expression = f"""
      map (row: let
        path = mode: builtins.unsafeDiscardStringContext (derivation {{
          name = builtins.elemAt row 0; system = "builtin"; builder = "x";
          outputHashMode = mode; outputHashAlgo = "sha256"; outputHash = builtins.elemAt row 1;
        }}).outPath;
      in [ (path "flat") (path "recursive") ]) (builtins.fromJSON ''{rows}'')"""
    ours = [[str(store.flat_path(n, h)), str(store.recursive_path(n, nar(h)))] for n, h in values]
    assert evaluate(expression, pure) == ours


@settings(FEW, max_examples=12)
@given(NAMES, HEX)
def test_store_paths_are_those_of_the_command(name: str, digest: str) -> None:
    # A name that begins with a hyphen would be an option of this command.
    name = name.lstrip("-") or "x"
    argv = ["nix-store", "--print-fixed-path"]
    assert run([*argv, "sha256", digest, name], timeout_s=HANG_S).stdout.strip() == str(store.flat_path(name, digest))
    recursive = run([*argv, "--recursive", "sha256", digest, name], timeout_s=HANG_S).stdout.strip()
    assert recursive == str(store.recursive_path(name, nar(digest)))


PACKAGES = st.builds(
    LockedPackage,
    name=st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True),
    version=st.from_regex(r"[A-Za-z0-9.+~:-]{1,20}", fullmatch=True),
    arch=st.sampled_from(["amd64", "all"]),
    repo=st.just("debian"),
    path=st.just("pool/x.deb"),
    size=st.just(1),
    sha256=HEX,
)


@FEW
@given(st.lists(PACKAGES, min_size=40, max_size=80))
def test_a_deb_has_one_name_and_one_place_in_both_languages(
    pure: dict[str, str], packages: list[LockedPackage]
) -> None:
    rows = json.dumps([package.model_dump() for package in packages])
    file = paths.nix_dir() / "bases/debian/fetch.nix"
    expression = f"""
      let fetch = import {file} {{ mirrors = {{ }}; }}; in
      map (p: [
        (fetch.debName p) (builtins.unsafeDiscardStringContext (fetch.fetchDeb p).outPath)
      ]) (builtins.fromJSON ''{rows}'')"""
    assert evaluate(expression, pure) == [[fetch.deb_name(p), str(fetch.deb_path(p))] for p in packages]


def test_the_hash_of_a_tree_is_that_of_its_archive(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "bin").mkdir()
    (tree / "bin/program").write_bytes(os.urandom(1000))
    (tree / "bin/program").chmod(0o755)
    (tree / "link").symlink_to("bin/program")
    archive = subprocess.run(
        ["nix-store", "--dump", str(tree)], capture_output=True, timeout=HANG_S, check=True
    ).stdout
    expected = nar(hashlib.sha256(archive).hexdigest())
    assert store.nar_hash(tree) == expected
    (tree / "bin/program").chmod(0o644)
    assert store.nar_hash(tree) != expected


# --- the real store --------------------------------------------------------------------------------------


@pytest.fixture
def added() -> Iterator[list[Path]]:
    """Store paths to be deleted afterwards."""
    found: list[Path] = []
    yield found
    store.delete([path for path in found if path not in store.invalid(found)])
    assert store.invalid(found) == set(found)


def test_files_are_added_where_they_are_looked_for(tmp_path: Path, added: list[Path]) -> None:
    files = []
    for i in range(3):
        file = tmp_path / f"nixbox-test_{secrets.token_hex(6)}_{i}+x.deb"
        file.write_bytes(os.urandom(100))
        files.append(file)
    wanted = [store.flat_path(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
    assert store.invalid(wanted) == set(wanted)
    added.extend(wanted)
    store.add_files(files)
    assert store.invalid(wanted) == set()
    assert [store.physical(path).read_bytes() for path in wanted] == [file.read_bytes() for file in files]
    assert store.sizes(wanted) >= 300
    assert store.requisites(wanted[0]) == [wanted[0]]
    assert store.closure_size(wanted[0]) == store.sizes(wanted[:1])


def test_a_tree_is_added_where_it_is_looked_for(tmp_path: Path, added: list[Path]) -> None:
    tree = tmp_path / f"nixbox-test-{secrets.token_hex(6)}"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/x").write_bytes(os.urandom(10))
    wanted = store.recursive_path(tree.name, store.nar_hash(tree))
    added.append(wanted)
    assert store.add_tree(tree) == wanted
    assert store.physical(wanted / "bin/x").read_bytes() == (tree / "bin/x").read_bytes()


def test_a_root_keeps_a_path_and_its_absence_does_not(tmp_path: Path, added: list[Path]) -> None:
    tree = tmp_path / f"nixbox-test-{secrets.token_hex(6)}"
    tree.write_bytes(os.urandom(10))
    path = store.add_tree(tree)
    added.append(path)
    link = tmp_path / "root"
    try:
        for _ in range(2):  # a second time replaces the first
            store.add_root(link, path)
            assert link.readlink() == path
        assert link in store.roots_of(path)
        assert store.dead([path]) == []
        assert store.delete([path]) == 0
        assert store.invalid([path]) == set()
    finally:
        link.unlink()
    assert store.dead([path]) == [path]
    assert store.roots_of(path) == []
    assert store.delete([path]) == 1


def asked_nix(monkeypatch: pytest.MonkeyPatch, *, really: bool) -> list[Sequence[str]]:
    """What is run from now on with something going on beside it; `really`: it is run, too."""
    asked: list[Sequence[str]] = []

    def noting(argv: Sequence[str], **options: Any) -> AbstractContextManager[None]:
        asked.append(argv)
        return beside(argv, **options) if really else nullcontext()

    monkeypatch.setattr("nixbox.run.beside", noting)
    return asked


def registered_roots() -> dict[Path, Path]:
    """Where the indirect roots lead to. One that leads nowhere may be taken away meanwhile, by a collector."""
    found = {}
    for at in (store.place(Path("/nix/var/nix")) / "gcroots/auto").iterdir():
        with suppress(FileNotFoundError):
            found[at] = at.readlink()
    return found


def test_a_root_is_the_one_that_nix_makes(tmp_path: Path, added: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / f"nixbox-test-{secrets.token_hex(6)}"
    tree.write_bytes(os.urandom(10))
    path = store.add_tree(tree)
    added.append(path)
    asked = asked_nix(monkeypatch, really=True)
    found = []
    for ours in (True, False):
        before = registered_roots()
        link = tmp_path / "link"
        monkeypatch.setattr(store, "through_daemon", lambda ours=ours: not ours)
        store.add_root(link, path)
        (registered,) = (at for at, to in registered_roots().items() if to == link)
        assert registered not in before and link.readlink() == path
        assert link in store.roots_of(path)
        found.append(registered.name)
        registered.unlink()
        link.unlink()
    assert found[0] == found[1] and len(asked) == 1
    assert not [at for at in tmp_path.iterdir() if at != tree]


def test_a_root_waits_for_a_garbage_collector_and_one_for_a_root(
    tmp_path: Path, added: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / f"nixbox-test-{secrets.token_hex(6)}"
    tree.write_bytes(os.urandom(10))
    path = store.add_tree(tree)
    added.append(path)
    asked = asked_nix(monkeypatch, really=False)
    with (store.place(Path("/nix/var/nix")) / "gc.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as who makes a root has it
        argv = ["nix-store", "--gc", "--print-dead"]
        env = os.environ | store.env()
        collector = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
        with collector:
            assert collector.stderr is not None
            assert any(b"garbage collector lock" in line for line in collector.stderr)  # it says that it waits
            assert collector.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            collector.stderr.read()
        assert collector.returncode == 0
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a collector has it
        store.add_root(tmp_path / "link", path)
    assert len(asked) == 1 and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(("variable", "value"), [("NIX_REMOTE", "ssh://x"), ("NIX_STATE_DIR", "/x")])
def test_a_root_elsewhere_is_for_nix_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    asked = asked_nix(monkeypatch, really=False)
    monkeypatch.setenv(variable, value)
    store.add_root(tmp_path / "link", store.STORE)
    assert len(asked) == 1 and not (tmp_path / "link").is_symlink()


def test_what_is_not_there_is_for_nix_to_say(tmp_path: Path) -> None:
    gone = store.STORE / f"{'0' * 32}-{secrets.token_hex(6)}"
    with pytest.raises(CommandError, match="nix-store"):
        store.add_root(tmp_path / "link", gone)
    assert not (tmp_path / "link").is_symlink()


def test_nothing_asked_is_nothing_done() -> None:
    assert store.invalid([]) == set()
    assert store.sizes([]) == 0
    assert store.delete([]) == 0


# --- how Nix is called -----------------------------------------------------------------------------------

GOOD = {
    "experimental-features": ["nix-command", "flakes"],
    "sandbox": True,
    "build-users-group": "",
    "substituters": ["https://cache.example"],
}
DEFAULTS = {"substituters": ["https://cache.example/"], "sandbox": True}
NIX = """#!/bin/sh
[ "$1" != --version ] || { echo "nix (Nix) 2.99.1"; exit 0; }
case "$*" in
*"WORDS --json") cat "$0.json" ;;
*) echo "error: 'show' is not a recognised command" >&2; exit 1 ;;
esac
"""


def setup_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str = "config show", **changes: Any
) -> store.NixSetup:
    """What setup() makes of a Nix with this configuration."""
    program = tmp_path / "nix"
    program.write_text(NIX.replace("WORDS", words))
    program.chmod(0o755)
    values = GOOD | {key.replace("_", "-"): value for key, value in changes.items()}
    config = {key: {"value": value, "defaultValue": DEFAULTS.get(key)} for key, value in values.items()}
    (tmp_path / "nix.json").write_text(json.dumps(config))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return store.setup.__wrapped__()


FEATURES = ("--extra-experimental-features", "nix-command flakes")


def test_a_nix_that_is_set_up_needs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = setup_with(tmp_path, monkeypatch)
    assert (found.version, found.options) == ("2.99.1", FEATURES)


def test_an_older_nix_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_with(tmp_path, monkeypatch, "show-config").version == "2.99.1"


@pytest.mark.parametrize(
    ("changes", "option", "reason"),
    [
        ({"sandbox": False}, "sandbox", "turns the sandbox off"),
        ({"substituters": ["https://cache.example/"]}, "substituters", "public Nix cache"),
    ],
)
def test_what_is_lacking_is_passed_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], option: str, reason: str
) -> None:
    found = setup_with(tmp_path, monkeypatch, **changes)
    assert option in found.options
    assert "experimental features" in found.reasons[0]
    assert len(found.reasons) == 2
    assert reason in found.reasons[1]


@pytest.mark.parametrize("substituters", [[], ["https://cache.example/", "https://own.example"]])
def test_caches_of_ones_own_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, substituters: list[str]
) -> None:
    assert setup_with(tmp_path, monkeypatch, substituters=substituters).options == FEATURES


@pytest.mark.parametrize(("uid", "passed"), [(0, True), (1000, False)])
def test_a_group_without_build_users_matters_to_root_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, passed: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    found = setup_with(tmp_path, monkeypatch, build_users_group="zzz-none")
    assert ("build-users-group" in found.options) is passed


def test_a_nix_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="nix does not answer: error: 'show' is not"):
        setup_with(tmp_path, monkeypatch, "zzz")


def test_the_real_nix_takes_the_options() -> None:
    found = store.setup.__wrapped__()
    argv = ["nix", *found.options, "eval", "--expr", "1 + 1"]
    assert run(argv, timeout_s=HANG_S).stdout.strip() == "2"
