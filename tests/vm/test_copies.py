"""Forks of a machine, and one that is suspended and resumed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.vm.conftest import RESOURCES, Workspace

CONFIG = f'name = "box"\nmounts = []\n{RESOURCES}'


def test_a_fork_of_a_running_machine_goes_on_as_another(workspace: Workspace) -> None:
    workspace.config(CONFIG + '[env]\nTOKEN = "t"\n')
    workspace("up")
    workspace.guest("echo disk > ~/file; echo memory | sudo tee /dev/shm/file; setsid sleep 4321 >/dev/null 2>&1 &")
    # A session of the parent's, which must not notice; and bytes that only the parent's guest could know of.
    # It starts programs without a pause: a copy that missed some of what the guest writes meanwhile cannot go on.
    ticks = "i=0; while [ $i -lt 40 ]; do i=$((i + 1)); ls / >/dev/shm/busy; echo $i; done"
    session = workspace.start("run", "--no-tty", "--", "sh", "-c", ticks)
    forks = json.loads(workspace("fork", "--count", "3", "--prefix", "copy", "--json").stdout)
    assert [fork["name"] for fork in forks] == ["copy-1", "copy-2", "copy-3"]
    assert {fork["how"] for fork in forks} == {"forked"}
    out, err = session.communicate(timeout=60)
    assert session.returncode == 0 and out.decode().split() == [str(i) for i in range(1, 41)], err

    script = (
        "hostname; cat /etc/machine-id; sudo sha256sum /run/nixbox/ssh/host_key | cut -d' ' -f1; "
        "head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' '"
    )
    names = ["box", "copy-1", "copy-2", "copy-3"]
    answers = [workspace("run", "-m", name, "--", "sh", "-c", script).stdout.split() for name in names]
    assert [answer[0] for answer in answers] == names
    assert all(len({answer[what] for answer in answers}) == 4 for what in range(4))
    for name in names[1:]:
        shared = "cat ~/file /dev/shm/file; pgrep -x sleep | wc -l; echo $TOKEN; date +%s"
        found = workspace("run", "-m", name, "--", "sh", "-c", shared).stdout.split()
        assert found[:2] == ["disk", "memory"] and found[3] == "t"
        # What the parent ran in the background goes on here too, what it ran in a session does not.
        assert found[2] == "1", workspace("run", "-m", name, "--", "ps", "-ef").stdout
        assert abs(int(found[4]) - time.time()) < 10
    # Each is an ordinary machine, with a disk of its own.
    workspace("run", "-m", "copy-1", "--", "sh", "-c", "echo other > ~/file; sync")
    assert workspace.guest("cat ~/file") == "disk\n"
    workspace("down", "copy-1")
    assert json.loads(workspace("up", "--json", "copy-1").stdout)["template"] == "boot"
    assert workspace("run", "-m", "copy-1", "--", "cat", "file").stdout == "other\n"
    workspace("rm", "--yes", "copy-2")
    assert workspace("fork", "--prefix", "copy").stdout == "copy-2\n", "the first name that is free"
    assert "curl" in workspace("run", "-m", "copy-2", "--", "sh", "-c", "curl --version").stdout
    workspace("fork", "--prefix", "Not a name", code=2)


def test_two_forks_at_once_make_different_machines(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo mine > ~/file")
    forks = [workspace.start("fork", "--count", "2") for _ in range(2)]
    done = [fork.communicate(timeout=400) for fork in forks]
    assert [fork.returncode for fork in forks] == [0, 0], done
    names = [name for out, _ in done for name in out.decode().split()]
    assert sorted(names) == ["box-1", "box-2", "box-3", "box-4"]
    for name in names:
        assert workspace("run", "-m", name, "--", "sh", "-c", "hostname; cat ~/file").stdout == f"{name}\nmine\n"


def test_forks_of_a_stopped_machine_have_its_disk(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo kept > ~/file")
    before = workspace.guest("cat /etc/machine-id")
    workspace("down")
    assert workspace("fork", "--count", "2").stdout.split() == ["box-1", "box-2"]
    for name in ("box-1", "box-2"):
        answer = workspace("run", "-m", name, "--", "sh", "-c", "cat ~/file; hostname; cat /etc/machine-id").stdout
        assert answer.split()[:2] == ["kept", name] and answer.split()[2] != before.strip()
    assert workspace("status", code=4).stdout.startswith("machine      box: stopped")


def test_kill_9_while_forking_loses_nothing(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo precious > ~/file; sync")
    for delay_s in (0.2, 0.3, 0.45, 0.6, 0.8, 1.2):
        process = workspace.start("fork", "--count", "2", "--prefix", "gone")
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        # The parent goes on, whatever moment it was held at.
        assert workspace.guest("cat ~/file", timeout_s=60) == "precious\n", delay_s
    for machine in sorted((workspace.path / ".nixbox/machines").glob("gone-*")):
        workspace("rm", "--yes", machine.name)
    names = workspace("fork", "--count", "2", "--prefix", "gone").stdout.split()
    assert workspace("run", "-m", names[1], "--", "cat", "file").stdout == "precious\n"


def test_what_was_suspended_goes_on(workspace: Workspace) -> None:
    workspace.config(CONFIG + '[env]\nTOKEN = "t"\n')
    workspace("up")
    secret = "planted-" + os.urandom(8).hex()
    workspace.guest(
        f"echo here > /tmp/file; echo {secret} | sudo tee /dev/shm/secret; setsid sleep 4321 >/dev/null 2>&1 &"
    )
    before = workspace.guest("cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/boot_id; pgrep -x sleep")
    workspace("suspend")
    assert workspace.vm_pids() == []
    assert workspace("status", code=4).stdout.startswith("machine      box: suspended")
    directory = workspace.machine() / "snapshot"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o600}
    manifest = json.loads((directory / "snapshot.json").read_text())
    fields = ["imageHash", "overlayFingerprint", "envHash", "hypervisorVersion", "createdAt", "invalidateReasons"]
    assert list(manifest) == fields and manifest["invalidateReasons"] == []
    assert secret.encode() in (directory / "memory").read_bytes(), "which is why its mode matters"
    workspace("suspend", code=4)

    time.sleep(3)
    done = json.loads(workspace("up", "--json").stdout)
    assert done["how"] == "resumed"
    assert (
        workspace.guest("cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/boot_id; pgrep -x sleep")
        == before
    )
    assert workspace.guest("cat /tmp/file; sudo cat /dev/shm/secret; echo $TOKEN") == f"here\n{secret}\nt\n"
    assert abs(int(workspace.guest("date +%s")) - time.time()) < 5, "the clock is right"
    workspace.guest("sudo apt-get -qq update")  # and the network works
    assert not directory.exists(), "what was saved is the past"
    workspace.guest("echo more > ~/file")
    for _ in range(2):  # again and again
        workspace("suspend")
        assert json.loads(workspace("up", "--json").stdout)["how"] == "resumed"
    assert workspace.guest("cat ~/file /tmp/file") == "more\nhere\n"
    workspace("suspend")
    workspace("rm", "--yes")
    assert not workspace.machine().exists()


def _suspended(box: Workspace) -> Path:
    box("up")
    box.guest("echo precious > ~/file; echo lost > /dev/shm/file")
    box("suspend")
    return box.machine() / "snapshot"


def _boots(box: Workspace, reason: str) -> None:
    """`up` names the reason, starts the machine without its snapshot, and its disk is whole."""
    done = box("up", "--json")
    assert reason in done.stderr and json.loads(done.stdout)["how"] == "restored", done.stderr
    manifest = json.loads((box.machine() / "snapshot/snapshot.json").read_text())
    assert any(reason in why for why in manifest["invalidateReasons"])
    assert not (box.machine() / "snapshot/memory").exists()
    assert box.guest("cat ~/file; ls /dev/shm") == "precious\n"


@pytest.mark.parametrize("what", ["memory", "state", "disk", "manifest"])
def test_a_snapshot_that_does_not_fit_is_not_used(workspace: Workspace, what: str) -> None:
    directory = _suspended(workspace)
    if what == "memory":
        os.truncate(directory / "memory", 100 << 20)
        _boots(workspace, "memory has 104857600 bytes instead of")
    elif what == "state":
        data = (directory / "state").read_bytes()
        (directory / "state").write_bytes(data[:-100])
        _boots(workspace, "state has")
    elif what == "disk":
        os.utime(workspace.machine() / "overlay.img")
        _boots(workspace, "the disk was changed since")
    else:
        (directory / "snapshot.json").write_text("{}")
        _boots(workspace, "snapshot.json is damaged")
    # And the next one is used again.
    workspace("suspend")
    assert json.loads(workspace("up", "--json").stdout)["how"] == "resumed"


def test_another_environment_or_shape_is_not_resumed(workspace: Workspace) -> None:
    _suspended(workspace)
    workspace.config(CONFIG + '[env]\nTOKEN = "new"\n')
    _boots(workspace, "the environment has changed")
    assert workspace.guest("echo $TOKEN") == "new\n"
    workspace("suspend")
    workspace.config(CONFIG.replace("320MiB", "352MiB") + '[env]\nTOKEN = "new"\n')
    _boots(workspace, "the machine's shape has changed")
    assert workspace.status()["memory_mib"] == 352
    workspace("suspend")
    assert json.loads(workspace("up", "--json", "--cold").stdout)["how"] == "booted"
    assert workspace.guest("cat ~/file") == "precious\n"


def test_another_hypervisor_is_not_resumed(workspace: Workspace) -> None:
    _suspended(workspace)
    tools = workspace.path / "tools"
    tools.mkdir()
    import shutil

    real = shutil.which("qemu-system-x86_64")
    script = f'#!/bin/sh\n[ "$1" != --version ] || {{ echo "QEMU emulator version 99.1"; exit; }}\nexec {real} "$@"\n'
    (tools / "qemu-system-x86_64").write_text(script)
    (tools / "qemu-system-x86_64").chmod(0o755)
    workspace.extra["PATH"] = f"{tools}:{os.environ['PATH']}"
    _boots(workspace, "the hypervisor")
    del workspace.extra["PATH"]


def test_kill_9_while_suspending_or_resuming_loses_nothing(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo precious > ~/file; sync")
    for number, delay_s in enumerate((0.15, 0.3, 0.45, 0.6, 0.8, 1.1, 1.5, 2.0)):
        for command in ("suspend", "up"):
            process = workspace.start(command)
            time.sleep(delay_s)
            process.kill()
            process.communicate()
            if command == "suspend" and number % 2:
                # What was held goes on with the next command, if it was not saved already.
                answer = workspace("run", "--", "cat", "file", code=None, timeout_s=120)
                assert answer.stdout == "precious\n" or "is not running" in answer.stderr, answer.stderr
    workspace("up")
    assert workspace.guest("cat ~/file") == "precious\n"
    assert len(workspace.vm_pids()) == 1
    workspace("suspend")
    assert json.loads(workspace("up", "--json").stdout)["how"] == "resumed"


def test_a_full_disk_while_suspending_loses_nothing(workspace: Workspace) -> None:
    from tests.vm.test_lifecycle import Disk

    disk = Disk(workspace.path / ".nixbox" / "machines", "60m")
    workspace.prefix = disk.prefix
    try:
        workspace("up")
        workspace.guest("echo precious > ~/file; echo here > /dev/shm/file")
        refused = workspace("suspend", code=1)
        assert "error:" in refused.stderr
        assert workspace.guest("cat ~/file /dev/shm/file") == "precious\nhere\n", "it runs on"
        assert disk.sh(f"ls {disk.place}/box").split().count("snapshot.new") == 0
        workspace("rm", "--yes")
    finally:
        workspace.prefix = ()
        disk.close()


def test_an_idle_machine_costs_next_to_nothing(workspace: Workspace) -> None:
    workspace("up")
    (pid,) = workspace.vm_pids()
    time.sleep(5)  # what a start leaves to do
    begun, ticks = time.monotonic(), _cpu_ticks(pid)
    time.sleep(10)
    share = (_cpu_ticks(pid) - ticks) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begun)
    assert share < 0.1, f"{share:.1%} of a CPU"
    memory = workspace.status()["memory"]
    assert 0 < memory["shared"] < memory["resident"] and memory["own"] + memory["shared"] == memory["resident"]
    assert "resident" in workspace("status").stdout


def test_memory_goes_back_to_the_host_if_the_config_says_so(workspace: Workspace) -> None:
    workspace.config(CONFIG.replace("disk =", "return_memory = true\ndisk ="))
    workspace("up")
    before = workspace.status()["memory"]["own"] + workspace.status()["memory"]["shared"]
    workspace.guest("head -c 120M /dev/urandom > /dev/shm/big")
    full = workspace.status()["memory"]["resident"]
    assert full - before > 100 << 20
    workspace.guest("rm /dev/shm/big")
    deadline = time.monotonic() + 60
    while workspace.status()["memory"]["resident"] > full - (80 << 20) and time.monotonic() < deadline:
        time.sleep(0.5)  # the guest reports what has been free for two seconds
    assert workspace.status()["memory"]["resident"] < full - (80 << 20)
    # Its forks and its later self are whole, and none of them shares memory in which holes are made.
    workspace.guest("head -c 60M /dev/urandom > /dev/shm/kept; cksum /dev/shm/kept > /tmp/sum")
    (fork,) = workspace("fork").stdout.split()
    workspace("run", "-m", fork, "--", "sh", "-c", "rm /dev/shm/kept; sleep 6")
    workspace("suspend")
    assert json.loads(workspace("up", "--json").stdout)["how"] == "resumed"
    assert workspace.guest("cksum /dev/shm/kept | cmp - /tmp/sum && echo whole") == "whole\n"
    other = json.loads(workspace("up", "--json", "other").stdout)
    assert (other["how"], other["made"]) == ("restored", False)


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
