"""References to GitHub, pins in nixbox.lock, and what is made of the words of git and Nix. Nothing here asks anybody.

What real ones say and do is in tests/nix/test_github_plugins.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixbox.cli import update
from nixbox.config import refs
from nixbox.config.refs import Github
from nixbox.errors import ConfigError, NixboxError
from nixbox.image import apt, build, ensure, github, lock, lockfile, pins, resolve
from nixbox.image.lock import Bootstrap, Lock, LockedPackage
from nixbox.image.lockfile import Pin
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter

QUICK = settings(deadline=None, max_examples=80, database=None)
REV, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
HASH = "sha256-" + "A" * 43 + "="
HERE = "github:owner/tools"


# --- references ------------------------------------------------------------------------------------------

OWNERS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}", fullmatch=True)
REPOS = st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True).filter(
    lambda name: name not in (".", "..") and not name.lower().endswith(".git")
)
PART = st.text("abcXYZ019._-ü +", min_size=1, max_size=8).filter(lambda part: part not in (".", ".."))
SUBDIRS = st.just("") | st.lists(PART, min_size=1, max_size=3).map("/".join)
REFS = st.none() | st.from_regex(r"[A-Za-z0-9_@][A-Za-z0-9_@+=!-]{1,20}(/[A-Za-z0-9_+-]{1,9}){0,2}", fullmatch=True)


@QUICK
@given(st.builds(Github, OWNERS, REPOS, SUBDIRS, REFS))
def test_a_reference_is_read_as_it_is_written(place: Github) -> None:
    assert refs.parse(str(place)) == place
    assert refs.is_github(str(place))


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        ("github:o/r", Github("o", "r"), "r"),
        ("github:o/r@main", Github("o", "r", "", "main"), "r"),
        ("github:o/r/a/b@feature/x", Github("o", "r", "a/b", "feature/x"), "b"),
        ("github:o/r/a@@scope/tool@1.2.0", Github("o", "r", "a", "@scope/tool@1.2.0"), "a"),
        ("github:o/.github@refs/tags/v1", Github("o", ".github", "", "refs/tags/v1"), ".github"),
        ("github:old--name-/r", Github("old--name-", "r"), "r"),
        (f"github:o/r@{REV.upper()}", Github("o", "r", "", REV), "r"),
    ],
)
def test_references(text: str, place: Github, name: str) -> None:
    assert refs.parse(text) == place
    assert place.name == name
    assert place.rev == (REV if place.ref == REV else None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gitlab:o/r", "does not begin with `github:`"),
        *((f"github:{owner}/r", "is no owner on GitHub") for owner in ("", "-o", "o.o", "o o", "x" * 40, "ö", "..")),
        ("github:o", "is no repository on GitHub"),
        *(
            (f"github:o/{repo}", "is no repository on GitHub")
            for repo in ("", ".", "..", "a b", "x" * 101, "é", "a?b")
        ),
        ("github:o/r.git", "leave `.git` out"),
        ("github:https://github.com/o/r", "is no owner on GitHub"),
        *(
            (f"github:o/r/{subdir}", "must be a path below the repository's top, without `..`")
            for subdir in ("", ".", "..", "a/../../b", "a//b", "/a", "a/")
        ),
        *((f"github:o/r/{subdir}", "a plugin's directory cannot have") for subdir in ("a\\b", "a\nb", "\x1b[2Ja")),
        ("github:o/r/" + "a/" * 100 + "a", "is longer than 200 characters"),
        *(
            (f"github:o/r@{ref}", "is no branch, tag or commit")
            for ref in (
                *("", "-x", "--upload-pack=x", "a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{1}"),
                *("@", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "a\nb", "\x7f", "\u200bx"),
                "x" * 201,
            )
        ),
    ],
)
def test_what_is_no_reference(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="github:OWNER/REPO") as caught:
        refs.parse(text)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


# --- the lock --------------------------------------------------------------------------------------------


def package(name: str) -> LockedPackage:
    path = f"pool/main/x/{name}.deb"
    return LockedPackage(name=name, version="1", arch="all", repo="debian", path=path, size=1, sha256="0" * 64)


def a_lock(*plugins: Pin, **changes: Any) -> Lock:
    values: dict[str, Any] = {
        "format": 1,
        "base": "debian",
        "suite": "trixie",
        "arch": "amd64",
        "requested": ("jq",),
        "base_requested": resolve.BASE_REQUEST,
        "bootstrap": Bootstrap(package=package("busybox-static"), nar_hash=HASH),
        "kernel": package("linux"),
        "tools": (package("bash"), package("erofs-utils")),
        "base_packages": (package("bash"),),
        "packages": (package("jq"),),
        "plugins": plugins,
    }
    return Lock(**(values | changes))


SPEC = ImageSpec("debian", "trixie", ("jq",), (), False)
PINS = st.lists(
    st.builds(
        lambda place, rev, date: Pin(str(place), place.rev or rev, HASH, date),
        st.builds(Github, OWNERS, REPOS, SUBDIRS, REFS | st.just(REV)),
        st.text("0123456789abcdef", min_size=40, max_size=40),
        st.none() | st.dates().map(str),
    ),
    unique_by=lambda pin: pin.ref,
    max_size=4,
)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / ".nixbox").mkdir()
    return tmp_path


@QUICK
@given(PINS)
def test_pins_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, found: list[Pin]) -> None:
    file = tmp_path_factory.getbasetemp() / "pins.lock"
    file.unlink(missing_ok=True)
    lockfile.save_pins(file, found)
    alone = file.read_text()
    assert lockfile.pins(file) == {pin.ref: pin for pin in found}
    assert lockfile.only_pins(json.loads(alone))
    assert alone.count("\n") == (len(found) + 5 if found else 4)  # one pin a line

    # Into a whole lock and out of it again: the rest stays to the byte.
    without = lock.dump(a_lock())
    file.write_text(without)
    lockfile.save_pins(file, found)
    assert lockfile.image_part(file.read_text()) == without
    whole = lock.load(file)
    assert whole.plugins == tuple(sorted(found, key=lambda pin: pin.ref))
    assert lock.parse(lock.dump(whole), file) == whole
    assert lock.load(file).model_copy(update={"plugins": ()}) == a_lock()


def test_a_lock_without_pins_has_no_word_of_them() -> None:
    assert "plugins" not in lock.dump(a_lock())
    assert lockfile.pins(Path("/nowhere/nixbox.lock")) == {}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([], "is no table"),
        ({"rev": REV, "hash": HASH}, "ref: must be text"),
        ({"ref": HERE, "hash": HASH}, "rev: must be text"),
        ({"ref": HERE, "rev": REV, "hash": 1}, "hash: must be text"),
        ({"ref": HERE, "rev": REV[:12], "hash": HASH}, "rev: `0123456789ab` has another form"),
        ({"ref": HERE, "rev": REV + "\n", "hash": HASH}, "rev: "),
        ({"ref": HERE, "rev": REV, "hash": "md5-x"}, "hash: `md5-x` has another form"),
        ({"ref": HERE, "rev": REV, "hash": HASH, "date": "today"}, "date: `today` has another form"),
        ({"ref": HERE, "rev": REV, "hash": HASH, "date": 1}, "date: `1` has another form"),
        ({"ref": HERE, "rev": REV, "hash": HASH, "owner": "x"}, "owner: is no field of a pin"),
        ({"ref": "github:../x", "rev": REV, "hash": HASH}, "`..` is no owner on GitHub"),
        ({"ref": f"{HERE}@{OTHER}", "rev": REV, "hash": HASH}, "rev: is another commit than"),
    ],
)
def test_what_is_no_pin(workspace: Path, row: object, fault: str) -> None:
    file = lockfile.path(workspace)
    good = Pin(HERE, REV, HASH).row
    file.write_text(json.dumps({"format": 1, "plugins": [good, row, good]}))
    with pytest.raises(ConfigError, match="is damaged") as caught:
        pins.read(workspace)
    first, second = caught.value.faults
    assert first.startswith("nixbox.lock: plugins.1: ")
    assert fault in first
    assert second == f"nixbox.lock: plugins.2: ref: `{HERE}` is there twice"
    # The models say the same of a whole lock.
    data = json.loads(lock.dump(a_lock())) | {"plugins": [row]}
    with pytest.raises(ConfigError) as models:
        lock.parse(json.dumps(data), file)
    assert fault in models.value.faults[0]


@pytest.mark.parametrize("text", ["", "{", "<<<<<<< HEAD", '{"format": 2}', "[]", '{"format": 1, "plugins": {}}'])
def test_a_damaged_lock_pins_nothing_anew(workspace: Path, text: str) -> None:
    """Who would resolve it again would take whatever GitHub has now for what was pinned."""
    lockfile.path(workspace).write_text(text)
    for call in (lambda: pins.read(workspace), lambda: pins.ensure(workspace, [HERE], Reporter())):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.hint
    assert lockfile.path(workspace).read_text() == text


def test_a_lock_of_pins_alone_is_no_lock_of_an_image(workspace: Path) -> None:
    file = lockfile.path(workspace)
    for found in ([], [Pin(HERE, REV, HASH)]):
        lockfile.save_pins(file, found)
        assert ensure.stale(workspace, SPEC) == "there is no lock yet"
        assert ensure.current(workspace, SPEC) is None
        with pytest.raises(ConfigError, match="has plugins and no packages yet"):
            lock.load(file)


def test_pins_make_no_lock_stale_and_no_image_another(workspace: Path) -> None:
    file = lockfile.path(workspace)
    data = json.loads(lock.dump(a_lock())) | {"host": []}
    old = lockfile.render(data)
    assert old == lock.dump(a_lock())
    keys = set()
    for found in ([], [Pin(HERE, REV, HASH)], [Pin(HERE, OTHER, HASH, "2026-07-04")]):
        file.write_text(old)
        lockfile.save_pins(file, found)
        assert ensure.stale(workspace, SPEC) is None
        keys.add(build.key(SPEC, file.read_text()))
    assert keys == {build.key(SPEC, old)}
    assert build.key(SPEC, lock.dump(a_lock(suite="sid"))) not in keys


@pytest.mark.parametrize("text", ['{"plugins": 1', '"plugins"', '["plugins"]', '{"a": "plugins"}'])
def test_any_other_text_is_a_key_as_it_is(text: str) -> None:
    assert lockfile.image_part(text) == text


def test_a_new_lock_keeps_the_pins(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "mirrors", lambda *_: None)
    monkeypatch.setattr(resolve, "resolve", lambda *_, **__: a_lock(suite="sid"))
    file, found = lockfile.path(workspace), Pin(HERE, REV, HASH, "2026-07-04")
    file.write_text(lock.dump(a_lock(found)))
    assert ensure.relock(workspace, SPEC, None, None, Reporter()) == []
    assert lock.load(file) == a_lock(found, suite="sid")
    lockfile.save_pins(file.with_name("alone"), [found])
    file.with_name("alone").replace(file)
    assert ensure.relock(workspace, SPEC, None, None, Reporter()) != []
    assert lock.load(file) == a_lock(found, suite="sid")
    file.write_text('{"format": 1, "plugins": [1]}')  # `nixbox lock` is the mend for a damaged one
    ensure.relock(workspace, SPEC, None, None, Reporter())
    assert lock.load(file) == a_lock(suite="sid")


def test_nothing_from_github_touches_nothing(workspace: Path) -> None:
    lockfile.path(workspace).write_text("{")
    assert pins.ensure(workspace, [], Reporter()) == {}
    assert pins.present(workspace, []) == {}


def test_what_is_loaded_for_a_pinned_plugin() -> None:
    """Each command of a workspace with one pays for it."""
    slow = ["pydantic", "nix_prefetch_github", "urllib.request", "sh", "logging"]
    code = f"import nixbox.image.pins, sys; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- words -----------------------------------------------------------------------------------------------

URL = "https://github.com/owner/tools"
GIT = f"fatal: unable to access '{URL}.git/': "
NIX = f"error: unable to download '{URL}/archive/x.tar.gz': "
WARNING = f"warning: {NIX}Couldn't resolve host name (6); retrying in 331 ms\n"


@pytest.mark.parametrize(
    ("said", "words", "code"),
    [
        # git 2.39 and 2.47, with GnuTLS and with OpenSSL
        (f"{GIT}Could not resolve host: github.com", "cannot be reached", 1),
        (f"{GIT}Failed to connect to github.com port 443 after 0 ms: Couldn't connect to server", "be reached", 1),
        (f"{GIT}Operation too slow. Less than 1 bytes/sec transferred the last 20 seconds", "be reached", 1),
        (f"{GIT}GnuTLS recv error (-110): The TLS connection was non-properly terminated.", "be reached", 1),
        (f"{GIT}server certificate verification failed. CAfile: none CRLfile: none", "does not prove who it is", 1),
        (f"{GIT}SSL certificate problem: unable to get local issuer certificate", "does not prove who it is", 1),
        (f"{GIT}The requested URL returned error: 429", "refuses to answer for now", 1),
        (f"{GIT}The requested URL returned error: 403", "refuses to answer for now", 1),
        (f"{GIT}The requested URL returned error: 503", "answers with error 503", 1),
        (f"fatal: could not read Username for '{URL}': terminal prompts disabled", "is not there, or", 2),
        (f"remote: Repository not found.\nfatal: repository '{URL}.git/' not found", "is not there, or", 2),
        (f"remote: Repository not found.\nfatal: Authentication failed for '{URL}.git/'", "is not there, or", 2),
        # Nix 2.8
        (f"{WARNING}{NIX}Couldn't resolve host name (6)", "cannot be reached", 1),
        (f"{NIX}Timeout was reached (28)", "cannot be reached", 1),
        (f"{NIX}SSL peer certificate or SSH remote key was not OK (60)", "does not prove who it is", 1),
        (f"{NIX}Problem with the SSL CA cert (path? access rights?) (77)", "does not prove who it is", 1),
        (f"{NIX}HTTP error 404\n\nresponse body:\n\nNot Found", "is not there, or", 2),
        (f"{NIX}HTTP error 429", "refuses to answer for now", 1),
        (f"{NIX}HTTP error 502", "answers with error 502", 1),
        ("error: hash mismatch for '/tmp/nix-1-0/unpacked/tools-1'", "is not what the lock says", 1),
        ("error: writing to file: No space left on device", "no space left", 1),
        ("error: cannot figure out user name", "could not be fetched: error: cannot figure", 1),
        ("", "nothing was said", 1),
    ],
)
def test_what_git_and_nix_say(said: str, words: str, code: int) -> None:
    error = github.failure(refs.parse(HERE), said)
    assert words in error.message
    assert error.message.startswith(f"{HERE}: ")
    assert "retrying" not in error.message
    assert (error.exit_code, bool(error.hint)) == (code, True)
    assert isinstance(error, NixboxError)


# --- the command line ------------------------------------------------------------------------------------

KNOWN = ["github:o/tools@v1", "github:o/mono/aws", "github:p/tools"]


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["github:o/tools@v1"], [0]),
        (["github:o/tools"], [0]),
        (["o/tools"], [0]),
        (["o/mono/aws"], [1]),
        (["aws", "github:o/mono/aws"], [1]),
        (["tools"], [0, 2]),
        (["p/tools", "aws"], [2, 1]),
    ],
)
def test_what_a_word_means(words: list[str], chosen: list[int]) -> None:
    assert update.choose(words, KNOWN) == [KNOWN[i] for i in chosen]


@pytest.mark.parametrize("word", ["mono", "o", "github:o", "v1", "github:o/tools@v2", ""])
def test_a_word_that_means_none(word: str) -> None:
    with pytest.raises(ConfigError, match="not pinned from GitHub") as caught:
        update.choose(["aws", word], KNOWN)
    assert caught.value.hint == f"the config pins {', '.join(KNOWN)}"
    assert "aws" not in caught.value.message


def test_what_the_config_names(workspace: Path) -> None:
    config = workspace / ".nixbox/config.toml"
    config.write_text(f'plugins = ["git", "{HERE}", "./none"]\n')
    assert update.references(workspace) == [HERE]
    config.write_text('plugins = ["git"]\n')
    assert update.references(workspace) == []
    config.write_text("plugins = [\n")
    with pytest.raises(ConfigError):
        update.references(workspace)
