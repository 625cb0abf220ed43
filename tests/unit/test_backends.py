"""Which hypervisor a machine gets, and what a config or a command line may ask of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nixbox.config import load
from nixbox.config.settings import Overrides
from nixbox.errors import ConfigError, HostError
from nixbox.machine import accelerator, backends, libkrun
from nixbox.machine.backend import Backend
from nixbox.machine.cloud_hypervisor import CloudHypervisor
from nixbox.machine.krun import Krun
from nixbox.machine.qemu import Qemu
from nixbox.plan import checks
from nixbox.plan.model import BackendName

HANG_S = 30.0  # nothing here may take this long: a bound against hangs, not a measure of speed
CONFIG = '[debian]\nmirror = "http://mirror.example/debian"\n'


@pytest.fixture(autouse=True)
def bin_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without programs and settings; what is put into the directory is installed."""
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        (tmp_path / variable).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A libkrun that the user names."""
    path = tmp_path / "libkrun.so"
    path.touch()
    monkeypatch.setenv(libkrun.VARIABLE, str(path))
    return path


def kvm(monkeypatch: pytest.MonkeyPatch, *, works: bool) -> None:
    """Let the probe of KVM find that it works, or does not; the probe has tests of its own."""

    def choose(wanted: str, backend: BackendName) -> accelerator.Choice:
        assert (wanted, backend) == ("auto", "krun")
        if not works:
            raise HostError("no KVM")
        return accelerator.Choice("kvm", "it works")

    monkeypatch.setattr(accelerator, "choose", choose)


def install_qemu(bin_: Path) -> None:
    (bin_ / "qemu-system-x86_64").touch(mode=0o755)


def test_qemu_is_taken_where_it_is_installed(bin_: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_qemu(bin_)
    kvm(monkeypatch, works=True)
    assert backends.choose("auto", "auto") == backends.choose("auto", "tcg") == "qemu"


def test_without_qemu_it_is_libkrun_if_that_works(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm(monkeypatch, works=True)
    assert backends.choose("auto", "auto") == backends.choose("auto", "kvm") == "krun"
    assert backends.choose("auto", "tcg") == "qemu"  # which alone emulates
    kvm(monkeypatch, works=False)
    assert backends.choose("auto", "auto") == "qemu"


def test_where_nothing_is_qemu_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm(monkeypatch, works=True)
    monkeypatch.setenv(libkrun.VARIABLE, str(tmp_path / "gone.so"))
    assert backends.choose("auto", "auto") == "qemu"
    monkeypatch.setattr("nixbox.machine.qemu.architecture", lambda: "x86_64")
    with pytest.raises(HostError, match="qemu-system-x86_64") as caught:
        Qemu().check_host()
    assert "qemu-system-x86" in str(caught.value.hint)


def test_what_is_asked_for_is_taken(bin_: Path) -> None:
    assert backends.choose("krun", "auto") == "krun"  # it says itself what is missing
    assert backends.choose("cloud-hypervisor", "kvm") == "cloud-hypervisor"
    install_qemu(bin_)
    assert backends.choose("krun", "kvm") == "krun"
    assert backends.choose("qemu", "tcg") == "qemu"


@pytest.mark.parametrize(("name", "kind"), [("qemu", Qemu), ("krun", Krun), ("cloud-hypervisor", CloudHypervisor)])
def test_each_name_is_a_backend(name: str, kind: type) -> None:
    made: Backend = backends.named(name)
    assert isinstance(made, kind)
    assert made.name == name


def test_libkrun_is_the_one_that_the_settings_name(tmp_path: Path, library: Path) -> None:
    settings = tmp_path / "XDG_CONFIG_HOME/nixbox/settings.toml"
    settings.parent.mkdir()
    settings.write_text(f'[krun]\nlibrary = "{tmp_path}/other.so"\n')
    with pytest.raises(HostError, match=r"settings\.toml names .*other\.so"):
        backends.named("krun").version()
    (tmp_path / "other.so").write_text("four")
    assert backends.named("krun").version().startswith(f"libkrun {tmp_path}/other.so (4 bytes, ")


# --- what a config and a command line may ask ---


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "place/.nixbox").mkdir(parents=True)
    (tmp_path / "place/.nixbox/config.toml").write_text(CONFIG)
    return tmp_path / "place"


def ask(workspace: Path, text: str) -> None:
    (workspace / ".nixbox/config.toml").write_text(CONFIG + text)


@pytest.mark.parametrize("backend", ["krun", "cloud-hypervisor"])
def test_only_qemu_emulates(workspace: Path, backend: BackendName) -> None:
    ask(workspace, f'[machine]\naccelerator = "tcg"\nbackend = "{backend}"\n')
    loaded = load.load(workspace)
    with pytest.raises(ConfigError) as caught:
        checks.check(loaded, backend)
    (fault,) = caught.value.faults
    assert fault.startswith("machine.accelerator (from config.toml): ")
    assert f"the backend {backend}" in fault and 'backend = "qemu"' in fault
    checks.check(loaded, "qemu")
    ask(workspace, f'[machine]\nbackend = "{backend}"\n')
    checks.check(load.load(workspace), backend)


def test_the_command_line_goes_before_the_config(workspace: Path) -> None:
    ask(workspace, '[machine]\nbackend = "krun"\n')
    assert load.load(workspace).settings.backend == "krun"
    assert load.load(workspace, Overrides(backend="qemu")).settings.backend == "qemu"


def up(workspace: Path, *args: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "nixbox", "up", *args]
    env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    done = subprocess.run(argv, cwd=workspace, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_backend_that_there_is_not_names_the_option_and_the_choices(workspace: Path) -> None:
    code, said = up(workspace, "--backend", "nonsense")
    assert code == 2
    assert "--backend: must be `auto`, `qemu`, `krun` or `cloud-hypervisor`, not `nonsense`" in said
    assert "machine.backend" not in said


def test_a_backend_that_cannot_do_what_the_config_asks_for_is_refused_at_once(workspace: Path) -> None:
    ask(workspace, '[machine]\naccelerator = "tcg"\n')
    code, said = up(workspace, "--backend", "krun")
    assert code == 2
    assert "machine.accelerator (from config.toml): the backend krun emulates nothing" in said
    assert [path.name for path in workspace.rglob("*")] == [".nixbox", "config.toml"]
