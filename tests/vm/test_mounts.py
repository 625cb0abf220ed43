"""Directories of the host in real guests: what they are good for, and what a hostile guest does with them."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nixbox.mounts import health
from tests.vm.conftest import RESOURCES, Workspace, processes
from tests.vm.test_lifecycle import Disk

SECRET = "the-hosts-own-secret"

# try NAME COMMAND…: print the name and the exit code; everything that is tried here must fail.
# try NAME COMMAND…: print the name and the exit code; all that is tried here must fail. $W is the workspace, $R
# the read-only directory, $O the host's own directory, which lies beside the workspace there.
TRY = """
try() { name=$1; shift; timeout 20 "$@" >>/tmp/out 2>&1; echo "$name $?"; }
: "${W:=$(echo /home/*/workspace)}" "${R:=/srv/ro}"
cd /
"""
READONLY = """
try write sh -c 'echo x >'$R/file
try append sh -c 'echo x >>'$R/file
try create sh -c 'echo x >'$R/new
try mkdir mkdir $R/dir
try link ln $R/file $R/hard
try symlink ln -s x $R/soft
try chmod chmod 600 $R/file
try touch touch $R/file
try truncate truncate -s 1 $R/file
try rename mv $R/file $R/other
try delete rm $R/sub/file
try deeper rm -r $R/sub
"""
OUTSIDE = """
rm -rf $W/play; mkdir $W/play $W/play/dir; touch $W/play/program
try dotdot cat $W/../${O##*/}/secret
ln -sfn ../../${O##*/}/secret $W/play/up
try relative cat $W/play/up
ln -sfn $O/secret $W/play/absolute
try absolute cat $W/play/absolute
try hosts_link cat $W/escape
try hosts_dir cat $W/escape_dir/secret
try through cat $W/escape_dir/../${O##*/}/secret
try hardlink sh -c "ln -L $W/escape $W/play/hard && grep secret $W/play/hard"
try own_link ln $W/.nixbox/config.toml $W/play/config
try own_dir ls $W/.nixbox
try own_read cat $W/.nixbox/config.toml
try own_key cat $W/.nixbox/machines/box/ssh/user_key
try own_write sh -c 'echo x >>'$W/.nixbox/config.toml
try own_new sh -c 'echo x >'$W/.nixbox/new
try own_chmod chmod 777 $W/.nixbox
try own_move sh -c "mv -T $W/.nixbox $W/play/moved && mv -T $W/play/moved $W/.nixbox"
try own_exchange perl -e 'my ($a, $b) = @ARGV; for (1, 2) { syscall(316, -100, $a, -100, $b, 2) == 0 or exit 1 }' \\
  $W/.nixbox $W/play/dir
try own_tree rm -r $W/.nixbox
try setuid chmod 4755 $W/play/program
try setgid chmod 2755 $W/play/program
try setuid_install install -m 4755 /bin/true $W/play/installed
try setuid_create perl -e 'sysopen(F, "'$W'/play/new", 0101, 04755) or exit 1; exit(((stat F)[2] & 06000) ? 0 : 1)'
try setgid_dir mkdir -m 2755 $W/play/setgid
"""
DEVICES = """
try device mknod $W/play/device b 8 0
try zero mknod $W/play/zero c 1 5
"""
AS_ROOT = """
mount -o remount,rw /srv/ro
mount --bind /srv/ro /mnt && mount -o remount,rw,bind /mnt
try bound sh -c 'echo x >/mnt/new'
umount /mnt
umount $W/.nixbox
try own_unmounted cat $W/.nixbox/config.toml
try own_unmounted_write sh -c 'echo x >'$W/.nixbox/config.toml
mkdir -p /mnt/again; tag=$(sed -n 's/.* - virtiofs \\(nixbox-[0-9a-f]*\\) .*/\\1/p' /proc/self/mountinfo | head -n 1)
try mounted_twice mount -t virtiofs $tag /mnt/again && try own_twice cat /mnt/again/.nixbox/config.toml
umount /mnt/again
try caps setcap cap_sys_admin+ep $W/play/program
"""


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a directory: its mode and content."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }


def attempts(box: Workspace, script: str, *, root: bool) -> dict[str, int]:
    """Run what must fail in the guest: names and exit codes."""
    shell = ["sudo", "bash"] if root else ["bash"]
    out = box("run", "--no-tty", "--", *shell, "-c", TRY + script).stdout
    return {name: int(code) for name, code in (line.split() for line in out.splitlines())}


def furnish(box: Workspace) -> Path:
    """Directories of the host around the workspace; returns the one beside it that no guest is given."""
    outside = box.path.parent / f"{box.path.name}-outside"
    for directory in (outside, box.path / "sub", outside / "ro" / "sub", outside / "writable"):
        directory.mkdir(parents=True, exist_ok=True)
    (outside / "secret").write_text(SECRET)
    (outside / "ro" / "file").write_text("read me\n")
    (outside / "ro" / "sub" / "file").write_text("me too\n")
    (box.path / "hello").write_text("hello\n")
    for name, target in (("escape", outside / "secret"), ("escape_dir", outside), ("data", outside / "writable")):
        (box.path / name).unlink(missing_ok=True)
        (box.path / name).symlink_to(target)
    return outside


def mount_tables(box: Workspace) -> str:
    outside = box.path.parent / f"{box.path.name}-outside"
    return f"""
[[mounts]]
source = "."
target = "~/workspace"
[[mounts]]
source = "{outside}/ro"
target = "/srv/ro"
readonly = true
"""


def config(box: Workspace, mounts: str = "") -> str:
    return f'name = "box"\n{RESOURCES}{mount_tables(box)}{mounts}'


@pytest.fixture
def box(workspace: Workspace) -> Workspace:
    furnish(workspace)
    workspace.config(config(workspace))
    return workspace


def attack(box: Workspace, outside: Path, uid: int) -> None:
    """All that a guest may try, as its user and as root; the host looks at what came of it."""
    before = tree(outside), tree(box.path / ".nixbox" / "profiles")
    text = (box.path / ".nixbox" / "config.toml").read_text()
    for root in (False, True):
        script = f"O={outside}\n" + READONLY + OUTSIDE + DEVICES + (AS_ROOT if root else "")
        found = attempts(box, script, root=root)
        assert {name for name, code in found.items() if code == 0} <= {"mounted_twice"}, (
            found
        )  # and that is looked at
        assert not {124, 137} & set(found.values()), found
        assert (tree(outside), tree(box.path / ".nixbox" / "profiles")) == before
        assert (box.path / ".nixbox" / "config.toml").read_text() == text
        for path in (box.path / "play").rglob("*"):
            info = path.lstat()
            assert info.st_uid == uid
            assert not info.st_mode & (stat.S_ISUID | stat.S_ISGID), path
            assert not stat.S_ISBLK(info.st_mode) and info.st_rdev == 0, path
        assert SECRET not in box.guest("cat /tmp/out")
        box.guest("sudo rm -rf ~/workspace/play /tmp/out")


def test_what_is_tried_works_where_nothing_hinders_it(tmp_path: Path) -> None:
    """The same attempts on the host itself: their failure in a guest says something."""
    box = Workspace(tmp_path / "w", {})
    box.path.mkdir()
    outside = furnish(box)
    key = box.path / ".nixbox" / "machines" / "box" / "ssh" / "user_key"
    key.parent.mkdir(parents=True)
    for path in (key, box.path / ".nixbox" / "config.toml"):
        path.touch()
    script = f"W={box.path} R={outside}/ro O={outside}\n" + (TRY + READONLY + OUTSIDE).replace(
        "/tmp/out", "/dev/null"
    )
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert {line for line in out.splitlines() if not line.endswith(" 0")} == set()
    assert len(out.splitlines()) == (READONLY + OUTSIDE).count("\ntry ")


# --- what mounts are good for ---


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["restored", "cold"])
def test_a_hostile_guest_stays_in_what_it_was_given(box: Workspace, options: tuple[str, ...]) -> None:
    outside = box.path.parent / f"{box.path.name}-outside"
    said = box("up", *options)
    assert box.status()["mounts"] == [f"~/workspace is {box.path}", f"/srv/ro is {outside}/ro (read-only)"]
    assert box.guest("cat ~/workspace/hello /srv/ro/file /srv/ro/sub/file") == "hello\nread me\nme too\n", said
    # Its user is the host's, both ways, and so is everybody else.
    box.guest("echo mine >~/workspace/made; mkdir ~/workspace/dir; sudo touch ~/workspace/roots")
    box.guest("sudo install -o 4242 -g 4242 /etc/hostname ~/workspace/others")
    assert [(box.path / name).stat().st_uid for name in ("made", "dir", "roots", "others")] == [os.getuid()] * 4
    assert box.guest("stat -c %u:%g ~/workspace/hello ~/workspace/roots") == "1000:1000\n" * 2
    (box.path / "made").write_text("changed\n")
    assert box.guest("sleep 1.1; cat ~/workspace/made") == "changed\n"
    attack(box, outside, os.getuid())


def test_no_race_leads_out(box: Workspace) -> None:
    """A directory and a link to the outside change places all the time, under both names, while both are read."""
    outside = box.path.parent / f"{box.path.name}-outside"
    box("up")
    assert (box.path / "escape_dir" / "secret").read_text() == SECRET  # for the host it is a link that leads out
    out = box.guest(
        f"""
        cd ~/workspace; mkdir real; echo mine >real/secret; ln -s {outside} turn
        perl -e 'my ($a, $b, $end) = ("real", "turn", time + 8);
          while (time < $end) {{ syscall(316, -100, $a, -100, $b, 2) == 0 or die; $n++ }}
          print "turns $n\\n"' >/tmp/n &
        end=$(($(date +%s) + 8))
        while [ $(date +%s) -lt $end ]; do
          for name in real turn; do
            cat $name/secret; cat $name/../$name/secret; cat $name/../outside/secret; : >$name/planted
          done 2>/dev/null
        done | sort | uniq
        wait; cat /tmp/n
        """
    )
    lines = out.splitlines()
    assert lines[:-1] == ["mine"]
    assert int(lines[-1].split()[1]) > 100
    assert not (outside / "planted").exists()


def test_a_virtiofsd_that_was_taken_over_has_nothing(box: Workspace) -> None:
    outside = box.path.parent / f"{box.path.name}-outside"
    box("up")
    own = daemons(box)
    assert len(own) == 2
    for pid in own:
        root = Path(f"/proc/{pid}/root")
        assert {entry.name for entry in root.iterdir()} <= {"bin", "lib", "lib64", "proc", "share", "usr"}
        assert [entry.name for entry in (root / "proc").iterdir()] == ["self", "sys"] or [
            entry.name for entry in (root / "proc").iterdir()
        ] == ["sys", "self"]
        assert not (root / str(outside).lstrip("/")).exists()
        if (root / "share" / ".nixbox").exists():
            assert stat.S_IMODE((root / "share" / ".nixbox").stat().st_mode) == 0
            assert list((root / "share" / ".nixbox").iterdir()) == []
        status = Path(f"/proc/{pid}/status").read_text()
        for field, value in (("CapEff", "0" * 16), ("CapBnd", "0" * 16), ("NoNewPrivs", "1"), ("Seccomp", "2")):
            assert re.search(rf"^{field}:\s+{value}$", status, re.MULTILINE), (field, status)
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        places = {line.split()[4] for line in mounts}
        assert {place for place in places if not place.startswith(("/share", "/usr", "/proc/self"))} == {"/"}
        # No network: a namespace of its own, in which there is no device but a loopback that is down.
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in lines] == ["lo"]
        others = {Path(f"/proc/{other}/ns/net").readlink() for other in (*box.vm_pids(), os.getpid())}
        assert Path(f"/proc/{pid}/ns/net").readlink() not in others


def daemons(box: Workspace) -> list[int]:
    """The virtiofsd processes of this session's machines."""
    return box.of_session(b"virtiofsd")


def test_a_workspace_that_a_guest_makes_is_not_the_users(box: Workspace) -> None:
    box("up")
    box.guest(
        'mkdir -p ~/workspace/sub/.nixbox; echo \'mounts = [{source = "~", target = "/h"}]\' > '
        "~/workspace/sub/.nixbox/config.toml"
    )
    planted = Workspace(box.path / "sub", box.env)
    for command in ("up", "status", "config", "run"):
        said = planted(command, *(["--", "true"] if command == "run" else []), code=None)
        assert said.returncode != 0
        assert "one of them may have put it there" in said.stderr and "nixbox trust" in said.stderr
    assert "a guest that runs can write" in planted("trust", code=2).stderr
    # Trusted while no guest runs, it is hidden from the next start on.
    box("down")
    planted("trust")
    planted("config")
    box("up")
    found = attempts(box, "try read cat $W/sub/.nixbox/config.toml\ntry list ls $W/sub/.nixbox\n", root=True)
    assert 0 not in found.values()
    # One that the user makes while a guest can write there is not taken for granted either.
    own = Workspace(box.path / "mine", box.env)
    own.path.mkdir()
    own("init")
    assert "one of them may have put it there" in own("config", code=2).stderr


# --- while it runs ---


def test_directories_come_and_go_while_it_runs(box: Workspace) -> None:
    outside = box.path.parent / f"{box.path.name}-outside"
    box("up")
    assert box("mount", "data", "/srv/data").stderr == f"/srv/data is {outside}/writable\n"
    box.guest("echo x >/srv/data/new")
    assert (outside / "writable" / "new").read_text() == "x\n"
    assert "mounted at /srv/data already" in box("mount", ".", "/srv/data/", code=2).stderr
    assert box("mount", str(outside / "ro"), "~/deep/er", "--readonly").returncode == 0
    assert box.guest("stat -c %u ~/deep; cat ~/deep/er/file") == "1000\nread me\n"
    assert 0 not in attempts(box, "try write sh -c 'echo x >'$W/../deep/er/file", root=True).values()

    user = box.start("run", "--", "sh", "-c", "cd /srv/data && exec 3<new; echo ready; cat", stdin=subprocess.PIPE)
    assert user.stdout is not None and user.stdout.readline() == b"ready\n"
    assert re.search(r"in use by [0-9]+ \(sh\)", box("unmount", "/srv/data", code=1).stderr)
    assert len(daemons(box)) == 4
    box("unmount", "--force", "/srv/data")
    assert len(daemons(box)) == 3, "its process is gone, and with it all that the guest still has open"
    user.kill()
    user.communicate()
    assert "nothing is mounted at /srv/data" in box("unmount", "/srv/data").stderr
    assert "nothing is mounted at /nowhere" in box("unmount", "/nowhere").stderr
    assert box("mount", "nothing", "/srv/data", code=2).stderr.count("is not there") == 1
    assert "cannot mount" in box("mount", ".", "/etc/passwd", code=2).stderr
    assert len(daemons(box)) == 3

    box("mount", "sub", "~/deep/er/sub")
    assert "is mounted inside" in box("unmount", "~/deep/er", code=2).stderr
    box("unmount", "~/deep/er/sub")
    for _ in range(4):
        box("mount", "data", "/srv/data")
        assert box.guest("cat /srv/data/new") == "x\n"
        box("unmount", "/srv/data")
    # What was added is there at the next start too, and what was taken away is not.
    box("down")
    box("up")
    assert box.guest("cat ~/deep/er/file; ls /srv/data") == "read me\n"
    # The config of a running machine is followed.
    box.config(config(box, mounts='[[mounts]]\nsource = "data"\ntarget = "/srv/data"\n'))
    said = box("up").stderr
    assert f"/srv/data is {outside}/writable ({box.path}/data leads there)" in said
    assert f"{outside}/writable is mounted at /srv/data" in said
    assert box.guest("cat /srv/data/new") == "x\n"
    assert len(daemons(box)) == 4
    box("down")
    assert daemons(box) == []


def test_a_machine_without_mounts_keeps_its_memory_to_itself(workspace: Workspace) -> None:
    workspace("up")
    said = workspace("mount", ".", "/srv/x", code=2).stderr
    assert "was started without any mount" in said and "[[mounts]]" in said


def test_copies_and_saved_machines_have_them_again(box: Workspace) -> None:
    box("up")
    box.guest("echo here >/dev/shm/file")
    box("suspend")
    assert daemons(box) == []
    (box.path / "hello").write_text("changed meanwhile\n")
    assert json.loads(box("up", "--json").stdout)["how"] == "resumed"
    assert box.guest("cat /dev/shm/file ~/workspace/hello") == "here\nchanged meanwhile\n"
    session = box.start(
        "run", "--", "sh", "-c", "echo ready; read line; cat ~/workspace/hello", stdin=subprocess.PIPE
    )
    assert session.stdout is not None and session.stdin is not None and session.stdout.readline() == b"ready\n"
    assert box("fork", "--count", "2").stdout == "box-1\nbox-2\n"
    assert session.communicate(b"\n", timeout=60)[0] == b"changed meanwhile\n", "sessions of the parent go on"
    for name in ("box", "box-1", "box-2"):
        box("run", "-m", name, "--", "sh", "-c", f"echo {name} >~/workspace/{name}; cat /srv/ro/file")
        assert (box.path / name).read_text() == f"{name}\n"
    assert len(daemons(box)) == 6

    # What was in the memory of a suspended machine is worth more than a directory that cannot be mounted.
    box("suspend")
    (box.path / "data").unlink()
    (box.path / "data").mkdir()
    box.config(config(box, mounts='[[mounts]]\nsource = "data"\ntarget = "/etc/passwd"\n'))
    done = box("up", "--json")
    assert json.loads(done.stdout)["how"] == "resumed"
    assert "warning: the guest cannot mount" in done.stderr and "/etc/passwd" in done.stderr
    assert box.guest("cat /dev/shm/file ~/workspace/hello") == "here\nchanged meanwhile\n"


# --- what breaks ---


def test_what_breaks_gives_errors_and_is_healed(box: Workspace) -> None:
    outside = box.path.parent / f"{box.path.name}-outside"
    box.config(config(box, mounts=f'[[mounts]]\nsource = "{outside}/writable"\ntarget = "/srv/data"\n'))
    box("up")
    busy = "while cat ~/workspace/hello >/dev/null; do :; done"
    readers = [box.start("run", "--", "sh", "-c", busy) for _ in range(3)]
    time.sleep(2)
    for pid in daemons(box):
        os.kill(pid, signal.SIGKILL)
    for reader in readers:
        _, err = reader.communicate(timeout=30)
        assert b"Input/output error" in err, err
    for line in box.status()["mounts"]:
        assert "its process has ended; `nixbox up` mounts it again" in line
    began = time.monotonic()
    assert (
        0
        not in attempts(box, "try read cat $W/hello\ntry write touch $W/new\ntry ro ls /srv/ro\n", root=True).values()
    )
    assert time.monotonic() - began < 20, "an error, and no wait"
    assert box("up").stderr.count("is mounted again at") == 3
    assert box.guest("cat ~/workspace/hello /srv/ro/file") == "hello\nread me\n"
    assert len(daemons(box)) == 3

    # A directory that goes, and comes back as another one.
    (outside / "writable" / "old").write_text("old\n")
    box.guest("cat /srv/data/old")
    (outside / "writable").rename(outside / "away")
    for path in (outside / "away").iterdir():
        path.unlink()
    (outside / "away").rmdir()
    found = attempts(box, "try read cat /srv/data/old\ntry write sh -c 'echo x >/srv/data/new'\n", root=False)
    assert 0 not in found.values() and 124 not in found.values()
    assert any("cannot be reached" in line for line in box.status()["mounts"])
    (outside / "writable").mkdir()
    (outside / "writable" / "old").write_text("another\n")
    assert any("was replaced" in line for line in box.status()["mounts"])
    assert "was replaced" in box("up").stderr
    assert box.guest("cat /srv/data/old") == "another\n"

    # The guard of its network is killed: nothing that is mounted notices, and its successor watches again.
    for pid in processes(b"nixbox-guard-box"):
        if Path(f"/proc/{pid}/cwd").exists() and os.fsencode(box.env["XDG_RUNTIME_DIR"]) in _environ(pid):
            os.kill(pid, signal.SIGKILL)
    assert box.guest("cat ~/workspace/hello") == "hello\n"
    box("up")
    for pid in daemons(box):
        os.kill(pid, signal.SIGKILL)
    assert 0 not in attempts(box, "try read cat $W/hello\n", root=False).values()
    box("up")
    assert box.guest("cat ~/workspace/hello") == "hello\n"


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_a_full_host_disk_is_an_error_for_the_guest(box: Workspace) -> None:
    outside = box.path.parent / f"{box.path.name}-outside"
    disk = Disk(outside / "small", "8m")
    box.config(config(box, mounts=f'[[mounts]]\nsource = "{outside}/small"\ntarget = "/srv/small"\n'))
    box.prefix = disk.prefix
    try:
        box("up")
        said = box("run", "--", "dd", "if=/dev/zero", "of=/srv/small/big", "bs=1M", "count=20", code=1)
        assert "No space left on device" in said.stderr
        assert box.status()["state"] == "running"
        assert box.guest("rm /srv/small/big; echo fits >/srv/small/small; cat /srv/small/small") == "fits\n"
        box("rm", "--yes")
    finally:
        box.prefix = ()
        disk.close()


def test_many_files_are_within_its_limit(box: Workspace) -> None:
    many = box.path / "many"
    many.mkdir()
    for i in range(3000):
        (many / str(i)).touch()
    box.prefix = ["sh", "-c", 'ulimit -Sn 1024; exec "$@"', "sh"]
    box("up")
    assert (
        box.guest("find ~/workspace/many -type f -size -1 | wc -l; ls -l ~/workspace/many | wc -l") == "3000\n3001\n"
    )
    assert max(map(health.descriptors, daemons(box))) > 3000
    (box.path / "node_modules").mkdir()
    box.config(config(box, mounts='[[mounts]]\nsource = "node_modules"\ntarget = "/srv/m"\n'))
    assert "looks like a cache" in box("doctor").stdout


def test_a_start_that_is_killed_leaves_nothing_behind(box: Workspace) -> None:
    before = set(processes(b"virtiofsd", b"/share"))
    box("up")
    box("down")
    for delay_s in (0.15, 0.2, 0.25, 0.3, 0.4):
        process = box.start("up")
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    box("up")
    assert box.guest("cat ~/workspace/hello") == "hello\n"
    box("rm", "--yes")
    _until(lambda: set(processes(b"virtiofsd", b"/share")) <= before)


def _until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_cannot_be_mounted_is_refused_before_anything_starts(box: Workspace) -> None:
    box.config(
        config(
            box,
            mounts='[[mounts]]\nsource = "nowhere"\ntarget = "/srv/x"\n'
            '[[mounts]]\nsource = "hello"\ntarget = "/sys/x"\n',
        )
    )
    said = box("up", code=2).stderr
    assert "mounts[2].source: `nowhere` is not there" in said and "mounts[3].target: `/sys/x`" in said
    box.config(config(box, mounts='[[mounts]]\nsource = "sub"\ntarget = "/etc/passwd"\n'))
    said = box("up", code=2).stderr
    assert "cannot mount" in said and "/etc/passwd" in said
    assert box.vm_pids() == [] and daemons(box) == []
    box.config(config(box))
    box.extra["NIXBOX_VIRTIOFSD"] = "/bin/true"
    assert "too old" in box("up", code=3).stderr
    assert box.vm_pids() == []
