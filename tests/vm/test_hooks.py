"""Hooks and plugins' commands around real machines, and a guest that tries to become one of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.vm.conftest import RESOURCES, Home, Workspace

TOML = """
description = "a plugin of the test's own"
scripts = ["echo in the guest >~/plugin-ran"]
[hooks]
post-up = ['echo "plugin $NIXBOX_EVENT $NIXBOX_NAME" >>log']
[[commands]]
name = "echo"
description = "Say what it was told."
[[commands]]
name = "inside"
description = "Run something in the guest."
"""
ECHO = """#!/bin/sh
echo "$NIXBOX_NAME $NIXBOX_WORKSPACE $NIXBOX_PLUGIN"
for word; do echo "<$word>"; done
cat
exit 7
"""
INSIDE = """#!/usr/bin/env nixbox-python
import sys
from nixbox.plugin import directory, sandbox

assert (directory() / "plugin.toml").is_file()
sys.exit(sandbox().run(sys.argv[1:]))
"""


def plugin(place: Path) -> None:
    (place / "commands").mkdir(parents=True)
    (place / "plugin.toml").write_text(TOML)
    for name, text in (("echo", ECHO), ("inside", INSIDE)):
        (place / "commands" / name).write_text(text)
        (place / "commands" / name).chmod(0o755)


def config(
    box: Workspace, hooks: str = "", mounts: str = "mounts = []\n", ref: str = "./.nixbox/plugins/mine"
) -> None:
    box.config(f'name = "box"\nplugins = ["{ref}"]\n{mounts}{RESOURCES}[hooks]\n{hooks}')


def test_hooks_and_commands(workspace: Workspace) -> None:
    log = workspace.path / "log"
    plugin(workspace.path / ".nixbox/plugins/mine")
    config(
        workspace,
        'pre-up = ["echo pre-up >>log", "exit 3"]\n'
        'post-up = ["echo post-up $NIXBOX_HOW >>log; nixbox run -- hostname >>log; nixbox up; nixbox mine echo"]\n'
        'pre-down = ["nixbox run -- echo pre-down >>log"]\n'
        'post-down = ["nixbox status; echo post-down $? >>log"]\n',
    )
    up = workspace("up", "--json")
    assert json.loads(up.stdout)["name"] == "box"  # what hooks print is not in it
    assert "warning: the pre-up hook of config.toml failed with exit code 3: `exit 3`" in up.stderr
    assert "<" not in up.stdout
    assert "warning: the post-up hook of config.toml failed with exit code 7" in up.stderr
    assert log.read_text().splitlines() == ["pre-up", "plugin post-up box", "post-up restored", "box"]
    assert workspace.guest("cat ~/plugin-ran") == "in the guest\n"

    # A command: its words, its streams and its exit code are its own; from a directory below as well.
    (workspace.path / "sub").mkdir()
    below = Workspace(workspace.path, workspace.env)
    said = below("mine", "echo", "--help", "-x", "--", "a b", "", stdin=b"over stdin\n", code=7)
    words = ["--help", "-x", "--", "a b", ""]
    assert said.stdout.splitlines() == [f"box {workspace.path} mine", *(f"<{word}>" for word in words), "over stdin"]
    assert workspace("mine", "inside", "sh", "-c", "hostname; exit 9", code=9).stdout == "box\n"
    assert workspace("mine", "-m", "no-such", "inside", "true", code=None).returncode != 0
    listed = workspace("--help").stdout
    assert re.search(r"mine echo\s+Say what it was told\.", listed)
    assert "inside" in workspace("mine", "--help").stdout
    assert "did you mean `inside`?" in workspace("mine", "insid", code=2).stderr
    completion = workspace_completion(workspace, "nixbox mi")
    assert "mine" in completion
    assert "inside" in workspace_completion(workspace, "nixbox mine in")

    log.write_text("")
    workspace("up")
    assert log.read_text().splitlines()[1:3] == ["plugin post-up box", "post-up running"]
    log.write_text("")
    workspace("down")
    assert log.read_text().splitlines() == ["pre-down", "post-down 4"]
    workspace("down")
    assert log.read_text().splitlines() == ["pre-down", "post-down 4"]  # it was down already

    # What is required: nothing begun, nothing stopped, or a machine that is up and a command that says so.
    config(workspace, 'pre-up = [{ run = "exit 5", required = true }]\n')
    assert "the pre-up hook of config.toml failed with exit code 5" in workspace("up", code=1).stderr
    assert workspace.vm_pids() == []
    config(
        workspace,
        'post-up = [{ run = "exit 5", required = true }]\npre-down = [{ run = "exit 6", required = true }]\n',
    )
    workspace("up", code=1)
    assert workspace.status()["state"] == "running"
    workspace("down", code=1)
    assert workspace.status()["state"] == "running"
    config(workspace, 'post-up = ["echo $$ >pid; exec sleep 600"]\n')
    interrupted(workspace)
    assert workspace.status()["state"] == "running"
    (workspace.path / ".nixbox/config.toml").write_text('name = "box"\nhooks = 3\n')
    assert "no hooks are run" in workspace("down").stderr  # what is broken does not keep a machine up
    config(workspace)


def workspace_completion(box: Workspace, line: str) -> str:
    """What bash would be offered at the end of a line (click's own protocol)."""
    words = line.split()
    box.extra.update({"_NIXBOX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)})
    try:
        return box(code=None).stdout
    finally:
        for name in ("_NIXBOX_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del box.extra[name]


def interrupted(box: Workspace) -> None:
    """Ctrl-C while a hook runs ends the hook, and `up` with 130."""
    pid = box.path / "pid"
    process = box.start("up")
    end = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    hook = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not hook.exists() or ") Z " in hook.read_text()


def test_a_guest_does_not_become_a_plugin(workspace: Workspace) -> None:
    """What a guest writes into a plugin's directory, or in its place, is never run on the host."""
    place = workspace.path / "tools/mine"
    plugin(place)
    config(workspace, mounts="", ref="./tools/mine")
    workspace("up")
    workspace("mine", "echo", stdin=b"", code=7)
    evil = f"touch {workspace.path}/escaped"
    command = f"printf '#!/bin/sh\\n{evil}\\n'"
    toml = f"printf '[hooks]\\npre-up = [\"{evil}\"]\\n'"
    attacks = {
        "its command": f"{command} >commands/echo",
        "its hooks": f"{toml} >plugin.toml",
        "its domains": "printf '[network]\\ndomains = [\"example.org\"]\\n' >plugin.toml",
        "its mounts": 'printf \'[[mounts]]\\nsource = "/"\\ntarget = "/host"\\n\' >plugin.toml',
        "another in its place": f"cd ..; mv mine old; mkdir mine; {toml} >mine/plugin.toml",
        "all above it": f"cd ../..; cp -r tools new; mv tools old; mv new tools; {command} >tools/mine/commands/echo",
        "a link": f"cd ../..; mv tools old; mkdir -p x/m tools; ln -s ../x/m tools/mine; {toml} >x/m/plugin.toml",
    }
    kept = workspace.path.with_name(f"{workspace.path.name}-kept")
    shutil.copytree(workspace.path / "tools", kept)
    try:
        for what, attack in attacks.items():
            # It knows names for a second, and what we have put back is another directory.
            workspace.guest(f"sleep 1.1; cd ~/workspace/tools/mine; {attack}")
            for words in (("mine", "echo"), ("up",), ("env", "list")):
                assert "guests can write it" in workspace(*words, stdin=b"", code=2).stderr, (what, words)
            assert "mine echo" not in workspace("--help").stdout
            assert not (workspace.path / "escaped").exists(), what
            # While it runs the guest could change it between the look and the use.
            assert "a guest that runs can write" in workspace("trust", code=2).stderr
            for left in ("tools", "old", "x"):
                shutil.rmtree(workspace.path / left, ignore_errors=True)
            shutil.copytree(kept, workspace.path / "tools")
            workspace("mine", "echo", stdin=b"", code=7)  # as it was, it is trusted as before
        # The user's own change: looked at, and trusted, when no guest can write there.
        (place / "commands/echo").write_text(ECHO.replace("exit 7", "exit 8"))
        workspace("mine", "echo", stdin=b"", code=2)
        assert "no hooks are run" in workspace("down").stderr
        assert f"{place} is trusted" in workspace("trust").stderr
        workspace("mine", "echo", stdin=b"", code=8)
        assert not (workspace.path / "escaped").exists()
    finally:
        shutil.rmtree(kept)


def test_a_new_plugin_works_and_its_test_says_so(home: Home, workspace: Workspace) -> None:
    workspace("plugin", "new", "shiny")
    assert "exists already" in workspace("plugin", "new", "shiny", code=2).stderr
    place = workspace.path / ".nixbox/plugins/shiny"
    programs = workspace.path / "bin"
    programs.mkdir()
    (programs / "nixbox").write_text(f'#!/bin/sh\nexec {" ".join(workspace_program())} "$@"\n')
    (programs / "nixbox").chmod(0o755)
    env = dict(home.env) | {"PATH": f"{programs}:{home.env['PATH']}", "TMPDIR": str(workspace.path)}
    done = subprocess.run(
        [str(place / "test")], env=env, capture_output=True, text=True, timeout=400, check=False, cwd=workspace.path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "shiny: all is well"
    assert "shiny: try is up (restored)" in done.stderr
    listed = json.loads(workspace("plugin", "list", "--json").stdout)
    assert {"name": "shiny", "used": False}.items() <= next(row for row in listed if row["name"] == "shiny").items()
    assert "Say where the guest is." in workspace("plugin", "show", "shiny").stdout
    assert "| `seeds` |" in workspace("plugin", "reference").stdout


def workspace_program() -> list[str]:
    import sys

    return [sys.executable, "-m", "nixbox"]


def test_what_a_plugin_needs_of_the_user_is_said(workspace: Workspace) -> None:
    place = workspace.path / ".nixbox/plugins/mine"
    plugin(place)
    (place / "plugin.toml").write_text('requires_env = ["REGISTRY_TOKEN", "REGISTRY_HOST"]\n')
    config(workspace)
    said = workspace("up", code=2)
    assert said.stderr.count("needs the variable REGISTRY_") == 2
    doctor = workspace("doctor", code=3).stdout
    assert doctor.count("needs the variable REGISTRY_") == 2
    with (workspace.path / ".nixbox/config.toml").open("a") as file:
        file.write('[env]\nREGISTRY_TOKEN = { from_host = "NIXBOXTEST_TOKEN" }\nREGISTRY_HOST = "x"\n')
    assert "NIXBOXTEST_TOKEN is not set" in workspace("doctor", code=3).stdout
    workspace.extra["NIXBOXTEST_TOKEN"] = "t"
    assert "plugins: mine" in workspace("doctor").stdout
    assert workspace("up", "--dry-run").returncode == 0
    assert os.environ.get("NIXBOXTEST_TOKEN") is None
