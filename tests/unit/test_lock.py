"""nixbox.lock: what is written is read back, what is damaged is named, and an old lock survives a failed write."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixbox import run
from nixbox.errors import ConfigError, ExitCode, HostError, NixboxError
from nixbox.image import build, ensure, krunfw, lock, lockfile, resolve
from nixbox.image.lock import Bootstrap, KrunKernel, Lock, LockedPackage
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter


def package(name: str, version: str = "1.0-1", arch: str = "amd64") -> LockedPackage:
    return LockedPackage(
        name=name,
        version=version,
        arch=arch,
        repo="debian",
        path=f"pool/main/{name[0]}/{name}/{name}_{version.rpartition(':')[2]}_{arch}.deb",
        size=100,
        sha256="0" * 64,
    )


def a_lock(**changes: Any) -> Lock:
    values: dict[str, Any] = {
        "format": 1,
        "base": "debian",
        "suite": "trixie",
        "arch": "amd64",
        "requested": ("jq",),
        "base_requested": resolve.BASE_REQUEST,
        "bootstrap": Bootstrap(package=package("busybox-static"), nar_hash="sha256-" + "A" * 43 + "="),
        "kernel": package("linux-image-6.12"),
        "tools": (package("mmdebstrap"), package("bash"), package("erofs-utils")),
        "base_packages": (package("bash"), package("apt", "1:2.0~rc1+b1")),
        "packages": (package("jq"),),
    }
    return Lock(**(values | changes))


def a_kernel(**changes: Any) -> KrunKernel:
    values: dict[str, Any] = {
        "file": "libkrunfw.so.5",
        "origin": "smolmachines 1.32.2",
        "size": 1000,
        "sha256": "a" * 64,
        "offset": 100,
        "length": 900,
        "load": 2**24,
        "entry": 2**24 + 899,
        "release": "6.18.55",
    }
    return KrunKernel(**(values | changes))


HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
PACKAGES = st.builds(
    LockedPackage,
    name=st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True),
    version=st.from_regex(r"[A-Za-z0-9.+~:-]{1,20}", fullmatch=True),
    arch=st.sampled_from(["amd64", "arm64", "all"]),
    repo=st.sampled_from(["debian", "security"]),
    path=st.from_regex(r"pool(/[A-Za-z0-9+~:%_-][A-Za-z0-9.+~:%_-]{0,8}){1,4}\.deb", fullmatch=True),
    size=st.integers(1, 2**40),
    sha256=HEX,
)
SETS = st.lists(PACKAGES, max_size=4).map(tuple)
LOCKS = st.builds(
    a_lock,
    suite=st.sampled_from(["trixie", "sid"]),
    arch=st.sampled_from(["amd64", "arm64"]),
    requested=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    kernel=PACKAGES,
    tools=SETS,
    base_packages=SETS,
    packages=SETS,
    sidecar_requested=st.lists(st.text(max_size=8), max_size=2).map(tuple),
    sidecar_packages=SETS,
    krun=st.none() | st.builds(a_kernel, sha256=HEX, origin=st.sampled_from(["libkrunfw", "smolmachines 2.0.0rc1"])),
)


# --- text ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, database=None)
@given(LOCKS)
def test_what_is_dumped_loads_as_the_same(tmp_path_factory: pytest.TempPathFactory, value: Lock) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.lock"
    lock.save(value, path)
    assert lock.load(path) == value
    assert path.read_text() == lock.dump(value) == lock.dump(lock.load(path))


def test_one_package_a_line() -> None:
    text = lock.dump(a_lock())
    lines = [line for line in text.splitlines() if '"sha256"' in line]
    assert len(lines) == 1 + 1 + 3 + 2 + 1
    assert all(line.count('"sha256"') == 1 for line in lines)
    assert text.endswith("}\n")
    other = lock.dump(a_lock(packages=(package("jq", "1.8"),)))
    assert len(set(text.splitlines()) ^ set(other.splitlines())) == 2


def test_a_lock_without_a_kernel_for_libkrun_does_not_mention_it() -> None:
    assert "krun" not in lock.dump(a_lock())
    lines = lock.dump(a_lock(krun=a_kernel())).splitlines()
    assert [line for line in lines if "krun" in line] == [line for line in lines if line.startswith('  "krun": {')]


def test_a_kernel_for_libkrun_is_part_of_the_image_and_stays_when_plugins_are_pinned(tmp_path: Path) -> None:
    text = lock.dump(a_lock(krun=a_kernel()))
    path = tmp_path / "nixbox.lock"
    path.write_text(text)
    lockfile.save_pins(path, [lockfile.Pin("github:a/b", "0" * 40, "sha256-" + "A" * 43 + "=")])
    assert lockfile.image_part(path.read_text()) == text
    assert lock.load(path).krun == a_kernel()
    assert build.key(spec("jq"), text) == build.key(spec("jq"), path.read_text())
    assert build.key(spec("jq"), text) != build.key(spec("jq"), lock.dump(a_lock()))


def test_a_sidecar_is_in_a_lock_that_has_one() -> None:
    assert "sidecar" not in lock.dump(a_lock())
    value = a_lock(sidecar_requested=("jdk",), sidecar_packages=(package("jdk", "21"),))
    assert [line[3:20] for line in lock.dump(value).splitlines() if line.startswith('  "s')] == [
        *('suite": "trixie",', "sidecar_requested", 'sidecar_packages"'),
    ]
    assert package("jdk", "21") in value.all_packages()
    assert lock.changes(a_lock(), value).lines() == ["+ jdk 21"]


def test_all_packages_holds_each_file_once() -> None:
    paths = [p.path for p in a_lock().all_packages()]
    assert len(paths) == len(set(paths)) == 7
    assert paths == sorted(paths)


# --- damage ----------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, data: object) -> ConfigError:
    path = tmp_path / "nixbox.lock"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        lock.load(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


def test_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no lock") as caught:
        lock.load(tmp_path / "nixbox.lock")
    assert "nixbox lock" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "{", "<<<<<<< HEAD\n", lock.dump(a_lock())[:200]])
def test_what_is_not_json(tmp_path: Path, text: str) -> None:
    assert "not JSON" in damaged(tmp_path, text).message


@pytest.mark.parametrize("data", [[], "text", 1, None])
def test_json_of_another_shape(tmp_path: Path, data: object) -> None:
    assert "damaged" in damaged(tmp_path, json.dumps(data)).message


@pytest.mark.parametrize("number", [2, 0, "1", None])
def test_another_format(tmp_path: Path, number: object) -> None:
    found = damaged(tmp_path, json.loads(lock.dump(a_lock())) | {"format": number})
    assert f"has format {number!r}; this nixbox reads format 1" in found.message


def test_every_bad_field_is_named(tmp_path: Path) -> None:
    data = json.loads(lock.dump(a_lock()))
    data["arch"] = "m68k"
    del data["suite"]
    data["packages"][0]["sha256"] = "zz"
    data["tools"][1]["size"] = -1
    data["kernel"]["extra"] = 1
    data["bootstrap"]["nar_hash"] = "md5-x"
    faults = "\n".join(damaged(tmp_path, data).faults)
    wanted = ("arch", "suite", "packages.0.sha256", "tools.1.size", "kernel.extra", "bootstrap.nar_hash")
    assert len(faults.splitlines()) == len(wanted)
    for field in wanted:
        assert f"nixbox.lock: {field}: " in faults


@pytest.mark.parametrize(
    "path",
    [
        "pool/../../../etc/shadow.deb",
        "pool/main/../../x.deb",
        "pool/./x.deb",
        "pool//x.deb",
        "pool/.deb",
        "/pool/x.deb",
        "../pool/x.deb",
        "http://elsewhere.example/pool/x.deb",
        "pool/x y.deb",
        "pool/$(id).deb",
        "pool/x.deb\n",
        "pool/x",
        "",
    ],
)
def test_a_path_that_leaves_the_repository_is_refused(tmp_path: Path, path: str) -> None:
    data = json.loads(lock.dump(a_lock()))
    data["packages"][0]["path"] = path
    assert [fault.split(": ")[1] for fault in damaged(tmp_path, data).faults] == ["packages.0.path"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", bad) for bad in ("../jq", "Jq", "j", "jq;id", "jq\n", "-jq")),
        *(("version", bad) for bad in ("1/2", "", "1 2", "$(id)", "1\n")),
        *(("arch", bad) for bad in ("../x", "", "amd 64")),
        *(("repo", bad) for bad in ("other", "", None)),
        *(("sha256", bad) for bad in ("0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n")),
        *(("size", bad) for bad in (0, -1, "x", 1.5)),
    ],
)
def test_fields_that_would_reach_a_command_are_checked(tmp_path: Path, field: str, value: object) -> None:
    data = json.loads(lock.dump(a_lock()))
    data["base_packages"][1][field] = value
    assert {fault.split(": ")[1] for fault in damaged(tmp_path, data).faults} == {f"base_packages.1.{field}"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({"file": bad}, ".file") for bad in ("../libkrunfw.so.5", "libkrunfw.so", "x", "libkrunfw.so.5\n", 5)),
        *(({"origin": bad}, ".origin") for bad in ("", "a\nb", "$(id)", "x" * 101, " x")),
        *(({"release": bad}, ".release") for bad in ("", "six", "6.1 x", "6.1\n", "6.1/..")),
        *(({"sha256": bad}, ".sha256") for bad in ("0" * 63, "G" * 64)),
        *(({name: -1}, f".{name}") for name in ("size", "offset", "length", "load", "entry")),
        ({"load": 2**64 - 1}, ".load"),
        ({"offset": 101}, ""),
        ({"entry": 2**24 + 900}, ""),
        ({"entry": 2**24 - 1}, ""),
        ({"more": 1}, ".more"),
    ],
)
def test_a_bad_kernel_for_libkrun_is_named(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    data = json.loads(lock.dump(a_lock(krun=a_kernel())))
    data["krun"] |= changes
    assert {fault.split(": ")[1] for fault in damaged(tmp_path, data).faults} == {f"krun{field}"}


# --- changes ---------------------------------------------------------------------------------------------


def test_what_changed_is_told_in_lines() -> None:
    old = a_lock(packages=(package("jq"), package("tree", "2.1")))
    new = a_lock(packages=(package("jq", "1.1-1"), package("zsh", "5.9")), tools=())
    found = lock.changes(old, new)
    assert found.lines() == ["+ zsh 5.9", "- tree 2.1", "~ jq 1.0-1 → 1.1-1"]
    assert found


def test_a_new_kernel_is_a_change() -> None:
    found = lock.changes(a_lock(), a_lock(kernel=package("linux-image-6.13")))
    assert found.lines() == ["+ linux-image-6.13 1.0-1", "- linux-image-6.12 1.0-1"]


def test_a_kernel_for_libkrun_is_a_change() -> None:
    old, new = a_kernel(), a_kernel(release="6.19.1", origin="smolmachines 2.0", sha256="b" * 64)
    before, after = "6.18.55 (smolmachines 1.32.2, aaaaaaaa)", "6.19.1 (smolmachines 2.0, bbbbbbbb)"
    assert lock.changes(a_lock(), a_lock(krun=old)).lines() == [f"+ libkrun's kernel {before}"]
    assert lock.changes(a_lock(krun=old), a_lock(krun=new)).lines() == [f"~ libkrun's kernel {before} → {after}"]
    assert lock.changes(a_lock(krun=old), a_lock(krun=a_kernel(sha256="c" * 64)))  # the same release, built anew
    assert not lock.changes(a_lock(krun=old), a_lock(krun=old))


def test_nothing_changed() -> None:
    assert lock.changes(a_lock(), a_lock(tools=())).lines() == []
    assert not lock.changes(a_lock(), a_lock())


def test_a_first_lock_adds_everything() -> None:
    found = lock.changes(None, a_lock())
    assert (set(found.added), found.removed, found.changed) == ({"bash", "apt", "jq", "linux-image-6.12"}, {}, {})


# --- stale -----------------------------------------------------------------------------------------------


def spec(*packages: str, suite: str = "trixie") -> ImageSpec:
    return ImageSpec("debian", suite, packages, (), False)


def stale(tmp_path: Path, value: Lock | str | None, wanted: ImageSpec) -> str | None:
    path = ensure.lock_path(tmp_path)
    path.parent.mkdir()
    if value is not None:
        path.write_text(value if isinstance(value, str) else lock.dump(value))
    return ensure.stale(tmp_path, wanted)


def test_no_lock_is_stale(tmp_path: Path) -> None:
    assert stale(tmp_path, None, spec("jq")) == "there is no lock yet"


def test_a_lock_that_fits_is_not(tmp_path: Path) -> None:
    assert not stale(tmp_path, a_lock(requested=("b", "a")), spec("a", "b"))


def test_another_suite(tmp_path: Path) -> None:
    assert stale(tmp_path, a_lock(), spec("jq", suite="sid")) == "the lock is for trixie, the config says sid"


def test_other_packages(tmp_path: Path) -> None:
    found = stale(tmp_path, a_lock(requested=("jq", "tree", "vim")), spec("jq", "zsh", "ash"))
    assert found == "new: ash, zsh; gone: tree, vim"


def test_other_packages_of_a_sidecar(tmp_path: Path) -> None:
    wanted = replace(spec("jq"), sidecar_packages=("jdk",))
    had = a_lock(requested=("jq",), sidecar_requested=("jdk",), sidecar_packages=(package("jdk"),))
    assert stale(tmp_path, a_lock(requested=("jq",)), wanted) == "new: jdk"
    for value, asked, why in (
        (had, wanted, None),
        (had, spec("jq"), "gone: jdk"),
        (had, spec("jq", "jdk"), "packages went to the sidecar, or came from it"),
        (had, replace(wanted, sidecar=("/opt",)), None),
    ):
        ensure.lock_path(tmp_path).write_text(lock.dump(value))
        assert ensure.stale(tmp_path, asked) == why


@pytest.mark.parametrize("package_", ["dropbear-bin", "openssh-server", "e2fsprogs"])
def test_a_lock_without_what_the_guest_needs(tmp_path: Path, package_: str) -> None:
    base = tuple(name for name in resolve.BASE_REQUEST if name != package_)
    assert len(base) == len(resolve.BASE_REQUEST) - 1
    assert stale(tmp_path, a_lock(base_requested=base), spec("jq")) == "the lock was made by an older nixbox"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "1", "null", '{"suite": "sid"}', '{"suite": "sid", "requested": 1}'),
        '{"suite": "trixie", "requested": ["jq"]}',
        *(f'{{"suite": "trixie", "requested": ["jq"], "base_requested": {base}}}' for base in ("1", "null", "[[]]")),
    ],
)
def test_a_damaged_lock_is_for_its_user_to_name(tmp_path: Path, text: str) -> None:
    assert stale(tmp_path, text, spec("jq")) is None  # `lock.load` names every field when it is used
    with pytest.raises(ConfigError):
        lock.load(ensure.lock_path(tmp_path))


def test_locked_refuses_to_change_the_lock(tmp_path: Path) -> None:
    assert stale(tmp_path, a_lock(), spec("zsh"))
    before = ensure.lock_path(tmp_path).read_bytes()
    with pytest.raises(ConfigError, match="does not fit the config: new: zsh; gone: jq"):
        ensure.ensure(tmp_path, spec("zsh"), "http://mirror.example/debian", None, Reporter(), locked=True)
    assert ensure.lock_path(tmp_path).read_bytes() == before


# --- libkrun's kernel -------------------------------------------------------------------------------------

KRUN = replace(spec("jq"), krun=True)
PINS = (lockfile.Pin("github:a/b", "0" * 40, "sha256-" + "A" * 43 + "="),)
BUILT = build.Image(Path("image"), Path("root"), fresh=False)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host with a libkrunfw and the images built; one that asks a mirror fails."""
    monkeypatch.setattr(krunfw, "locate", lambda library=None: library or Path("libkrunfw.so.5"))
    monkeypatch.setattr(krunfw, "inspect", lambda path: a_kernel(origin=path.name))
    monkeypatch.setattr(build, "built", lambda key: BUILT)
    monkeypatch.delattr(resolve, "resolve")
    return monkeypatch


def written(tmp_path: Path, value: Lock) -> Path:
    path = ensure.lock_path(tmp_path)
    path.parent.mkdir()
    lock.save(value, path)
    return path


def test_a_lock_without_a_kernel_for_libkrun(tmp_path: Path) -> None:
    assert stale(tmp_path, a_lock(), KRUN) == "the lock has no kernel for libkrun yet"
    assert ensure.current(tmp_path, KRUN) is None


@pytest.mark.parametrize("wanted", [KRUN, spec("jq")])
def test_a_lock_with_a_kernel_for_libkrun_serves_both(tmp_path: Path, wanted: ImageSpec) -> None:
    assert stale(tmp_path, a_lock(krun=a_kernel()), wanted) is None


def test_only_the_kernel_is_added_and_no_mirror_is_asked(tmp_path: Path, host: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, a_lock(plugins=PINS))
    reporter = Reporter()
    notes: list[str] = []
    host.setattr(reporter, "note", notes.append)
    assert ensure.ensure(tmp_path, KRUN, None, None, reporter) == BUILT
    assert lock.load(path) == a_lock(plugins=PINS, krun=a_kernel(origin="libkrunfw.so.5"))
    assert notes == ["+ libkrun's kernel 6.18.55 (libkrunfw.so.5, aaaaaaaa)"]
    before = path.read_bytes()
    ensure.ensure(tmp_path, KRUN, None, None, reporter, locked=True)
    assert path.read_bytes() == before


def test_the_kernel_is_that_of_the_named_libkrun(tmp_path: Path, host: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, a_lock())
    ensure.ensure(tmp_path, KRUN, None, None, Reporter(), libkrun=Path("other.so"))
    assert (kernel := lock.load(path).krun) is not None
    assert kernel.origin == "other.so"


def test_locked_does_not_add_a_kernel_for_libkrun(tmp_path: Path, host: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, a_lock())
    with pytest.raises(ConfigError, match="does not fit the config: the lock has no kernel for libkrun yet"):
        ensure.ensure(tmp_path, KRUN, None, None, Reporter(), locked=True)
    assert lock.load(path) == a_lock()


def test_a_host_without_libkrunfw_leaves_the_lock(tmp_path: Path, host: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, a_lock())
    host.setattr(krunfw, "locate", lambda library=None: None)
    with pytest.raises(HostError, match="is not on this host"):
        ensure.ensure(tmp_path, KRUN, None, None, Reporter())
    assert lock.load(path) == a_lock()


@pytest.mark.parametrize(
    ("wanted", "is_here", "origin"),
    [
        (KRUN, True, "libkrunfw.so.5"),
        (KRUN, False, "smolmachines 1.32.2"),
        (spec("jq"), True, "smolmachines 1.32.2"),
    ],
)
def test_a_new_lock_keeps_the_kernel_or_takes_the_one_that_is_here(
    tmp_path: Path, host: pytest.MonkeyPatch, wanted: ImageSpec, is_here: bool, origin: str
) -> None:
    path = written(tmp_path, a_lock(krun=a_kernel(), plugins=PINS))
    if not is_here:
        host.setattr(krunfw, "locate", lambda library=None: None)
    host.setattr(run, "tool", lambda name: name)
    host.setattr(resolve, "resolve", lambda *args, **options: a_lock(suite="sid"), raising=False)
    ensure.relock(tmp_path, wanted, "http://mirror.example/debian", None, Reporter())
    assert lock.load(path) == a_lock(suite="sid", krun=a_kernel(origin=origin), plugins=PINS)


def test_a_first_lock_without_libkrunfw_asks_no_mirror(tmp_path: Path, host: pytest.MonkeyPatch) -> None:
    host.setattr(krunfw, "locate", lambda library=None: None)
    host.setattr(run, "tool", lambda name: name)
    with pytest.raises(HostError, match="is not on this host"):
        ensure.relock(tmp_path, KRUN, "http://mirror.example/debian", None, Reporter())


# --- writing ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nixbox.lock"
    lock.save(a_lock(), path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(NixboxError, match=r"no space left to write .*nixbox\.lock"):
            lock.save(a_lock(suite="sid"), path)
    assert lock.load(path) == a_lock()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    path = tmp_path / "nixbox.lock"
    lock.save(a_lock(), path)

    def stop(self: Path, target: Path) -> Path:
        raise fault

    with monkeypatch.context() as patched, pytest.raises(fault):
        patched.setattr(Path, "replace", stop)
        lock.save(a_lock(suite="sid"), path)
    assert lock.load(path) == a_lock()
    assert list(tmp_path.iterdir()) == [path]
