"""A variable's value is in the guest that it is for, and nowhere else."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from nixbox.image import store
from tests.vm.conftest import RESOURCES, Home, Workspace

PLANTED = "s3cr3t-" + "b7d41e0f9a"  # in no file of this repository in one piece


def config(env: str) -> str:
    return f'name = "box"\n{RESOURCES}[[mounts]]\nsource = "."\ntarget = "~/workspace"\n[env]\n{env}'


def holding(value: bytes, files: Iterable[Path]) -> list[Path]:
    """Those of the files that hold it."""
    found = []
    for path in files:
        try:
            if not path.is_file() or path.stat().st_size == 0:
                continue
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                if data.find(value) >= 0:
                    found.append(path)
        except FileNotFoundError:  # a log that was rotated, a socket
            continue
    return found


def processes_with(value: bytes) -> list[str]:
    """Processes of the host, this one apart, whose command line or environment holds it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        for name in ("cmdline", "environ"):
            try:
                if value in (process / name).read_bytes():
                    found.append(f"{process / name}: {(process / 'cmdline').read_bytes()[:200]!r}")
            except OSError:
                continue
    return found


def image_files(box: Workspace) -> Iterator[Path]:
    image = Path(box.status()["image"])
    for name in ("vmlinux", "initrd", "root.img", "image.json"):
        yield store.physical(image / name)


def files_of_the_host(box: Workspace, home: Home) -> list[Path]:
    """All that nixbox has written, but the sources of the value themselves."""
    found = [path for path in home.path.rglob("*") if not path.is_symlink()]
    return [path for path in found if path != box.path / ".nixbox" / "config.toml"]


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["restored", "cold"])
def test_a_value_is_where_it_belongs_and_nowhere_else(
    workspace: Workspace, home: Home, options: tuple[str, ...]
) -> None:
    value = PLANTED.encode()
    workspace.config(config('TOKEN = { from_host = "HOST_TOKEN" }\n'))
    workspace.extra["HOST_TOKEN"] = PLANTED
    workspace("up", *options, "--timings")
    workspace("env", "push")
    del workspace.extra["HOST_TOKEN"]
    assert workspace.guest("echo $TOKEN; sync") == f"{PLANTED}\n"

    # The search finds it where it has to be: in a file of the guest's memory alone.
    search = 'sudo grep -rlsF --exclude-dir=proc --exclude-dir=sys -e "$TOKEN" / 2>/dev/null || :'
    assert workspace.guest(search).split() == ["/run/nixbox/env"]
    assert workspace.guest("stat -f -c %T /run/nixbox/env; stat -c %a /run/nixbox/env") == "tmpfs\n600\n"
    assert PLANTED not in workspace.guest("cat /proc/cmdline; sudo dmesg")
    in_guest = 'sudo grep -lsF -e "$TOKEN" /proc/[0-9]*/cmdline || :'
    assert [line for line in workspace.guest(in_guest).split() if "self" not in line] == []

    # The host: image, templates, disks, records, logs, sockets' directory, command lines and environments.
    assert holding(value, image_files(workspace)) == []
    assert holding(value, files_of_the_host(workspace, home)) == []
    assert processes_with(value) == []
    for command in (("status", "--json"), ("env", "list"), ("logs",), ("config",), ("net", "log")):
        assert PLANTED not in workspace(*command, code=None).stdout
    listed = workspace("env", "list", "--json").stdout
    assert "TOKEN" in listed

    # Another machine of the same workspace, which is asked for without it.
    workspace.config(config(""))
    workspace("up", "other")
    found = workspace(
        "run", "-m", "other", "--", "sh", "-c", f"env; sudo grep -rsF {PLANTED[:6]} /run/nixbox", code=None
    )
    assert PLANTED not in found.stdout
    memory = [pid for pid in workspace.vm_pids() if b"nixbox-other" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(memory) == 1
    assert not in_memory(memory[0], value)

    # Taken out of the config, it goes from the guest that has it.
    workspace("up")
    assert workspace.guest('echo "[${TOKEN-}]"; sudo cat /run/nixbox/env') == "[]\n\n"


def in_memory(pid: int, value: bytes) -> bool:
    """Whether a process has it in its memory: the guest's is part of it."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if "r" not in rights or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            tail = b""
            for at in range(start, end, 1 << 22):
                try:
                    memory.seek(at)
                    data = memory.read(min(1 << 22, end - at))
                except OSError:
                    break
                if value in tail + data:
                    return True
                tail = data[-len(value) :]
    return False


def test_the_search_through_memory_finds_it_where_it_is(workspace: Workspace) -> None:
    workspace.config(config(f'TOKEN = "{PLANTED}"\n'))
    workspace("up")
    (pid,) = workspace.vm_pids()
    assert in_memory(pid, PLANTED.encode())
    # A value in the config is where the user wrote it, and the guest cannot read that.
    assert json.loads(workspace("env", "list", "--json").stdout)
    assert workspace("run", "--", "cat", "workspace/.nixbox/config.toml", code=1).stdout == ""
