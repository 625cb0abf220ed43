"""The command line as its callers see it: words on stderr, data on stdout, and one exit code for each outcome."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import nixbox
from nixbox import cli, paths
from nixbox.cli import common, plugins
from nixbox.image import build, ensure, lock, resolve, store
from nixbox.image.lock import Bootstrap, Lock, LockedPackage
from nixbox.machine import template
from nixbox.plan.model import ImageSpec

HANG_S = 60.0
LONG = "x" * 200
CONFIG = """\
name = "box"
[debian]
mirror = "http://mirror.example/debian"
[machine]
accelerator = "tcg"
"""


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with nothing of this host's user around it."""
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        (tmp_path / variable).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("COLUMNS", "120")
    directory = tmp_path / "place"
    directory.mkdir()
    monkeypatch.chdir(directory)
    store.setup.cache_clear()
    return directory


@pytest.fixture
def workspace(place: Path) -> Path:
    (place / ".nixbox").mkdir()
    (place / ".nixbox/config.toml").write_text(CONFIG)
    return place


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program inside this process."""

    def call(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["nixbox", *args])
        capsys.readouterr()
        plugins.with_commands.cache_clear()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        assert "Traceback" not in said.err
        return Said(int(caught.value.code), said.out, said.err)

    return call


def program(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "nixbox", *args]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- usage -----------------------------------------------------------------------------------------------


def test_version(call: Call) -> None:
    assert call("version") == Said(0, f"nixbox {nixbox.__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command(call: Call, option: str) -> None:
    said = call(option)
    assert said.code == 0
    words = {line.split()[0] for line in said.out.splitlines() if line.startswith("  ") and line.strip()}
    assert words >= {
        *("init", "up", "down", "shell", "run", "status", "list", "logs", "rm", "lock", "build", "config"),
        *("ssh-config", "doctor", "version", "image", "template", "suspend", "fork", "net", "port", "env"),
        *("plugin", "trust", "mount", "unmount"),
    }


@pytest.mark.parametrize(
    "args",
    [
        *(["upp"], ["up", "--zzz"], ["up", "a", "b"], ["up", "--cpus", "many"], ["run"], ["image", "zzz"]),
        *(["template", "zzz"], ["template", "rm"], ["fork", "-n", "0"], ["fork", "-n", "1001"], ["fork", "-n", "x"]),
    ],
)
def test_bad_usage_is_2(call: Call, workspace: Path, args: list[str]) -> None:
    said = call(*args)
    assert (said.code, said.out) == (2, "")
    assert said.err


@pytest.mark.parametrize(
    "args",
    [
        ["up"],
        ["down"],
        ["status"],
        ["list"],
        ["config"],
        ["build"],
        ["lock"],
        ["rm"],
        ["logs"],
        ["shell"],
        ["suspend"],
        ["fork"],
    ],
)
def test_no_workspace_is_2(call: Call, args: list[str]) -> None:
    said = call(*args)
    assert (said.code, said.out) == (2, "")
    assert "no .nixbox/config.toml in" in said.err
    assert "hint: `nixbox init` makes this directory a workspace" in said.err


def test_run_itself_failing_is_125(call: Call) -> None:
    assert call("run", "--", "true").code == 125


def test_every_fault_of_a_bad_config_is_shown(call: Call, workspace: Path) -> None:
    text = 'nmae = "x"\nbase = "debain"\n[resources]\nvcpus = 0\nmemory = "lots"\n'
    (workspace / ".nixbox/config.toml").write_text(text)
    for command in ("up", "config", "build"):
        said = call(command)
        assert (said.code, said.out) == (2, "")
        for field in ("nmae: ", "did you mean `name`?", "base: ", "resources.vcpus: ", "resources.memory: "):
            assert field in said.err
        assert len([line for line in said.err.splitlines() if line.startswith("  .nixbox/config.toml: ")]) == 4


def test_a_config_that_is_no_toml(call: Call, workspace: Path) -> None:
    (workspace / ".nixbox/config.toml").write_text("name = \n")
    said = call("up")
    assert said.code == 2
    assert ".nixbox/config.toml: line 1" in said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('network.domains = ["example.org"]\n', "network.domains"),
        ("network.ports = [80]\n", "network.ports"),
        ("ports = [{ host = 1, guest = 1 }, { host = 1, guest = 2 }]\n", "ports[1].host"),
    ],
)
def test_what_cannot_be_served_yet_is_refused(call: Call, workspace: Path, text: str, words: str) -> None:
    (workspace / ".nixbox/config.toml").write_text(text)
    said = call("up", "--dry-run")
    assert said.code == 2
    assert f"  {words} (from config.toml)" in said.err


@pytest.mark.parametrize("name", ["..", "a/b", "", LONG, ".", "-a", "a b", "a\n", "é"])
@pytest.mark.parametrize("command", ["up", "status", "rm", "run", "down", "logs", "shell", "suspend", "fork"])
def test_bad_names(call: Call, workspace: Path, command: str, name: str) -> None:
    before = files(workspace)
    said = call("run", "-m", name, "--", "true") if command == "run" else call(command, "--", name)
    assert (said.code, said.out) == (125 if command == "run" else 2, "")
    assert "error: the machine name " in said.err
    assert "1 to 63 letters, digits and hyphens" in said.err
    assert LONG not in said.err
    assert all(line.isprintable() for line in said.err.splitlines())
    assert files(workspace) == before


def test_init_from_a_config_in_nix(call: Call, place: Path) -> None:
    (place / "old.nix").write_text('{ name = "shop"; env.TOKEN = builtins.getEnv "TOKEN"; nix.packages = [ "jq" ]; }')
    said = call("init", "--from", "old.nix", "--name", "mine")
    assert said.code == 0
    text = (place / ".nixbox/config.toml").read_text()
    assert 'name = "mine"' in text
    assert 'TOKEN = {from_host = "TOKEN"}' in text
    assert json.loads(call("config", "--json").out)["settings"]["packages"] == []  # they are named for nixpkgs
    (place / "bad.nix").write_text("{ name = foo; }")
    said = call("init", "--from", "bad.nix")
    assert said.code == 2
    assert "bad.nix: line 1, column 10: undefined variable 'foo'" in said.err


def test_a_bad_name_in_the_config(call: Call, workspace: Path) -> None:
    (workspace / ".nixbox/config.toml").write_text('name = "../x"\n')
    said = call("status")
    assert said.code == 2
    assert ".nixbox/config.toml: name: " in said.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env", "NOVALUE"], "--env takes NAME=VALUE"),
        (["--env", "=x"], "--env takes NAME=VALUE"),
        (["--env", "a-b=x"], "--env "),
        (["--memory", "lots"], "--memory: "),
        (["--cpus", "0"], "--cpus: "),
        (["--profile", "none"], "--profile: no profile `none`"),
    ],
)
def test_bad_options(call: Call, workspace: Path, args: list[str], words: str) -> None:
    said = call("up", "--dry-run", *args)
    assert (said.code, said.out) == (2, "")
    assert words in said.err


def test_a_missing_host_variable(call: Call, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIXBOXTEST_A", raising=False)
    (workspace / ".nixbox/config.toml").write_text(CONFIG + '[env]\nA = { from_host = "NIXBOXTEST_A" }\n')
    for args in (["up"], ["up", "--dry-run"]):
        said = call(*args, "--env-from-host", "NIXBOXTEST_B")
        assert said.code == 2
        assert "NIXBOXTEST_A, NIXBOXTEST_B" in said.err
        assert "export NIXBOXTEST_A=" in said.err
    assert not (workspace / ".nixbox/machines").exists()


# --- machines that are not there -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["status", "other"],
        ["logs"],
        ["shell"],
        ["rm"],
        ["rm", "other", "--yes"],
        ["ssh-config"],
        ["suspend"],
    ],
)
def test_no_machine_is_4(call: Call, workspace: Path, args: list[str]) -> None:
    said = call(*args)
    assert (said.code, said.out) == (4, "")
    assert "there is no machine `" in said.err
    assert "`nixbox up`" in said.err
    assert not (workspace / ".nixbox/machines").exists()


def test_run_without_a_machine_is_125(call: Call, workspace: Path) -> None:
    said = call("run", "--", "true")
    assert said.code == 125
    assert "there is no machine `box`" in said.err


def test_lists_of_nothing(call: Call, workspace: Path) -> None:
    assert call("list") == Said(0, "", "no machines here: `nixbox up` makes one\n")
    assert call("list", "--json") == Said(0, "[]\n", "")
    assert call("image", "list").code == 0
    assert json.loads(call("image", "list", "--json").out) == []


def test_two_logs_at_once(call: Call, workspace: Path) -> None:
    assert call("logs", "--console", "--setup").code == 2


# --- templates -------------------------------------------------------------------------------------------


def make_template(image: Path, vcpus: int, used: int) -> str:
    """One that holds next to nothing; returns its name."""
    devices = ("-m", "8M")
    key = template.Key("boot", str(image), "qemu", "QEMU 7.2", "tcg", "emulated", vcpus, 8, "1 2 3", devices)

    def unexpected() -> None:
        raise AssertionError

    with template.making(key, unexpected) as work:
        out = work / "out"
        out.mkdir()
        (out / "memory").write_bytes(b"x" * 100_000)
        (out / "state").touch()
        template.publish(out, key)
    os.utime(template.directory() / key.ident / "used", (used, used))
    return key.ident


def test_templates_are_listed_and_removed(call: Call, place: Path) -> None:
    said = call("template", "list")
    assert (said.code, said.out) == (0, "")
    assert "no templates yet" in said.err
    assert call("template", "list", "--json") == Said(0, "[]\n", "")
    old, new = make_template(place, 2, 1000), make_template(place, 4, 2000)
    assert [info["ident"] for info in json.loads(call("template", "list", "--json").out)] == [new, old]
    lines = call("template", "list").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [new[:12], old[:12]]
    assert call("template", "rm", "nothing").code == 1
    assert call("template", "rm", old[:12], old).err == "removed 1\n"
    assert [info["ident"] for info in json.loads(call("template", "list", "--json").out)] == [new]


def test_template_gc_removes_what_is_of_no_use(call: Call, place: Path) -> None:
    image = place / "image"
    image.touch()
    kept, damaged, gone = (
        make_template(image, 1, 1000),
        make_template(image, 2, 2000),
        make_template(place / "x", 3, 3),
    )
    (template.directory() / damaged / "memory").write_bytes(b"")
    said = call("template", "gc", "--dry-run")
    assert {line.split()[0] for line in said.out.splitlines()} == {damaged[:12], gone[:12]}
    assert len(template.every()) == 3
    assert call("template", "gc").out == said.out
    assert [info.ident for info in template.every()] == [kept]
    assert call("template", "gc") == Said(0, "", "nothing to remove\n")
    assert call("template", "gc", "--all").code == 0
    assert template.every() == []


def test_template_gc_keeps_to_the_limit(call: Call, place: Path) -> None:
    old, new = make_template(place, 2, 1000), make_template(place, 4, 2000)
    settings = paths.user_config_dir() / "settings.toml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('templates.limit = "1MiB"')
    assert call("template", "gc").out == ""
    (template.directory() / new / "more").write_bytes(b"x" * 850_000)
    assert call("template", "gc").out.startswith(old[:12])
    assert [info.ident for info in template.every()] == [new]
    settings.write_text("templates.limit = 0")
    said = call("template", "gc")
    assert (said.code, said.out) == (2, "")
    assert f"{settings}: templates.limit: 0MiB is too little" in said.err


# --- init and config -------------------------------------------------------------------------------------


def test_init_twice(call: Call, place: Path) -> None:
    assert call("init", "--name", "web-1").code == 0
    before = files(place)
    assert set(before) == {".nixbox/config.toml", ".nixbox/.gitignore"}
    said = call("init")
    assert said.code == 2
    assert "exists already" in said.err
    assert files(place) == before


def test_config_shows_values_and_where_they_come_from(call: Call, workspace: Path) -> None:
    (workspace / ".nixbox/config.toml").write_text(CONFIG + '[env]\nTOKEN = "s3cret"\n')
    text = call("config").out
    assert 'name = "box"' in text
    assert "# config.toml" in text
    data = json.loads(call("config", "--json").out)
    assert data["settings"]["machine"]["accelerator"] == "tcg"
    assert data["origins"]["resources.vcpus"] == "default"
    assert "s3cret" not in text + json.dumps(data)


def test_config_nix_is_what_would_be_built(call: Call, workspace: Path) -> None:
    said = call("config", "--nix")
    assert said.code == 0
    assert said.out.startswith("import ")
    assert "nixbox.lock" in said.out
    assert '"http://mirror.example/debian"' in said.out


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_a_dry_run_leaves_nothing(call: Call, workspace: Path, args: list[str], tmp_path: Path) -> None:
    before = files(tmp_path)
    said = call("up", "--dry-run", "--cpus", "3", *args)
    assert said.code == 0
    if args:
        data = json.loads(said.out)
        assert data["machine"]["vcpus"] == 3
        assert data["machine"]["state"] == "new"
        assert data["image"]["relock"] == "there is no lock yet"
        assert data["image"]["built"] is None
    else:
        assert "3 vCPUs" in said.out
        assert "would be built" in said.out
    kept = ("XDG_CACHE_HOME/nixbox/config/", "XDG_CACHE_HOME/nixbox/commands")  # as by any command
    assert {path: text for path, text in files(tmp_path).items() if not path.startswith(kept)} == before
    assert not (workspace / ".nixbox/machines").exists()


# --- a host that lacks something -------------------------------------------------------------------------


def package(name: str) -> LockedPackage:
    file = f"pool/main/x/{name}.deb"
    return LockedPackage(name=name, version="1", arch="all", repo="debian", path=file, size=1, sha256="0" * 64)


def write_lock(workspace: Path) -> str:
    value = Lock(
        format=1,
        base="debian",
        suite="trixie",
        arch="amd64",
        requested=(),
        base_requested=resolve.BASE_REQUEST,
        bootstrap=Bootstrap(package=package("busybox-static"), nar_hash="sha256-" + "A" * 43 + "="),
        kernel=package("linux"),
        tools=(),
        base_packages=(package("bash"),),
        packages=(),
    )
    lock.save(value, ensure.lock_path(workspace))
    return lock.dump(value)


def only(tools: tuple[str, ...], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with these programs of the host alone."""
    directory.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"no {tool} on this host")
        (directory / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr("nixbox.run.find_tool", shutil.which)
    return directory


def stubs(directory: Path, *programs: str) -> None:
    """Programs that are there and do nothing."""
    for name in programs:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)


def test_a_host_without_nix(call: Call, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(workspace)
    directory = only((), tmp_path / "bin", monkeypatch)
    stubs(
        directory, "qemu-system-x86_64", "mke2fs", "e2fsck", "resize2fs", "ssh", "ssh-keygen", "apt-get", "apt-helper"
    )
    for command in ("up", "build"):
        said = call(command)
        assert (said.code, said.out) == (3, "")
        assert re.search(r"the program `nix(-store)?` is not on this host", said.err)
        assert "apt install nix-bin" in said.err


def test_a_host_without_apt_cannot_make_a_lock(
    call: Call, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs(only((), tmp_path / "bin", monkeypatch), "nix", "nix-store", "nix-instantiate")
    said = call("lock")
    assert said.code == 3
    assert "`apt-get` is not on this host" in said.err


def test_a_host_without_qemu(call: Call, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_lock(workspace)
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    bin_dir = only(("mke2fs", "ssh-keygen"), tmp_path / "bin", monkeypatch)
    stubs(bin_dir, "nix", "nix-store", "e2fsck", "resize2fs", "ssh")
    image = tmp_path / "image"
    image.mkdir()
    for file, text_ in (
        ("image.json", "{}"),
        ("vmlinux", ""),
        ("initrd", ""),
        ("root.img", ""),
        ("bzImage", ""),
    ):
        (image / file).write_text(text_)
    build.roots_dir().mkdir(parents=True)
    spec = ImageSpec("debian", "trixie", (), (), False)
    (build.roots_dir() / build.key(spec, text)).symlink_to(image)
    said = call("up")
    assert said.code == 3
    assert "the program `qemu-system-x86_64` is not on this host" in said.err
    assert "apt install qemu-system-x86;" in said.err
    assert call("status").code == 4  # nothing runs


def test_doctor_names_what_is_missing(
    call: Call, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only((), tmp_path / "bin", monkeypatch)
    said = call("doctor")
    assert said.code == 3
    for program_, package_ in (
        ("nix", "nix-bin"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("ssh", "openssh-client"),
    ):
        assert f"the program `{program_}` is not on this host" in said.out
        assert f"apt install {package_};" in said.out
    found = json.loads(call("doctor", "--json").out)
    assert {entry["what"] for entry in found if entry["level"] == "missing"} >= {"nix", "qemu", "ssh", "mke2fs"}


# --- how failures look -----------------------------------------------------------------------------------


def test_ctrl_c_is_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nixbox.config.scaffold.init", interrupt)
    assert call("init").code == 130


def test_ctrl_c_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nixbox.config.scaffold.init", interrupt)
    assert call("init").err == "interrupted\n"


def test_a_fault_of_ours_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("nixbox.config.scaffold.init", fail)
    said = call("init")
    assert said.code == 1
    assert "this is a fault in nixbox: ZeroDivisionError: oops" in said.err
    assert "nixbox --debug" in said.err


def test_the_program_itself(place: Path) -> None:
    done = program("status", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no .nixbox/config.toml")
    assert "Traceback" not in done.stderr
    done = program("--debug", "status", cwd=place)
    assert done.returncode not in (0, 4)
    assert "Traceback" in done.stderr
    assert "nixbox.errors.ConfigError" in done.stderr


def test_a_reader_that_goes_away_sees_no_traceback(place: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        argv = [sys.executable, "-m", "nixbox", "--help"]
        done = subprocess.run(
            argv, cwd=place, env=env, stdout=write_fd, stderr=subprocess.PIPE, text=True, timeout=HANG_S, check=False
        )
    finally:
        os.close(write_fd)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.stderr == ""


def test_machines_complete(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("box", "bar", "web"):
        directory = workspace / paths.CONFIG_DIR / "machines" / name
        directory.mkdir(parents=True)
        (directory / "machine.json").write_text("{}")
    assert common.complete_machine("b") == ["bar", "box"]
    monkeypatch.chdir("/")
    assert common.complete_machine("") == []
