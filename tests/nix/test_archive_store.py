"""Archives, binary caches and checks of builds, by the real Nix, in stores of the tests' own.

The image is a tiny one in the place of Debian's; everything else is what an image of Debian goes through.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from nixbox.errors import ConfigError, ExitCode, HostError, NixboxError
from nixbox.image import archive, binary_cache, build, check, ensure, images, manifest, nixkey, store, ustar
from nixbox.image.ustar import ArchiveError
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter
from tests import tiny
from tests.tiny import Host, Hosts, lock_text, spec

pytestmark = [
    pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store on this host"),
    pytest.mark.skipif(tiny.BUSYBOX is None, reason="no static busybox on this host"),
]


hosts = pytest.fixture(tiny.hosts)


def exported(host: Host, what: ImageSpec, target: Path, **options: Any) -> archive.Exported:
    """The tiny image, built on a host and written to a file."""
    image = host.build(what, lock_text())
    return archive.export(target, what, lock_text(), image.path, Reporter(), **options)


# --- archives ---


def test_what_one_host_built_another_has_by_a_file(hosts: Hosts, tmp_path: Path) -> None:
    ci = hosts("ci")
    what = spec("echo hello > $out/etc/motd")
    done = exported(ci, what, tmp_path / "a.tar")
    again = archive.export(tmp_path / "b.tar", what, lock_text(), done.image, Reporter())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes(), "the same bits each time"
    assert again.manifest_sha256 == done.manifest_sha256
    assert done.bytes == (tmp_path / "a.tar").stat().st_size
    listed = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == ["manifest.json", "manifest.sum", "nixbox.lock"], "any tar reads it"
    assert listed.stderr == ""

    laptop = hosts("laptop")
    assert laptop.held == set()
    taken = archive.bring(tmp_path / "a.tar", Reporter(), sha256=done.manifest_sha256.upper())
    assert laptop.held == {"tiny-image", "tiny-initrd"}
    assert taken.image.path == done.image
    assert taken.image.file("etc/motd").read_text() == "hello\n"
    assert taken.lock_text == lock_text()
    found = build.built(build.key(what, lock_text()))
    assert found is not None and found.path == done.image and found.root in store.roots_of(found.path)
    assert not list((laptop.path / "cache/nixbox/downloads").iterdir()), "what was unpacked is gone"
    # What came by a file goes on by a file, the same.
    archive.export(tmp_path / "c.tar", what, lock_text(), done.image, Reporter())
    assert (tmp_path / "c.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
    # And again: nothing is to be done.
    assert archive.bring(tmp_path / "a.tar", Reporter()).image.path == done.image
    # Its root is an image's like every other.
    (info,) = images.all_images()
    assert images.collect([info]).paths >= 2 and laptop.held == set()


@pytest.mark.parametrize("name", ["a b", "a%20b", "ü", "a?b", "a#b"])
def test_a_cache_directory_may_have_any_name(hosts: Hosts, tmp_path: Path, name: str) -> None:
    exported(hosts("ci"), spec(), tmp_path / "a.tar")
    laptop = hosts("laptop")
    laptop.patch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    laptop.patch.setattr(tempfile, "tempdir", str(tmp_path))
    archive.bring(tmp_path / "a.tar", Reporter())
    assert laptop.held == {"tiny-image", "tiny-initrd"}
    assert not list(tmp_path.glob("nixbox-import-*"))


def test_a_flipped_byte_is_refused_wherever_it_is(hosts: Hosts, tmp_path: Path) -> None:
    exported(hosts("ci"), spec(), tmp_path / "good.tar", key=None)
    good = (tmp_path / "good.tar").read_bytes()
    laptop = hosts("laptop")
    bad = tmp_path / "bad.tar"
    # One byte in every 97, and each of the blocks that hold a header.
    places = sorted({*range(0, len(good), 97), *range(0, len(good), 512), len(good) - 1})
    assert len(places) > 50
    for place in places:
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises((ArchiveError, NixboxError)) as refused:
            archive.bring(bad, Reporter())
        assert refused.value.exit_code in (ExitCode.FAILURE, ExitCode.HOST), place
    assert laptop.held == set(), "nothing reached the store"
    assert not list((laptop.path / "cache/nixbox").glob("images/*"))
    assert not list((laptop.path / "cache/nixbox/downloads").iterdir())


def test_a_changed_member_is_named(hosts: Hosts, tmp_path: Path) -> None:
    done = exported(hosts("ci"), spec("echo needle > $out/etc/x"), tmp_path / "good.tar")
    good = (tmp_path / "good.tar").read_bytes()
    hosts("laptop")
    bad = tmp_path / "bad.tar"
    bad.write_bytes(good.replace(b"needle\n", b"noodle\n"))
    with pytest.raises(ArchiveError, match=rf"nar/{done.image.name[:32]}\.nar is damaged, or was changed"):
        archive.bring(bad, Reporter())
    bad.write_bytes(good.replace(b'"suite": "trixie",', b'"suite": "trixia",'))
    with pytest.raises(ArchiveError, match=r"nixbox\.lock is damaged"):
        archive.bring(bad, Reporter())


def test_a_pin_and_a_signature_say_who_made_it(hosts: Hosts, tmp_path: Path) -> None:
    key = nixkey.SecretKey("ci-1", bytes(range(32)))
    other = nixkey.SecretKey("ci-1", bytes(32))
    ci = hosts("ci")
    plain = exported(ci, spec(), tmp_path / "plain.tar")
    signed = exported(ci, spec(), tmp_path / "signed.tar", key=key)
    assert (plain.signed_by, signed.signed_by) == (None, "ci-1")
    hosts("laptop")
    public, wrong = (nixkey.public_key(one.public) for one in (key, other))
    for file, options, words in (
        ("plain.tar", {"keys": (public,)}, "its manifest is not signed"),
        ("signed.tar", {"keys": (wrong,)}, "not signed by a key that was named"),
        ("plain.tar", {"sha256": "0" * 64}, "its manifest's SHA-256 is"),
    ):
        with pytest.raises(ArchiveError, match=words):
            archive.bring(tmp_path / file, Reporter(), **options)
    taken = archive.bring(tmp_path / "signed.tar", Reporter(), keys=(wrong, public))
    assert taken.signed_by == "ci-1"
    # Nix itself agrees with the signatures of the paths.
    (row,) = [path for path in taken.manifest.paths if path.path == str(signed.image)]
    (info,) = store.path_infos([signed.image])
    assert public.accepts(manifest.fingerprint(info), row.signatures[0])


def test_an_archive_of_another_nixbox_is_not_believed(hosts: Hosts, tmp_path: Path) -> None:
    exported(hosts("ci"), spec(), tmp_path / "a.tar")
    laptop = hosts("laptop")
    image = paths.nix_dir() / "image.nix"
    image.write_text(image.read_text().replace("mkdir -p", "mkdir -p -m 755"))
    with pytest.raises(NixboxError, match=r"from its lock this one .* would build"):
        archive.bring(tmp_path / "a.tar", Reporter())
    assert laptop.held == set()


def test_an_image_that_claims_another_lock_is_not_believed(hosts: Hosts, tmp_path: Path) -> None:
    # A whole archive, every hash right, whose image is not what its lock comes to.
    ci = hosts("ci")
    evil = ci.build(spec("echo evil > $out/etc/x"), lock_text())
    archive.export(tmp_path / "evil.tar", spec(), lock_text(), evil.path, Reporter())
    laptop = hosts("laptop")
    with pytest.raises(NixboxError, match=r"from its lock this one .* would build"):
        archive.bring(tmp_path / "evil.tar", Reporter())
    assert laptop.held == set()


def test_other_bits_under_the_same_name_are_noticed(hosts: Hosts, tmp_path: Path) -> None:
    what = spec("$b head -c 8 /dev/urandom > $out/etc/random")
    exported(hosts("ci"), what, tmp_path / "a.tar")
    laptop = hosts("laptop")
    laptop.build(what, lock_text())
    with pytest.raises(NixboxError, match="with other bits than the archive"):
        archive.bring(tmp_path / "a.tar", Reporter())


def test_a_damaged_store_is_not_exported(hosts: Hosts, tmp_path: Path) -> None:
    ci = hosts("ci")
    image = ci.build(spec("echo here > $out/etc/x"), lock_text())
    file = image.file("etc/x")
    file.chmod(0o644)
    file.write_text("else\n")
    with pytest.raises(NixboxError, match="is not what it was when it was built"):
        archive.export(tmp_path / "a.tar", spec(), lock_text(), image.path, Reporter())
    assert not list(tmp_path.glob("*.tar*")) and not list(tmp_path.glob(".*")), "no half of a file is left"


def test_a_file_that_is_there_stays(hosts: Hosts, tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    target.write_text("mine")
    ci = hosts("ci")
    with pytest.raises(ConfigError, match="is there already"):
        exported(ci, spec(), target)
    assert target.read_text() == "mine"
    done = exported(ci, spec(), target, force=True)
    assert target.stat().st_size == done.bytes


# --- binary caches ---


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server that serves the directory `cache`."""
    (tmp_path / "cache").mkdir()
    handler = functools.partial(_Handler, directory=str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def secret(tmp_path: Path, name: str = "ci-1") -> tuple[Path, str]:
    """A key of Nix's own making, and its public half by Nix."""
    features = ["nix", "--extra-experimental-features", "nix-command", "key"]
    file = tmp_path / f"{name}.secret"
    made = subprocess.run([*features, "generate-secret", "--key-name", name], capture_output=True, check=True)
    file.write_bytes(made.stdout)
    public = subprocess.run(
        [*features, "convert-secret-to-public"], input=made.stdout, capture_output=True, check=True
    )
    assert nixkey.secret_key(file).public == public.stdout.decode().strip(), "both say the same of a key"
    return file, public.stdout.decode().strip()


@pytest.mark.parametrize("by_http", [False, True], ids=["file", "http"])
def test_what_one_host_built_another_has_from_a_cache(
    hosts: Hosts, tmp_path: Path, server: str, by_http: bool
) -> None:
    url = server if by_http else f"file://{tmp_path}/cache"
    file, public = secret(tmp_path)
    laptop = hosts("laptop")
    what, key = spec(), build.key(spec(), lock_text())
    source = binary_cache.cache(url, [public], unsigned=False)
    said: list[str] = []

    class Listening(Reporter):
        def note(self, text: str) -> None:
            said.append(text)

    (tmp_path / "cache/nix-cache-info").write_text("StoreDir: /nix/store\n")
    assert ensure._substitute(what, lock_text(), key, source, Listening()) is None
    assert len(said) == 1 and "has not got this image" in said[0] and url in said[0]

    ci = hosts("ci")
    binary_cache.push(f"file://{tmp_path}/cache", ci.build(what, lock_text()).path, file)
    laptop.use()
    image = ensure._substitute(what, lock_text(), key, source, Listening())  # asked anew, though it just had not
    assert image is not None and image.how == "substituted" and len(said) == 1
    assert image.file("initrd").read_text() == "trixie\n"
    assert build.built(key) is not None and laptop.held == {"tiny-image", "tiny-initrd"}


def test_a_cache_is_believed_by_signature_only(hosts: Hosts, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/cache"
    (tmp_path / "cache").mkdir()
    path = hosts("ci").build(spec(), lock_text()).path
    file, public = secret(tmp_path)
    _, other = secret(tmp_path, "ci-2")
    binary_cache.push(url, path)
    laptop = hosts("laptop")
    for keys in ([], [public]):
        with pytest.raises(NixboxError, match="is not signed by a trusted key"):
            binary_cache.take(binary_cache.cache(url, keys, unsigned=False), path)
    hosts("ci")
    shutil.rmtree(tmp_path / "cache")
    binary_cache.push(url, path, file)
    laptop.use()
    with pytest.raises(NixboxError, match="is not signed by a trusted key"):
        binary_cache.take(binary_cache.cache(url, [other], unsigned=False), path)
    assert laptop.held == set()
    binary_cache.take(binary_cache.cache(url, [other, public], unsigned=False), path)
    assert laptop.held == {"tiny-image", "tiny-initrd"}
    third = hosts("third")
    binary_cache.take(binary_cache.cache(url, [], unsigned=True), path)
    assert third.held == laptop.held


def test_a_changed_cache_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/cache?compression=none"
    path = hosts("ci").build(spec("echo needle > $out/etc/x"), lock_text()).path
    (tmp_path / "cache").mkdir()
    file, public = secret(tmp_path)
    (tmp_path / "a key").mkdir()
    file = file.rename(tmp_path / "a key/%20")
    binary_cache.push(url, path, file)
    for nar in (tmp_path / "cache/nar").iterdir():
        nar.write_bytes(nar.read_bytes().replace(b"needle", b"noodle"))
    hosts("laptop")
    with pytest.raises(NixboxError, match="is damaged, or was changed"):
        binary_cache.take(binary_cache.cache(url, [public], unsigned=False), path)
    assert store.invalid([path]) == {path}


def test_a_cache_that_is_not_there_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts("laptop")
    path = Path("/nix/store/" + "a" * 32 + "-x")
    with pytest.raises(NixboxError, match="there is no binary cache at file:"):
        binary_cache.has(binary_cache.cache(f"file://{tmp_path}/none", [], unsigned=True), path)
    with pytest.raises(NixboxError, match=r"http://127\.0\.0\.1:9 cannot be used"):
        binary_cache.has(binary_cache.cache("http://127.0.0.1:9", [], unsigned=True), path)


# --- building again ---


def drv_of(image: build.Image) -> Path:
    """The derivation of an image that was built here."""
    found = store.deriver(image.path)
    assert found is not None
    return found


def test_what_can_be_built_again_agrees(hosts: Hosts) -> None:
    image = hosts("ci").build(spec("echo same > $out/etc/x"), lock_text())
    found = check.check_drv(drv_of(image), Reporter())
    assert [one.step.name for one in found] == ["tiny-initrd", "tiny-image"]
    assert all(one.agrees for one in found) and check.report(found) is None


def test_files_that_differ_are_named(hosts: Hosts) -> None:
    script = """
      $b head -c 8 /dev/urandom > $out/etc/random
      read -r a < $out/etc/random || true
      $b cat /proc/sys/kernel/random/uuid > $out/etc/uuid
      $b ln -s $($b cat $out/etc/uuid) $out/link
      $b mkdir $out/d; echo x > $out/d/$($b cat $out/etc/uuid)
      echo same > $out/etc/same
    """
    ci = hosts("ci")
    image = ci.build(spec(script), lock_text())
    before = image.file("etc/uuid").read_text().strip()
    found = check.check_drv(drv_of(image), Reporter())
    initrd, own = found
    assert initrd.agrees and not own.agrees
    rows = {(d.path, d.what) for d in own.differences}
    assert {
        ("tiny-image/etc/random", "content"),
        ("tiny-image/etc/uuid", "content"),
        ("tiny-image/link", "content"),
    } < rows
    assert (f"tiny-image/d/{before}", "is there") in rows
    assert not any("same" in path for path, _ in rows)
    error = check.report(found)
    assert error is not None and error.exit_code == ExitCode.DIFFERS
    assert "tiny-image/etc/random: content" in error.message and "1 of 2 builds" in error.message
    assert json.loads(json.dumps([one.as_json() for one in found]))[1]["agrees"] is False
    assert not list((ci.path / "store/nix/store").glob("*.check")), "the second build is gone"
    assert image.file("etc/uuid").read_text().strip() == before, "the first stays"


def test_an_image_from_elsewhere_is_compared_with_one_of_here(hosts: Hosts, tmp_path: Path) -> None:
    ci = hosts("ci")
    exported(ci, spec("echo right > $out/etc/x"), tmp_path / "a.tar")
    laptop = hosts("laptop")
    image = archive.bring(tmp_path / "a.tar", Reporter()).image
    (tmp_path / "image.nix").write_text(
        build.expression(spec("echo right > $out/etc/x"), ensure.keep_lock("k", lock_text()), {})
    )
    drv = build.instantiate(tmp_path / "image.nix")
    assert all(one.agrees for one in check.check_drv(drv, Reporter()))
    # What somebody put into the store under its name is found out.
    subprocess.run(["chmod", "-R", "u+w", str(store.place(image.path))], check=True)
    image.file("etc/x").write_text("wrong\n")
    nar = subprocess.run(
        ["nix-store", "--dump", str(store.place(image.path))], capture_output=True, check=True
    ).stdout
    database = laptop.path / "store/nix/var/nix/db/db.sqlite"
    with sqlite3.connect(database) as db:
        changed = db.execute(
            "update ValidPaths set hash = ?, narSize = ? where path = ?",
            (f"sha256:{hashlib.sha256(nar).hexdigest()}", len(nar), str(image.path)),
        )
        assert changed.rowcount == 1
    found = check.check_drv(drv, Reporter())
    assert [(d.path, d.what) for one in found for d in one.differences] == [("tiny-image/etc/x", "content")]


def test_a_build_with_the_network_is_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"not reproducible: its build \(profile dev\)"):
        check.require_reproducible(spec("true", network=True))
    check.require_reproducible(spec("true"))
    check.require_reproducible(spec(network=True))  # nothing runs that could use it


def test_another_architecture_is_refused(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(hosts("ci"), spec(), tmp_path / "a.tar")
    laptop = hosts("laptop")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HostError, match="this host is riscv64"):
        archive.bring(tmp_path / "a.tar", Reporter())
    assert laptop.held == set()


# --- a daemon ---


@pytest.mark.parametrize("trusted", [False, True], ids=["unknown key", "trusted key"])
def test_a_daemon_takes_what_a_key_that_it_trusts_signed(hosts: Hosts, tmp_path: Path, trusted: bool) -> None:
    """A real daemon on a store of its own, to which this user is nobody."""
    key = nixkey.SecretKey("ci-1", b"k" * 32)
    done = exported(hosts("ci"), spec(), tmp_path / "a.tar", key=key)
    far = hosts("far")
    (tmp_path / "conf").mkdir()
    keys = f"trusted-public-keys = {key.public}\n" if trusted else ""
    (tmp_path / "conf/nix.conf").write_text(f"build-users-group =\ntrusted-users = nobody\nsubstituters =\n{keys}")
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        socket = Path(short) / "s"
        env = dict(os.environ) | {"NIX_CONF_DIR": str(tmp_path / "conf"), "NIX_DAEMON_SOCKET_PATH": str(socket)}
        with subprocess.Popen(["nix-daemon"], env=env, stderr=subprocess.DEVNULL) as daemon:
            try:
                for _ in range(200):
                    if socket.exists():
                        break
                    time.sleep(0.05)
                far.patch.setenv("NIX_REMOTE", f"unix://{socket}")
                for cached in (store.private_root, store.setup):
                    cached.cache_clear()
                source = unpacked(tmp_path / "a.tar", tmp_path / "unpacked")
                if trusted:
                    binary_cache.take(source, done.image)
                else:
                    with pytest.raises(HostError, match="the Nix daemon refuses what is not signed"):
                        binary_cache.take(source, done.image)
                assert store.invalid([done.image]) == (set() if trusted else {done.image})
            finally:
                daemon.terminate()


def unpacked(file: Path, work: Path) -> build.Cache:
    """An archive as the binary cache that an import makes of it."""
    work.mkdir()
    with file.open("rb") as opened:
        reader = ustar.Reader(opened, file.name)
        data = reader.small("manifest.json", 1 << 20)
        seal = reader.small("manifest.sum", 1 << 10)
        said = manifest.parse(data)
        whole = ustar.length([len(data), len(seal), *said.sizes])
        archive._unpack(reader, said, whole, work, Reporter())
    return build.Cache(f"file://{work}", unsigned=True)
