"""What else starts microVMs and comes from PyPI, each in a KVM host of its own, with the root of nixbox's image.

Their own images come from registries; both take a directory as well. Each has a box to itself: nixbox was seen to
start half as fast in one where they had run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kvm.box import Box, BoxError, Done

VERSIONS = ("microsandbox==0.7.11", "smolmachines==1.32.2")
LIMIT_S = 300.0
_SMOL = """
import json, os, sys, time
ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
sys.path.insert(0, sys.argv[1])
from smol import ConnectOptions, Machine, MachineConfig, ResourceSpec
now = time.monotonic()
resources = ResourceSpec(cpus=int(sys.argv[3]), memory_mb=int(sys.argv[4]))
machine = Machine.create(MachineConfig(image=sys.argv[2], resources=resources), ConnectOptions(target="local"))
assert machine.exec(["true"]).exit_code == 0
end = time.monotonic()
print(json.dumps([time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), end - now]))
machine.delete()
"""


class CannotRun(Exception):
    """A peer does not run here; in its own words."""


def prepare(directory: Path, root: Path) -> None:
    """Install the peers and unpack nixbox's root image (EROFS). Raises CalledProcessError."""
    if not directory.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(directory / "packages"), *VERSIONS], check=True)
        subprocess.run(["fsck.erofs", f"--extract={directory / 'root'}", str(root)], check=True, capture_output=True)


def _run(box: Box, argv: list[str], **more: str) -> Done:
    env = {"HOME": "/tmp/peer", "MSB_HOME": "/tmp/peer/msb", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | more
    try:
        done = box.run(argv, env=env, timeout_s=LIMIT_S)
    except BoxError as error:
        raise CannotRun(str(error).splitlines()[0]) from None
    if done.code != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise CannotRun(" ".join(said[-3:]) or f"exit code {done.code}")
    return done


def smolmachines(box: Box, directory: Path, vcpus: int, memory_mib: int) -> tuple[float, float]:
    """Seconds to its first command's exit: from the start of Python, and from the call that makes the machine."""
    # Each of its machines is another user's, who has to open /dev/kvm (as udev lets everybody) and its libraries: not
    # below a directory that is this user's alone.
    there = """chmod 0666 /dev/kvm
    for name in packages root; do
      mkdir -p /tmp/peer/$name
      mountpoint -q /tmp/peer/$name || mount --bind "$0/$name" /tmp/peer/$name
    done"""
    _run(box, ["sh", "-euc", there, str(directory)])
    program = [sys.executable, "-I", "-S", "-c", _SMOL, "/tmp/peer/packages", "/tmp/peer/root"]
    whole, start = json.loads(_run(box, [*program, str(vcpus), str(memory_mib)]).stdout)
    return whole, start


def microsandbox(box: Box, directory: Path, vcpus: int, memory_mib: int) -> tuple[float, float]:
    """Seconds of its program's whole run with one command, twice: it is no Python, and its end is part of it."""
    if not (box.work / "root").exists():
        # It wants extended attributes of the user's below its machines and on the root: the box's tmpfs has none, the
        # shared directory has; its database again cannot be there.
        shutil.copytree(directory / "root", box.work / "root", symlinks=True)
        (box.work / "machines").mkdir()
        there = "/tmp/peer/msb/sandboxes"
        _run(box, ["sh", "-euc", f"mkdir -p {there}; mount --bind /box/machines {there}; chmod 0666 /dev/kvm"])
    program = directory / "packages" / "microsandbox" / "_bundled" / "bin" / "msb"
    options = ["--no-tty", "--no-stdin", "--cpus", str(vcpus), "--memory", f"{memory_mib}M"]
    seconds = _run(box, [str(program), "run", *options, "/box/root", "--", "true"]).seconds
    return seconds, seconds
