"""Real locks and real `nix build`s of Debian images, and how their failures read."""

from __future__ import annotations

import functools
import http.server
import json
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixbox.image import nixkey
from tests.vm.conftest import RESOURCES, Home, Workspace
from tests.vm.test_lifecycle import Disk

CONFIG = f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}'


def _nix(box: Workspace, *argv: str) -> subprocess.CompletedProcess[str]:
    from nixbox.image import store

    options = store.setup().options
    env = dict(box.env)
    if store.private_root() is not None:
        env["NIX_REMOTE"] = str(Path(env["HOME"]) / ".local/share/nix/root")
    return subprocess.run([*argv, *options], check=False, capture_output=True, text=True, env=env)


def test_the_same_lock_gives_the_same_bits(workspace: Workspace) -> None:
    build = "date -R -r / > /etc/when; useradd -m builder; mkdir /opt/side; date -R -r / > /opt/side/when"
    profile = f'packages = ["tree"]\nbuild = "{build}"\nsidecar = ["/opt/side"]\nsidecar_packages = ["jq"]\n'
    workspace.config(CONFIG, profile)
    workspace("build")
    lock = (workspace.path / ".nixbox/nixbox.lock").read_text()
    done = workspace("build", "--check", "--json")
    found = json.loads(done.stdout)["check"]
    assert found["agrees"] is True
    # Fixed outputs (.debs, the bootstrap) are what their hash says; everything that is built is built again.
    assert sorted(row["name"] for row in found["derivations"]) == [
        "nixbox-debian-base.squashfs",
        "nixbox-debian-built.squashfs",
        "nixbox-debian-host-tools",
        "nixbox-debian-kernel",
        "nixbox-debian-packages.squashfs",
        "nixbox-debian-root.erofs",
        "nixbox-debian-sidecar-packages.erofs",
        "nixbox-debian-sidecar.erofs",
        "nixbox-debian-tools",
        "nixbox-image",
        "nixbox-initrd",
        *(["nixbox-krun-boot", "nixbox-krun-kernel"] if "krun" in json.loads(lock) else []),
    ]
    assert all(row["agrees"] and not row["differences"] for row in found["derivations"])
    assert "built again, and the same bit for bit" in done.stderr


def test_a_build_that_comes_out_otherwise_is_told_by_file(workspace: Workspace) -> None:
    script = "head -c 16 /dev/urandom > /etc/random; echo same > /etc/same; chmod $((600 + $$ % 2 * 40)) /etc/same"
    script += "; echo x > /etc/$(cat /proc/sys/kernel/random/uuid)"
    workspace.config(CONFIG, f"build = {json.dumps(script)}\n")
    before = workspace("build").stdout.strip()
    failed = workspace("build", "--check", "--json", code=5)
    found = {row["name"]: row for row in json.loads(failed.stdout)["check"]["derivations"]}
    assert [name for name, row in found.items() if not row["agrees"]] == ["nixbox-debian-built.squashfs"]
    rows = found["nixbox-debian-built.squashfs"]["differences"]
    named = {(row["path"].partition(":")[2], row["what"]) for row in rows}
    assert ("/etc/random", "content") in named
    assert sum(what == "is there" for _, what in named) == 2, named
    assert {path for path, _ in named} - {row["path"].partition(":")[2] for row in rows} == set()
    assert all(path.startswith("/etc") for path, _ in named), named
    assert "nixbox-debian-built.squashfs:/etc/random: content" in failed.stderr
    assert workspace("build").stdout.strip() == before, "what was built stays"
    workspace.config(CONFIG, f"build = {json.dumps(script)}\nbuild_network = true\n")
    workspace("build")
    refused = workspace("build", "--check", code=2)
    assert "this image is not reproducible" in refused.stderr and "profile dev" in refused.stderr


def test_an_image_goes_to_another_host_as_a_file(workspace: Workspace, tmp_path: Path) -> None:
    # The host's store may still hold what an earlier run of this test imported, which nobody there has built.
    said = f"from afar, {uuid.uuid4()}"
    profile = f'build = "echo {said} > /etc/used-elsewhere"\n'
    workspace.config(CONFIG, profile)
    facts = json.loads(workspace("build", "--json").stdout)
    path, file = facts["path"], tmp_path / "image.tar"
    sizes = {one["path"]: one["nar_size"] for one in facts["closure"]}
    assert sum(sizes.values()) == facts["closure_size"] > facts["files"]["root.img"]["size"] > 50_000_000
    asked = _nix(workspace, "nix-store", "--query", "--deriver", path).stdout.strip()
    assert (asked, sizes[path], facts["reproducible"]) == (facts["drv"], facts["nar_size"], True)
    pin = workspace("image", "export", str(file)).stdout.strip()
    # Interrupted, and on a full disk, nothing of a file is left.
    export = workspace.start("image", "export", str(tmp_path / "second.tar"))
    while not list(tmp_path.glob(".second.tar.*")) and export.poll() is None:
        time.sleep(0.005)
    export.send_signal(signal.SIGINT)
    export.communicate(timeout=60)
    assert export.returncode == 130 and [one.name for one in tmp_path.iterdir()] == ["image.tar"]
    disk = Disk(workspace.path / "small", "20m")
    workspace.prefix = disk.prefix
    try:
        failed = workspace("image", "export", str(disk.place / "a.tar"), code=1)
        assert "no space left for the archive a.tar" in failed.stderr
        assert disk.sh(f"ls -A {disk.place}") == ""
    finally:
        workspace.prefix = ()
        disk.close()

    others = _roots_kept(workspace)
    try:
        workspace("image", "gc", "--yes")
    finally:
        for root, target in others.items():
            root.symlink_to(target)
    assert "is not valid" in _nix(workspace, "nix-store", "--query", "--hash", path).stderr
    # Another workspace, without a lock; no mirror can be asked.
    (workspace.path / ".nixbox/nixbox.lock").unlink()
    mirror = '[debian]\nmirror = "http://127.0.0.1:9/debian"\n'
    workspace.config(CONFIG + mirror, profile)

    bad = tmp_path / "bad.tar"
    with file.open("rb") as whole, bad.open("wb") as out:
        data = bytearray(whole.read())
        data[len(data) // 2] ^= 1
        out.write(data)
    failed = workspace("image", "import", str(bad), code=1)
    assert ".nar is damaged, or was changed" in failed.stderr
    assert "its manifest's SHA-256 is" in workspace("image", "import", str(file), "--sha256", "0" * 64, code=1).stderr
    assert not (workspace.path / ".nixbox/nixbox.lock").exists()
    downloads = Path(workspace.env["HOME"]) / ".cache/nixbox/downloads"
    taking = workspace.start("image", "import", str(file))
    while not list(downloads.glob("*/nar/*")) and taking.poll() is None:
        time.sleep(0.005)
    taking.send_signal(signal.SIGINT)
    taking.communicate(timeout=60)
    assert taking.returncode == 130 and not list(downloads.iterdir())
    assert "is not valid" in _nix(workspace, "nix-store", "--query", "--hash", path).stderr

    taken = json.loads(workspace("image", "import", str(file), "--sha256", pin, "--json").stdout)
    assert (taken["path"], taken["lock"], taken["fits"]) == (path, "written", True)
    workspace("up", "--locked")
    assert workspace.guest("cat /etc/used-elsewhere") == f"{said}\n"
    assert workspace.status()["image"] == path


def test_an_image_comes_from_a_binary_cache(workspace: Workspace, server: tuple[str, Path]) -> None:
    url, directory = server
    profile = f'build = "echo from a cache, {uuid.uuid4()} > /etc/used-cache"\n'
    workspace.config(CONFIG, profile)
    key, public = directory.parent / f"{directory.name}.key", directory.parent / f"{directory.name}.pub"
    key.write_text(_nix(workspace, "nix", "key", "generate-secret", "--key-name", "ci-1").stdout)
    path = workspace("build", "--store", f"file://{directory}", "--sign-key", str(key)).stdout.strip()
    public.write_text(nixkey.secret_key(key).public)
    others = _roots_kept(workspace)
    try:
        workspace("image", "gc", "--yes")
    finally:
        for root, target in others.items():
            root.symlink_to(target)
    refused = workspace("build", "--from", url, code=1)
    assert "is not signed by a trusted key" in refused.stderr and "--public-key" in refused.stderr
    mirror = '[debian]\nmirror = "http://127.0.0.1:9/debian"\n'
    workspace.config(CONFIG + mirror, profile)
    taken = workspace("build", "--locked", "--from", url, "--public-key", public.read_text(), "--json")
    data = json.loads(taken.stdout)
    assert (data["path"], data["how"], data["fresh"]) == (path, "substituted", True)
    assert f"the image came from {url}" in taken.stderr
    again = workspace("build", "--from", url)
    assert "the image was here already" in again.stderr


def test_an_image_says_what_it_is(home: Home, workspace: Workspace) -> None:
    built = json.loads(workspace("build", "--json").stdout)
    assert built["fresh"] is False, "the session's image serves: nothing was built again"
    meta = built["image"]
    names = {package["name"] for package in meta["packages"]}
    assert {"bash", "openssh-server", "apt"} <= names
    assert (meta["base"], meta["suite"], meta["reproducible"]) == ("debian", "trixie", True)
    rows = json.loads(workspace("image", "list", "--json").stdout)
    # A row for each lock that comes to it: a flake's copy of one is written in another way.
    row, *_ = [row for row in rows if row["path"] == built["path"]]
    assert row["size_bytes"] > 50_000_000 and row["packages"] == len(meta["packages"])
    text = workspace("image", "list").stdout
    assert text.splitlines()[0].split() == ["NAME", "BASE", "PACKAGES", "SIZE", "AGE", "IN", "USE"]
    expression = workspace("config", "--nix").stdout
    assert "image.nix" in expression and "nixbox.lock" in expression


def test_collecting_takes_only_what_no_machine_uses(workspace: Workspace) -> None:
    workspace.config(CONFIG, 'build = "echo used > /etc/used"\n')
    workspace("up")
    used = workspace.status()["image"]
    workspace("down")
    workspace.config(CONFIG, 'build = "echo unused > /etc/unused"\n')
    unused = workspace("build").stdout.strip()
    # Every other image of the session is out of the way: collecting must not take it from the other tests.
    others = _roots_kept(workspace)
    try:
        dry = workspace("image", "gc", "--dry-run").stdout
        assert unused in dry and used not in dry
        assert "--yes" in workspace("image", "gc", code=2).stderr
        workspace("image", "gc", "--yes")
    finally:
        for root, target in others.items():
            root.symlink_to(target)
    rows = {row["path"]: row for row in json.loads(workspace("image", "list", "--json").stdout)}
    assert unused not in rows and rows[used]["used_by"] == [f"{workspace.path}:box"]
    assert "is not valid" in _nix(workspace, "nix-store", "--query", "--hash", unused).stderr
    assert workspace("build").stdout.strip() == unused, "what was collected can be built again"


def _roots_kept(box: Workspace) -> dict[Path, Path]:
    """Take the roots of other tests' images away for a while; the base image stays alive through a machine's."""
    mine = {Path(row["path"]).name for row in json.loads(box("image", "list", "--json").stdout)}
    assert mine
    kept = {}
    for root in (Path(box.env["HOME"]) / ".cache/nixbox/images").glob("*"):
        if root.is_symlink() and not _is_of_this_test(root):
            kept[root] = root.readlink()
            root.unlink()
    return kept


def _is_of_this_test(root: Path) -> bool:
    source = root.with_name(root.name.removesuffix("-1") + ".nix")
    text = source.read_text() if source.exists() else ""
    return "/etc/used" in text or "/etc/unused" in text  # and all that begins like these


def test_unknown_packages_are_named_with_their_near_names(workspace: Workspace) -> None:
    workspace.config(f'name = "box"\npackages = ["jqq", "no-such-thing-at-all", "tree"]\nmounts = []\n{RESOURCES}')
    failed = workspace("build", code=2)
    assert "no package `jqq` (near: jq" in failed.stderr
    assert "no package `no-such-thing-at-all`" in failed.stderr
    assert "`tree`" not in failed.stderr


def test_a_build_script_that_fails_is_shown_with_its_log(workspace: Workspace) -> None:
    workspace.config(CONFIG, 'build = """\necho about to fail\nls /not/there\necho not reached"""\n')
    failed = workspace("build", code=1)
    assert "the build of profile dev failed with exit code 2" in failed.stderr
    assert "about to fail" in failed.stderr and "/not/there" in failed.stderr
    assert "not reached" not in failed.stderr
    assert "nix log" in failed.stderr


def test_a_maintainer_script_that_fails_is_named(workspace: Workspace) -> None:
    # A real one: installed on top of an image whose build put a file in its way.
    workspace.config(
        CONFIG, 'build = "rm /usr/sbin/update-ca-certificates; dpkg-reconfigure -f noninteractive ca-certificates"\n'
    )
    failed = workspace("build", code=1)
    assert "update-ca-certificates" in failed.stderr and "profile dev" in failed.stderr


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on loopback and the directory that it serves."""
    handler = functools.partial(_Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path
        httpd.shutdown()
        thread.join()


def test_a_build_has_no_network_unless_it_says_so(workspace: Workspace, server: tuple[str, Path]) -> None:
    url, directory = server
    (directory / "data").write_text("from the network\n")
    script = f'build = "curl -sS -m 5 {url}/data -o /etc/fetched"\n'
    workspace.config(CONFIG, script)
    failed = workspace("build", code=1)
    assert "curl" in failed.stderr and "profile dev failed" in failed.stderr

    workspace.config(CONFIG, script + "build_network = true\n")
    built = json.loads(workspace("build", "--json").stdout)
    assert built["image"]["reproducible"] is False
    listed = workspace("image", "list").stdout
    assert "not reproducible (build_network)" in listed
    workspace("up")
    assert workspace.guest("cat /etc/fetched") == "from the network\n"
    # The build saw the host's resolver; the image does not hold it.
    assert "10.0.2.2" in workspace.guest("cat /etc/resolv.conf")


def test_a_build_with_network_cannot_leave_its_root(workspace: Workspace, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    # The classic way out of a chroot: keep a directory open outside of a new one, and climb.
    escape = (
        "mkdir /tmp/e; perl -e 'chroot q(/tmp/e); chdir q(..) for 1..64; chroot q(.); exec q(/bin/sh), q(-c), @ARGV'"
    )
    script = (
        f"{escape} 'cat {secret} /.outside{secret}; ls -A /' > /var/found 2>&1 || true; cat /var/found >&2; false"
    )
    workspace.config(CONFIG, f"build = {json.dumps(script)}\nbuild_network = true\n")
    failed = workspace("build", code=1)
    assert "No such file" in failed.stderr
    assert "of the host" not in failed.stderr


def test_a_lock_that_changes_meanwhile_does_not_poison_the_cache(workspace: Workspace) -> None:
    lock = workspace.path / ".nixbox" / "nixbox.lock"
    before = lock.read_text()
    workspace.config(CONFIG, 'build = "true; sleep 2"\n')
    build = workspace.start("build")
    assert build.stderr is not None
    for line in build.stderr:
        if b"evaluating" in line:
            data = json.loads(before)
            data["packages"] = data["base_packages"][:1]
            lock.write_text(json.dumps(data))
            break
    out, err = build.communicate(timeout=300)
    assert build.returncode == 0, err.decode()
    lock.write_text(before)
    again = json.loads(workspace("build", "--json").stdout)
    assert again["path"] == out.decode().strip() and again["fresh"] is False
    assert len(again["image"]["packages"]) == len(json.loads(before)["base_packages"])


def test_control_characters_of_a_build_do_not_reach_the_terminal(workspace: Workspace) -> None:
    script = "printf '\\033]0;title\\007\\033[2J boo\\n'; false"
    workspace.config(CONFIG, f"build = {json.dumps(script)}\n")
    failed = workspace("build", code=1)
    assert "boo" in failed.stderr and "\x1b" not in failed.stderr and "\x07" not in failed.stderr


def test_a_mirror_that_cannot_be_reached_is_named(workspace: Workspace) -> None:
    mirror = '[debian]\nmirror = "http://127.0.0.1:9/debian"\n'
    workspace.config(f'name = "box"\nmounts = []\n{RESOURCES}{mirror}')
    lock = workspace.path / ".nixbox" / "nixbox.lock"
    before = lock.read_text()
    failed = workspace("lock", code=1)
    assert "the Debian mirror http://127.0.0.1:9/debian cannot be used for trixie" in failed.stderr
    assert lock.read_text() == before
    workspace("build")  # everything that is locked is in the store: no mirror is needed


def test_packages_that_are_gone_or_changed_are_named(workspace: Workspace, server: tuple[str, Path]) -> None:
    url, directory = server
    lock = workspace.path / ".nixbox" / "nixbox.lock"
    data = json.loads(lock.read_text())
    changed, gone = data["base_packages"][0], data["base_packages"][1]
    changed["sha256"], gone["sha256"] = "1" * 64, "2" * 64
    place = directory / changed["path"]
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x" * changed["size"])
    lock.write_text(json.dumps(data))
    mirror = f'[debian]\nmirror = "{url}"\nsecurity_mirror = "{url}"\n'
    workspace.config(f'name = "box"\nmounts = []\n{RESOURCES}{mirror}')
    failed = workspace("build", code=1)
    assert f"{gone['name']} {gone['version']}: not there" in failed.stderr
    assert f"{changed['name']} {changed['version']}" in failed.stderr
    assert "`nixbox lock` moves the lock" in failed.stderr
    downloads = Path(workspace.env["HOME"]) / ".cache/nixbox/downloads"
    assert list(downloads.iterdir()) == [], "no half state is left"


def test_a_damaged_lock_is_named_field_by_field(workspace: Workspace) -> None:
    lock = workspace.path / ".nixbox" / "nixbox.lock"
    data = json.loads(lock.read_text())
    data["kernel"]["sha256"] = "xyz"
    data["tools"][0]["path"] = "../../etc/passwd"
    lock.write_text(json.dumps(data))
    failed = workspace("build", code=2)
    assert "kernel.sha256" in failed.stderr and "tools.0.path" in failed.stderr


def test_ctrl_c_during_a_build_leaves_no_half_state(workspace: Workspace) -> None:
    workspace.config(CONFIG, 'packages = ["tree"]\nbuild = "sleep 300"\n')
    scratch = workspace.path / "scratch"
    scratch.mkdir(mode=0o755)
    workspace.extra["TMPDIR"] = str(scratch)
    build = workspace.start("build")
    assert build.stderr is not None
    for line in build.stderr:
        if b"nixbox-debian-built" in line:
            break
    time.sleep(1)
    build.send_signal(signal.SIGINT)
    _, err = build.communicate(timeout=60)
    assert build.returncode == 130, err.decode()
    assert not _running("sleep\0300\0"), "the builder ended too"
    assert not list(scratch.iterdir()), "its directory is gone"
    workspace.config(CONFIG, 'packages = ["tree"]\n')
    workspace("build")


def _running(command: str) -> list[Path]:
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if line.read_bytes() == command.encode():
                found.append(line)
        except OSError:
            continue
    return found


def test_a_full_disk_during_a_build_is_said(workspace: Workspace, home: Home) -> None:
    disk = Disk(workspace.path / "tmp", "20m")
    workspace.prefix = disk.prefix
    workspace.extra["TMPDIR"] = str(disk.place)
    workspace.config(CONFIG, 'build = "head -c 300M /dev/urandom > /var/big"\n')
    try:
        failed = workspace("build", code=1)
        assert "full" in failed.stderr, failed.stderr
        assert disk.sh(f"ls {disk.place}") == ""
    finally:
        workspace.prefix = ()
        disk.close()
    # The same for what is fetched: the cache directory is on the small disk.
    cache = Disk(workspace.path / "cache", "3m")
    workspace.prefix = cache.prefix
    workspace.extra = {"XDG_CACHE_HOME": str(cache.place)}
    try:
        failed = workspace("lock", code=1)
        assert "no space left" in failed.stderr.lower() or "full" in failed.stderr, failed.stderr
    finally:
        workspace.prefix = ()
        cache.close()
