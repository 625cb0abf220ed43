"""SSH into a guest: keys made on the host, the host key known before the first connection, one master.

The configuration file that is written works for any SSH client: `ssh -F …/ssh/config NAME`, scp, rsync, editors.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nixbox import paths, run
from nixbox.errors import HostError, NixboxError
from nixbox.guest.control import env_text

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How a guest is reached: its SSH configuration file and its name in there."""

    config: Path
    name: str

    def argv(self, *options: str) -> list[str]:
        """The beginning of an ssh command line."""
        return ["ssh", "-F", str(self.config), *options, self.name]


def make_keys(directory: Path) -> None:
    """Make the machine's host key and the user's key to it, once; they stay over restarts."""
    for name in ("host_key", "user_key"):
        key = directory / name
        if key.exists() and key.with_suffix(".pub").exists():
            continue
        # ssh-keygen writes the two files one after the other: make them aside, the private one last.
        new = directory / f"{name}.new"
        # An old private key without its other half goes first, or it could be taken for the new one's.
        for leftover in (key, new, Path(f"{new}.pub")):
            leftover.unlink(missing_ok=True)
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nixbox", "-f", str(new)]
        run.run(argv, timeout_s=_TIMEOUT_S)
        Path(f"{new}.pub").replace(key.with_suffix(".pub"))
        new.replace(key)


def _quoted(path: Path) -> str:
    """A path in ssh_config(5): quoted, and `%` doubled where tokens are expanded."""
    text = str(path)
    if "${" in text or not text.isprintable():  # ssh_config(5) has no escape for either
        raise HostError(f"ssh cannot work in a directory with `${{` or control characters in its name: {text!r}")
    return '"' + text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%") + '"'


def check_path(directory: Path) -> None:
    """Raise HostError for a path that no SSH configuration can hold: asked before anything is built."""
    _quoted(directory)


def write_config(directory: Path, name: str, user: str, port: int, control: Path) -> Endpoint:
    """Write `config` and `known_hosts` for a machine that was just started."""
    host_key = (directory / "host_key.pub").read_text().split()
    paths.write_atomic(directory / "known_hosts", f"{name} {host_key[0]} {host_key[1]}\n", mode=0o600)
    settings = {
        "HostName": "127.0.0.1",
        "Port": str(port),
        "User": user,
        "HostKeyAlias": name,
        "UserKnownHostsFile": _quoted(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "IdentityFile": _quoted(directory / "user_key"),
        "IdentitiesOnly": "yes",
        # Keys and agents of the host do not cross.
        "IdentityAgent": "none",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "ControlMaster": "auto",
        "ControlPath": _quoted(control),
        "ControlPersist": "yes",
        # The fastest of what both ends have: the link is the host's own loopback.
        "KexAlgorithms": "curve25519-sha256",
        "Ciphers": "aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr",
        "ConnectTimeout": "60",
        "SendEnv": "NIXBOX_ENV NIXBOX_RUN COLORTERM",
        "LogLevel": "ERROR",
    }
    text = f"# Written by nixbox at each start of the machine.\nHost {name}\n"
    text += "".join(f"  {key} {value}\n" for key, value in settings.items())
    paths.write_atomic(directory / "config", text, mode=0o600)
    return Endpoint(directory / "config", name)


def remote_command(command: Sequence[str], workdir: str | None) -> str:
    """One shell line for the guest that runs exactly these words, in `workdir` (`~/…`: the guest's home)."""
    line = shlex.join(command)
    if workdir is None:
        return line
    if workdir == "~" or workdir.startswith("~/"):
        place = '"$HOME"' + (f"/{shlex.quote(workdir[2:])}" if workdir[2:] else "")
    else:
        place = shlex.quote(workdir)
    return f"cd -- {place} && exec {line}"


def session_env(run_id: str, env: Mapping[str, str]) -> dict[str, str]:
    """What one `run` sends along: its mark, and its variables, which no command line ever shows."""
    return {"NIXBOX_RUN": run_id} | ({"NIXBOX_ENV": env_text(env)} if env else {})


def send_signal(endpoint: Endpoint, run_id: str, sig: signal.Signals) -> None:
    """Signal everything of one run or script in the guest (nix/guest/signal).

    Nothing is raised: it is called while something else already goes wrong, and that is what is to be told.
    """
    command = f"/run/nixbox/signal {run_id} {sig.name.removeprefix('SIG')}"
    with contextlib.suppress(NixboxError):
        run.run([*endpoint.argv("-T"), command], timeout_s=_TIMEOUT_S, check=False)


def open_master(endpoint: Endpoint) -> None:
    """Open the connection that later commands share. It ends with the guest, or by close_master."""
    run.run(endpoint.argv("-f", "-N", "-o", "ControlMaster=yes"), timeout_s=90)


def close_master(endpoint: Endpoint, control: Path) -> None:
    """End the shared connection, if there is one."""
    if control.exists():
        run.run(endpoint.argv("-O", "exit"), timeout_s=_TIMEOUT_S, check=False)


def guest_user() -> str:
    """The guest's user: named after the host's, unless that is root or a name that Debian keeps for itself."""
    import pwd
    import re

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "nixbox"
    # Debian reserves uids below 1000; their names must not be given uid 1000.
    reserved = {
        *("root", "daemon", "bin", "sys", "sync", "games", "man", "lp", "mail", "news", "uucp", "proxy"),
        *("www-data", "backup", "list", "irc", "gnats", "_apt", "nobody", "sshd", "messagebus"),
    }
    return name if re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", name) and name not in reserved else "nixbox"
