"""The generated expression of an image evaluates, and its derivation depends on the image's inputs alone."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from nixbox.config.load import load
from nixbox.image import build, lock
from nixbox.image.lock import Bootstrap, KrunKernel, Lock, LockedPackage
from nixbox.image.resolve import BASE_REQUEST
from nixbox.plan.model import ImageSpec, Script
from nixbox.plan.resolve import resolve
from nixbox.run import CommandError, run

pytestmark = pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="no nix-instantiate on this host")

MIRRORS = {"debian": "http://mirror.example/debian", "security": "http://mirror.example/debian-security"}


def package(name: str, version: str = "1.0", **changes: Any) -> LockedPackage:
    """A package of which nothing exists but its name: evaluation needs no files."""
    values: dict[str, Any] = {
        "name": name,
        "version": version,
        "arch": "amd64",
        "repo": "debian",
        "path": f"pool/main/{name[0]}/{name}/{name}_{version.rpartition(':')[2]}_amd64.deb",
        "size": 10,
        "sha256": hashlib.sha256(f"{name} {version}".encode()).hexdigest(),
    }
    return LockedPackage(**(values | changes))


def a_lock(**changes: Any) -> Lock:
    values: dict[str, Any] = {
        "format": 1,
        "base": "debian",
        "suite": "trixie",
        "arch": "amd64",
        "requested": (),
        "base_requested": BASE_REQUEST,
        "bootstrap": Bootstrap(
            package=package("busybox-static"),
            nar_hash="sha256-" + base64.b64encode(hashlib.sha256(b"busybox").digest()).decode(),
        ),
        "kernel": package("linux-image-6.12"),
        "tools": (package("mmdebstrap"), package("bash")),
        "base_packages": (package("bash"), package("apt", "1:2.0~rc1+b1"), package("libssl3", repo="security")),
        "packages": (),
    }
    return Lock(**(values | changes))


SPEC = ImageSpec("debian", "trixie", (), (), False)
BUILD = (Script("profile dev", "echo '${x}' \"$HOME\" >/etc/built\n''${\n"),)
JQ = (package("jq"),)


def a_kernel(release: str = "6.18.55", **changes: Any) -> KrunKernel:
    """libkrun's kernel, of which nothing exists either."""
    values: dict[str, Any] = {
        "file": "libkrunfw.so.5",
        "origin": "smolmachines 1.0",
        "size": 99,
        "sha256": "1" * 64,
        "offset": 9,
    }
    values |= {"length": 90, "load": 1000, "entry": 1001, "release": release}
    return KrunKernel(**(values | changes))


PLAIN = a_lock()


@dataclass(frozen=True)
class Variation:
    """One image: its specification, its lock, the mirrors and the Nix files it is made with."""

    spec: ImageSpec = SPEC
    lock: Lock = PLAIN
    mirrors: tuple[tuple[str, str], ...] = tuple(MIRRORS.items())
    nix: str = "same"


BASE = Variation()
# What changes the image …
OTHER = {
    "packages": Variation(replace(SPEC, packages=("jq",)), a_lock(requested=("jq",), packages=JQ)),
    "version": Variation(
        replace(SPEC, packages=("jq",)), a_lock(requested=("jq",), packages=(package("jq", "1.1"),))
    ),
    "base package": Variation(lock=a_lock(base_packages=(package("bash", "5.3"),))),
    "bits of a package": Variation(lock=a_lock(base_packages=(package("bash", sha256="0" * 64),))),
    "kernel": Variation(lock=a_lock(kernel=package("linux-image-6.13"))),
    "tool": Variation(lock=a_lock(tools=(package("mmdebstrap", "1.5"), package("bash")))),
    "bootstrap": Variation(
        lock=a_lock(bootstrap=Bootstrap(package=package("busybox-static"), nar_hash="sha256-" + "A" * 43 + "="))
    ),
    "suite": Variation(replace(SPEC, suite="sid"), a_lock(suite="sid")),
    "build": Variation(replace(SPEC, build=BUILD)),
    "build text": Variation(replace(SPEC, build=(Script("profile dev", "echo other"),))),
    "build order": Variation(replace(SPEC, build=(*BUILD, Script("plugin a", "a")))),
    "build reordered": Variation(replace(SPEC, build=(Script("plugin a", "a"), *BUILD))),
    "build_network": Variation(replace(SPEC, build=BUILD, build_network=True)),
    "sidecar": Variation(replace(SPEC, sidecar=("/opt/jdk",))),
    "sidecars": Variation(replace(SPEC, sidecar=("/opt/jdk", "/srv"))),
    "sidecar's packages": Variation(lock=a_lock(sidecar_requested=("jq",), sidecar_packages=JQ)),
    "sidecar's version": Variation(lock=a_lock(sidecar_requested=("jq",), sidecar_packages=(package("jq", "1.1"),))),
    "libkrun": Variation(lock=a_lock(krun=a_kernel())),
    "libkrun's kernel": Variation(lock=a_lock(krun=a_kernel("6.19"))),
    "bits of libkrun's kernel": Variation(lock=a_lock(krun=a_kernel(sha256="2" * 64))),
    "place of libkrun's kernel": Variation(lock=a_lock(krun=a_kernel(offset=8))),
    "guest init": Variation(nix="guest"),
    "nix code": Variation(nix="code"),
    "new guest file": Variation(nix="new"),
}
# … and what does not.
SAME = {
    "again": Variation(),
    "mirrors": Variation(mirrors=(("debian", "https://other.example/debian"),)),
    "no mirror": Variation(mirrors=()),
    "asking for libkrun": Variation(replace(SPEC, krun=True)),  # the lock is asked, not the config
    "network without a build": Variation(replace(SPEC, build_network=True)),
}
EVERY = {"base": BASE, **OTHER, **SAME}


@pytest.fixture(scope="module")
def nix_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nixbox's Nix files, and copies with one change each."""
    place = tmp_path_factory.mktemp("nix")
    found = {}
    for name in ("same", "guest", "code", "new"):
        found[name] = place / name
        shutil.copytree(paths.nix_dir(), found[name])
    with (found["guest"] / "guest/stage1").open("a") as file:
        file.write("# another init\n")
    image = found["code"] / "image.nix"
    image.write_text(image.read_text().replace("mkdir $out", "mkdir -p $out"))
    (found["new"] / "guest/extra").write_text("x")
    return found


Evaluate = Callable[[dict[str, Variation], str], dict[str, Any]]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory, nix_dirs: dict[str, Path]) -> Evaluate:
    """Evaluate an attribute of many images at once, in a Nix that writes nothing anywhere."""
    conf = tmp_path_factory.mktemp("nix-conf")
    (conf / "nix.conf").write_text("experimental-features = nix-command flakes\nsubstituters =\n")
    env = {"NIX_CONF_DIR": str(conf), "NIX_REMOTE": "dummy://"}
    place = tmp_path_factory.mktemp("locks")

    def evaluate(variations: dict[str, Variation], attribute: str) -> dict[str, Any]:
        parts = []
        for i, (name, variation) in enumerate(variations.items()):
            file = place / f"{i}.lock"
            lock.save(variation.lock, file)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(paths, "nix_dir", lambda v=variation: nix_dirs[v.nix])
                text = build.expression(variation.spec, file, dict(variation.mirrors))
            parts.append(f"{json.dumps(name)} = ({text}).{attribute};")
        argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
        done = run(argv, stdin="{\n" + "\n".join(parts) + "\n}", timeout_s=120, env=env)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return evaluate


@pytest.fixture(scope="module")
def outs(evaluate: Evaluate) -> dict[str, str]:
    # The path that is built. The .drv file's own path is finer: it names the mirrors, from which fixed outputs
    # are fetched, and which make no difference to what is built.
    return evaluate(EVERY, "image.outPath")


def keys(nix_dirs: dict[str, Path]) -> dict[str, str]:
    found = {}
    for name, variation in EVERY.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(paths, "nix_dir", lambda v=variation: nix_dirs[v.nix])
            found[name] = build.key(variation.spec, lock.dump(variation.lock))
    return found


def test_every_image_evaluates(evaluate: Evaluate, outs: dict[str, str]) -> None:
    assert all(path.endswith("-nixbox-image.drv") for path in evaluate(EVERY, "image.drvPath").values())
    assert set(outs) == set(EVERY)
    assert all(path.endswith("-nixbox-image") for path in outs.values())


@pytest.mark.parametrize("what", OTHER)
def test_what_changes_the_image(what: str, outs: dict[str, str]) -> None:
    assert outs[what] != outs["base"]


def test_each_change_is_another_image(outs: dict[str, str]) -> None:
    assert len({outs[what] for what in ("base", *OTHER)}) == 1 + len(OTHER)


def test_a_sidecar_of_packages_changes_alone(evaluate: Evaluate) -> None:
    some = ("base", "sidecar", "sidecars", "sidecar's packages", "sidecar's version", "build")
    chosen = {what: EVERY[what] for what in some}
    roots, sidecars = evaluate(chosen, "image.rootImage.outPath"), evaluate(chosen, "image.sidecars")
    assert roots["base"] == roots["sidecar's packages"] == roots["sidecar's version"]
    assert len({roots[what] for what in ("base", "sidecar", "sidecars", "build")}) == 4
    assert [len(sidecars[what]) for what in some] == [0, 1, 1, 1, 1, 0]
    assert len({str(sidecars[what]) for what in some}) == 5


@pytest.mark.parametrize("what", SAME)
def test_what_does_not_change_the_image(what: str, outs: dict[str, str]) -> None:
    assert outs[what] == outs["base"]


def test_the_same_key_means_the_same_image(outs: dict[str, str], nix_dirs: dict[str, Path]) -> None:
    found = keys(nix_dirs)
    by_key: dict[str, set[str]] = {}
    for what, key in found.items():
        by_key.setdefault(key, set()).add(outs[what])
    assert {key: paths_ for key, paths_ in by_key.items() if len(paths_) != 1} == {}
    # Of use only if it is not finer than it must be where a user would notice:
    assert found["base"] == found["again"] == found["mirrors"] == found["no mirror"]
    assert all(found[what] != found["base"] for what in OTHER)


def test_the_key_sees_a_file_that_becomes_executable(nix_dirs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "nix"
    shutil.copytree(nix_dirs["same"], copy)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paths, "nix_dir", lambda: copy)
        before = build.key(SPEC, "{}")
        (copy / "guest/stage1").chmod((copy / "guest/stage1").stat().st_mode ^ 0o111)
        assert build.key(SPEC, "{}") != before


def test_where_the_nix_files_lie_does_not_matter(nix_dirs: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paths, "nix_dir", lambda: nix_dirs["same"])
        elsewhere = build.key(SPEC, "{}")
    assert build.key(SPEC, "{}") == elsewhere


def test_inputs_hold_every_package(evaluate: Evaluate) -> None:
    some = {"base": BASE, "mirrors": SAME["mirrors"]} | {what: OTHER[what] for what in ("kernel", "libkrun")}
    found = evaluate(some, "inputs.outPath")
    assert found["base"] == found["mirrors"]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(("what", "reproducible"), [("base", True), ("build", True), ("build_network", False)])
def test_the_image_says_what_it_is(evaluate: Evaluate, what: str, reproducible: bool) -> None:
    meta = json.loads(evaluate({what: EVERY[what]}, "image.imageJson")[what])
    assert meta["reproducible"] is reproducible
    assert meta["build"] == [script.origin for script in EVERY[what].spec.build]
    assert (meta["base"], meta["suite"], meta["arch"]) == ("debian", "trixie", "amd64")
    assert [p["name"] for p in meta["packages"]] == ["bash", "apt", "libssl3"]


def test_the_image_says_which_kernel_of_libkruns_it_has(evaluate: Evaluate) -> None:
    found = evaluate({what: EVERY[what] for what in ("base", "libkrun")}, "image.imageJson")
    base, krun = (json.loads(found[what]) for what in ("base", "libkrun"))
    assert "krun" not in base
    assert krun == base | {"krun": {"release": "6.18.55", "origin": "smolmachines 1.0"}}


def test_the_parts_for_libkrun_depend_on_what_they_are_made_of(evaluate: Evaluate) -> None:
    some = {what: EVERY[what] for what in ("libkrun", "libkrun's kernel")}
    some["package"] = Variation(lock=a_lock(krun=a_kernel(), base_packages=(package("bash", "5.3"),)))
    some["guest"] = replace(some["libkrun"], nix="guest")
    kernels, roots = evaluate(some, "image.krunKernel"), evaluate(some, "image.krunBoot")
    assert kernels["libkrun"] == kernels["package"] == kernels["guest"] != kernels["libkrun's kernel"]
    assert roots["libkrun"] == roots["package"] == roots["libkrun's kernel"] != roots["guest"]


def test_libkruns_kernel_is_not_for_other_architectures(evaluate: Evaluate) -> None:
    with pytest.raises(CommandError, match="no kernel of libkrun's for the architecture arm64"):
        evaluate({"arm64": Variation(lock=a_lock(krun=a_kernel(), arch="arm64"))}, "image.outPath")


# --- from the config -------------------------------------------------------------------------------------

CONFIG = """\
name = "box"
profile = "dev"
packages = ["jq"]
"""
PROFILE = 'build = "echo built"\nsetup = "echo once"\n'


def image_of(workspace: Path, config: str, profile: str) -> tuple[str, str]:
    """The expression and the key that a workspace comes to."""
    directory = workspace / ".nixbox"
    (directory / "profiles").mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(config)
    (directory / "profiles/dev.toml").write_text(profile)
    spec = resolve(load(workspace)).image
    return build.expression(spec, directory / "nixbox.lock", MIRRORS), build.key(spec, "{}")


@pytest.mark.parametrize(
    ("config", "profile"),
    [
        (CONFIG.replace("box", "other"), PROFILE),
        (CONFIG + "[resources]\nvcpus = 7\nmemory = 512\ndisk = 4096\n", PROFILE),
        (CONFIG + '[env]\nA = "b"\n', PROFILE),
        (CONFIG + 'scripts = ["echo up"]\n', PROFILE),
        (CONFIG + '[machine]\naccelerator = "tcg"\n', PROFILE),
        (CONFIG + '[debian]\nmirror = "http://third.example/debian"\n', PROFILE),
        (CONFIG, PROFILE.replace("once", "twice")),
        (CONFIG, PROFILE + 'disk.size = "4GiB"\n'),
    ],
)
def test_what_is_no_part_of_the_image(tmp_path: Path, config: str, profile: str) -> None:
    assert image_of(tmp_path, config, profile) == image_of(tmp_path, CONFIG, PROFILE)


def test_a_build_script_is_part_of_the_image(tmp_path: Path) -> None:
    before, after = (image_of(tmp_path, CONFIG, text) for text in (PROFILE, PROFILE.replace("built", "again")))
    assert before[0] != after[0]
    assert before[1] != after[1]
