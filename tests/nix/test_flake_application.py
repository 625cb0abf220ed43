"""The application that is made without nixpkgs: its locks, and what is built of the one for this host."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nixbox.errors import ConfigError, NixboxError
from nixbox.image import apt, store
from nixbox.run import run
from tests.flakes import REPO, Clone, make_clone

ARCHES = {"amd64": "x86_64", "arm64": "aarch64"}
BUILD_S = 600.0
HANG_S = 60.0


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("application", REPO / "scripts" / "application.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["application"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


script: Any = load_script()


# --- the locks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_a_lock_is_whole_and_of_the_versions_that_are_tested(arch: str) -> None:
    held = script.load(arch)
    every = script.requirements((REPO / "requirements.lock").read_text())
    wanted = script.runtime(every, script.dependencies(), ARCHES[arch], held.python)
    mend = "scripts/application.py lock"
    assert [(p.name, p.version) for p in held.python_packages] == [(r.name, r.version) for r in wanted], mend
    for package, requirement in zip(held.python_packages, wanted, strict=True):
        assert f"sha256:{package.sha256}" in requirement.text, mend
        # Pure Python, or compiled for this Python and this machine.
        assert re.search(rf"-none-any\.whl$|\.tar\.gz$|-cp313-.*{ARCHES[arch]}\.whl$", package.file), package.file
        assert bool(package.modules) == package.file.endswith(".tar.gz")
    names = {package.name for package in held.packages}
    assert {f"python{held.python}-minimal", f"libpython{held.python}-stdlib", "libc6", "libnftables1"} <= names
    assert {package.arch for package in held.debs} <= {arch, "all"}
    assert held.text() == script.lock_path(arch).read_text()


@pytest.mark.parametrize("arch", ARCHES)
def test_a_lock_names_no_host(arch: str) -> None:
    text = script.lock_path(arch).read_text()
    assert not re.search(r"://|\b[a-z0-9-]+\.(org|com|net|io|dev)\b", text)


def test_what_nixbox_needs_is_found_through_who_needs_it() -> None:
    text = (
        "a==1.0 \\\n    --hash=sha256:aa\n    # via nixbox (pyproject.toml)\n"
        "b==2.0 ; sys_platform == 'linux' \\\n    --hash=sha256:bb\n    # via\n    #   a\n    #   x\n"
        "c==3.0 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n    # via a\n"
        "d==4.0 \\\n    --hash=sha256:dd\n    # via b\n"
        "x==5.0 \\\n    --hash=sha256:ee\n    # via nixbox (pyproject.toml)\n"
        "y==6.0 \\\n    --hash=sha256:ff\n    # via x\n"
    )
    every = script.requirements(text)
    assert {name: sorted(one.via) for name, one in every.items()} == {
        "a": ["nixbox"],
        "b": ["a", "x"],
        "c": ["a"],
        "d": ["b"],
        "x": ["nixbox"],
        "y": ["x"],
    }
    assert [one.name for one in script.runtime(every, ["a"], "x86_64", "3.13")] == ["a", "b", "d"]
    assert every["a"].text == "a==1.0 \\\n    --hash=sha256:aa\n"
    with pytest.raises(ConfigError, match="has no z"):
        script.runtime(every, ["z"], "x86_64", "3.13")


def test_a_damaged_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(script.lock_path("amd64").read_text())
    monkeypatch.setattr(script, "lock_path", lambda arch: tmp_path / "application.lock")
    with pytest.raises(ConfigError, match="there is no"):
        script.load("amd64")
    wrongs: tuple[Any, ...] = (
        {**data, "packages": [{"name": "x"}]},
        {**data, "bootstrap": None},
        [],
        {**data, "format": 2},
    )
    for wrong in wrongs:
        (tmp_path / "application.lock").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError):
            script.load("amd64")


# --- the flake ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    yield make_clone(tmp_path_factory.mktemp("application"))


@pytest.mark.parametrize("machine", ARCHES.values())
def test_it_evaluates_without_nixpkgs_and_asks_for_no_mirror(clone: Clone, machine: str) -> None:
    package = f".#packages.{machine}-linux.nixbox-debian"
    path = clone.eval(f"{package}.outPath")
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert path.endswith(f"-nixbox-{version}")
    assert clone.eval(f".#apps.{machine}-linux.nixbox-debian.program") == f"{path}/bin/nixbox"
    # A mirror is another derivation of each download, and the same application.
    given = {"NIXBOX_DEBIAN_MIRROR": "http://mirror.invalid/debian", "NIXBOX_PYPI_MIRROR": "http://files.invalid"}
    words = [f"{name}={value}" for name, value in given.items()]
    drv = clone.eval(f"{package}.drvPath")
    options = (*store.setup().options, "--store", str(clone.store))
    elsewhere = ["env", *words, *clone.unshare, "nix", *options, "eval", "--impure", "--json"]
    asked = run([*elsewhere, f"{package}.outPath"], cwd=clone.repo, env=clone.env, timeout_s=HANG_S)
    assert json.loads(asked.stdout) == path
    other = json.loads(
        run([*elsewhere, f"{package}.drvPath"], cwd=clone.repo, env=clone.env, timeout_s=HANG_S).stdout
    )
    assert other != drv
    fetches = clone.nix("show-derivation", "--recursive", drv)
    assert "set-NIXBOX_PYPI_MIRROR.invalid/packages/" in fetches and "http://files.invalid" not in fetches


# --- what is built ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def application() -> Path:
    """bin/nixbox, built from this checkout, in this host's store."""
    arch = next((a for a, machine in ARCHES.items() if machine == platform.machine()), None)
    if arch is None or shutil.which("nix") is None:
        pytest.skip("no Nix here, or no lock for this architecture")
    try:
        apt.mirrors(None, None)
        script.put(arch)
    except NixboxError as error:
        pytest.skip(f"the application's inputs cannot be had here: {error}")
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    expression = (
        f'(import {REPO}/nix/flake/application.nix {{ source = {REPO}; version = "{version}";'
        f" lock = {script.lock_path(arch)}; }}).application"
    )
    options = store.setup().options
    argv = ["nix", *options, "build", "--json", "--no-link", "--impure", "--expr", expression]
    done = run(argv, env=store.env(), timeout_s=BUILD_S)
    return store.physical(Path(json.loads(done.stdout)[0]["outputs"]["out"])) / "bin" / "nixbox"


def call(program: Path | str, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    if store.private_root() is not None:
        pytest.skip("in a store of one's own a program of it runs only by `nix run`")
    return subprocess.run(
        [program, *words],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_it_runs_with_a_python_of_its_own(application: Path, tmp_path: Path) -> None:
    # Nothing of the user's Python may get in.
    (tmp_path / "typer.py").write_text("raise SystemExit('not this one')\n")
    done = call(application, "version", PYTHONPATH=str(tmp_path), PYTHONHOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nixbox ")

    python = application.read_text().split("\n")[0].removeprefix("#!").split()[0]
    code = (
        "import sys, ctypes, json, os, sqlite3, ssl, lzma, pydantic_core, _cffi_backend\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "print(json.dumps([sys.executable, sorted(maps), sorted(k for k in os.environ if k.startswith('LD_'))]))"
    )
    tree = Path(python).parents[2]
    library = next(tree.glob("usr/lib/*/libnftables.so.1"))
    said = call(python, "-I", "-c", code, str(library))
    assert said.returncode == 0, said.stderr
    executable, maps, variables = json.loads(said.stdout)
    assert executable == python
    assert variables == []
    assert len(maps) > 10
    assert [path for path in maps if not path.startswith(f"{tree}/")] == [], "libraries of the host are in it"


def test_none_of_its_files_leads_to_the_host(application: Path) -> None:
    tree = Path(application.read_text().split("\n")[0].removeprefix("#!").split()[0]).parents[2]
    links = [path for path in tree.rglob("*") if path.is_symlink()]
    assert links, "a tree of libraries has links"
    outside = [f"{path} -> {path.readlink()}" for path in links if path.readlink().is_absolute()]
    assert outside == []


def test_its_children_are_the_host_s_programs(application: Path, tmp_path: Path) -> None:
    """Commands work, and a program of the host that nixbox starts runs with the host's libraries."""
    env = {"HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state")}
    (tmp_path / "w").mkdir()
    done = call(application, "init", "--name", "demo", cwd=tmp_path / "w", **env)
    assert done.returncode == 0, done.stderr
    shown = call(application, "config", "--json", cwd=tmp_path / "w", **env)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout
    # It asks Nix, apt and QEMU.
    report = call(application, "doctor", "--json", cwd=tmp_path / "w", **env)
    assert "version" in report.stdout.lower(), report.stderr
    assert "symbol lookup error" not in report.stdout + report.stderr


def test_plugins_programs_are_run_by_the_same_python(application: Path, tmp_path: Path) -> None:
    """A command of a plugin gets `nixbox` and `nixbox-python`, which can import it."""
    env = {"HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state")}
    plugin = tmp_path / "w/.nixbox/plugins/mine"
    (plugin / "commands").mkdir(parents=True)
    (tmp_path / "w/.nixbox/config.toml").write_text('plugins = ["mine"]\n')
    (plugin / "plugin.toml").write_text('[[commands]]\nname = "who"\n')
    program = plugin / "commands/who"
    program.write_text(
        "#!/usr/bin/env nixbox-python\nimport nixbox, subprocess, sys\nprint(nixbox.__file__)\n"
        "sys.stdout.flush()\nsubprocess.run(['nixbox', 'version'], check=True)\n"
    )
    program.chmod(0o755)
    done = call(application, "mine", "who", cwd=tmp_path / "w", **env)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n")[:2]
    assert first == str(application.parent.parent / "lib/nixbox/nixbox/__init__.py")
    assert second.startswith("nixbox ")
