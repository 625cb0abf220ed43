"""nixbox with cloud-hypervisor on a host whose KVM runs guests: the machine's whole life."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.kvm.box import Box
from tests.vm.conftest import Home

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = 'name = "box"\nmounts = []\n[resources]\nvcpus = 1\nmemory = "320MiB"\ndisk = "1GiB"\n'
KEPT = ("HOME", "XDG_RUNTIME_DIR", "PATH", "LC_ALL", "PYTHONDONTWRITEBYTECODE")


@pytest.mark.skipif(
    shutil.which("cloud-hypervisor") is None,
    reason="no cloud-hypervisor on PATH: this one test needs it",
)
def test_a_machines_life_with_cloud_hypervisor(box: Box, home: Home) -> None:
    workspace = home.path / "cloud"
    (workspace / ".nixbox").mkdir(parents=True)
    env = {name: home.env[name] for name in KEPT if name in home.env} | {"PYTHONPATH": str(CHECKOUT)}

    def nixbox(*args: str, code: int = 0) -> str:
        argv = [sys.executable, "-m", "nixbox", *args]
        done = box.run(argv, cwd=str(workspace), env=env, timeout_s=300)
        assert done.code == code, f"{shlex.join(argv)}: {done.code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def up() -> None:
        done = json.loads(nixbox("up", "--backend", "cloud-hypervisor", "--json"))
        assert (done["how"], done["accelerator"]) == ("booted", "kvm"), done

    def guest(script: str) -> str:
        return nixbox("run", "--no-tty", "--", "sh", "-euc", script)

    try:
        (workspace / ".nixbox/config.toml").write_text(CONFIG)
        (workspace / ".nixbox/nixbox.lock").write_text(home.lock)
        up()
        assert guest("cat /proc/sys/kernel/randomize_va_space; echo mine >~/file; sync") == "2\n"
        nixbox("down")
        up()
        assert guest("cat ~/file") == "mine\n"
        pid = json.loads(nixbox("status", "--json"))["pid"]
        assert box.run(["kill", "-9", str(pid)]).code == 0
        nixbox("run", "true", code=125)
        up()
        assert guest("cat ~/file") == "mine\n"
        nixbox("down")
    finally:
        shutil.rmtree(workspace)
