"""From an empty directory to a guest and back: what the README promises, as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.vm.conftest import RESOURCES, Home, Workspace


def test_from_an_empty_directory_to_a_guest_that_keeps_its_files(home: Home, workspace: Workspace) -> None:
    lock = workspace.path / ".nixbox" / "nixbox.lock"
    lock.unlink()
    (workspace.path / ".nixbox" / "config.toml").unlink()
    workspace("init", "--name", "box")
    lock.write_text(home.lock)
    workspace("up", "--memory", "512MiB")

    done = workspace("run", "--", "sh", "-c", "echo hi; exit 7", code=7)
    assert done.stdout == "hi\n"
    workspace.guest("echo kept > ~/file; sudo apt-get -qq update; sudo apt-get -qq install -y tree >/dev/null 2>&1")
    assert "tree v" in workspace.guest("tree --version")
    before = workspace.guest("cat /etc/machine-id; cat /etc/hostname; ls /home")
    keys = (workspace.machine() / "ssh" / "host_key.pub").read_text()
    workspace("up")  # is running already: says so, changes nothing
    assert workspace.status()["state"] == "running"

    workspace("down")
    assert workspace.vm_pids() == []
    assert workspace("status", code=4).stdout.startswith("machine      box: stopped")
    workspace("run", "--", "true", code=125)
    workspace("up", "--memory", "512MiB")
    assert workspace.guest("cat ~/file") == "kept\n"
    assert "tree v" in workspace.guest("tree --version")
    assert workspace.guest("cat /etc/machine-id; cat /etc/hostname; ls /home") == before
    assert (workspace.machine() / "ssh" / "host_key.pub").read_text() == keys

    assert [m["name"] for m in json.loads(workspace("list", "--json").stdout)] == ["box"]
    workspace.guest("head -c 120M /dev/urandom > ~/big; sync")
    asked = workspace("rm", code=2)
    assert "the disk of `box` holds" in asked.stderr and "--yes" in asked.stderr
    assert workspace.guest("stat -c %s ~/big") == "125829120\n"
    workspace("rm", "--yes")
    assert not workspace.machine().exists()
    assert workspace.vm_pids() == []
    workspace("status", code=4)


def test_a_profile_shapes_the_image_and_the_first_boot(workspace: Workspace) -> None:
    profile = {
        "packages": 'packages = ["jq"]\n',
        "build": 'build = "echo built > /etc/built; id -u >> /etc/built; adduser --system --quiet builder"\n',
        "setup": 'setup = "echo set up by $USER; echo once >> ~/setup-runs"\n',
    }
    config = f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}'
    workspace.config(config, "".join(profile.values()))
    first = workspace("up")
    assert "set up by" in first.stderr
    assert workspace.guest("echo '{\"a\": 1}' | jq .a; cat /etc/built") == "1\nbuilt\n0\n"
    assert "builder" in workspace.guest("getent passwd builder; stat -c %U /etc/built")
    image = workspace.status()["image"]
    for _ in range(2):
        workspace("down")
        again = workspace("up")
        assert "set up by" not in again.stderr
    assert workspace.guest("cat ~/setup-runs") == "once\n"
    assert "set up by" in workspace("logs", "--setup").stdout
    marker = workspace.guest("cat /var/lib/nixbox/setup-done; stat -c %U /var/lib/nixbox/setup-done").split()
    assert len(marker[0]) == 64 and marker[1] == "root"

    # setup and resources rebuild nothing; the changed setup is not run again, and up says so.
    workspace("down")
    profile["setup"] = 'setup = "echo twice >> ~/setup-runs"\n'
    bigger = config.replace('disk = "1GiB"', 'disk = "2GiB"').replace('memory = "320MiB"', 'memory = "352MiB"')
    workspace.config(bigger, "".join(profile.values()))
    changed = workspace("up")
    assert "is not run again" in changed.stderr and "building" not in changed.stderr
    assert workspace.status()["image"] == image
    assert workspace.guest("cat ~/setup-runs") == "once\n"
    blocks = int(workspace.guest("stat -f -c %b /"))
    assert blocks * 4096 > 1.8 * 2**30, "the overlay disk and its file system grew"

    # packages rebuild, and the machine keeps its own files on top of the new image.
    workspace("down")
    profile["packages"] = 'packages = ["jq", "tree"]\n'
    workspace.config(config, "".join(profile.values()))
    dry = json.loads(workspace("up", "--dry-run", "--json").stdout)
    assert dry["image"]["relock"] == "new: tree" and dry["image"]["built"] is None
    rebuilt = workspace("up")
    assert "+ tree" in rebuilt.stderr
    assert workspace.status()["image"] != image
    assert "tree v" in workspace.guest("tree --version")
    assert workspace.guest("cat ~/setup-runs") == "once\n"

    # The lock is part of the workspace: --locked refuses to change it.
    workspace("down")
    workspace.config(config, profile["packages"].replace("tree", "file"))
    refused = workspace("build", "--locked", code=2)
    assert "the lock does not fit the config" in refused.stderr


def test_plugins_add_to_the_image_and_to_every_start(workspace: Workspace) -> None:
    plugin = workspace.path / "tools" / "greeter"
    plugin.mkdir(parents=True)
    (plugin / "plugin.toml").write_text(
        'packages = { debian = ["tree"] }\nbuild = "echo from the plugin > /etc/greeting"\n'
        'scripts = ["cat /etc/greeting >> ~/order"]\n'
    )
    profile = 'build = "echo then the profile >> /etc/greeting"\n'
    own = 'plugins = ["./tools/greeter"]\nscripts = ["echo own >> ~/order"]\n'
    workspace.config(f'name = "box"\nprofile = "dev"\nmounts = []\n{own}{RESOURCES}', profile)
    workspace("up")
    assert workspace.guest("cat ~/order") == "from the plugin\nthen the profile\nown\n"
    assert "tree v" in workspace.guest("tree --version")
    assert "plugin ./tools/greeter" in workspace("config").stdout

    (plugin / "plugin.toml").write_text('[env]\nTOKEN = "x"\n[resources]\nvcpus = 2\n')
    refused = workspace("up", code=2)
    assert "env: a plugin cannot set" in refused.stderr and "resources: a plugin does not" in refused.stderr


def test_setup_and_scripts_that_fail_are_shown_and_tried_again(workspace: Workspace) -> None:
    scripts = 'scripts = ["echo first; false", "echo second: $GREETING"]\nprofile = "dev"\nmounts = []\n'
    config = f'name = "box"\n{scripts}[env]\nGREETING = "hello there"\n{RESOURCES}'
    workspace.config(config, 'setup = "echo trying; ls /missing"\n')
    failed = workspace("up", code=1)
    assert "setup failed with exit code 2" in failed.stderr and "/missing" in failed.stderr
    assert "setup-done" not in workspace.guest("ls /var/lib/nixbox/")
    assert "trying" in workspace("logs", "--setup").stdout

    workspace.config(config, 'setup = "echo mended"\n')
    mended = workspace("up", code=1)  # the setup runs now, and then the scripts; the first one still fails
    assert "mended" in mended.stderr and "failed with exit code 1" in mended.stderr
    workspace("down")
    scripted = workspace("up", code=1)
    assert "mended" not in scripted.stderr
    order = [scripted.stderr.index(text) for text in ("first", "failed with exit code 1", "second: hello there")]
    assert order == sorted(order)


def test_two_machines_of_one_workspace(workspace: Workspace) -> None:
    one, two = workspace.start("up"), workspace.start("up", "other")
    assert one.communicate(timeout=400)[1] is not None and one.returncode == 0
    assert two.communicate(timeout=400)[1] is not None and two.returncode == 0
    assert workspace.guest("hostname; cat /etc/machine-id") != (
        workspace("run", "-m", "other", "--", "sh", "-c", "hostname; cat /etc/machine-id").stdout
    )
    names = {machine["name"]: machine["state"] for machine in json.loads(workspace("list", "--json").stdout)}
    assert names == {"box": "running", "other": "running"}
    workspace("down")
    assert workspace("run", "-m", "other", "--", "hostname").stdout == "other\n"


def test_two_ups_at_once_make_one_machine(workspace: Workspace) -> None:
    ups = [workspace.start("up") for _ in range(3)]
    said = [up.communicate(timeout=400)[1].decode() for up in ups]
    assert [up.returncode for up in ups] == [0, 0, 0], said
    assert len(workspace.vm_pids()) == 1
    assert sum("is at work on `box`; waiting" in text for text in said) == 2
    assert sum("`box` is running" in text for text in said) == 2


def test_rm_during_up_waits_and_leaves_nothing(workspace: Workspace) -> None:
    up = workspace.start("up")
    _wait(lambda: (workspace.machine() / "busy").exists())
    removed = workspace("rm", "--yes")
    up.communicate(timeout=400)
    assert "is at work on `box`; waiting" in removed.stderr
    assert workspace.vm_pids() == [] and not workspace.machine().exists()


def test_an_up_without_standard_streams_keeps_its_lock(workspace: Workspace) -> None:
    # The lock's file must not take the place of a closed stream: the child's log would be put over it.
    closed = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", closed, "sh", sys.executable, "-m", "nixbox", "up"]
    assert subprocess.run(command, cwd=workspace.path, env=dict(workspace.env), check=False).returncode == 0
    assert workspace.status()["state"] == "running"
    workspace("down")
    assert workspace.vm_pids() == []


def test_sigterm_ends_what_up_has_begun(workspace: Workspace) -> None:
    up = workspace.start("up")
    _wait(lambda: workspace.vm_pids() != [], 60)
    up.terminate()
    _, err = up.communicate(timeout=60)
    assert up.returncode == 128 + signal.SIGTERM, err.decode()
    assert workspace.vm_pids() == []


def test_an_interrupted_setup_does_not_run_beside_the_next(workspace: Workspace) -> None:
    slow = "echo begin $$ >> ~/runs; sleep 6; echo end $$ >> ~/runs"
    workspace.config(f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}', f'setup = "{slow}"\n')
    up = workspace.start("up", "--cold")
    assert up.stderr is not None
    for line in up.stderr:
        if b"running the profile's setup" in line:
            break
    _wait(lambda: "begin" in workspace("run", "--", "cat", "runs", code=None).stdout)
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=60)
    assert up.returncode == 130
    workspace("up", "--cold")  # the machine is up; its setup runs now, alone
    runs = workspace.guest("cat ~/runs").split("\n")[:-1]
    assert [line.split()[0] for line in runs] == ["begin", "begin", "end"]
    assert runs[1].split()[1] == runs[2].split()[1]
    workspace("up", "--cold")
    assert workspace.guest("grep -c begin ~/runs") == "2\n"

    # kill -9 of up: what it left in the guest is ended before the next one runs.
    workspace("rm", "--yes")
    up = workspace.start("up", "--cold")
    _wait(lambda: "begin" in workspace("run", "--", "cat", "runs", code=None).stdout, 90)
    up.kill()
    up.communicate()
    workspace("up", "--cold")
    runs = workspace.guest("cat ~/runs").split("\n")[:-1]
    assert [line.split()[0] for line in runs] == ["begin", "begin", "end"]


def test_up_of_a_running_machine_brings_it_up_to_date(workspace: Workspace) -> None:
    config = f'name = "box"\nmounts = []\nscripts = ["echo ran >> ~/ran"]\n{RESOURCES}'
    workspace.config(config)
    workspace("up")
    again = workspace("up", "--env", "FRESH=yes")
    assert "changed" not in again.stderr
    assert workspace.guest("echo $FRESH; cat ~/ran") == "yes\nran\nran\n"
    workspace.config(config.replace("320MiB", "384MiB"), None)
    assert "changed: resources" in workspace("up").stderr
    assert workspace.guest("echo ${FRESH-gone}") == "gone\n"
    workspace.config(config + '[env]\nA = "a secret"\nB = { from_host = "B_OF_HOST" }\n')
    assert "B_OF_HOST" in workspace("env", "push", code=2).stderr
    workspace.extra["B_OF_HOST"] = "two\nlines"
    assert "A, B" in workspace("env", "push").stderr
    assert workspace.guest('echo "$A $B"') == "a secret two\nlines\n"
    listed = workspace("env", "list").stdout
    assert "B_OF_HOST" in listed and "secret" not in listed and "lines" not in listed
    workspace.config(config)
    workspace("env", "push")
    assert workspace.guest("echo ${A-gone} ${B-gone}") == "gone gone\n"


def test_a_new_image_brings_its_system_users(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("sudo useradd --system mine")
    workspace("down")
    profile = 'build = "useradd --system --home-dir /srv newcomer; echo kept > /var/log/apt/kept"\n'
    workspace.config(f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}', profile)
    workspace("up")
    assert workspace.guest("getent passwd newcomer mine | cut -d: -f1").split() == ["newcomer", "mine"]
    assert "newcomer:!" in workspace.guest("sudo getent shadow newcomer")
    assert workspace.guest("cat /var/log/apt/kept") == "kept\n"


def test_a_damaged_record_can_still_be_stopped_and_removed(workspace: Workspace) -> None:
    workspace("up")
    (workspace.machine() / "machine.json").write_text("{}")
    assert "damaged" in workspace("up", code=1).stderr
    assert workspace.vm_pids() != [], "a machine that may be in use is left alone"
    assert "damaged" in workspace("list").stdout
    workspace("down")
    assert workspace.vm_pids() == []
    workspace("rm", "--yes")
    assert not workspace.machine().exists()


def test_another_runtime_directory_finds_the_machine(workspace: Workspace, home: Home) -> None:
    # As from cron or after su: the sockets are where the start put them.
    workspace("up")
    workspace.extra["XDG_RUNTIME_DIR"] = "/nonexistent"
    assert "is running" in workspace("up").stderr
    assert "is down" in workspace("down").stderr


def test_kill_9_of_the_vm_loses_nothing(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo precious > ~/file; sync")
    (pid,) = workspace.vm_pids()
    os.kill(pid, signal.SIGKILL)
    _wait(lambda: workspace.status()["state"] == "stopped")
    workspace("run", "--", "true", code=125)
    workspace("up")
    assert workspace.guest("cat ~/file") == "precious\n"


def test_kill_9_of_up_at_any_moment_loses_nothing(workspace: Workspace) -> None:
    workspace("up")
    workspace.guest("echo precious > ~/file; sync")
    workspace("down")
    for delay_s in (0.05, 0.2, 0.35, 0.6, 1.2, 2.5, 4.0):
        up = workspace.start("up")
        time.sleep(delay_s)
        up.kill()
        up.communicate()
    done = workspace("up")
    assert len(workspace.vm_pids()) == 1, done.stderr
    assert workspace.guest("cat ~/file") == "precious\n"

    # The same on a machine that is not there yet.
    for delay_s in (0.1, 0.3, 0.5):
        up = workspace.start("up", "fresh")
        time.sleep(delay_s)
        up.kill()
        up.communicate()
    workspace("up", "fresh")
    assert workspace("run", "-m", "fresh", "--", "hostname").stdout == "fresh\n"


def test_ctrl_c_leaves_nothing_running(workspace: Workspace) -> None:
    for delay_s in (0.0, 0.1, 0.3, 0.8, 2.0):
        up = workspace.start("up", "--cold")
        time.sleep(delay_s)
        up.send_signal(signal.SIGINT)
        _, err = up.communicate(timeout=60)
        assert up.returncode in (130, -signal.SIGINT), err.decode()
        assert b"Traceback" not in err
        assert workspace.vm_pids() == []
    workspace("up")
    assert workspace.guest("echo fine") == "fine\n"


def test_a_hung_machine_is_ended_by_force(workspace: Workspace) -> None:
    workspace("up")
    (pid,) = workspace.vm_pids()
    os.kill(pid, signal.SIGSTOP)
    done = workspace("down", timeout_s=90)
    assert "killed" in done.stderr
    assert workspace.vm_pids() == []
    workspace("up")


def test_a_guest_that_panics_is_seen_and_shown(workspace: Workspace) -> None:
    workspace("up")
    workspace("run", "--", "sudo", "sh", "-c", "echo c > /proc/sysrq-trigger", code=None, timeout_s=60)
    _wait(lambda: workspace.status()["state"] == "stopped")
    assert "sysrq triggered crash" in workspace("logs").stdout
    workspace("up")


# Mounts, says so, and keeps the namespace until its standard input is closed.
_HOLD = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo ready && exec cat'


class Disk:
    """A small disk of the test's own, mounted in a mount namespace that only the test's commands see."""

    def __init__(self, place: Path, size: str) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        flags = ["-m"] if os.getuid() == 0 else ["-Urm"]
        self.holder = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", _HOLD, "sh", size, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"ready\n"
        user = [] if os.getuid() == 0 else ["-U", "--preserve-credentials"]
        self.prefix = ["nsenter", "-t", str(self.holder.pid), "-m", *user, "--wd=."]

    def sh(self, script: str) -> str:
        return subprocess.run([*self.prefix, "sh", "-euc", script], check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait()


def test_a_full_host_disk_pauses_the_machine_and_loses_nothing(workspace: Workspace) -> None:
    disk = Disk(workspace.path / ".nixbox" / "machines", "40m")
    write = "dd if=/dev/urandom bs=1M count=60 status=none"
    workspace.prefix = disk.prefix
    try:
        workspace("up")
        workspace.guest("echo precious > ~/file; sync")
        writer = workspace.start(
            "run", "--", "sh", "-c", "dd if=/dev/urandom of=big bs=1M count=60; sync; sha1sum big"
        )
        _wait(lambda: workspace.status()["state"] == "io-error", 60)
        status = workspace("status")
        assert "the host's disk is full" in status.stderr
        disk.sh(f"mount -o remount,size=200m {disk.place}")
        assert "letting it go on" in workspace("up").stderr
        out, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0
        assert workspace.guest("sha1sum big") == out.decode()
        assert workspace.guest("cat ~/file") == "precious\n"

        # Stopped while it could not write: what was synced before is there after the next up.
        disk.sh(f"mount -o remount,size=120m {disk.place}; cat /dev/zero > {disk.place}/filler || true")
        stuck = workspace.start("run", "--", "sh", "-c", f"{write} of=big2; sync")
        _wait(lambda: workspace.status()["state"] == "io-error", 60)
        assert "quit" in workspace("down").stderr
        stuck.communicate(timeout=30)
        # Still full: up either works or says that the disk is full; it never harms what is there.
        full = workspace("up", code=None)
        assert full.returncode == 0 or "no space left" in full.stderr
        workspace("down")
        disk.sh(f"rm {disk.place}/filler")
        workspace("up")
        assert workspace.guest("cat ~/file; sha1sum big") == "precious\n" + out.decode()
        workspace("rm", "--yes")
        assert disk.sh(f"ls {disk.place}") == ""
    finally:
        workspace.prefix = ()
        disk.close()


def _wait(condition, timeout_s: float = 30) -> None:  # type: ignore[no-untyped-def]
    """Wait for something that another process brings about; a bound against hanging, not a timing."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
