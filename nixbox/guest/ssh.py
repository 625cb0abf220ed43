"""SSH into a guest: keys made on the host, the host key known before the first connection.

Two servers listen in a guest: OpenSSH for whatever else wants to connect (`ssh -F …/ssh/config NAME`, scp, rsync,
editors), and dropbear for nixbox's own commands, which share one connection (docs/decisions/014-two-ssh-servers.md).
"""

from __future__ import annotations

import binascii
import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nixbox import paths, run
from nixbox.errors import HostError, NixboxError
from nixbox.values import dataclass

_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 20  # of ssh itself, up to the server's first words
_MASTER_TIMEOUT_S = 90.0
_PATIENCE_S = 5.0
_LONGEST_LINE = 8000  # bytes: dropbear ends a session whose command has more than 9000 (MAX_CMD_LEN in its source)


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
        # An old private key without its other half goes first, or it could be taken for the new one's.
        key.unlink(missing_ok=True)
        from nixbox.guest import keys

        keys.make(key)


def _quoted(path: Path) -> str:
    """A path in ssh_config(5): quoted, and `%` doubled where tokens are expanded."""
    text = str(path)
    if "${" in text or not text.isprintable():  # ssh_config(5) has no escape for either
        raise HostError(f"ssh cannot work in a directory with `${{` or control characters in its name: {text!r}")
    return '"' + text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%") + '"'


def check_path(directory: Path) -> None:
    """Raise HostError for a path that no SSH configuration can hold: asked before anything is built."""
    _quoted(directory)


def dropbear_key(host_key: str) -> bytes:
    """An unencrypted ed25519 key of ssh-keygen (OpenSSH's PROTOCOL.key) in dropbear's format (its signkey.c).

    Both keep strings with a 32-bit length before them; dropbear's file is the type and the 64 bytes of the key.
    """
    damaged = HostError(
        "the machine's host key is damaged", hint="remove its ssh/host_key; `nixbox up` makes a new one"
    )
    try:
        data = binascii.a2b_base64("".join(host_key.strip().splitlines()[1:-1]))
    except ValueError:
        raise damaged from None
    at = len(b"openssh-key-v1\0")

    def string() -> bytes:
        nonlocal at
        length = int.from_bytes(data[at : at + 4], "big")
        at += 4 + length
        return data[at - length : at]

    for _ in ("cipher", "kdf", "kdf options"):
        string()
    at += 4  # the number of keys: one
    string()  # its public half
    at += 4 + 8  # the length of the private section, and two equal numbers that would check a passphrase
    kind, _, key = string(), string(), string()
    if kind != b"ssh-ed25519" or len(key) != 64:
        raise damaged
    return b"".join(len(part).to_bytes(4, "big") + part for part in (kind, key))


def write_exec_config(directory: Path, name: str, user: str, control: Path) -> Endpoint:
    """Write `exec` and `known_hosts`, for nixbox's own connection; `control` is the socket that its users share."""
    host_key = (directory / "host_key.pub").read_text().split()
    known = f"{name} {host_key[0]} {host_key[1]}\n"
    paths.write_atomic(directory / "known_hosts", known, mode=0o600, synced=False)
    # Whoever does not find the shared connection must not look for another way.
    return _write_config(directory, "exec", name, user, {"ProxyCommand": "false"}, control)


def write_config(directory: Path, name: str, user: str, control: Path) -> Endpoint:
    """Write `config`, for other programs: OpenSSH in the guest, reached through nixbox's own connection.

    That goes over a serial port, so whatever the network's mode is makes no difference.
    """
    inner = ["ssh", "-F", str(directory / "exec"), "-W", "127.0.0.1:22", name]
    # A shell runs it, and ssh expands its own tokens in it before (ssh_config(5)).
    return _write_config(
        directory, "config", name, user, {"ProxyCommand": shlex.join(inner).replace("%", "%%")}, control
    )


def _write_config(
    directory: Path, file: str, name: str, user: str, where: Mapping[str, str], control: Path
) -> Endpoint:
    settings = {
        **where,
        "User": user,
        "HostKeyAlias": name,
        "UserKnownHostsFile": _quoted(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "IdentityFile": _quoted(directory / "user_key"),
        "IdentitiesOnly": "yes",
        # Keys and agents of the host do not cross.
        "IdentityAgent": "none",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PreferredAuthentications": "publickey",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "ControlMaster": "auto",
        "ControlPath": _quoted(control),
        "ControlPersist": "yes",
        # The fastest of what both ends have: the link is the host's own loopback.
        "KexAlgorithms": "curve25519-sha256",
        "Ciphers": "aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "SendEnv": "COLORTERM",
        "LogLevel": "ERROR",
    }
    text = f"# Written by nixbox at each start of the machine.\nHost {name}\n"
    text += "".join(f"  {key} {value}\n" for key, value in settings.items())
    paths.write_atomic(directory / file, text, mode=0o600, synced=False)
    return Endpoint(directory / file, name)


def remote_command(command: Sequence[str], workdir: str | None) -> str:
    """One shell line for the guest that runs exactly these words, in `workdir` (`~/…`: the guest's home)."""
    line = shlex.join(command)
    if workdir is None:
        return line
    if workdir == "~" or workdir.startswith("~/"):
        place = '"$HOME"' + (f"/{shlex.quote(workdir[2:])}" if workdir[2:] else "")
    else:
        place = shlex.quote(workdir)
    return f"cd -- {place} && {line}"


def marked(endpoint: Endpoint, run_id: str, line: str, env: Mapping[str, str]) -> str:
    """What to send as the command of one `run`: its mark and the line, for a shell or for nix/guest/session.

    Variables, which no command line ever shows, and a line that is too long for dropbear go ahead on a connection's
    standard input. Raises CommandError when the guest cannot be reached.
    """
    if env or len(os.fsencode(line)) > _LONGEST_LINE:
        from nixbox.guest.control import env_text

        file = f"/run/nixbox/scripts/run-{run_id}"
        text = f"/run/nixbox/busybox rm -f {file}\n{env_text(env)}NIXBOX_LINE={shlex.quote(line)}\n"
        run.run([*endpoint.argv("-T"), f"umask 077; cat >{file}"], timeout_s=_TIMEOUT_S, stdin=text)
        line = f'. {file}; eval "$NIXBOX_LINE"'
    # The shell goes on after the line, so it starts it as a child, and a command ended by signal n gives 128 + n.
    return f"NIXBOX_RUN_ID={run_id}; . /run/nixbox/rc\n{line}\nexit $?"


def send_signal(endpoint: Endpoint, run_id: str, sig: signal.Signals) -> None:
    """Signal everything of one run or script in the guest (nix/guest/signal).

    Nothing is raised: it is called while something else already goes wrong, and that is what is to be told.
    """
    command = f"/run/nixbox/signal {run_id} {sig.name.removeprefix('SIG')}"
    with contextlib.suppress(NixboxError):
        run.run([*endpoint.argv("-T"), command], timeout_s=_TIMEOUT_S, check=False)


def begin_master(endpoint: Endpoint, transport: socket.socket, log: Path) -> int:
    """Begin to open the connection that later commands share, over a connected socket; returns ssh's process id.

    It ends with the guest, or by close_masters. `ProxyCommand -` takes standard input and output for the connection
    (sshconnect.c in OpenSSH's source).
    """
    argv = endpoint.argv("-N", "-o", "ControlMaster=yes", "-o", "ProxyCommand=-")
    return run.spawn(argv, log=log, stdio=transport.fileno()).pid


def await_master(endpoint: Endpoint, control: Path, shell: Path, log: Path) -> None:
    """Wait for the shared connection; one that has ended is opened again. Raises HostError when it cannot be."""
    deadline = time.monotonic() + _MASTER_TIMEOUT_S
    again = time.monotonic() + _PATIENCE_S  # one may have been begun a moment ago
    while not _answers(control):
        if time.monotonic() > deadline:
            raise HostError(
                f"no SSH connection to `{endpoint.name}` comes about",
                hint=f"nixbox logs {endpoint.name} --console may show why",
            )
        if time.monotonic() > again:
            with connected(shell) as transport:
                begin_master(endpoint, transport, log)
            again = time.monotonic() + 1.5 * CONNECT_TIMEOUT_S
        time.sleep(0.005)  # ssh makes the socket when it has the connection; there is nothing else to wait for


def _answers(control: Path) -> bool:
    """Whether somebody listens at the socket of a shared connection; one that was left over is removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        try:
            attempt.connect(str(control))
        except ConnectionRefusedError:
            control.unlink(missing_ok=True)
            return False
        except OSError:
            return False
    return True


def drop_stale(transport: socket.socket) -> None:
    """Throw away what a guest's former SSH server still said, up to the present one's first word if that is there."""
    transport.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while data := transport.recv(65536, socket.MSG_PEEK):
            begin = data.rfind(b"SSH-2.0-")
            if begin == 0:
                break
            transport.recv(begin if begin > 0 else len(data))
    transport.setblocking(True)


def connected(path: Path) -> socket.socket:
    """Connect to the unix socket of a guest's SSH port. Raises HostError when nothing listens there."""
    transport = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        transport.connect(str(path))
    except OSError as error:
        transport.close()
        raise HostError(f"the machine's SSH port does not answer: {error.strerror}") from None
    return transport


def close_masters(endpoint: Endpoint, sockets: tuple[Path, Path]) -> None:
    """End the shared connections that there are: OpenSSH's, and nixbox's own."""
    for file, control in zip(("config", "exec"), sockets, strict=True):
        if control.exists():
            config = Endpoint(endpoint.config.with_name(file), endpoint.name)
            run.run(config.argv("-O", "exit"), timeout_s=_TIMEOUT_S, check=False)


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
