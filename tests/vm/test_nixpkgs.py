"""Real machines of the nixpkgs base, made of the stand-in: the guest's tests of the Debian base, and its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nixpkgs as standin
from tests.vm import conftest
from tests.vm.conftest import RESOURCES, Home, Workspace

# The same tests as for the Debian base, on machines of the fixtures below.
from tests.vm.test_guest import (  # noqa: F401
    ODD_VALUES,
    test_a_terminal_when_there_is_one,
    test_a_time_limit_ends_the_command_in_the_guest,
    test_copying_files_with_plain_scp_and_sftp,
    test_ctrl_c_in_a_terminal_reaches_the_command_alone,
    test_names_of_variables_are_names,
    test_signals_reach_the_command,
    test_streams_and_exit_codes_pass_through,
    test_the_root_image_cannot_be_written_by_guest_root,
    test_twenty_commands_at_once,
    test_what_sudo_runs_is_ended_too,
    test_workdir_and_variables_of_one_command,
)

SOURCE = f'[nixpkgs]\nsource = "github:{standin.PIN["owner"]}/{standin.PIN["repo"]}@{standin.PIN["ref"]}"\n'
PACKAGES = '["jq", "extra.tree"]'
CONFIG = f'name = "box"\nbase = "nixpkgs"\nmounts = []\npackages = {PACKAGES}\nld_libraries = ["libjq"]\n'


@pytest.fixture(scope="module")
def lock(home: Home) -> str:
    """A lock of the stand-in, whose tree and .debs are in the store that the machines' home uses."""
    path = Path(tempfile.mkdtemp(prefix="n", dir=home.path))
    debian = Workspace(path, home.env)
    debian.config(f'name = "box"\nmounts = []\npackages = {json.dumps(standin.REQUEST)}\n{RESOURCES}')
    debian("lock")
    found = path / ".nixbox" / "nixbox.lock"
    argv = [sys.executable, "-m", "tests.nixpkgs", str(path), str(found), str(path / "made.lock")]
    done = subprocess.run(
        argv, env=dict(home.env), cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (path / "made.lock").read_text()
    shutil.rmtree(path)
    return text


def prepared(home: Home, lock: str, text: str = "") -> Workspace:
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    box = Workspace(path, home.env)
    box.config(f"{CONFIG}{text}{RESOURCES}{SOURCE}")
    (path / ".nixbox" / "nixbox.lock").write_text(lock)
    return box


@pytest.fixture
def workspace(home: Home, lock: str) -> Iterator[Workspace]:
    box = prepared(home, lock)
    yield box
    conftest._end(box)


@pytest.fixture(scope="module")
def running(home: Home, lock: str) -> Iterator[Workspace]:
    box = prepared(home, lock)
    box("up")
    yield box
    conftest._end(box)


# --- what the root is like -------------------------------------------------------------------------------


def test_the_user_and_the_root(running: Workspace) -> None:
    assert running.guest("id -u; sudo -n id -u").split() == ["1000", "0"]
    modes = running.guest("stat -L -c '%a %U:%G %n' /usr/bin/sudo /usr/bin/su /etc/shadow /etc/sudoers /tmp /root")
    assert modes.splitlines() == [
        "4755 root:root /usr/bin/sudo",
        "555 root:root /usr/bin/su",
        "600 root:root /etc/shadow",
        "440 root:root /etc/sudoers",
        "1777 root:root /tmp",
        "700 root:root /root",
    ]
    assert running.guest("getent passwd sshd | cut -d: -f1,6") == "sshd:/var/empty\n"
    assert running.guest("ls -A /etc/ssh | grep host_key || echo none") == "none\n"
    assert running.guest("date -u +%Y") == time.strftime("%Y\n", time.gmtime())
    # What stage 1 put together cannot be reached from inside.
    assert running("run", "--", "sudo", "ls", "/overlay", "/lower", code=2).stdout == ""
    # Nobody but root changes the user by su, and whoever su is for gets the machine's environment.
    assert running("run", "--", "su", "-", "root", "-c", "id", code=None).returncode != 0
    user = str(running.status()["user"])
    assert running.guest(f"sudo su - {user} -c 'echo $USER:$HOME; command -v jq'").splitlines() == [
        f"{user}:/home/{user}",
        "/usr/bin/jq",
    ]


def test_the_packages_and_what_they_need(running: Workspace) -> None:
    assert running.guest("echo '{\"a\": [1, 2]}' | jq -c .a") == "[1,2]\n"
    assert running.guest("tree --version").startswith("tree v")
    assert running.guest("readlink -f /usr/bin/jq").startswith("/nix/store/")
    assert int(running.guest("grep -c BEGIN /etc/ssl/certs/ca-certificates.crt")) > 100
    assert running.guest("getent services ssh | tr -s ' '") == "ssh 22/tcp\n"
    assert running.guest("TZ=:/etc/zoneinfo/Asia/Tokyo date -d @0 +%H") == "09\n"
    assert running.guest("for p in curl git-none ip less ps tar which xz; do command -v $p || echo no $p; done") == (
        "/usr/bin/curl\nno git-none\n"
        + "".join(f"/usr/bin/{p}\n" for p in ("ip", "less", "ps", "tar", "which", "xz"))
    )


def test_nix_in_the_guest_knows_its_store(running: Workspace) -> None:
    assert running.guest("nix --version").startswith("nix (Nix) 2.")
    paths = set(running.guest("nix-store --query --requisites /run/current-system/sw").split())
    there = set(running.guest("ls -d /nix/store/*-*").split())
    assert len(paths) > 20
    assert paths < there
    assert running.guest(f"nix-store --check-validity {' '.join(there)} && echo valid") == "valid\n"
    assert running.guest("nix-store --verify --check-contents 2>&1 | grep -v 'checking\\|reading' || echo whole") == (
        "whole\n"
    )
    pinned = json.loads(running.guest("cat /etc/nix/registry.json"))["flakes"][0]["to"]
    assert pinned["rev"] == standin.PIN["rev"]


def test_nix_in_the_guest_builds(running: Workspace) -> None:
    # As the machine's user, without a daemon and without a network, from what the image has.
    script = r"""
      bash=$(readlink -f /usr/bin/bash)
      cat >~/made.nix <<END
        derivation {
          name = "made-here";
          system = "x86_64-linux";
          builder = "\${builtins.storePath ${bash%/bin/*}}/bin/bash";
          args = [ "-c" "echo hello >\$out" ];
        }
END
      # Debian's Nix would have its own static shell as the sandbox's.
      nix-build --no-out-link --option substituters '' --option sandbox-paths '' ~/made.nix
    """
    found = running.guest(script, timeout_s=200).strip()
    assert found.endswith("-made-here")
    assert running.guest(f"cat {found}") == "hello\n"
    # What the image brought is a root of the collector; what was made here is garbage.
    collected = running.guest(
        "nix-store --gc 2>&1; ls -d /nix/store/*-made-here 2>&1 || command -v jq", timeout_s=200
    )
    assert "/usr/bin/jq" in collected
    assert running.guest("jq --version").startswith("jq-")


def test_a_program_from_elsewhere_finds_its_loader_and_libraries(running: Workspace, tmp_path: Path) -> None:
    # Debian's own jq, as it is: its loader is where nix-ld is, its libraries are in no directory of this root.
    deb = next(Path("/nix/store").glob("*-jq_*.deb"))
    subprocess.run(["dpkg-deb", "--extract", deb, tmp_path], check=True)
    program = (tmp_path / "usr/bin/jq").read_bytes()
    process = running.start("run", "--no-tty", "--", "sh", "-c", "cat >~/foreign && chmod +x ~/foreign", stdin=-1)
    process.communicate(program, timeout=60)
    assert process.returncode == 0
    where = "/run/current-system/sw/share/nix-ld/lib"
    assert running.guest("readlink -f /lib64/ld-linux-x86-64.so.2").strip().endswith("/libexec/nix-ld")
    names = running.guest(f"ls {where}").split()
    assert {"ld.so", "libjq.so.1", "libstdc++.so.6", "libz.so.1"} <= set(names)
    # nix-ld itself sets this before it goes on to ld.so; the stand-in's is Debian's loader, which has to be told.
    loader = running.guest(f"dirname $(readlink -f {where}/ld.so)").strip()
    assert running("run", "--", "sh", "-c", "~/foreign --version", code=None).returncode != 0
    told = f"LD_LIBRARY_PATH={where}:{loader} ~/foreign --version"
    assert running.guest(told).startswith("jq-")


# --- its life --------------------------------------------------------------------------------------------


def test_a_machine_comes_up_again_and_another_from_the_template(workspace: Workspace) -> None:
    assert json.loads(workspace("up", "--json").stdout)["how"] in ("booted", "restored")
    workspace.guest("echo kept >~/file; sudo sh -c 'echo kept >/etc/file'")
    workspace("suspend")
    workspace("up")
    workspace("down")
    # A larger disk: the image's own resize2fs grows the file system on it.
    workspace.config(f"{CONFIG}{RESOURCES}{SOURCE}".replace('disk = "1GiB"', 'disk = "2GiB"'))
    workspace("up")
    assert workspace.guest("cat ~/file /etc/file") == "kept\nkept\n"
    assert int(workspace.guest("df -BM --output=size / | tail -1 | tr -dc 0-9")) > 1800
    other = json.loads(workspace("up", "other", "--json").stdout)
    assert other["how"] == "restored"
    assert workspace("run", "-m", "other", "--", "sh", "-c", "hostname; jq --version").stdout.startswith("other\njq-")


def test_a_share_is_served_by_the_images_own_virtiofsd(home: Home, lock: str) -> None:
    box = prepared(home, lock)
    box.config(f"{CONFIG}{RESOURCES}{SOURCE}".replace("mounts = []\n", ""))
    (box.path / "seen").write_text("here")
    box.extra["PATH"] = os.pathsep.join(p for p in box.env["PATH"].split(os.pathsep) if "virtiofsd" not in p)
    try:
        box("up")
        assert box.guest("cat ~/workspace/seen; echo back >~/workspace/new") == "here"
        assert (box.path / "new").read_text() == "back\n"
        exes = [Path(f"/proc/{p}/exe").readlink() for p in conftest.processes(b"virtiofsd", b"--fd")]
        told = [exe for exe in exes if str(exe).startswith("/nix/store/") and exe.name == "virtiofsd"]
        assert told
    finally:
        conftest._end(box)


def test_the_environment_arrives_byte_for_byte(workspace: Workspace) -> None:
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in ODD_VALUES.items()]
    workspace.config(f"{CONFIG}[env]\n{chr(10).join(lines)}\n{RESOURCES}{SOURCE}")
    workspace("up")
    script = "; ".join(f'printf "%s\\0" "${name}"' for name in ODD_VALUES)
    for command in (["sh", "-c", script], ["bash", "-lc", script], ["bash", "-c", script]):
        assert workspace("run", "--", *command).stdout.split("\0") == [*ODD_VALUES.values(), ""], command
    user = str(workspace.status()["user"])
    through_su = workspace("run", "--", "sudo", "su", "-", user, "-c", 'printf %s "$QUOTES"').stdout
    assert through_su == ODD_VALUES["QUOTES"]


# --- its image -------------------------------------------------------------------------------------------


def test_scripts_of_a_build_run_in_the_root(workspace: Workspace) -> None:
    script = """
      id -u > /etc/built
      mkdir -p /opt/tool/bin && printf '#!/bin/sh\\necho tool\\n' > /opt/tool/bin/tool && chmod 755 /opt/tool/bin/tool
      chown 1000:1000 /opt/tool && chmod 4755 /opt/tool/bin/tool
      jq --version >> /etc/built
      ls /build /overlay /.outside 2>/dev/null >> /etc/built || true
      curl -s --max-time 2 http://192.0.2.1/ || echo offline >> /etc/built
    """
    text = CONFIG.replace('name = "box"\n', 'name = "box"\nprofile = "dev"\n')
    workspace.config(f"{text}{RESOURCES}{SOURCE}", f"build = {json.dumps(script)}\n")
    workspace("up")
    assert workspace.guest("cat /etc/built | sed s/jq-.*/jq/") == "0\njq\noffline\n"
    assert workspace.guest("stat -c '%a %u:%g' /opt/tool /opt/tool/bin/tool; /opt/tool/bin/tool") == (
        "755 1000:1000\n4755 0:0\ntool\n"
    )
    assert workspace.guest("ls -d /nix/.build /dev/fd /proc/1 2>&1 | grep -c No") == "1\n"
    workspace.config(f"{text}{RESOURCES}{SOURCE}", 'build = "echo before; no-such-program"\n')
    failed = workspace("build", code=1)
    assert "the build of profile dev failed with exit code 127" in failed.stderr
    assert "before" in failed.stderr and "no-such-program: not found" in failed.stderr.replace("command ", "")


def test_the_same_lock_gives_the_same_bits(workspace: Workspace) -> None:
    from tests.vm.test_image import _nix

    path = workspace("build").stdout.strip()
    drv = _nix(workspace, "nix-store", "--query", "--deriver", path).stdout.strip()
    inputs = _nix(workspace, "nix-store", "--query", "--requisites", drv).stdout.split()
    checked = []
    for each in inputs:
        # What is ours, and not the stand-in's.
        name = each[44:-4]
        if (
            each.endswith(".drv")
            and name.startswith("nixbox-")
            and name not in ("nixbox-busybox", "nixbox-ld", "nixbox-sw")
        ):
            done = _nix(workspace, "nix-store", "--realise", "--check", each)
            assert done.returncode == 0, done.stderr[-3000:]
            checked.append(name)
    assert sorted(checked) == ["nixbox-image", "nixbox-initrd", "nixbox-nixpkgs-kernel", "nixbox-nixpkgs-root.erofs"]


def test_what_is_locked_needs_no_network(workspace: Workspace) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root takes the network away from a Nix without a daemon")
    workspace.prefix = ["unshare", "--net"]
    before = json.loads((workspace.path / ".nixbox" / "nixbox.lock").read_text())["nixpkgs"]
    # Another package, of the same revision: the lock changes, and the pin does not.
    others = '["jq", "extra.depth.of.three"]'
    workspace.config(f"{CONFIG.replace(PACKAGES, others)}{RESOURCES}{SOURCE}")
    meta = json.loads(workspace("build", "--json").stdout)["image"]
    workspace.prefix = ()
    assert meta["requested"] == ["jq", "extra.depth.of.three"]
    assert json.loads((workspace.path / ".nixbox" / "nixbox.lock").read_text())["nixpkgs"] == before


def test_names_that_nixpkgs_lacks_are_named_before_anything_is_built(workspace: Workspace) -> None:
    names = '["jqq", "extra.tre", "costly"]'
    workspace.config(f"{CONFIG.replace(PACKAGES, names)}{RESOURCES}{SOURCE}", None)
    failed = workspace("build", code=2)
    assert "there is no package `jqq` (did you mean `jq`?) (from config.toml)" in failed.stderr
    assert "`extra` has no `tre` (did you mean `tree`?)" in failed.stderr
    assert "[nixpkgs] allow_unfree = true" in failed.stderr
    assert "libjq" not in failed.stderr
