"""The in-tree plugins, each really used in a guest. One image and one machine have all of them.

What cannot be fetched here (npm's, PyPI's and Maven Central's packages) comes from a server of the test's own, in the
small Internet of namespaces, by the way that the real one would come.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from tests.vm import internet, test_credentials
from tests.vm.conftest import Home, Workspace
from tests.vm.world import World

PLUGINS = ("aws", "claude-code", "node", "python-uv", "rust", "scala-sbt")
PORT = 8081
SERVER = f"http://allowed.example:{PORT}"
CONFIG = f"""
name = "box"
plugins = {json.dumps(PLUGINS)}
mounts = []
[resources]
vcpus = 1
memory = "512MiB"
disk = "1GiB"
[network]
mode = "filtered"
domains = ["allowed.example"]
ports = [443, {PORT}]
[env]
NPM_CONFIG_REGISTRY = "{SERVER}/npm/"
PIP_INDEX_URL = "{SERVER}/simple/"
PIP_TRUSTED_HOST = "allowed.example"
SBT_LAUNCH_REPO = "{SERVER}/maven"
"""
MAVEN = """
MAVEN_REPO_HOST = "repo.example"
MAVEN_REPO_REALM = "Some Realm"
MAVEN_REPO_USER = 'us\\er'
MAVEN_REPO_PASSWORD = { from_host = "MAVEN_PASSWORD" }
"""
# In no file of this repository in one piece.
PASSWORD = "pl4nted-" + "m4ven-c19e"
REFRESH = "pl4nted-" + "cl4ude-77ab"
SETTINGS_SECRET = "pl4nted-" + "setting-e20d"
NO_SECRET = "what may be on the disk: 5a0c"
SBT = "1.10.7"
XDG = {"CACHE": ".cache", "CONFIG": ".config", "STATE": ".local/state", "DATA": ".local/share"}


# --- the host ------------------------------------------------------------------------------------------


# It answers as version 2 of the AWS CLI does (awscli/customizations: configure/exportcreds.py, configure/get.py,
# configure/listprofiles.py, sso/login.py, ecr.py; errors and exit codes: errorhandler.py, constants.py).
AWS = f"""#!{sys.executable} -IS
import json, pathlib, sys
state = pathlib.Path(__file__).parent / "state"
words = sys.argv[1:]
with (state / "calls").open("a") as log:
    log.write(json.dumps(words) + "\\n")
def fail(code, text):
    sys.stderr.write("\\n" + text + "\\n")
    raise SystemExit(code)
profile = "default"
if "--profile" in words:
    at = words.index("--profile")
    profile = words[at + 1]
    del words[at : at + 2]
known = json.loads((state / "profiles").read_text())
if words[:2] == ["configure", "list-profiles"]:
    print("\\n".join(known))
    raise SystemExit(0)
if profile not in known:
    fail(255, f"The config profile ({{profile}}) could not be found")
settings = known[profile]
if words[:2] == ["configure", "get"]:
    if words[2] not in settings:
        raise SystemExit(1)
    print(settings[words[2]])
elif words[:2] == ["sso", "login"]:
    if "sso_session" not in settings:
        fail(253, "Missing the following required SSO configuration values: sso_start_url, sso_region.")
    if settings.get("broken"):
        fail(255, "An error occurred (AccessDeniedException) when calling the CreateToken operation: no")
    print("Attempting to automatically open the SSO authorization page in your default browser.")
    (state / "session").touch()
    print("Successfully logged into Start URL: https://corp.awsapps.com/start")
elif words[:2] == ["configure", "export-credentials"]:
    assert words[2:] == ["--format", "process"], words
    if "static" in settings:
        found = {{"Version": 1, "AccessKeyId": "AKIAXXXXXXXXXXXXXXXX", "SecretAccessKey": "long-lived"}}
    elif not (state / "session").exists():
        fail(253, "Unable to retrieve credentials: Error loading SSO Token: Token for corp does not exist")
    else:
        found = json.loads((state / "credentials").read_text())
    sys.stdout.write(json.dumps(found, indent=2, separators=(",", ": ")) + "\\n")
elif words[:2] == ["sts", "get-caller-identity"]:
    print("123456789012")
elif words[:2] == ["ecr", "get-login-password"]:
    if not (state / "session").exists():
        fail(255, "Error loading SSO Token: Token for corp does not exist")
    sys.stdout.write((state / "password").read_text() + "\\n")
else:
    fail(252, "aws: error: argument command: Invalid choice, valid choices are: ...")
"""


class Aws:
    """A stand-in for the AWS CLI on the host's PATH, and what it knows."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir()
        program = directory / "aws"
        program.write_text(AWS)
        program.chmod(0o755)
        profiles = {
            "dev": {"sso_session": "corp", "region": "eu-central-1"},
            "role": {"source_profile": "dev", "role_arn": "arn:aws:iam::123456789012:role/x", "region": "us-east-1"},
            "keys": {"static": "1"},
            "broken": {"sso_session": "corp", "broken": "1"},
        }
        (self.state / "profiles").write_text(json.dumps(profiles))
        (self.state / "password").write_text("pl4nted-" + "ecr-90aa")
        self.give(1, timedelta(hours=1))

    def give(self, number: int, lasts: timedelta) -> str:
        """Have other credentials from now on; returns their secret."""
        secret = "pl4nted-" + f"aws-{number}-5e1f"
        found = {
            "Version": 1,
            "AccessKeyId": f"ASIAEXAMPLE{number}",
            "SecretAccessKey": secret,
            "SessionToken": f"token-{number}",
            "Expiration": (datetime.now(UTC) + lasts).replace(microsecond=0).isoformat(),
        }
        (self.state / "credentials").write_text(json.dumps(found))
        return secret

    def log_out(self) -> None:
        """End the SSO session."""
        (self.state / "session").unlink(missing_ok=True)

    def calls(self) -> list[list[str]]:
        """What it was called with since this was asked last."""
        log = self.state / "calls"
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in text.splitlines()]


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def fill_home(home: Path) -> list[Path]:
    """Caches and a ~/.claude on the host; returns what to remove again."""
    files: Mapping[str, str] = {
        ".cache/coursier/v1/https/repo1.maven.org/maven2/org/a/a/1/a-1.jar": "a jar",
        ".cache/coursier/v1/https/repo1.maven.org/maven2/org/a/a/1/.a-1.jar.part": "half a jar",
        ".cache/coursier/v1/https/repo1.maven.org/maven2/org/a/jvm/1/jvm-1.pom": "not what jvm/* means",
        ".cache/coursier/v1/https/repo1.maven.org/maven2/org/a/a/1/.structure.lock": "",
        ".cache/coursier/jvm/one/bin/java": "a whole JDK",
        ".ivy2/local/org/a/1/jars/a.jar": "a jar of our own",
        ".ivy2/.credentials": "password=of the host",
        ".npm/_cacache/content-v2/sha512/00/11/aa": "content",
        ".npm/_cacache/tmp/half": "half",
        ".npm/_logs/some.log": "log",
        ".cache/uv/simple-v28/pypi/a.rkyv": "index",
        ".cache/uv/.lock": "",
        ".cache/uv/interpreter-v5/a.msgpack": "/usr/bin/of/the/host",
        ".cargo/registry/cache/index.crates.io-6f17d22bba15001f/a-1.0.0.crate": "a crate",
        ".cargo/registry/src/index.crates.io-6f17d22bba15001f/a-1.0.0/lib.rs": "unpacked",
        ".claude/CLAUDE.md": NO_SECRET,
        ".claude/commands/one.md": "a command",
        ".claude/agents/deep/two.md": "an agent",
        ".claude/history.jsonl": "what was said",
        ".claude/projects/x/session.jsonl": "a whole session",
        ".claude/.credentials.json": json.dumps({"claudeAiOauth": {"refreshToken": REFRESH}}),
        ".claude/settings.json": json.dumps(
            {
                "model": "opus",
                "env": {"ANTHROPIC_API_KEY": SETTINGS_SECRET},
                "apiKeyHelper": "/usr/bin/of-the-host",
                "permissions": {"allow": ["Bash(make:*)"], "additionalDirectories": ["/home/me"]},
                "tomorrow": {"token": SETTINGS_SECRET},
            }
        ),
    }
    for name, text in files.items():
        write(home / name, text)
    (home / ".claude" / "commands" / "link.md").symlink_to(home / ".claude" / "history.jsonl")
    return [home / name for name in (".cache/coursier", ".cache/uv", ".ivy2", ".npm", ".cargo", ".claude")]


# --- the Internet --------------------------------------------------------------------------------------


def packages(root: Path) -> None:
    """What the server has: an npm package, a wheel and a jar, small stand-ins for the real ones."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        program = "#!/usr/bin/env node\nconsole.log('claude says', process.argv.slice(2).join(' '))\n"
        manifest = {"name": "@anthropic-ai/claude-code", "version": "1.2.3", "bin": {"claude": "cli.js"}}
        for name, text in (("package.json", json.dumps(manifest)), ("cli.js", program)):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    write(root / "npm" / "claude.tgz", data.getvalue())
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data.getvalue()).digest()).decode()
    version = manifest | {"dist": {"tarball": f"{SERVER}/npm/claude.tgz", "integrity": integrity}}
    about = {"name": manifest["name"], "dist-tags": {"latest": "1.2.3"}, "versions": {"1.2.3": version}}
    write(root / "npm" / "@anthropic-ai" / "claude-code", json.dumps(about))

    wheel = root / "simple" / "uv" / "uv-9.9.9-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("uv", "uvx"):
            script = zipfile.ZipInfo(f"uv-9.9.9.data/scripts/{name}")
            script.external_attr = 0o100755 << 16  # its mode, which pip keeps
            archive.writestr(script, f'#!/bin/sh\necho {name} 9.9.9 "$@"\n')
        info = "uv-9.9.9.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 9.9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    write(wheel.parent / "index.html", f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')


@pytest.fixture(scope="module")
def server(net: World) -> Iterator[Path]:
    """A web server in the small Internet; returns the directory that it serves."""
    with tempfile.TemporaryDirectory(prefix="nbp") as directory:
        root = Path(directory)
        packages(root)
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        script = (
            "import functools, http.server as h, sys, threading\n"
            "serve = functools.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1])\n"
            "server = h.ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), serve)\n"
            "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
            "print('ready', flush=True)\n"
            "sys.stdin.read()\n"
        )
        argv = ["nsenter", "--target", str(net.internet), *user, "--net", "--", sys.executable, "-I", "-S"]
        process = subprocess.Popen(
            [*argv, "-c", script, directory, internet.ALLOWED, str(PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield root
        finally:
            process.communicate("")


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with tempfile.TemporaryDirectory(prefix="nba") as directory:
        yield Aws(Path(directory))


@pytest.fixture(scope="module")
def box(home: Home, net: World, server: Path, aws: Aws) -> Iterator[Workspace]:
    """A machine with every plugin, up, whose host is the one of the small Internet."""
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    made = Workspace(path, home.env)
    made.config(CONFIG + MAVEN)
    (path / ".nixbox" / "nixbox.lock").write_text(home.lock)
    made("build", timeout_s=900)  # out here, where the packages' mirror is
    there = ["sh", "-c", 'cd "$0" && exec "$@"', str(path)]  # a mount namespace begins at its root
    made = dataclasses.replace(made, prefix=[*net.prefix, *there])
    made.extra |= {"PATH": f"{aws.directory}:{home.env['PATH']}", "MAVEN_PASSWORD": PASSWORD}
    places = fill_home(home.path)
    try:
        said = made("up").stderr
        print(said)  # shown when a test fails
        assert "warning" not in said, said  # a cache that was seeded in part, for one
        yield made
    finally:
        if (path / ".nixbox" / "machines" / "box").exists():
            made("rm", "--yes")
        for place in places:
            shutil.rmtree(place)
        assert not made.vm_pids()
        shutil.rmtree(path)


def only_in_memory(box: Workspace, home: Home, secret: str) -> str:
    """Where in the guest's memory a secret is, if it is on no disk and command line."""
    places = box("run", "--no-tty", "--", "sh", "-euc", SEARCH, stdin=secret.encode()).stdout
    files = test_credentials.files_of_the_host(box, home)
    mine = [file for file in files if not file.is_relative_to(home.path / ".claude")]
    assert test_credentials.holding(secret.encode(), mine) == []
    found = [line for line in test_credentials.processes_with(secret.encode()) if "cmdline:" in line]
    assert found == []
    return places


SEARCH = """
cat >/dev/shm/wanted # a pattern that is on no command line
sync
sudo grep -rlsF -f /dev/shm/wanted --exclude=wanted /dev/shm /run /home /tmp || :
sudo grep -lsF -f /dev/shm/wanted /proc/[0-9]*/cmdline || :
rm /dev/shm/wanted
"""


# --- what an image and a policy have ---------------------------------------------------------------------


def test_packages_run(box: Workspace) -> None:
    said = box.guest(
        "node --version; cargo --version; rustc --version; python3 --version; java --version | head -n 1\n"
        "for name in npm aws scala javac sbt maven-credentials claude uv uvx; do command -v $name; done"
    ).splitlines()
    assert [line.split()[0].rstrip(".0123456789") for line in said[:5]] == [
        "v",
        "cargo",
        "rustc",
        "Python",
        "openjdk",
    ]
    assert len(said) == 5 + 9


def test_domains_are_in_the_policy(box: Workspace) -> None:
    policy: dict[str, Any] = json.loads(box("net", "status", "--json").stdout)["policy"]
    for name in PLUGINS:
        plugin = tomllib.loads((paths.plugins_dir() / name / "plugin.toml").read_text())
        assert set(plugin["network"]["domains"]) <= set(policy["domains"]), name


# --- seeds -----------------------------------------------------------------------------------------------


def seeded_state(box: Workspace, *differ: Iterable[str]) -> str:
    """What the guest knows of its seeds, for a test that found others."""
    script = """
    cd; date; df -h . /; grep -E '^Mem|^Cached' /proc/meminfo
    cd .local/state/nixbox/seeds; ls -la --time-style=full-iso; head -n 7 [0-9a-f]*[0-9a-f]
    cd; ls -laR .cache .ivy2 | head -n 60; sudo dmesg | tail -n 30
    """
    found = box("run", "--no-tty", "--", "sh", "-uc", script, code=None)
    lines = [line for part in differ for line in [*list(part)[:20], "--"]]
    return "\n".join([*lines, found.stdout, found.stderr])


def test_caches_are_seeded_without_what_is_the_hosts_alone(box: Workspace, home: Home) -> None:
    listing = 'find .npm .cache/uv .cache/coursier .ivy2 .cargo -type f -user "$(id -u)" | sort'
    maven = ".cache/coursier/v1/https/repo1.maven.org/maven2/org/a"
    wanted = [
        f"{maven}/a/1/a-1.jar",
        f"{maven}/jvm/1/jvm-1.pom",
        ".cache/uv/simple-v28/pypi/a.rkyv",
        ".cargo/registry/cache/index.crates.io-6f17d22bba15001f/a-1.0.0.crate",
        ".ivy2/local/org/a/1/jars/a.jar",
        ".npm/_cacache/content-v2/sha512/00/11/aa",
    ]
    found = box.guest(listing).split()
    assert found == wanted, seeded_state(box, found)

    # The next `up` copies nothing, `--force` does.
    write(home.path / ".ivy2" / "local" / "new", "new")
    again = box("up")
    assert "seed" not in again.stderr
    box("scala-sbt", "warm-cache")
    assert box.guest("ls .ivy2/local").split() == ["org"]
    box("scala-sbt", "warm-cache", "--force")
    assert box.guest("ls .ivy2/local").split() == ["new", "org"]
    assert box("scala-sbt", "warm-cache", "--now", code=2).stderr.startswith("usage:")


def coursier_cache(place: Path) -> None:
    """A cache as coursier keeps it (v1/https/HOST/PATH, sums beside the files): 20,000 files, 300 MB."""
    block = random.Random(1).randbytes(16 << 20)
    maven = place / "v1/https/repo1.maven.org/maven2/org"
    for group in range(100):
        for artifact in range(50):
            name = f"artifact-{artifact}"
            directory = maven / f"group{group}" / name / f"1.{artifact}.0"
            directory.mkdir(parents=True)
            size = 6_000_000 if artifact == 0 and group < 30 else 20_000
            at = (group * 50 + artifact) * 997
            (directory / f"{name}.jar").write_bytes(block[at : at + size])
            (directory / f"{name}.pom").write_text(f"<project><!-- {name} -->{'<x/>' * 500}</project>")
            (directory / f".{name}.jar__sha1").write_bytes(hashlib.sha1(block[at : at + size]).digest())
            (directory / f"{name}.jar.lock").touch()  # left out
            (directory / f"{name}.pom.sha1").write_text("0" * 40)


CONTENT = "cd ~/.cache/coursier; find . -type f ! -name '*.lock' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum"
META = "cd ~/.cache/coursier; find . ! -name '*.lock' -printf '%P %m %T@ %y\\n' | LC_ALL=C sort"


def test_a_machine_comes_up_with_a_large_cache(box: Workspace, home: Home, tmp_path: Path) -> None:
    coursier_cache(tmp_path / ".cache/coursier")
    (tmp_path / ".ivy2/local").mkdir(parents=True)
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    warm = Workspace(path, home.env)
    warm.config(CONFIG.partition("[network]")[0].replace('"1GiB"', '"2GiB"') + '[network]\nmode = "off"\n')
    own = {f"XDG_{name}_HOME": str(home.path / place) for name, place in XDG.items()}
    warm.extra |= {"HOME": str(tmp_path), **own}
    shutil.copy(box.path / ".nixbox/nixbox.lock", path / ".nixbox/nixbox.lock")
    try:
        said = warm("up").stderr
        assert "seeding ~/.cache/coursier" in said
        assert "warning" not in said, said
        for look in (CONTENT, META):
            env = {**os.environ, "HOME": str(tmp_path)}
            mine = subprocess.run(["sh", "-c", look], env=env, capture_output=True, text=True, check=True).stdout
            theirs = warm.guest(look)
            lacking, strange = (
                {*one.splitlines()} - {*other.splitlines()} for one, other in ((mine, theirs), (theirs, mine))
            )
            assert not lacking | strange, seeded_state(warm, lacking, strange)
            assert mine.count("\n") == theirs.count("\n") >= 20_000
        assert warm.guest('find ~/.cache ~/.ivy2 ! -user "$(id -u)" -o -name "*.lock"') == ""
        again = warm("up", "--json")
        assert "seeding" not in again.stderr
        # Those that this host has no source of wait for one.
        waiting = ["~/.npm", "~/.cache/uv", "~/.cargo/registry"]
        assert json.loads(again.stdout)["seeds"] == {"seeded": [], "failed": [], "pending": waiting}
    finally:
        warm("rm", "--yes", code=None)
        shutil.rmtree(path)


# --- scala-sbt -------------------------------------------------------------------------------------------


def test_sbt_is_fetched_at_its_first_call(box: Workspace, server: Path) -> None:
    refused = box("run", "--", "sbt", "--version", code=1).stderr
    assert "its launcher cannot be fetched from" in refused
    # A launcher that says what it was started with, made by the guest's own compiler.
    box.guest(
        "mkdir -p /tmp/launch && cd /tmp/launch\n"
        'echo "class L { public static void main(String[] a) { System.out.println("\\\n'
        '  "String.join(\\" \\", a) + \\" \\" + System.getProperty(\\"x\\") + \\" \\" '
        '+ System.getenv(\\"SBT_CREDENTIALS\\")); } }" >L.java\n'
        "javac L.java"
    )
    compiled = box("run", "--", "base64", "-w0", "/tmp/launch/L.class").stdout
    jar = server / "maven" / "org" / "scala-sbt" / "sbt-launch" / SBT / f"sbt-launch-{SBT}.jar"
    jar.parent.mkdir(parents=True)
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\nMain-Class: L\n")
        archive.writestr("L.class", base64.b64decode(compiled))
    write(Path(f"{jar}.sha1"), "0" * 40)
    assert "not what its .sha1 says" in box("run", "--", "sbt", code=1).stderr
    assert box.guest("ls -A ~/.cache/sbt/launch") == ""
    write(Path(f"{jar}.sha1"), hashlib.sha1(jar.read_bytes()).hexdigest())
    said = box("run", "--", "sbt", "-Dx=a b", "clean", "test").stdout.split("\n")[0]
    assert said.startswith("clean test a b /home/") and said.endswith("/.sbt/.credentials")


def test_maven_credentials_are_in_memory_and_go_with_their_variables(box: Workspace, home: Home) -> None:
    box.guest("maven-credentials")  # as sbt does
    said = box.guest("stat -f -c %T -L .sbt/.credentials; stat -c %a -L .sbt/.credentials; cat .sbt/.credentials")
    text = f"realm=Some Realm\nhost=repo.example\nuser=us\\\\er\npassword={PASSWORD}\n"
    assert said == f"tmpfs\n600\n{text}"
    said = box.guest("cd .config/coursier; stat -c %a -L credentials.properties; cat credentials.properties")
    lines = ["host=repo.example", "username=us\\\\er", f"password={PASSWORD}", "realm=Some Realm"]
    assert said == "600\n" + "".join(f"nixbox.{line}\n" for line in lines)
    found = only_in_memory(box, home, PASSWORD).split()
    assert found and all(place.startswith(("/dev/shm/nixbox-", "/run/nixbox/env")) for place in found)

    box.config(CONFIG + MAVEN.replace("MAVEN_REPO_USER", "MAVEN_REPO_USERS"))
    box("env", "push")
    assert "belong together" in box("run", "--", "maven-credentials").stderr
    left = "ls -A .sbt .config/coursier; ls -A /dev/shm/nixbox-*/scala-sbt 2>/dev/null || :"
    assert box.guest(left).split() == [".config/coursier:", ".sbt:"]
    # A file of the guest's own is left alone.
    box.guest("echo own >.sbt/.credentials")
    box.config(CONFIG + MAVEN)
    box("env", "push")
    assert "stays as it is" in box("run", "--", "maven-credentials").stderr
    assert box.guest("cat .sbt/.credentials; rm .sbt/.credentials") == "own\n"
    box.config(CONFIG)
    box("up")
    assert box("run", "--", "maven-credentials").stderr == ""
    assert box.guest(left).split() == [".config/coursier:", ".sbt:"]


# --- aws -------------------------------------------------------------------------------------------------

HELPER = '"$HOME/.aws/nixbox-credentials"'


def test_aws_login_gives_temporary_credentials_and_renews_them(box: Workspace, home: Home, aws: Aws) -> None:
    box.guest("mkdir -p .aws; printf '[profile own]\\nregion = x-own-1\\n' >.aws/config")
    first = aws.give(1, timedelta(hours=1))
    aws.calls()
    said = box("aws", "login", "dev").stderr
    assert "Successfully logged into" in said and "`box` has credentials of `dev` until" in said
    assert ["sso", "login", "--profile", "dev"] in aws.calls()

    # The real CLI of the guest finds them, as the default profile too, and when they end.
    known = json.loads(box("run", "--", "aws", "configure", "export-credentials", timeout_s=200).stdout)
    assert (known["AccessKeyId"], known["SecretAccessKey"]) == ("ASIAEXAMPLE1", first)
    assert datetime.fromisoformat(known["Expiration"]) > datetime.now(UTC)
    config = box.guest("cat .aws/config")
    assert config.startswith("[profile own]\nregion = x-own-1\n")
    assert "region = eu-central-1" in config
    assert box.guest("stat -c %a /dev/shm/nixbox-*/aws/dev.json") == "600\n"
    found = only_in_memory(box, home, first).split()
    assert found and all(place.startswith("/dev/shm/nixbox-") for place in found)

    # Another login: nobody logs in who is, and a program that runs sees the new ones.
    second = aws.give(2, timedelta(hours=1))
    box("aws", "login", "role")
    assert not [call for call in aws.calls() if call[:2] == ["sso", "login"]]
    assert json.loads(box.guest(f"{HELPER} role"))["SecretAccessKey"] == second
    assert json.loads(box.guest(f"{HELPER} dev"))["SecretAccessKey"] == first
    box("aws", "login", "dev")
    assert json.loads(box.guest(f"{HELPER} dev"))["SecretAccessKey"] == second
    assert box.guest("grep -c nixbox-credentials .aws/config; grep '^\\[' .aws/config").split("\n")[:-1] == [
        "3",
        "[profile own]",
        "[profile dev]",
        "[profile role]",
        "[default]",
    ]

    # Expired: the host's session is asked first, then its user; the guest says what to do.
    aws.give(3, timedelta(seconds=-5))
    assert "have expired" in box("aws", "login", "dev", code=1).stderr
    aws.log_out()
    third = aws.give(4, timedelta(hours=1))
    aws.calls()
    box("aws", "login", "role")
    assert ["sso", "login", "--profile", "dev"] in aws.calls()
    assert json.loads(box.guest(f"{HELPER} role"))["SecretAccessKey"] == third
    box.guest("""f=/dev/shm/nixbox-$(id -u)/aws/role.json; sed -i 's/"20[0-9][0-9]-/"2001-/' "$f" """)
    assert "on the host: nixbox aws login role" in box("run", "--", "sh", "-c", f"{HELPER} role", code=1).stderr


def test_aws_refuses_in_words(box: Workspace, aws: Aws) -> None:
    def refused(*words: str, code: int = 1) -> str:
        return box("aws", *words, code=code).stderr

    assert "long-lived key" in refused("login", "keys")
    assert "no AWS profile `nope`" in (said := refused("login", "nope")) and "dev, role" in said
    aws.log_out()
    assert "the SSO login of `broken` failed" in refused("login", "broken")
    assert "usage:" in refused("login", "--no-browser", code=2)
    assert "has a name that the guest" in refused("login", "../x")
    box.guest("printf '[profile dev]\\nregion = mine-1\\n' >>.aws/config")
    assert "[profile dev] already" in refused("login", "dev")
    box.guest("rm .aws/config")
    box("aws", "login", "dev")
    without = {"PATH": ":".join(part for part in box.extra["PATH"].split(":") if not (Path(part) / "aws").exists())}
    poor = dataclasses.replace(box, extra=box.extra | without)
    assert "this host has no `aws`" in poor("aws", "login", "dev", code=3).stderr


def test_ecr_login_puts_a_password_into_memory(box: Workspace, home: Home, aws: Aws) -> None:
    box("aws", "login", "dev")
    said = box("aws", "ecr-login", "--profile", "dev").stderr
    registry = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
    assert f"can use {registry} for twelve hours" in said
    other = "999999999999.dkr.ecr.us-east-1.amazonaws.com"
    aws.calls()
    box("aws", "ecr-login", "--profile", "dev", other)
    assert ["ecr", "get-login-password", "--region", "us-east-1", "--profile", "dev"] in aws.calls()
    config = json.loads(box.guest("cat .docker/config.json"))
    password = (aws.state / "password").read_text()
    auth = base64.b64encode(f"AWS:{password}".encode()).decode()
    assert config == {"auths": {registry: {"auth": auth}, other: {"auth": auth}}}
    assert only_in_memory(box, home, auth).split() == box.guest("readlink .docker/config.json").split()

    assert "neither a region nor" in box("aws", "ecr-login", "Frankfurt", code=1).stderr
    aws.log_out()
    assert "nixbox aws login dev renews" in box("aws", "ecr-login", "--profile", "dev", code=1).stderr
    (aws.state / "session").touch()
    box.guest("rm .docker/config.json; echo '{}' >.docker/config.json")
    assert "of its own, on its disk" in box("aws", "ecr-login", "--profile", "dev", code=1).stderr
    assert box.guest("cat .docker/config.json; rm .docker/config.json") == "{}\n"


# --- claude-code and python-uv ---------------------------------------------------------------------------


def test_claude_code_is_installed_at_its_first_call_and_gets_the_chosen_part(box: Workspace, home: Home) -> None:
    done = box("run", "--timeout", "300", "--", "claude", "-p", "hello")
    assert done.stdout == "claude says -p hello\n"
    assert "installing the npm package" in done.stderr
    assert box("run", "--", "claude", "again").stderr == ""
    assert box.guest("ls -A .local/share") == "claude-code\n"

    said = box("claude-code", "sync-config").stderr
    listing = "cd .claude; find . ! -type d | sort"
    wanted = ["./CLAUDE.md", "./agents/deep/two.md", "./commands/one.md", "./settings.json"]
    assert box.guest(listing).split() == wanted
    assert json.loads(box.guest("cat .claude/settings.json")) == {
        "model": "opus",
        "permissions": {"allow": ["Bash(make:*)"]},
    }
    overlay = box.machine() / "overlay.img"
    box.guest("sync")
    assert test_credentials.holding(NO_SECRET.encode(), [overlay]) == [overlay]  # the search does look there
    for word in ("commands/link.md (a link)", "settings.json: env", "settings.json: tomorrow", "apiKeyHelper"):
        assert word in said
    assert only_in_memory(box, home, SETTINGS_SECRET) == ""
    assert only_in_memory(box, home, REFRESH) == ""

    box("claude-code", "sync-config", "--credentials")
    assert REFRESH in box.guest("cat .claude/.credentials.json")
    assert only_in_memory(box, home, REFRESH).split() == box.guest("readlink .claude/.credentials.json").split()
    # With the machine's memory it is gone, and the next call takes the link away.
    box.guest("rm -r /dev/shm/nixbox-*/claude-code; claude; test ! -L .claude/.credentials.json")
    assert "usage:" in box("claude-code", "sync-config", "--all", code=2).stderr


def test_uv_is_installed_at_its_first_call(box: Workspace) -> None:
    done = box("run", "--timeout", "300", "--", "uv", "sync", "a b")
    assert done.stdout == "uv 9.9.9 sync a b\n", done.stderr
    assert "installing it from PyPI" in done.stderr
    assert box("run", "--", "uvx", "ruff").stdout == "uvx 9.9.9 ruff\n"


def test_commands_need_a_running_machine_and_are_in_the_help(box: Workspace, aws: Aws) -> None:
    said = box("--help").stdout
    assert all(name in said for name in ("aws", "claude-code", "scala-sbt"))
    assert "ecr-login" in box("aws", "--help").stdout
    box("down")
    aws.calls()
    assert "is not running" in box("aws", "login", "dev", code=4).stderr
    assert aws.calls() == []  # nobody logs in for nothing
    assert "is not running" in box("claude-code", "sync-config", code=4).stderr
    box("scala-sbt", "warm-cache", code=4)
