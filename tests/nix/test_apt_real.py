"""apt itself against a signed repository of three small packages, made here: resolved, verified, refused."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.image import apt
from nixbox.image.apt import Mirrors, UnknownPackagesError

TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "gpg", "gpgconf")
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {', '.join(TOOLS)} on this host"
)
HANG_S = 60.0
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")
CONTROLS = {
    "nbt-app": f"Version: 1:2.0~rc1+b1-3\nArchitecture: {ARCH}\nDepends: nbt-lib (>= 1.0), nbt-data\n",
    "nbt-lib": f"Version: 1.5-1\nArchitecture: {ARCH}\nPriority: required\n",
    "nbt-data": "Version: 3\nArchitecture: all\nRecommends: nbt-extra\n",
    "nbt-extra": "Version: 1\nArchitecture: all\n",
    "nbt-broken": "Version: 1\nArchitecture: all\nDepends: nbt-none\n",
}


def call(*argv: str, **env: str) -> str:
    done = subprocess.run(
        argv,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Repository:
    """A mirror in a directory, signed by a key of its own."""

    def __init__(self, directory: Path, gnupg: Path) -> None:
        self.directory = directory
        self.gnupg = gnupg
        self.key = directory / "key.gpg"
        directory.mkdir()
        call("gpg", "--batch", "--passphrase", "", "--quick-gen-key", "nixbox test", "ed25519", GNUPGHOME=str(gnupg))
        call("gpg", "--batch", "--output", str(self.key), "--export", GNUPGHOME=str(gnupg))

    def publish(self, suite: str, names: tuple[str, ...]) -> None:
        stanzas = []
        for name in names:
            tree = self.directory / "trees" / name
            (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
            control = f"Package: {name}\nMaintainer: x <x@mirror.example>\n{CONTROLS[name]}Description: a test\n"
            (tree / "DEBIAN/control").write_text(control)
            version, arch = (
                next(line for line in CONTROLS[name].splitlines() if line.startswith(field)).partition(": ")[2]
                for field in ("Version", "Architecture")
            )
            deb = self.directory / f"pool/main/n/{name}_{version.rpartition(':')[2]}_{arch}.deb"
            deb.parent.mkdir(parents=True, exist_ok=True)
            call("dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb))
            data = deb.read_bytes()
            path, digest = deb.relative_to(self.directory), hashlib.sha256(data).hexdigest()
            stanzas.append(f"{control}Filename: {path}\nSize: {len(data)}\nSHA256: {digest}\n")
        place = self.directory / "dists" / suite
        packages = place / f"main/binary-{ARCH}/Packages"
        packages.parent.mkdir(parents=True)
        packages.write_text("\n".join(stanzas))
        data = packages.read_bytes()
        (place / "Release").write_text(
            f"Origin: test\nSuite: {suite}\nCodename: {suite}\nDate: {formatdate(usegmt=True)}\n"
            f"Architectures: {ARCH}\nComponents: main\nSHA256:\n"
            f" {hashlib.sha256(data).hexdigest()} {len(data)} main/binary-{ARCH}/Packages\n"
        )
        argv = [
            "gpg",
            "--batch",
            "--yes",
            "--clearsign",
            "--output",
            str(place / "InRelease"),
            str(place / "Release"),
        ]
        call(*argv, GNUPGHOME=str(self.gnupg))
        (place / "Release").unlink()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    # A short path: gpg's agent has a socket in it.
    with tempfile.TemporaryDirectory(prefix="nbt", dir="/tmp", ignore_cleanup_errors=True) as gnupg:
        try:
            found = Repository(tmp_path_factory.mktemp("apt") / "debian", Path(gnupg))
            found.publish("trixie", ("nbt-app", "nbt-lib", "nbt-data", "nbt-extra", "nbt-broken"))
            found.publish("trixie-updates", ())
            yield found
        finally:
            call("gpgconf", "--kill", "all", GNUPGHOME=gnupg)


@pytest.fixture
def mirrors(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirrors:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(apt, "KEYRINGS", (repository.key,))
    return Mirrors(f"file:{repository.directory}", None)


def test_a_set_is_resolved_from_signed_metadata(repository: Repository, mirrors: Mirrors, tmp_path: Path) -> None:
    with apt.open_root("trixie", ARCH, mirrors) as root:
        root.update()
        found = root.resolve(["nbt-app"])
        assert [(p.name, p.version, p.arch, p.repo) for p in found] == [
            ("nbt-app", "1:2.0~rc1+b1-3", ARCH, "debian"),
            ("nbt-data", "3", "all", "debian"),
            ("nbt-lib", "1.5-1", ARCH, "debian"),
        ]  # without what is only recommended
        for package in found:
            data = (repository.directory / package.path).read_bytes()
            assert (package.size, package.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert [p.name for p in root.resolve(["?priority(required)"])] == ["nbt-lib"]
        assert [p.name for p in root.exact(["nbt-app"])] == ["nbt-app"]
        assert root.first_dependency("nbt-app") == "nbt-lib"
        # What is installed already is not brought again.
        status = tmp_path / "status"
        root.write_status([p for p in found if p.name != "nbt-app"], status)
        assert [p.name for p in root.resolve(["nbt-app"], installed=status)] == ["nbt-app"]
        root.write_status(found, status)
        assert root.resolve(["nbt-app"], installed=status) == []
    with apt.open_root("trixie", ARCH, mirrors) as again:  # the metadata is still there
        assert again.resolve(["nbt-app"]) == found


def test_unknown_names_are_told_all_at_once(mirrors: Mirrors) -> None:
    with apt.open_root("trixie", ARCH, mirrors) as root:
        root.update()
        root.check_known(["nbt-app", "nbt-lib"])
        with pytest.raises(UnknownPackagesError) as caught:
            root.check_known(["nbt-ap", "nbt-lib", "zzzzzzzz"])
    assert set(caught.value.near) == {"nbt-ap", "zzzzzzzz"}
    assert "nbt-app" in caught.value.near["nbt-ap"]
    assert len(caught.value.faults) == 2


def test_a_set_that_cannot_be_is_told_in_apts_words(mirrors: Mirrors) -> None:
    with apt.open_root("trixie", ARCH, mirrors) as root:
        root.update()
        with pytest.raises(ConfigError, match="nbt-none"):
            root.resolve(["nbt-broken"])
        with pytest.raises(NixboxError):
            root.first_dependency("nbt-extra")


def test_a_mirror_signed_by_somebody_else_is_refused(
    repository: Repository, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbt", dir="/tmp", ignore_cleanup_errors=True) as gnupg:
        try:
            stranger = Repository(tmp_path / "stranger", Path(gnupg))
        finally:
            call("gpgconf", "--kill", "all", GNUPGHOME=gnupg)
    monkeypatch.setattr(apt, "KEYRINGS", (stranger.key,))
    failing = pytest.raises(NixboxError, match="cannot be used for trixie")
    with apt.open_root("trixie", ARCH, mirrors) as root, failing as caught:
        root.update()
    assert mirrors.debian in caught.value.message


@pytest.mark.parametrize("what", ["packages", "suite", "mirror"])
def test_a_mirror_that_is_not_whole_is_refused(
    repository: Repository, mirrors: Mirrors, tmp_path: Path, what: str
) -> None:
    copy = tmp_path / "copy"
    if what != "mirror":
        shutil.copytree(repository.directory, copy)
    if what == "packages":
        with (copy / f"dists/trixie/main/binary-{ARCH}/Packages").open("a") as file:
            file.write("\n")
    suite = "sid" if what == "suite" else "trixie"
    failing = pytest.raises(NixboxError, match=f"cannot be used for {suite}")
    with apt.open_root(suite, ARCH, Mirrors(f"file:{copy}", None)) as root, failing:
        root.update()


def test_no_keyring_no_trust(mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apt, "KEYRINGS", (tmp_path / "none",))
    with pytest.raises(HostError, match="keyring"), apt.open_root("trixie", ARCH, mirrors):
        pass
