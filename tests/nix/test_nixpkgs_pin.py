"""nixpkgs from GitHub: what `nixbox lock` pins and `nixbox update` moves, against a server that stands in for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nixbox.image import lock
from nixbox.image.resolve import default_arch
from tests import nixpkgs as standin
from tests.github import DAY, Repository, Workspace

RESOLVE = ("-m", "nixbox", "lock")
UPDATE = ("-m", "nixbox", "update")


def publish(repository: Repository, *ref: str, changed: tuple[str, str] | None = None, **versions: str) -> str:
    """A commit with the stand-in's tree, its .debs with these versions, `changed` replaced in what it offers."""
    for place in repository.clone.iterdir():
        if place.name != ".git":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    made = standin.write_tree(repository.clone.parent / "tree", standin.debian_lock(**versions))
    shutil.copytree(made, repository.clone, dirs_exist_ok=True)
    shutil.rmtree(made)
    if changed is not None:
        offered = repository.clone / "offered.nix"
        text = offered.read_text()
        assert changed[0] in text
        offered.write_text(text.replace(*changed))
    repository("add", "--all")
    repository("commit", "--quiet", "--allow-empty", "--message", "packages")
    repository("push", "--quiet", "--force", "origin", *(f"HEAD:{name}" for name in ref or ("refs/heads/trunk",)))
    return repository("rev-parse", "HEAD")


@pytest.fixture
def packages(box: Workspace) -> Repository:
    return Repository(box.world, box.owner, "nixpkgs")


def config(box: Workspace, names: str = '["jq"]', ref: str = "trunk", more: str = "") -> None:
    source = f'[nixpkgs]\nsource = "github:{box.owner}/nixpkgs@{ref}"\n'
    text = f'name = "box"\nbase = "nixpkgs"\nmounts = []\npackages = {names}\n{more}{source}'
    (box.path / ".nixbox/config.toml").write_text(text)


def locked(box: Workspace) -> lock.NixpkgsLock:
    found = lock.load(box.lock)
    assert isinstance(found, lock.NixpkgsLock)
    return found


def test_a_lock_names_the_revision_and_its_hash(box: Workspace, packages: Repository, tmp_path: Path) -> None:
    rev = publish(packages)
    config(box)
    out, _ = box.python(*RESOLVE)
    assert f"+ nixpkgs {rev[:12]} ({DAY})\n+ jq of nixpkgs\n" == out
    found = locked(box)
    assert found.nixpkgs.model_dump() == {
        "owner": box.owner,
        "repo": "nixpkgs",
        "ref": "trunk",
        "rev": rev,
        "hash": packages.nar_hash(rev, tmp_path),
        "date": DAY,
    }
    assert (found.requested, found.arch) == (("jq",), default_arch())
    # What is locked needs no network: not to be locked again, nor with another package, nor to be evaluated.
    assert box.python(*RESOLVE, offline=True)[0] == ""
    config(box, '["extra.tree"]')
    assert box.python(*RESOLVE, offline=True)[0] == "+ extra.tree of nixpkgs\n- jq of nixpkgs\n"
    assert locked(box).nixpkgs == found.nixpkgs
    # A later commit of the branch changes nothing until it is asked for.
    publish(packages, jq="3.0-1")
    assert box.python(*RESOLVE)[0] == ""
    assert locked(box).nixpkgs == found.nixpkgs


def test_another_source_is_another_pin(box: Workspace, packages: Repository) -> None:
    first = publish(packages, "refs/heads/trunk", "refs/tags/v1")
    second = publish(packages, jq="3.0-1")
    config(box)
    box.python(*RESOLVE)
    assert locked(box).nixpkgs.rev == second
    dry = json.loads(box.python("-m", "nixbox", "up", "--dry-run", "--json")[0])
    assert dry["image"]["relock"] is None
    config(box, ref="v1")
    dry = json.loads(box.python("-m", "nixbox", "up", "--dry-run", "--json")[0])
    assert dry["image"]["relock"] == f"the lock is for another nixpkgs than github:{box.owner}/nixpkgs@v1"
    box.python(*RESOLVE)
    assert locked(box).nixpkgs.rev == first
    # A commit is what it is.
    config(box, ref=first)
    box.python(*RESOLVE)
    assert box.python(*UPDATE, "nixpkgs")[1].startswith(f"github:{box.owner}/nixpkgs@{first} names a commit")


def test_update_shows_what_becomes_of_the_packages(box: Workspace, packages: Repository) -> None:
    first = publish(packages)
    config(box, '["jq", "extra.tree"]')
    box.python(*RESOLVE)
    before = box.lock.read_text()
    out, err = box.python(*UPDATE)
    assert out == ""
    assert err.endswith("nothing to update\n")
    second = publish(packages, jq="1:3.1-2", curl="9.0-1")
    wanted = f"nixpkgs: {first[:12]} ({DAY}) → {second[:12]} ({DAY})\n  ~ jq 2.0 → 3.1\n  ~ curl 2.0 → 9.0\n"
    assert box.python(*UPDATE, "--dry-run")[0] == wanted
    assert box.lock.read_text() == before
    assert json.loads(box.python(*UPDATE, "nixpkgs", "--dry-run", "--json")[0]) == [
        {
            "ref": "nixpkgs",
            "old": {"rev": first, "date": DAY},
            "new": {"rev": second, "date": DAY},
            "packages": {"added": {}, "removed": {}, "changed": {"jq": ["2.0", "3.1"], "curl": ["2.0", "9.0"]}},
        }
    ]
    assert box.python(*UPDATE, "nixpkgs")[0] == wanted
    assert locked(box).nixpkgs.rev == second
    assert box.python(*UPDATE, "nixpkgs")[0] == ""


def test_update_of_one_thing_leaves_the_other(box: Workspace, packages: Repository) -> None:
    tools = Repository(box.world, box.owner)
    publish(packages)
    plugin = tools.commit("one")
    here = f"github:{box.owner}/tools"
    config(box, more=f'plugins = ["{here}"]\n')
    box.python(*RESOLVE)
    pinned = locked(box)
    assert [pin.rev for pin in pinned.plugins] == [plugin]
    moved = tools.commit("two")
    newer = publish(packages, jq="3.1-1")
    box.python(*UPDATE, "tools")
    assert locked(box).nixpkgs == pinned.nixpkgs
    assert [pin.rev for pin in locked(box).plugins] == [moved]
    tools.commit("three")
    box.python(*UPDATE, "nixpkgs")
    assert locked(box).nixpkgs.rev == newer
    assert [pin.rev for pin in locked(box).plugins] == [moved]
    other = box.python(*UPDATE, "debian", code=2)[1]
    assert "there is no debian to update: the image is made of nixpkgs" in other
    assert "not pinned from GitHub: `nixpkg`" in box.python(*UPDATE, "nixpkg", code=2)[1]


def test_a_revision_that_lacks_a_package_is_not_taken(box: Workspace, packages: Repository) -> None:
    publish(packages)
    config(box, '["extra.tree"]')
    box.python(*RESOLVE)
    before = box.lock.read_text()
    publish(packages, changed=("    tree =", "    tree2 ="))
    for options in ((), ("--dry-run",)):
        _, err = box.python(*UPDATE, *options, code=2)
        assert (
            "there is no package `extra.tree`: `extra` has no `tree` (did you mean `tree2`?) (from config.toml)"
            in err
        )
    assert box.lock.read_text() == before


def test_what_github_does_not_have_is_said_of_nixpkgs(box: Workspace, packages: Repository) -> None:
    publish(packages)
    config(box, ref="none")
    _, err = box.python(*RESOLVE, code=2)
    assert "has no branch and no tag `none`" in err
    assert "[nixpkgs] source in .nixbox/config.toml" in err
    config(box)
    _, err = box.python(*RESOLVE, offline=True, code=1)
    assert "GitHub cannot be reached" in err
    assert "plugin" not in err
    assert not box.lock.exists()


def test_a_pin_is_fetched_by_its_hash_alone(box: Workspace, packages: Repository) -> None:
    publish(packages)
    config(box, '["no-such-package"]')
    box.python(*RESOLVE)
    # Somewhere else, where nothing is: the tree comes by revision and hash, and then it is looked at.
    box.fresh_store()
    _, err = box.python("-m", "nixbox", "build", "--locked", code=2)
    assert "there is no package `no-such-package`" in err
    box.fresh_store()
    box.world.mode("other-bits")
    _, err = box.python("-m", "nixbox", "build", "--locked", code=1)
    assert "what GitHub has for this commit is not what the lock says" in err
