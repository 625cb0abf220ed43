"""The one form that an archive has, what its manifest may say, and Nix's signatures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixbox import ed25519
from nixbox.errors import ConfigError, HostError
from nixbox.image import archive, manifest, nixkey, ustar
from nixbox.image.manifest import Content, Manifest, StoredPath
from nixbox.image.ustar import ArchiveError
from nixbox.plan.model import ImageSpec, Script

# --- ustar ---


def written(members: dict[str, bytes]) -> bytes:
    """An archive of small members."""
    file = io.BytesIO()
    for name, data in members.items():
        ustar.write(file, name, data)
    file.write(ustar.END)
    return file.getvalue()


@settings(deadline=None, database=None, max_examples=50)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9]{1,20}(/[a-z0-9.]{1,19}[a-z]){0,3}", fullmatch=True),
        st.binary(max_size=2000),
        max_size=5,
    )
)
def test_archives_are_those_of_any_tar(members: dict[str, bytes]) -> None:
    data = written(members)
    assert len(data) == ustar.length(map(len, members.values()))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.name for m in tar.getmembers()] == list(members)
        for member in tar.getmembers():
            assert (member.mode, member.mtime, member.uid, member.uname) == (0o644, 0, 0, "")
    info = tarfile.TarInfo("nar/x.nar")
    info.size = 12345
    assert info.tobuf(tarfile.USTAR_FORMAT) == ustar.header("nar/x.nar", 12345)


def test_gnu_tar_reads_one_without_a_complaint(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(written({"a": b"1" * 600, "b/c": b""}))
    done = subprocess.run(["tar", "xvf", "a.tar"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a\nb/c\n", "")
    assert (tmp_path / "a").read_bytes() == b"1" * 600


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 1), ("x", -1), ("x", ustar.MOST_BYTES + 1)])
def test_what_ustar_cannot_say_is_not_said(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="ustar has no place"):
        ustar.header(name, size)


def read(tmp_path: Path, data: bytes) -> list[bytes]:
    """The members `one` (any) and `two` (4 bytes, known hash) of an archive."""
    file = tmp_path / "a.tar"
    file.write_bytes(data)
    pieces: list[bytes] = []
    with file.open("rb") as opened:
        reader = ustar.Reader(opened, "a.tar")
        first = reader.small("one", 100)
        # sha256sum of "data"
        digest = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
        reader.copy("two", 4, digest, pieces.append)
        reader.end()
    return [first, *pieces]


GOOD = written({"one": b"first", "two": b"data"})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == [b"first", b"data"]


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swapped(b"data", b"dat\xe1"), "two is damaged, or was changed: its SHA-256"),
        (lambda d: written({"../../etc/passwd": b"first", "two": b"data"}), r"'\.\./\.\./etc/passwd' is where one"),
        (lambda d: written({"/etc/passwd": b"first"}), "'/etc/passwd' is where one belongs"),
        (lambda d: written({"one": b"first", "one ": b"data"}), "'one ' is where two belongs"),
        (lambda d: written({"one": b"first", "two": b"data", "x": b""}), "does not end where it should"),
        (lambda d: written({"one": b"x" * 101, "two": b"data"}), "one claims 101 bytes; 100 is the most"),
        (lambda d: written({"one": b"first"}), "it ends before two"),
        (lambda d: written({"one": b"first", "two": b"dat"}), "the header of two is damaged"),
        (lambda d: d[:700], "it ends within one|it ends before two"),
        (lambda d: d[: 512 + 512 + 512 + 2], "it ends within two"),
        (lambda d: d[:200], "it ends before one"),
        (lambda d: b"", "it ends before one"),
        (lambda d: d + b"x", "does not end where it should"),
        (lambda d: d[:-1], "does not end where it should"),
        (lambda d: d[: 512 + 5] + b"hidden" + d[512 + 11 :], "something behind one"),
        (lambda d: d[:156] + b"2" + d[157:], "the header of one is damaged"),  # a link
        (lambda d: d[:157] + b"/etc/passwd" + d[168:], "the header of one is damaged"),
        (lambda d: d[:124] + b"\x80" + d[125:], "the header of one is damaged"),  # GNU's large numbers
        (lambda d: d[:124] + b"99999999999" + d[135:], "the header of one is damaged"),
        (lambda d: d[:124] + b"77777777777" + d[135:], "the header of one is damaged"),
        (lambda d: b"PK\3\4" + os.urandom(2000), "is where one belongs"),
        (lambda d: b"\x1b]0;x\7" + d[6:], r"'\?\]0;x\?' is where one"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        read(tmp_path, change(GOOD))


@settings(deadline=None, database=None, max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_no_bit_can_be_another(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[place] ^= 1 << bit
    if 512 <= place < 517:  # the content of `one`, whose hash only the caller knows
        return
    with pytest.raises(ArchiveError):
        read(tmp_path_factory.mktemp("a"), bytes(data))


# --- the manifest ---

A, B = "/nix/store/" + "a" * 32 + "-nixbox-image", "/nix/store/" + "b" * 32 + "-root.erofs"


def a_manifest(**changes: Any) -> Manifest:
    """A small one."""
    values: dict[str, Any] = {
        "format": 1,
        "nixbox": "0.1.0",
        "arch": "amd64",
        "image": A,
        "reproducible": True,
        "spec": ImageSpec("debian", "trixie", ("jq",), (Script("profile dev", "echo ü\n"),), False),
        "lock": Content(sha256="0" * 64, size=10),
        "paths": (
            StoredPath(path=A, sha256="1" * 64, size=5, references=(B,)),
            StoredPath(path=B, sha256="2" * 64, size=6, references=()),
        ),
    }
    return Manifest(**(values | changes))


def test_a_manifest_is_read_as_it_was_written() -> None:
    one = a_manifest()
    assert manifest.parse(manifest.dump(one)) == one
    assert one.sizes == [10, 5, 6]


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest's text with one thing changed."""
    data = json.loads(manifest.dump(a_manifest()))
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "it has format 2; this nixbox reads format 1"),
        (lambda m: m.update(image=B.replace("b", "c")), "the image is not among them"),
        (lambda m: m["paths"].pop(), "which is not among them"),
        (lambda m: m["paths"].append(m["paths"][1]), "one is there twice"),
        (lambda m: m["paths"][0].update(path="/nix/store/../../etc/passwd"), "paths.0.path"),
        (lambda m: m["paths"][0].update(path=A + "/bin"), "paths.0.path"),
        (lambda m: m["paths"][0].update(size=2**40), "paths.0.size"),
        (lambda m: m["paths"][0].update(size=-1), "paths.0.size"),
        (lambda m: m["paths"][0].update(sha256="A" * 64), "paths.0.sha256"),
        (lambda m: m["paths"][0].update(signatures=["x:y\nSig: evil"]), "paths.0.signatures"),
        (lambda m: m["lock"].update(size=0), "lock.size"),
        (lambda m: m.update(arch="s390x"), "arch"),
        (lambda m: m.update(nixbox="0.1\nx"), "nixbox"),
        (lambda m: m.update(paths=[]), "paths"),
        (lambda m: m.update(more=1), "more"),
        (lambda m: m["spec"].update(more=1), "spec.more"),
        (lambda m: m["spec"].pop("suite"), "suite"),
    ],
)
def test_a_manifest_of_another_form_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        manifest.parse(changed(change))


@pytest.mark.parametrize(("data", "words"), [(b"", "no JSON"), (b"[]", "format None"), (b"\xff\xfe", "no JSON")])
def test_what_is_no_manifest(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        manifest.parse(data)


def test_a_key_given_twice_hides_nothing() -> None:
    text = manifest.dump(a_manifest())
    twice = text.replace(b'{\n  "arch"', b'{\n  "arch": "arm64",\n  "arch"')
    assert twice != text
    with pytest.raises(ValueError, match="not as nixbox writes it"):
        manifest.parse(twice)


def test_a_seal_fits_its_manifest_alone() -> None:
    data, key = manifest.dump(a_manifest()), nixkey.SecretKey("ci-1", b"k" * 32)
    public = nixkey.public_key(key.public)
    assert manifest.signature(data, manifest.seal(data, None)) == ""
    sealed = manifest.seal(data, key)
    signature = manifest.signature(data, sealed)
    assert manifest.signed_by(data, signature, (public,)) == "ci-1"
    assert manifest.signed_by(data + b" ", signature, (public,)) is None
    assert manifest.signed_by(data, "", (public,)) is None
    assert manifest.signed_by(data, signature, ()) is None
    for place in range(len(sealed)):
        with pytest.raises(ValueError, match="do not fit"):
            manifest.signature(data, sealed[:place] + bytes([sealed[place] ^ 4]) + sealed[place + 1 :])


@pytest.mark.parametrize("text", ["", "12", "g" * 64, "0" * 63, "0" * 65])
def test_a_pin_has_64_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        archive.check_sha256(text)


# --- signatures ---


@pytest.mark.parametrize("text", ["", "name", "name:", "name:AAAA", "na me:" + "A" * 43 + "=", ":" + "A" * 43 + "="])
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(ConfigError, match="no public key"):
        nixkey.public_key(text)


def test_a_secret_key_is_not_shown(tmp_path: Path) -> None:
    key = nixkey.SecretKey("ci-1", b"secret-secret-secret-secret-1234")
    assert "secret" not in repr(key) and "ci-1" in repr(key)
    file = tmp_path / "key"
    for content in (b"", b"ci-1:c2VjcmV0", b"\xff\xff", b"ci-1:" + b"c2Vj" * 21 + b"cw=="):
        file.write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            nixkey.secret_key(file)
        assert "c2Vj" not in refused.value.message + str(refused.value.hint)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        nixkey.secret_key(tmp_path / "none")


def test_without_libcrypto_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    key = nixkey.SecretKey("ci-1", b"k" * 32)
    public, made = nixkey.public_key(key.public), key.sign(b"m")
    assert public.accepts(b"m", made)
    assert not public.accepts(b"m", made.replace("ci-1", "ci-2"))
    assert not nixkey.PublicKey("ci-1", b"\xff" * 32).accepts(b"m", made)

    def missing() -> None:
        raise ed25519.Missing("there is none")

    monkeypatch.setattr(ed25519, "_libcrypto", missing)
    for call in (lambda: key.sign(b"m"), lambda: public.accepts(b"m", made)):
        with pytest.raises(HostError, match="signatures cannot be made or checked here"):
            call()
