"""`nixbox build`, `image export` and `import` as they are typed, with the tiny image in stores of the tests' own."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nixbox import cli, ed25519
from nixbox.cli import plugins
from nixbox.image import fetch, nixkey, store
from tests import tiny
from tests.tiny import Hosts, lock_text

pytestmark = [
    pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store on this host"),
    pytest.mark.skipif(tiny.BUSYBOX is None, reason="no static busybox on this host"),
]
CONFIG = """\
name = "box"
mounts = []
profile = "dev"
[debian]
mirror = "http://mirror.example/debian"
[machine]
accelerator = "tcg"
"""
hosts = pytest.fixture(tiny.hosts)


@dataclass(frozen=True)
class Said:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Its JSON."""
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def call(hosts: Hosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program inside this process, where the hosts' variables are."""
    # The tiny image is made of no package, and so none is brought.
    monkeypatch.setattr(fetch, "ensure", lambda *_: 0)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(hosts.place / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(hosts.place / "state"))

    def call(*args: str, code: int = 0) -> Said:
        monkeypatch.setattr(sys, "argv", ["nixbox", *args])
        capsys.readouterr()
        plugins.with_commands.cache_clear()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert caught.value.code == code, said.err
        return Said(code, said.out, said.err)

    return call


def workspace(place: Path, monkeypatch: pytest.MonkeyPatch, script: str, lock: str | None = None) -> Path:
    """A workspace whose image that script makes; the current directory from now on."""
    (place / ".nixbox/profiles").mkdir(parents=True)
    (place / ".nixbox/config.toml").write_text(CONFIG)
    (place / ".nixbox/profiles/dev.toml").write_text(f"build = {json.dumps(script)}\n")
    if lock is not None:
        (place / ".nixbox/nixbox.lock").write_text(lock)
    monkeypatch.chdir(place)
    return place / ".nixbox/nixbox.lock"


def key_file(place: Path) -> tuple[Path, str]:
    """A secret key, and its public half."""
    key = nixkey.SecretKey("ci-1", b"k" * 32)
    file = place / "ci.secret"
    file.write_text(f"ci-1:{base64.b64encode(key.seed + ed25519.public_half(key.seed)).decode()}\n")
    return file, key.public


def test_from_a_build_to_another_workspace(hosts: Hosts, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts("ci")
    script = "echo made > $out/etc/x"
    workspace(hosts.place / "w1", monkeypatch, script, lock_text())
    archive = str(hosts.place / "a.tar")
    missing = call("image", "export", archive, code=1)
    assert "is not here" in missing.err and "nixbox build" in missing.err
    facts = call("build", "--json").data
    assert facts["how"] == "built" and facts["reproducible"] is True and facts["fresh"] is True
    closure = {one["path"]: one for one in facts["closure"]}
    assert facts["closure_size"] == sum(one["nar_size"] for one in closure.values())
    assert facts["nar_hash"] == closure[facts["path"]]["nar_hash"] == store.nar_hash(store.place(Path(facts["path"])))
    assert set(facts["files"]) == {"initrd", "image.json", "etc/x"}
    assert facts["files"]["initrd"]["size"] == len("trixie\n")
    assert facts["drv"].endswith("-tiny-image.drv")
    assert call("build", "--json").data["how"] == "there"
    file, public = key_file(hosts.place)
    done = call("image", "export", archive, "--sign-key", str(file), "--json").data
    assert done["signed_by"] == "ci-1" and done["size"] == Path(archive).stat().st_size
    assert call("image", "export", archive, code=2).err.startswith(f"error: {archive} is there already")
    pin = call("image", "export", "--force", archive).out.strip()
    assert pin != done["manifest_sha256"], "the signatures of its paths are in a manifest"

    hosts("laptop")
    lock = workspace(hosts.place / "w2", monkeypatch, script)
    taken = call("image", "import", archive, "--sha256", pin)
    assert taken.out.strip() == facts["path"] and "its lock is this workspace's now" in taken.err
    assert "nixbox up --locked" in taken.err and "only checked against itself" not in taken.err
    assert lock.read_text() == lock_text()
    assert call("build", "--locked", "--json").data["how"] == "there"
    again = call("image", "import", archive, "--json").data
    assert (again["lock"], again["fits"], again["signed_by"], again["manifest_sha256"]) == ("same", True, None, pin)
    assert "only checked against itself" in call("image", "import", archive).err
    assert "is not signed" in call("image", "import", archive, "--public-key", public, code=1).err


def test_another_lock_stays_and_what_differs_is_said(
    hosts: Hosts, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts("ci")
    workspace(hosts.place / "w1", monkeypatch, "true", lock_text())
    archive = str(hosts.place / "a.tar")
    call("build")
    call("image", "export", archive)
    hosts("laptop")
    mine = lock_text().replace('"name": "linux", "version": "1"', '"name": "linux", "version": "2"')
    assert mine != lock_text()
    lock = workspace(hosts.place / "w2", monkeypatch, "true", mine)
    taken = call("image", "import", archive)
    assert "stays; the archive's has:\n~ linux 2 → 1" in taken.err and "up --locked" not in taken.err
    assert lock.read_text() == mine
    # A lock with pinned plugins only gets the packages, and keeps the pins.
    pin = {"ref": "github:o/r", "rev": "0" * 40, "hash": "sha256-" + "A" * 43 + "="}
    lock.write_text(json.dumps({"format": 1, "plugins": [pin]}))
    assert call("image", "import", archive, "--json").data["lock"] == "written"
    now = json.loads(lock.read_text())
    assert now["plugins"] == [pin] and now["suite"] == "trixie"
    # Another script makes another image, whatever the lock says.
    workspace(hosts.place / "w3", monkeypatch, "false")
    data = call("image", "import", archive, "--json").data
    assert data["fits"] is False and data["notes"] == [
        "this workspace's config asks for another image: its build scripts differ"
    ]
    # And without a workspace there is nothing to fit.
    (hosts.place / "nowhere").mkdir()
    monkeypatch.chdir(hosts.place / "nowhere")
    data = call("image", "import", archive, "--json").data
    assert (data["lock"], data["fits"]) == (None, False)


def test_a_cache_from_build_to_build(hosts: Hosts, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts("ci")
    workspace(hosts.place / "w", monkeypatch, "true", lock_text())
    file, public = key_file(hosts.place)
    url = f"file://{hosts.place}/cache"
    pushed = call("build", "--store", url, "--sign-key", str(file))
    assert f"the image is in {url}" in pushed.err
    laptop = hosts("laptop")
    assert "is not signed by a trusted key" in call("build", "--from", url, code=1).err
    assert laptop.held == set()
    taken = call("build", "--from", url, "--public-key", public)
    assert taken.out == pushed.out and f"the image came from {url}" in taken.err
    assert "was here already" in call("build", "--from", url).err
    hosts("other")
    (hosts.place / "empty").mkdir()
    built = call("build", "--from", f"file://{hosts.place}/empty")
    assert "has not got this image" in built.err and "was built here" in built.err and built.out == pushed.out


def test_a_check_has_an_exit_code_of_its_own(hosts: Hosts, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts("ci")
    workspace(hosts.place / "w", monkeypatch, "echo same > $out/etc/x", lock_text())
    assert "built again, and the same bit for bit: 2 derivations" in call("build", "--check").err
    workspace(hosts.place / "w2", monkeypatch, "$b cat /proc/sys/kernel/random/uuid > $out/etc/uuid", lock_text())
    failed = call("build", "--check", "--json", code=5)
    assert failed.data["check"]["agrees"] is False
    assert "tiny-image/etc/uuid: content: " in failed.err
    profile = hosts.place / "w2/.nixbox/profiles/dev.toml"
    profile.write_text(profile.read_text() + "build_network = true\n")
    # Refused before anything is built or compared: as an own store cannot even build it.
    assert "not reproducible" in call("build", "--check", code=2).err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("build", "--public-key", "a:b"), "about what --from URL gives"),
        (("build", "--unsigned"), "about what --from URL gives"),
        (("build", "--sign-key", "x"), "--sign-key signs what --store URL"),
        (("build", "--from", "/x"), "takes the URL of a Nix binary cache"),
        (("build", "--from", "file:///x", "--public-key", "x"), "is no public key of Nix's"),
        (("build", "--store", "x"), "takes the URL of a Nix binary cache"),
        (("build", "--store", "file:///x", "--sign-key", "/none"), "the key /none cannot be read"),
        (("build", "--builders", " "), "names no builder"),
        (("image", "export", "a.tar", "--sign-key", "/none"), "the key /none cannot be read"),
        (("image", "import", "none.tar"), "there is no archive none.tar"),
        (("image", "import", "."), ". is no file"),
        (("image", "import", "none.tar", "--sha256", "12"), "64 hexadecimal digits"),
        (("image", "import", "none.tar", "--public-key", "12"), "is no public key of Nix's"),
    ],
)
def test_bad_usage_starts_nothing(
    args: tuple[str, ...], words: str, hosts: Hosts, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts("ci")
    workspace(hosts.place / "w", monkeypatch, "true", lock_text())
    said = call(*args, code=2)
    assert words in said.err and said.out == ""
    assert not (hosts.place / "ci/store").exists() or not list((hosts.place / "ci/store/nix/store").glob("*tiny*"))
