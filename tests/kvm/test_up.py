"""nixbox on a host whose KVM runs guests: the machine's whole life, from the image that runs under TCG elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.kvm.box import Box, Done
from tests.vm.conftest import Home

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = 'name = "box"\nmounts = []\n[resources]\nvcpus = 1\nmemory = "320MiB"\ndisk = "1GiB"\n'


def nixbox(box: Box, home: Home, workspace: Path, *args: str, code: int = 0) -> Done:
    """A nixbox command in the box, with the session's home, which the box sees but does not change."""
    kept = ("HOME", "XDG_RUNTIME_DIR", "PATH", "LC_ALL", "PYTHONDONTWRITEBYTECODE")
    env = {name: home.env[name] for name in kept if name in home.env} | {"PYTHONPATH": str(CHECKOUT)}
    done = box.run([sys.executable, "-m", "nixbox", *args], cwd=str(workspace), env=env, timeout_s=300)
    assert done.code == code, f"nixbox {args}: {done.code}\n{done.stdout}\n{done.stderr}"
    return done


def test_a_machines_life_under_kvm(box: Box, home: Home) -> None:
    workspace = home.path / "kvm"
    (workspace / ".nixbox").mkdir(parents=True)
    try:
        (workspace / ".nixbox/config.toml").write_text(CONFIG)
        (workspace / ".nixbox/nixbox.lock").write_text(home.lock)

        def up(how: str) -> None:
            done = json.loads(nixbox(box, home, workspace, "up", "--json").stdout)
            assert (done["how"], done["accelerator"]) == (how, "kvm"), done

        def guest(script: str) -> str:
            return nixbox(box, home, workspace, "run", "--no-tty", "--", "sh", "-euc", script).stdout

        up("restored")
        assert guest("cat /proc/sys/kernel/randomize_va_space; echo mine >~/file; sync") == "2\n"
        nixbox(box, home, workspace, "down")
        up("restored")
        assert guest("cat ~/file; echo here >/dev/shm/file") == "mine\n"
        nixbox(box, home, workspace, "suspend")
        up("resumed")
        assert guest("cat /dev/shm/file") == "here\n"
        pid = json.loads((nixbox(box, home, workspace, "status", "--json")).stdout)["pid"]
        assert box.run(["kill", "-9", str(pid)]).code == 0
        nixbox(box, home, workspace, "run", "true", code=125)
        up("restored")
        assert guest("cat ~/file") == "mine\n"
        nixbox(box, home, workspace, "down")
    finally:
        shutil.rmtree(workspace)
