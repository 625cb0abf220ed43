"""Restore instead of boot: what a template holds and does not hold, and that a bad one harms nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import RESOURCES, Home, Workspace

CONFIG = f'name = "box"\nmounts = []\n{RESOURCES}'
IDENTITY = "hostname; cat /etc/hostname /etc/machine-id; sudo cat /run/nixbox/ssh/host_key | sha256sum"


@pytest.fixture
def templates(home: Home) -> Path:
    """The session's template directory."""
    return home.path / ".cache/nixbox/templates"


@pytest.fixture
def own_cache(workspace: Workspace, home: Home) -> Iterator[Path]:
    """A cache directory of the test's own that shares the built image; returns its template directory."""
    cache = workspace.path / "cache"
    (cache / "nixbox").mkdir(parents=True)
    for name in ("images", "downloads", "kvm.json"):
        place = home.path / ".cache/nixbox" / name
        if place.exists():
            (cache / "nixbox" / name).symlink_to(place)
    workspace.extra["XDG_CACHE_HOME"] = str(cache)
    yield cache / "nixbox/templates"
    assert not list((cache / "nixbox/templates").glob(".new-*")), "a half-made template was left behind"


def up(box: Workspace, *args: str, **options: Any) -> dict[str, Any]:
    """`nixbox up --json`."""
    done: dict[str, Any] = json.loads(box("up", "--json", *args, **options).stdout)
    return done


def published(directory: Path) -> dict[str, Path]:
    """Stage to directory of every template."""
    found = {}
    for manifest in directory.glob("[0-9a-f]*/template.json"):
        found[json.loads(manifest.read_text())["stage"]] = manifest.parent
    return found


def test_a_new_machine_is_restored_and_an_old_one_keeps_its_disk(workspace: Workspace, own_cache: Path) -> None:
    first = up(workspace)
    assert (first["how"], first["template"], first["made"]) == ("restored", "ready", True)
    assert {"boot", "ready"} == set(published(own_cache))
    workspace.guest("echo mine > ~/file; sudo apt-get -qq update; sudo apt-get -qq install -y tree >/dev/null 2>&1")
    before = workspace.guest(IDENTITY)
    workspace("down")

    again = up(workspace)
    assert (again["how"], again["template"], again["made"]) == ("restored", "boot", False)
    assert workspace.guest("cat ~/file") == "mine\n" and "tree v" in workspace.guest("tree --version")
    assert workspace.guest(IDENTITY) == before

    other = up(workspace, "other")
    assert (other["how"], other["template"], other["made"]) == ("restored", "ready", False)
    guest = workspace("run", "-m", "other", "--", "sh", "-c", f"ls -A ~; {IDENTITY}").stdout
    assert "file" not in guest.split("\n")
    assert not set(guest.split()[-5:]) & set(before.split()) - {"-"}
    assert set(other["phases"]) >= {"config", "lock", "build", "restore", "go", "ssh", "scripts"}

    cold = up(workspace, "third", "--cold")
    assert (cold["how"], cold["template"]) == ("booted", None)
    timeline = workspace("up", "fourth", "--timings").stderr
    assert all(word in timeline for word in ("restore", "go", "total"))
    listed = json.loads(workspace("template", "list", "--json").stdout)
    assert [info["stage"] for info in listed] == ["ready", "boot"] and all(not info["damage"] for info in listed)


def test_no_secret_and_no_identity_is_in_a_template(workspace: Workspace, own_cache: Path) -> None:
    secret = "planted-" + os.urandom(12).hex()
    name = "m" + os.urandom(6).hex()
    env = f'[env]\nTOKEN = "{secret}"\nHOSTS = {{ from_host = "NIXBOX_TEST_SECRET" }}\n'
    workspace.config(f'name = "{name}"\nmounts = []\nprofile = "dev"\n{RESOURCES}{env}', 'setup = "env > ~/seen"\n')
    workspace.extra["NIXBOX_TEST_SECRET"] = secret + "-from-host"
    assert up(workspace)["made"] is True
    assert workspace.guest("printenv TOKEN HOSTS").split() == [secret, secret + "-from-host"]
    assert secret not in workspace.guest("cat ~/seen"), "a shared setup sees no environment"
    machine = workspace.machine(name)
    record = json.loads((machine / "machine.json").read_text())
    key = (machine / "ssh/host_key").read_text().splitlines()[2]
    public = (machine / "ssh/user_key.pub").read_text().split()[1]
    found = published(own_cache)
    assert set(found) == {"boot", "ready"}
    for directory in found.values():
        assert directory.stat().st_mode & 0o077 == 0
        for file in directory.iterdir():
            data = file.read_bytes()
            for planted in (secret, name, record["machine_id"], key, public):
                assert planted.encode() not in data, f"{planted} is in {file}"


def damage(directory: Path, how: str) -> None:
    memory = directory / "memory"
    if how == "truncated":
        os.truncate(memory, memory.stat().st_size // 2)
    elif how == "a changed byte":
        before = memory.stat()
        with memory.open("r+b") as file:
            file.seek(100 << 20)
            file.write(b"\xff" * 64)
        os.utime(memory, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "half written":
        (directory / "files.json").unlink()
    elif how == "another state":
        (directory / "state").write_bytes(b"QEVM" + b"\0" * 5000)
    elif how == "another manifest":
        manifest = json.loads((directory / "template.json").read_text())
        (directory / "template.json").write_text(json.dumps(manifest | {"hypervisor": "QEMU emulator version 1"}))
    elif how == "another disk":
        os.truncate(directory / "overlay.img", 1 << 20)


def test_a_bad_template_is_said_removed_and_made_again(workspace: Workspace, own_cache: Path) -> None:
    up(workspace)
    for how in ("truncated", "a changed byte", "half written", "another state", "another manifest", "another disk"):
        damage(
            published(own_cache)["ready"] if how != "half written" else sorted(own_cache.glob("[0-9a-f]*/"))[0], how
        )
        listed = json.loads(workspace("template", "list", "--json").stdout)
        assert sum(bool(info["damage"]) for info in listed) == 1, how
        done = workspace("up", "--json", "new")
        if json.loads(done.stdout)["made"]:
            assert "a template is damaged" in done.stderr, how
        assert json.loads(done.stdout)["how"] == "restored"
        assert workspace("run", "-m", "new", "--", "hostname").stdout == "new\n"
        workspace("rm", "--yes", "new")
        workspace("template", "gc")

    # One that passes every check and yet cannot be restored: it goes, and the machine boots.
    directory = published(own_cache)["ready"]
    state = (directory / "state").read_bytes()
    (directory / "state").write_bytes(state[: len(state) // 2])
    from nixbox.machine import saved

    saved.seal(directory, ["memory", "state", "overlay.img", "template.json"])
    mount = '[[mounts]]\nsource = "."\ntarget = "~/workspace"\n'  # what was begun for the restore is begun again
    workspace.config(CONFIG.replace("mounts = []\n", "") + mount)
    done = workspace("up", "--json", "new")
    assert json.loads(done.stdout)["how"] == "booted" and "the template does not work" in done.stderr
    assert (
        workspace("run", "-m", "new", "--", "ls", "workspace/.nixbox", code=2).stderr.count("Permission denied") == 1
    )
    assert "ready" not in published(own_cache)
    assert workspace("run", "-m", "new", "--", "hostname").stdout == "new\n"


def test_two_ups_at_once_make_one_template(workspace: Workspace, own_cache: Path) -> None:
    ups = [workspace.start("up", "--json", name) for name in ("one", "two", "three")]
    done = [process.communicate(timeout=400) for process in ups]
    assert [process.returncode for process in ups] == [0, 0, 0], done
    assert sorted(json.loads(out)["made"] for out, _ in done) == [False, False, True]
    assert sum(b"is making the template; waiting" in err for _, err in done) == 2
    assert len(list(own_cache.glob("[0-9a-f]*/"))) == 2


def test_a_limit_keeps_the_last_used(workspace: Workspace, own_cache: Path, home: Home) -> None:
    workspace.extra["XDG_CONFIG_HOME"] = str(workspace.path / "config")
    settings = workspace.path / "config/nixbox/settings.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text('[templates]\nlimit = "1 apple"\nmore = 1\n')
    refused = workspace("up", code=2)
    assert "settings.toml" in refused.stderr and "templates.limit" in refused.stderr and "more" in refused.stderr
    settings.write_text('[templates]\nlimit = "250MiB"\n')
    up(workspace)
    first = published(own_cache)
    up(workspace, "other", "--memory", "352MiB")  # its two do not fit beside the first two
    left = {info["memory_mib"] for info in json.loads(workspace("template", "list", "--json").stdout)}
    assert 352 in left and sum(file.exists() for file in first.values()) < 2
    dry = workspace("template", "gc", "--all", "--dry-run").stdout
    assert dry and list(own_cache.glob("[0-9a-f]*/"))
    (name, *_) = [info["ident"] for info in json.loads(workspace("template", "list", "--json").stdout)]
    workspace("template", "rm", name[:8])
    assert "no template's name begins with" in workspace("template", "rm", name[:8], code=1).stderr
    workspace("template", "gc", "--all")
    assert not list(own_cache.glob("[0-9a-f]*/"))
    assert workspace.guest("hostname") == "box\n", "a machine does not notice that its template went"


def test_a_setup_is_part_of_the_template(workspace: Workspace) -> None:
    setup = 'setup = "echo set up; echo once >> ~/runs; (sleep 999 &)"\n'
    workspace.config(f'{CONFIG}profile = "dev"\n'.replace(RESOURCES, "") + RESOURCES, setup)
    first = workspace("up", "--json")
    assert "set up" in first.stderr and json.loads(first.stdout)["setup"] == "ran"
    assert "set up" in workspace("logs", "--setup").stdout
    second = workspace("up", "--json", "other")
    assert "set up" not in second.stderr and json.loads(second.stdout)["setup"] == "done before"
    assert workspace("run", "-m", "other", "--", "cat", "runs").stdout == "once\n"
    assert "sleep" not in workspace("run", "-m", "other", "--", "ps", "-e").stdout, "nobody's processes"

    # One that needs the environment runs on each new machine instead.
    needy = 'setup = "test $TOKEN = yes && echo $(hostname) >> ~/runs"\n'
    config = f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}[env]\nTOKEN = "yes"\n'
    workspace.config(config, needy)
    refused = workspace("up", "third", code=1)
    assert "setup failed with exit code" in refused.stderr and "setup_env" in refused.stderr
    assert workspace("run", "-m", "third", "--", "hostname").stdout == "third\n", "it is up, to look around"
    workspace.config(config, needy + "setup_env = true\n")
    workspace("up", "fourth")
    assert workspace("run", "-m", "fourth", "--", "cat", "runs").stdout == "fourth\n"


def test_twenty_machines_from_one_template_are_twenty(workspace: Workspace) -> None:
    up(workspace)
    names = workspace("fork", "many", "--count", "20", timeout_s=600).stdout.split()
    assert names == [f"many-{number}" for number in range(1, 21)]
    script = (
        "hostname; cat /etc/machine-id; sudo sha256sum /run/nixbox/ssh/host_key | cut -d' ' -f1; "
        "head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' '; cat /proc/sys/kernel/random/uuid"
    )
    answers = [workspace("run", "-m", name, "--", "sh", "-c", script).stdout.split() for name in names]
    assert [answer[0] for answer in answers] == names
    for what in range(5):
        assert len({answer[what] for answer in answers}) == 20, what
    pids = workspace.vm_pids()
    assert len(pids) == 21
    fields = [dict(line.split(":", 1) for line in _rollup(pid)) for pid in pids]
    taken = sum(int(field["Pss"].split()[0]) for field in fields)
    assert taken < 4 << 20, f"{taken >> 10} MiB for 21 machines"


def _rollup(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]


def _state(box: Workspace) -> tuple[set[str], set[str], set[int], int]:
    """What a run could leave behind: files, sockets, processes that name the session's home, shared memory (KiB)."""
    home = Path(box.env["HOME"])
    files = {str(path) for place in (box.path, home / ".cache/nixbox/templates") for path in place.rglob("*")}
    sockets = {str(path) for path in Path(box.env["XDG_RUNTIME_DIR"]).rglob("*")}
    shared = next(int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("Shmem:"))
    return files, sockets, set(_naming(str(home))), shared


def _naming(text: str) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                yield int(process.name)
        except OSError:
            continue


def test_two_hundred_ephemeral_runs_leave_nothing(workspace: Workspace) -> None:
    assert workspace("run", "--ephemeral", "--", "sh", "-c", "hostname; exit 7", code=7).stdout.startswith("run-")
    files, sockets, processes, shared = _state(workspace)
    for number in range(200):
        done = workspace("run", "--ephemeral", "--no-tty", "--", "echo", str(number))
        assert (done.stdout, done.stderr) == (f"{number}\n", "")
    now = _state(workspace)
    assert now[0] == files and now[1] == sockets and now[2] == processes
    assert abs(now[3] - shared) < 64 << 10, "KiB of shared memory"


def test_kill_9_of_an_ephemeral_run_leaves_nothing_for_long(workspace: Workspace) -> None:
    workspace("run", "--ephemeral", "--", "true")
    before = _state(workspace)
    for delay_s in (0.15, 0.25, 0.35, 0.5, 0.7):
        process = workspace.start("run", "--ephemeral", "--", "sleep", "60")
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 20
    while workspace.vm_pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workspace.vm_pids() == [], "the VM ends with the command"
    assert workspace("run", "--ephemeral", "--", "echo", "fine").stdout == "fine\n"
    now = _state(workspace)
    assert now[0] == before[0]
    shutil.rmtree(Path(workspace.env["XDG_RUNTIME_DIR"]) / "nixbox", ignore_errors=False)
    (Path(workspace.env["XDG_RUNTIME_DIR"]) / "nixbox").mkdir(mode=0o700)


def test_ctrl_c_of_an_ephemeral_run(workspace: Workspace) -> None:
    workspace("run", "--ephemeral", "--", "true")
    process = workspace.start("run", "--ephemeral", "--no-tty", "--", "sh", "-c", "echo up; sleep 60")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert workspace.vm_pids() == [] and not list((workspace.path / ".nixbox/machines").glob("*"))


def test_kill_9_while_a_template_is_made(workspace: Workspace, own_cache: Path) -> None:
    for delay_s in (1.0, 3.0, 4.5, 5.5, 6.5):
        process = workspace.start("up")
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    done = workspace("up", "--json")
    assert workspace.guest("hostname") == "box\n", done.stderr
    assert not list(own_cache.glob(".new-*"))
    assert all(not info["damage"] for info in json.loads(workspace("template", "list", "--json").stdout))
    assert len(workspace.vm_pids()) == 1
