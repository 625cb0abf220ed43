"""Nix's remote builders: a build that goes to another store by a real SSH server, in namespaces of the test's own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nixbox.errors import ConfigError
from nixbox.image import binary_cache
from tests import tiny

HANG_S = 120

# In the namespaces: a loopback, the server's own user and directory, the server, and then the client.
INSIDE = """
ip link set lo up
mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs tmpfs /run
mkdir /run/sshd
LD_LIBRARY_PATH="$2" "$3" -r -D -e -f "$1/sshd_config" 2> "$1/sshd.log" &
shift 3
exec "$@"
"""

CLIENT = """
import json, socket, sys, time
from pathlib import Path
from nixbox import paths
from nixbox.image import build, ensure
from nixbox.report import Reporter
from tests import tiny

for _ in range(300):
    try:
        socket.create_connection(("127.0.0.1", 22)).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
nix, builders = sys.argv[1:]
paths.nix_dir = lambda: Path(nix)
said = []

class Listening(Reporter):
    def note(self, text): said.append(text)
    def phase(self, text): said.append(text)

spec, text = tiny.spec("echo far > $out/etc/x"), tiny.lock_text()
key = build.key(spec, text)
expression = build.expression(spec, ensure.keep_lock(key, text), {})
image = build.build(spec, key, expression, Listening(), builders)
print(json.dumps({"path": str(image.path), "said": said, "x": image.file("etc/x").read_text()}))
"""


def sshd(place: Path) -> tuple[Path, str]:
    """An SSH server and the libraries it needs: the host's, else Debian's package, unpacked and not installed."""
    found = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if found:
        return Path(found), ""
    if shutil.which("apt-get") is None:
        pytest.skip("no sshd on this host, and no apt to get one by")
    argv = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "openssh-server", "libwrap0"]
    done = subprocess.run(argv, cwd=place, capture_output=True, text=True, timeout=HANG_S, check=False)
    if done.returncode != 0:
        pytest.skip(f"no sshd on this host, and its package cannot be had: {done.stderr[-300:]}")
    for deb in place.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb, place / "root"], check=True)
    libraries = sorted({str(file.parent) for file in place.glob("root/**/*.so*")})
    return place / "root/usr/sbin/sshd", ":".join(libraries)


@pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server in namespaces of its own needs root")
@pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store on this host")
@pytest.mark.skipif(tiny.BUSYBOX is None, reason="no static busybox on this host")
def test_a_builder_builds_and_what_it_built_comes_back(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    server, libraries = sshd(tmp_path)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    # The builder: another store, with a configuration of its own, and nothing else for this key.
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/nix.conf").write_text("build-users-group =\nsubstituters =\nsandbox = true\n")
    remote = tmp_path / "remote.sh"
    remote.write_text(
        f'#!/bin/sh\necho "$SSH_ORIGINAL_COMMAND" >> {tmp_path}/asked\n'
        f"export NIX_REMOTE={tmp_path}/far NIX_CONF_DIR={tmp_path}/conf\n"
        'exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    remote.chmod(0o755)
    user = (tmp_path / "user.pub").read_text()
    (tmp_path / "authorized").write_text(f'restrict,command="{remote}" {user}')
    (tmp_path / "passwd").write_text(
        Path("/etc/passwd").read_text() + "sshd:x:1199:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:22\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
    )
    host_key = base64.b64encode((tmp_path / "host.pub").read_bytes()).decode()
    system = {"x86_64": "x86_64-linux", "aarch64": "aarch64-linux"}[os.uname().machine]
    builders = f"ssh://127.0.0.1 {system} {tmp_path}/user 1 1 - - {host_key}"
    nix = tiny.write(tmp_path / "nix")
    repository = Path(__file__).parents[2]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(repository),
        "NIX_REMOTE": str(tmp_path / "near"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv += ["sh", "-euc", INSIDE, "sh", str(tmp_path), libraries, str(server)]
    argv += [sys.executable, "-c", CLIENT, str(nix), builders]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=HANG_S, check=False)
        assert done.returncode == 0, done.stderr + (tmp_path / "sshd.log").read_text()
        found = json.loads(done.stdout)
        assert found["x"] == "far\n"
        assert "building tiny-image on ssh://127.0.0.1" in found["said"]
        assert "2 of its derivations were built on ssh://127.0.0.1" in found["said"]
        assert "nix-store --serve --write" in (tmp_path / "asked").read_text()
        for side in ("near", "far"):
            assert (tmp_path / side / found["path"][1:] / "etc/x").read_text() == "far\n"
    finally:
        for side in ("near", "far"):
            subprocess.run(["chmod", "-R", "u+w", str(tmp_path / side)], check=False, capture_output=True)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "names no builder"),
        (" ; ", "names no builder"),
        ("ssh://localhost", "would wait for itself"),
        ("ssh://a x86_64-linux; ssh://localhost?x=1 x86_64-linux", "would wait for itself"),
        ("@/not/there", "there is no file /not/there"),
    ],
)
def test_builders_that_can_be_none_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        binary_cache.check_builders(spec)


@pytest.mark.parametrize("spec", ["ssh://root@host", "ssh-ng://a x86_64-linux k 2; ssh://b", "ssh://127.0.0.1"])
def test_other_builders_are_as_they_are(spec: str) -> None:
    assert binary_cache.check_builders(spec) == spec
