"""What GitHub is asked: which commit a reference means, and its tree, into the Nix store.

The questions are those of nix-prefetch-github's library (`git ls-remote`, `nix-prefetch-url` on the archive); the
processes that it wants are started by `run`, and what they complain of is put into words here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nixbox import run
from nixbox.config.names import shown
from nixbox.errors import ConfigError, NixboxError
from nixbox.image import store

if TYPE_CHECKING:
    from nixbox.config.refs import Github

STORE_NAME = "source"  # as Nix's fetchTarball and nixpkgs' fetchFromGitHub call what they unpack
_ASK_S = 60.0
_DATE_S = 5.0
# By default Nix makes five attempts and waits 300 seconds for a connection and for each byte.
_LIMITS = {"connect-timeout": "15", "stalled-download-timeout": "60", "download-attempts": "3"}
# git gives up when less than a byte a second comes for 20 seconds (git-config(1), http.lowSpeedTime).
_GIT_ENV = {"LC_ALL": "C", "GIT_HTTP_LOW_SPEED_LIMIT": "1", "GIT_HTTP_LOW_SPEED_TIME": "20"}
_GIT_ENV |= {"GCM_INTERACTIVE": "never"}  # for a name that is not there a credential manager would open a window
# What a user may have set up for git; nothing that names a repository, a program or an unchecked connection.
_GIT_PASSED = ("GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "GIT_PROXY_SSL_CAINFO", "SSH_AUTH_SOCK")
# No repository is there whose configuration git would follow: a workspace's own may be a guest's work.
_NOWHERE = Path("/")
# In the words of git and curl, and of Nix, whose numbers are curl's (libcurl-errors(3)).
_TLS = re.compile(r"certificate|SSL CA cert|\((?:51|58|60|77)\)", re.IGNORECASE)
_LIMIT = re.compile(r"(?:HTTP error|returned error:) (?:403|429)|rate limit|too many requests", re.IGNORECASE)
_MISSING = re.compile(
    r"(?:HTTP error|returned error:) (?:401|404|410)|terminal prompts disabled|could not read Username"
    r"|Authentication failed|repository .* not found|Repository not found",
    re.IGNORECASE,
)
_BROKEN = re.compile(r"(?:HTTP error|returned error:) (5\d\d)")
_NETWORK = re.compile(
    r"could(?: not|n't) (?:resolve|connect)|failed to connect|connection (?:refused|timed out|reset)|unreachable"
    r"|timed out|timeout was reached|too slow|empty reply|non-properly terminated|unexpected eof"
    r"|\((?:5|6|7|28|35|52|55|56)\)",
    re.IGNORECASE,
)


class _Commands:
    """nix-prefetch-github's CommandRunner: starts what it wants, and raises what it would not tell."""

    def __init__(self, place: Github) -> None:
        self.place = place

    def run_command(
        self,
        command: Sequence[str],
        cwd: str | None = None,
        environment_variables: Mapping[str, str] | None = None,
        merge_stderr: bool = False,
    ) -> tuple[int, str]:
        match command:
            case ["nix-prefetch-url", "--unpack", str(_)]:
                return 0, _prefetch(self.place, command[2])
            case ["git", *_]:
                env = {name: os.environ[name] for name in _GIT_PASSED if name in os.environ}
                env |= _GIT_ENV | dict(environment_variables or {})
                done = run.run(command, timeout_s=_ASK_S, check=False, env=env, cwd=_NOWHERE)
                if done.code != 0:
                    raise failure(self.place, done.stderr)
            case _:
                done = run.run(command, timeout_s=_ASK_S, env=store.env(), cwd=_NOWHERE)
        return done.code, done.stdout


def _repository(place: Github) -> Any:
    from nix_prefetch_github.interfaces import GithubRepository

    return GithubRepository(place.owner, place.repo)


def _silent() -> Any:
    """A logger that says nothing: the library's own is the root logger."""
    import logging

    return logging.Logger("nix-prefetch-github", logging.CRITICAL + 1)


def resolve(place: Github) -> str:
    """The commit (40 hex digits) that a reference means now. Raises ConfigError when there is none, NixboxError."""
    if place.rev is not None:
        return place.rev
    from nix_prefetch_github.list_remote_factory import ListRemoteFactoryImpl
    from nix_prefetch_github.revision_index import RevisionIndexImpl

    remote = ListRemoteFactoryImpl(_Commands(place)).get_list_remote(_repository(place))
    index = RevisionIndexImpl(remote)
    name = place.ref or "HEAD"
    # Of a tag with a message, what it stands on; the library does so for a short name only.
    peeled = index.get_revision_by_name(f"{name}^{{}}") if name.startswith("refs/tags/") else None
    rev: str | None = peeled or index.get_revision_by_name(name)
    if rev is not None and re.fullmatch(r"[0-9a-f]{40}", rev):
        return rev
    if place.ref is None:
        raise ConfigError(f"{place}: the repository has no commit yet", hint="name another one in `plugins`")
    names = [*remote.heads, *(tag for tag in remote.tags if not tag.endswith("^{}"))] if remote else []
    known = ", ".join(map(shown, names[:8])) + (" …" if names[8:] else "")
    hint = f"it has {known}" if known else "it has none at all"
    if re.fullmatch(r"[0-9a-fA-F]{4,39}", place.ref):
        hint = "a commit is named by all of its 40 digits"
    raise ConfigError(f"{place}: {place.repository} has no branch and no tag {shown(place.ref)}", hint=hint)


def prefetch(place: Github, rev: str) -> str:
    """Bring a commit's tree into the store; returns its NAR hash (`sha256-…`). Raises ConfigError, NixboxError."""
    from nix_prefetch_github.hash_converter import HashConverterImpl
    from nix_prefetch_github.interfaces import PrefetchedRepository, PrefetchOptions
    from nix_prefetch_github.list_remote_factory import ListRemoteFactoryImpl
    from nix_prefetch_github.prefetch import PrefetcherImpl
    from nix_prefetch_github.revision_index_factory import RevisionIndexFactoryImpl
    from nix_prefetch_github.url_hasher.nix_prefetch import NixPrefetchUrlHasherImpl

    commands = _Commands(place)
    # Not the library's own choice of a hasher: without nixpkgs' nix-prefetch-git it evaluates nixpkgs.
    hasher = NixPrefetchUrlHasherImpl(commands, _silent(), HashConverterImpl(commands))
    prefetcher = PrefetcherImpl(hasher, RevisionIndexFactoryImpl(ListRemoteFactoryImpl(commands)))
    result = prefetcher.prefetch_github(_repository(place), rev, PrefetchOptions())
    if not isinstance(result, PrefetchedRepository):
        raise NixboxError(f"{place}: {result.reason}", hint="does `nix hash to-sri` work on this host?")
    found: str = result.hash_sum
    return found


def fetch(place: Github, rev: str, nar_hash: str) -> None:
    """Bring the tree of a commit into the store, if it is the one of that hash. Raises ConfigError, NixboxError."""
    _prefetch(place, f"https://github.com/{place.repository}/archive/{rev}.tar.gz", nar_hash)


def _prefetch(place: Github, url: str, *nar_hash: str) -> str:
    """Download and unpack an archive into the store, to the path that fetchTarball would give it."""
    options = [word for name, value in _LIMITS.items() for word in ("--option", name, value)]
    argv = ["nix-prefetch-url", *options, "--type", "sha256", "--unpack", "--name", STORE_NAME, url, *nar_hash]
    done = run.stream(argv, env=store.env(), cwd=_NOWHERE)
    if done.code != 0:
        raise failure(place, done.stderr, url)
    return done.stdout


def commit_date(place: Github, rev: str) -> str | None:
    """The day of a commit (`2026-07-04`, UTC); None when GitHub's API does not say it at once.

    It answers 60 times an hour without a $GITHUB_TOKEN; a pin is as good without its date.
    """
    import socket

    from nix_prefetch_github.github import GithubAPIImpl

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DATE_S)  # the library's request has no limit of its own
    try:
        date = GithubAPIImpl(_silent(), os.environ).get_commit_date(_repository(place), rev)
        return None if date is None else date.strftime("%Y-%m-%d")
    except Exception:  # whatever a strange answer makes of the library: it is only the date
        return None
    finally:
        socket.setdefaulttimeout(previous)


def failure(place: Github, said: str, url: str = "") -> NixboxError:
    """What git or Nix said, as an error of ours; `url` is what was fetched."""
    # Nix shows every attempt that failed; the last line counts. git's own words come after the server's.
    lines = [line for line in said.strip().splitlines() if not line.startswith(("warning:", "path is"))]
    text = "\n".join(lines) or said.strip() or "nothing was said"
    if "hash mismatch" in text:
        return NixboxError(
            f"{place}: what GitHub has for this commit is not what the lock says",
            hint="restore nixbox.lock from version control; if it is right, do not use what GitHub serves now",
        )
    if "No space left on device" in text:
        return NixboxError(f"{place}: no space left to fetch it", hint="free some space and try again")
    if _TLS.search(text):
        return NixboxError(
            f"{place}: github.com does not prove who it is: {text}",
            hint="is something between you and GitHub? A CA of your own goes into $NIX_SSL_CERT_FILE, $SSL_CERT_FILE "
            "and $GIT_SSL_CAINFO",
        )
    if _LIMIT.search(text):
        return NixboxError(
            f"{place}: GitHub refuses to answer for now: {text}", hint="wait some minutes and try again"
        )
    if _MISSING.search(text):
        what = "has no such commit, or there is no such repository" if url else "is not there"
        return ConfigError(
            f"{place}: {place.repository} {what}, or it is private",
            hint="look at its name; of a private one, clone it and name its directory in `plugins`",
        )
    if broken := _BROKEN.search(text):
        return NixboxError(f"{place}: GitHub answers with error {broken[1]}", hint="try again later")
    if _NETWORK.search(text):
        return NixboxError(
            f"{place}: GitHub cannot be reached: {text}",
            hint="a plugin that is pinned and in the Nix store needs no network; this one has to be fetched once",
        )
    return NixboxError(f"{place}: it could not be fetched: {text}", hint="`nixbox doctor` looks at this host's Nix")
