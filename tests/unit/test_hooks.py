"""Hooks: real shells on this host, what they are told, and what their failure means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nixbox.config.settings import Hook, Loaded, Used
from nixbox.errors import ConfigError, NixboxError
from nixbox.machine.record import MachineDir
from nixbox.report import Reporter
from nixbox.session import hooks, which

HANG_S = 30.0


class Notes(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def loaded(workspace: Path, *post_up: Hook, plugin: Path | None = None) -> Loaded:
    from nixbox.config import load

    (workspace / ".nixbox").mkdir(exist_ok=True)
    (workspace / ".nixbox/config.toml").write_text("")
    made = load.load(workspace)
    settings = replace(made.settings, hooks={**made.settings.hooks, "post-up": post_up})
    used = (Used("warm", "warm", plugin, plugin),) if plugin else ()
    return Loaded(made.workspace, settings, made.origins, made.files, plugins=used)


def run(tmp_path: Path, *post_up: Hook, plugin: Path | None = None, **also: str) -> list[str]:
    notes = Notes()
    box = MachineDir(tmp_path, "box")
    hooks.run_hooks("post-up", box, loaded(tmp_path, *post_up, plugin=plugin), os.environ, notes, also)
    return notes.said


def test_a_hook_is_told_what_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_USER", "kept")
    write = (
        'pwd >out; echo "$NIXBOX_NAME|$NIXBOX_WORKSPACE|$NIXBOX_EVENT|$NIXBOX_HOW|$OF_THE_USER|$NIXBOX_PLUGIN" >>out'
    )
    assert run(tmp_path, Hook(write), NIXBOX_HOW="restored") == []
    said = (tmp_path / "out").read_text().splitlines()
    assert said == [str(tmp_path), f"box|{tmp_path}|post-up|restored|kept|"]


def test_a_plugins_hook_is_told_of_its_plugin(tmp_path: Path) -> None:
    hook = Hook('echo "$NIXBOX_PLUGIN|$NIXBOX_PLUGIN_DIR" >out', plugin="warm")
    assert run(tmp_path, hook, plugin=tmp_path / "p") == []
    assert (tmp_path / "out").read_text() == f"warm|{tmp_path / 'p'}\n"


def test_nixbox_on_the_path_is_this_one(tmp_path: Path) -> None:
    python = 'nixbox-python -c "import nixbox.plugin"'
    hook = Hook(f'nixbox version >out && "$NIXBOX" version >>out && {python} || echo no >>out')
    assert run(tmp_path, hook) == []
    assert (tmp_path / "out").read_text() == "nixbox 0.1.0\nnixbox 0.1.0\n"


def test_a_failure_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    said = run(tmp_path, Hook("exit 3\n# more"), Hook("kill -9 $$"), Hook("touch out"))
    assert said == [
        "warning: the post-up hook of config.toml failed with exit code 3: `exit 3`",
        "warning: the post-up hook of config.toml failed with exit code 137: `kill -9 $$`",
    ]
    assert (tmp_path / "out").exists()


def test_a_required_one_that_fails_is_the_end(tmp_path: Path) -> None:
    with pytest.raises(NixboxError, match=r"the post-up hook of plugin warm failed with exit code 1: `false`"):
        run(tmp_path, Hook("false", required=True, plugin="warm"), Hook("touch out"))
    assert not (tmp_path / "out").exists()


def test_a_machines_hooks_do_not_call_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXBOX_EVENT", "post-up")
    monkeypatch.setenv("NIXBOX_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("NIXBOX_NAME", "other")
    run(tmp_path, Hook("touch other"))
    monkeypatch.setenv("NIXBOX_NAME", "box")
    run(tmp_path, Hook("touch own"))
    assert ((tmp_path / "other").exists(), (tmp_path / "own").exists()) == (True, False)


def test_inside_a_hook_its_own_machine_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(tmp_path)
    assert which.meant(tmp_path) == which.default_machine(tmp_path)
    monkeypatch.setenv("NIXBOX_NAME", "box-2")
    assert which.meant(tmp_path) != "box-2"  # another workspace's, or nobody's
    monkeypatch.setenv("NIXBOX_WORKSPACE", str(tmp_path))
    assert which.meant(tmp_path) == "box-2"
    monkeypatch.setenv("NIXBOX_NAME", "../x")
    assert which.meant(tmp_path) == which.default_machine(tmp_path)


PROGRAM = """
import os, sys
sys.path[:] = sys.argv[2:]
from pathlib import Path
from nixbox import run
try:
    run.on_host(["sh", "-c", sys.argv[1]], env=os.environ, cwd=Path("/"))
except KeyboardInterrupt:
    os._exit(130)
"""


@pytest.mark.parametrize(
    "script", ["sleep 600 & echo $$ $! >&2; wait", "trap '' TERM; echo $$ $$ >&2; sleep 600; sleep 600"]
)
def test_ctrl_c_ends_a_hook_and_all_it_started(script: str) -> None:
    argv = [sys.executable, "-I", "-c", PROGRAM, script, *sys.path]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as ours:
        assert ours.stderr is not None
        pids = [int(word) for word in ours.stderr.readline().split()]
        try:
            ours.send_signal(signal.SIGINT)
            assert ours.wait(HANG_S) == 130
            end = time.monotonic() + HANG_S
            while any(Path(f"/proc/{pid}/stat").exists() and " Z " not in stat(pid) for pid in pids):
                assert time.monotonic() < end
                time.sleep(0.01)
        finally:
            ours.kill()


def stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


def test_a_python_command_outside_of_nixbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from nixbox import plugin

    monkeypatch.delenv("NIXBOX_WORKSPACE", raising=False)
    with pytest.raises(ConfigError, match="NIXBOX_WORKSPACE is not set"):
        plugin.sandbox()
