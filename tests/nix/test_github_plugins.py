"""Plugins from GitHub: git, Nix and nixbox against a server that stands for it, in namespaces made here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.github import DAY, DRIVER, HANG_S, HERE, Repository, Workspace, run

# --- what a reference means ------------------------------------------------------------------------------


def test_every_kind_of_reference_is_resolved(box: Workspace, repository: Repository, tmp_path: Path) -> None:
    first = repository.commit("one", "refs/heads/trunk", "refs/tags/light")
    repository("tag", "--annotate", "--message", "noted", "v1.0@beta")
    repository("push", "--quiet", "origin", "v1.0@beta")
    assert repository("rev-parse", "v1.0@beta") != first  # the tag is an object of its own
    second = repository.commit("two", "refs/heads/feature/x", subdir="plugins/inner")
    third = repository.commit("three", "refs/heads/trunk")
    here = f"github:{box.owner}/tools"
    wanted = {
        here: third,
        f"{here}@trunk": third,
        f"{here}@light": first,
        f"{here}@v1.0@beta": first,
        f"{here}@refs/tags/v1.0@beta": first,
        f"{here}@refs/heads/feature/x": second,
        f"{here}@{first}": first,
        f"{here}/plugins/inner@feature/x": second,
        f"{here}/plugins/inner": third,
    }
    said = box.call("ensure", list(wanted))
    assert {ref: row["rev"] for ref, row in box.rows().items()} == wanted
    assert {row["date"] for row in box.rows().values()} == {DAY}
    texts = {ref: (Path(place) / "plugin.toml").read_text() for ref, place in said["places"].items()}
    means = {first: "one", second: "one", third: "three"}
    inner = {ref for ref in wanted if "inner" in ref}
    assert texts == {ref: f'description = "{"two" if ref in inner else means[rev]}"\n' for ref, rev in wanted.items()}
    assert os.access(Path(said["places"][here]) / "commands/hello", os.X_OK)
    for rev in (first, second, third):
        found = {row["hash"] for row in box.rows().values() if row["rev"] == rev}
        assert found == {repository.nar_hash(rev, tmp_path)}
    assert f"pinned {here}@trunk to {third[:12]} ({DAY}) in .nixbox/nixbox.lock" in said["notes"]
    # One tree, one path in the store, and its own name for all that fetches the same.
    assert len(box.store_paths()) == 3
    assert all(name.endswith("-source") for name in box.store_paths())


def test_fetch_tarball_finds_it_without_a_network(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    place = box.ensure(here)[here]
    sha256 = box.rows()[here]["hash"]
    expression = f'builtins.fetchTarball {{ url = "https://github.com/x.tar.gz"; sha256 = "{sha256}"; }}'
    argv = [*box.world.unshare(), "nix-instantiate", "--eval", "--expr", expression]
    path = json.loads(run(argv, box.env))
    assert str(place) == box.env["NIX_REMOTE"] + path


def test_a_commit_without_its_date(box: Workspace, repository: Repository) -> None:
    rev = repository.commit("one")
    box.world.mode("no-api")
    here = f"github:{box.owner}/tools"
    box.ensure(here)
    assert box.rows()[here].keys() == {"ref", "rev", "hash"}
    assert box.rows()[here]["rev"] == rev


# --- what GitHub does not have ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "is not there, or it is private"),
        ("none@main", "is not there, or it is private"),
        ("none@" + "1" * 40, "has no such commit, or there is no such repository, or it is private"),
        ("tools@" + "1" * 40, "has no such commit"),
        ("tools@none", "has no branch and no tag `none`\nit has `trunk`, `v1`"),
        ("tools@1234567", "has no branch and no tag `1234567`\na commit is named by all of its 40 digits"),
        ("tools/none", "has no directory `none`"),
        ("tools/plugin.toml", "has no directory `plugin.toml`"),
        ("tools/outside", "has no directory `outside`"),
        ("tools/above", "has no directory `above`"),
        ("empty", "the repository has no commit yet"),
    ],
)
def test_what_is_not_there(box: Workspace, repository: Repository, name: str, words: str) -> None:
    (repository.clone / "outside").symlink_to("/etc")
    (repository.clone / "above").symlink_to("..")
    repository.commit("one", "refs/heads/trunk", "refs/tags/v1")
    Repository(box.world, box.owner, "empty")
    text, code = box.refused(f"github:{box.owner}/{name}")
    assert words in text
    assert code == 2


def test_one_that_fails_records_none(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    box.refused(f"github:{box.owner}/tools", f"github:{box.owner}/none")
    assert not box.lock.exists()


@pytest.mark.parametrize(
    ("mode", "words"), [("limit", "GitHub refuses to answer for now"), ("broken", "GitHub answers with error 502")]
)
@pytest.mark.parametrize("ref", ["", "@REV"])
def test_a_server_that_will_not(box: Workspace, repository: Repository, mode: str, words: str, ref: str) -> None:
    rev = repository.commit("one")
    box.world.mode(mode)
    text, code = box.refused(f"github:{box.owner}/tools{ref.replace('REV', rev)}")
    assert words in text
    assert code == 1


@pytest.mark.parametrize("ref", ["", "@REV"])
def test_a_server_that_is_not_github(box: Workspace, repository: Repository, ref: str) -> None:
    rev = repository.commit("one")
    names = ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "GIT_SSL_CAINFO")
    other = dict.fromkeys(names, str(box.world.directory / "other.pem"))
    text, code = box.refused(f"github:{box.owner}/tools{ref.replace('REV', rev)}", environ=other)
    assert "github.com does not prove who it is" in text
    assert code == 1
    assert box.asked() == []


def test_what_a_guest_wrote_into_the_workspace_is_not_followed(box: Workspace) -> None:
    """A workspace is often a repository whose configuration its guest can write: git would run what it says."""
    mark = box.path.parent / "mark"
    run(["git", "init", "--quiet", box.path], box.env)
    run(["git", "-C", box.path, "config", "credential.helper", f"!touch {mark}; true"], box.env)
    text, _ = box.refused(f"github:{box.owner}/none")
    assert "is not there, or it is private" in text
    assert not mark.exists()
    ask = ["git", "ls-remote", f"https://github.com/{box.owner}/none.git"]
    env = box.env | {"GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run([*box.world.enter(box.path), *ask], env=env, capture_output=True, check=False)
    assert done.returncode != 0
    assert mark.exists()  # it would have


# --- what is pinned --------------------------------------------------------------------------------------


def test_what_is_there_asks_nobody(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    first = box.ensure(here)
    asked, text = box.asked(), box.lock.read_bytes()
    nothing = {"PATH": "/nowhere"}  # no program can be started
    assert box.ensure(here, environ=nothing) == first
    assert box.call("present", [here, f"{here}@other"], environ=nothing)["places"] == {here: str(first[here])}
    assert box.asked() == asked
    assert box.lock.read_bytes() == text
    box.fresh_store()
    assert box.call("present", [here], environ=nothing)["places"] == {}


def test_a_pin_holds_though_its_branch_moves(box: Workspace, repository: Repository) -> None:
    first = repository.commit("one")
    here = f"github:{box.owner}/tools"
    box.ensure(here)
    repository("checkout", "--quiet", "--orphan", "again")
    second = repository.commit("two")  # by force: the first is in no branch any more
    box.fresh_store()
    asked = len(box.asked())
    place = box.ensure(here, locked=True)[here]
    assert (place / "plugin.toml").read_text() == 'description = "one"\n'
    # From the pin alone: nobody asks what the branch is now.
    assert [host for host, _ in box.asked()[asked:]] == ["github.com", "codeload.github.com"]
    assert all(first in path for _, path in box.asked()[asked:])

    line = f"{here}: {first[:12]} ({DAY}) → {second[:12]} ({DAY})"
    before = box.lock.read_bytes()
    assert box.update(here, dry_run=True) == [line]
    assert box.lock.read_bytes() == before
    assert box.update(here) == [line]
    assert box.rows()[here]["rev"] == second
    assert (box.ensure(here)[here] / "plugin.toml").read_text() == 'description = "two"\n'
    assert box.update(here) == []


def test_update_moves_what_is_chosen(box: Workspace, repository: Repository) -> None:
    other = Repository(box.world, box.owner, "other")
    old = repository.commit("one"), other.commit("one")
    here, there = f"github:{box.owner}/tools", f"github:{box.owner}/other"
    fixed, gone = f"{here}@{old[0]}", f"{there}@trunk"
    box.ensure(here, there, fixed, gone)
    new = repository.commit("two"), other.commit("two")
    assert len(box.update(here, there, fixed, chosen=[there])) == 1
    assert {ref: row["rev"] for ref, row in box.rows().items()} == {here: old[0], there: new[1], fixed: old[0]}
    said = box.call("update", [here, there, fixed])
    assert [change.split(":")[1].split("/")[1] for change in said["changes"]] == ["tools"]
    assert said["notes"] == [f"{fixed} names a commit: it never moves"]
    assert {ref: row["rev"] for ref, row in box.rows().items()} == {here: new[0], there: new[1], fixed: old[0]}
    late = f"{there}@trunk"
    assert box.update(here, late) == [f"{late}: not pinned → {new[1][:12]} ({DAY})"]
    assert box.rows().keys() == {here, late}


def test_an_update_that_fails_moves_nothing(box: Workspace, repository: Repository) -> None:
    other = Repository(box.world, box.owner, "other")
    repository.commit("one")
    other.commit("one", subdir="sub")
    here, there = f"github:{box.owner}/tools", f"github:{box.owner}/other/sub"
    box.ensure(here, there)
    repository.commit("two")
    other("rm", "-r", "--quiet", "sub")
    other.commit("without it")
    text, code = box.refused(here, there, what="update")
    assert (code, "has no directory `sub`" in text) == (2, True)


def test_the_command_line(box: Workspace, repository: Repository) -> None:
    first = repository.commit("one")
    here = f"github:{box.owner}/tools"
    config = box.path / ".nixbox/config.toml"
    config.write_text(f'plugins = ["git", "{here}"]\nmounts = []\n')
    box.ensure(here)
    nixbox = ("-m", "nixbox", "update")
    assert box.python(*nixbox) == ("", f"· asking GitHub for {here}\nnothing to update\n")
    second = repository.commit("two")
    line = f"{here}: {first[:12]} ({DAY}) → {second[:12]} ({DAY})\n"
    assert box.python(*nixbox, "--dry-run")[0] == line
    change = {"ref": here, "old": {"rev": first, "date": DAY}, "new": {"rev": second, "date": DAY}}
    assert json.loads(box.python(*nixbox, "--dry-run", "--json")[0]) == [change]
    for word in ("none", "git"):
        _, err = box.python(*nixbox, "tools", word, code=2)
        assert f"not pinned from GitHub: `{word}`\nhint: the config pins {here}\n" in err
    assert box.rows()[here]["rev"] == first
    assert box.python(*nixbox, f"{box.owner}/tools")[0] == line
    assert box.rows()[here]["rev"] == second
    config.write_text("mounts = []\n")
    assert "the config names no plugin from GitHub" in box.python(*nixbox, "tools", code=2)[1]
    assert box.python(*nixbox) == ("", "nothing to update\n")


def test_a_config_has_what_its_plugin_says(box: Workspace, repository: Repository) -> None:
    repository.commit("one", more='packages = ["made-one"]\n')
    here = f"github:{box.owner}/tools"
    (box.path / ".nixbox/config.toml").write_text(f'plugins = ["{here}"]\nmounts = []\n')
    config = ("-m", "nixbox", "config")
    out, err = box.python(*config)
    assert ('made-one"' in out, f"pinned {here} to" in err) == (True, True)
    assert box.python(*config, offline=True) == (out, "")
    second = repository.commit("two", more='packages = ["made-two"]\n')
    assert box.python(*config) == (out, "")
    box.update(here)
    assert "made-two" in box.python(*config, offline=True)[0]
    # Somebody else's lock, from version control: another pin is another plugin.
    moved = box.lock.read_text()
    box.lock.unlink()
    repository.commit("three", more='packages = ["made-three"]\n')
    assert "made-three" in box.python(*config)[0]
    box.lock.write_text(moved)
    assert "made-two" in box.python(*config)[0]
    assert box.rows()[here]["rev"] == second


# --- what is recorded is what is used --------------------------------------------------------------------


@pytest.mark.parametrize("liar", ["lock", "server"])
def test_other_bits_are_refused(box: Workspace, repository: Repository, liar: str) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    box.ensure(here)
    box.fresh_store()
    if liar == "lock":
        row = box.rows()[here]
        box.lock.write_text(box.lock.read_text().replace(row["hash"], "sha256-" + "A" * 43 + "="))
    else:
        box.world.mode("other-bits")
    for locked in (False, True):
        text, code = box.refused(here, locked=locked)
        assert (code, "is not what the lock says" in text) == (1, True)
    assert box.store_paths() == set()


def test_locked_pins_nothing(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    text, code = box.refused(here, locked=True)
    assert (code, f"not pinned: `{here}`" in text, "`nixbox lock`" in text) == (2, True, True)
    assert not box.lock.exists()
    assert box.asked() == []


def test_without_a_network(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    places = box.ensure(here)
    assert box.ensure(here, offline=True) == places
    shutil.rmtree(box.env["XDG_CACHE_HOME"])  # the root has gone, the path has not
    assert box.ensure(here, offline=True, locked=True) == places
    for refs in ([here, f"{here}@trunk"], [f"{here}@{'1' * 40}"]):
        text, code = box.refused(*refs, offline=True)
        assert (code, "GitHub cannot be reached" in text) == (1, True)
    box.fresh_store()
    text, code = box.refused(here, offline=True)
    assert (code, "GitHub cannot be reached" in text, "in the Nix store needs no network" in text) == (1, True, True)
    assert box.refused(here, what="update", offline=True)[1] == 1


def test_a_collector_leaves_what_is_pinned(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    first = box.ensure(here)[here]
    run(["nix-store", "--gc"], box.env)
    assert (first / "plugin.toml").exists()
    repository.commit("two")
    box.update(here)
    run(["nix-store", "--gc"], box.env)
    second = box.ensure(here, offline=True)[here]
    assert not first.exists()
    # A workspace that is gone keeps nothing.
    later = box.path.with_name("later")
    box.path.rename(later)
    box.path = later
    box.lock.unlink()
    box.ensure(f"{here}@trunk", here)
    roots = [path for path in Path(box.env["XDG_CACHE_HOME"], "nixbox/plugins").iterdir() if path.is_dir()]
    assert [path.joinpath("workspace").read_text() for path in roots] == [f"{later}\n"]
    assert second.exists()


def test_what_else_is_in_the_lock_stays(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    here = f"github:{box.owner}/tools"
    text = '{\n  "format": 1,\n  "suite": "sid",\n  "packages": [\n    {"name": "jq"},\n    {"name": "x"}\n  ]\n}\n'
    box.lock.write_text(text)
    box.ensure(here)
    row = json.dumps(box.rows()[here])
    assert box.lock.read_text() == text[:-4] + f'],\n  "plugins": [\n    {row}\n  ]\n}}\n'


# --- two at a time, an interruption, an ordinary user ----------------------------------------------------


def test_two_commands_at_once(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    refs = [f"github:{box.owner}/tools", f"github:{box.owner}/tools@trunk"]
    both = [box.start(["-c", DRIVER, json.dumps(["ensure", refs, {}])]) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=HANG_S)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0]["places"] == said[1]["places"]
    assert sorted(len(each["notes"]) for each in said) == [0, 2]  # the second one found what the first had pinned
    assert list(box.rows()) == refs


def test_an_interruption_leaves_nothing(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    box.world.mode("stall")
    process = box.start(["-c", DRIVER, json.dumps(["ensure", [f"github:{box.owner}/tools"], {}])])
    deadline = time.monotonic() + HANG_S
    while not any(host == "codeload.github.com" for host, _ in box.asked()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    assert "KeyboardInterrupt" in err
    assert not box.lock.exists()
    assert list(box.lock.parent.iterdir()) == []
    assert box.store_paths() == set()
    assert processes(box.owner) == []
    box.world.mode("")
    assert box.ensure(f"github:{box.owner}/tools")


def processes(word: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line:
                found.append(line)
    return found


# Python and nixbox where that user can read them, wherever they are: in a mount namespace of the command's own.
_AS_USER = """
base=$1 uid=$2 code=$3 site=$4 python=$5; shift 5
mount --bind "$code" "$base/code"; mount --bind "$site" "$base/site"; mount --bind "$python" "$base/python"
exec setpriv --reuid="$uid" --regid="$uid" --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs -- "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are an ordinary user's here already")
def test_an_ordinary_user_has_a_store_of_their_own(box: Workspace, repository: Repository) -> None:
    repository.commit("one")
    uid, base, home = 54321, box.path.parent, box.path.parent / "home"
    for name in ("code", "site", "python", "home"):
        (base / name).mkdir()
    for path in (base, home, box.path, box.path / ".nixbox"):
        os.chown(path, uid, uid)
    for name in ("NIX_REMOTE", "XDG_CACHE_HOME"):
        del box.env[name]
    # Nix wants a name, and this user is in no passwd.
    box.env |= {"HOME": str(home), "USER": "tester", "PYTHONPATH": f"{base / 'code'}:{base / 'site'}"}
    there = [str(base), str(uid), str(HERE.parents[1]), sysconfig.get_path("purelib"), sys.base_prefix]
    box.prefix = ["/usr/bin/env", "unshare", "--mount", "sh", "-euc", _AS_USER, "sh", *there]
    box.program = str(base / "python/bin/python3")
    here = f"github:{box.owner}/tools"
    place = box.ensure(here)[here]
    assert place.is_relative_to(home / ".local/share/nix/root/nix/store")
    assert (place / "plugin.toml").stat().st_uid == uid
    asked = box.asked()
    box.update(here)
    assert len(box.asked()) > len(asked)
    asked = box.asked()
    assert box.ensure(here) == {here: place}
    assert box.asked() == asked
