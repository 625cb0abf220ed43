"""Nix binary caches: whether one has an image, taking it from there, putting it there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from nixbox import run
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.image import nixkey, store
from nixbox.image.build import Cache, agent
from nixbox.report import harmless

_SCHEMES = ("file", "http", "https", "s3", "ssh", "ssh-ng")
_ASK_S = 120.0
# Nix remembers what a cache had, and had not, for hours; what was pushed a minute ago is to be found.
_ASK_ANEW = ("--option", "narinfo-cache-negative-ttl", "0", "--option", "narinfo-cache-positive-ttl", "0")


class CacheError(NixboxError):
    """A binary cache cannot be reached, or what it gave is refused."""


def check_url(url: str, option: str) -> str:
    """A cache's URL as Nix takes it. Raises ConfigError: a bare path means another kind of store to Nix."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{option}: {harmless(url)!r} is no URL: {error}", hint="file:///srv/cache") from None
    if parts.scheme not in _SCHEMES or any(c.isspace() or not c.isprintable() for c in url):
        mend = f"file://{Path(url).absolute()}" if not parts.scheme else f"one of {', '.join(_SCHEMES)}"
        raise ConfigError(f"{option} takes the URL of a Nix binary cache, not {harmless(url)!r}", hint=mend)
    if parts.scheme == "file" and not parts.path.startswith("/"):
        raise ConfigError(f"{option}: {harmless(url)} has no absolute path", hint="file:///srv/cache")
    if parts.scheme in ("http", "https", "ssh", "ssh-ng", "s3") and not parts.netloc:
        raise ConfigError(f"{option}: {harmless(url)} names no host", hint=f"{parts.scheme}://HOST/…")
    return url


def check_builders(spec: str) -> str:
    """Remote builders as Nix takes them (nix.conf, `builders`). Raises ConfigError for those that can be none."""
    machines = [words for line in spec.replace(";", "\n").splitlines() if (words := line.split())]
    if not machines or any(not c.isprintable() and c != "\n" for c in spec):
        raise ConfigError("--builders names no builder", hint="--builders ssh://HOST, or @FILE (nix.conf: builders)")
    for words in machines:
        if words[0].startswith("@") and not Path(words[0][1:]).is_file():
            raise ConfigError(f"--builders: there is no file {words[0][1:]}")
        if words[0].partition("?")[0] in ("localhost", "ssh://localhost", "ssh-ng://localhost"):
            # Nix then runs no ssh but itself, on the very store whose lock it holds.
            raise ConfigError(
                f"--builders: to Nix {words[0]} is this host's own store, and it would wait for itself for ever",
                hint="without --builders it builds here; another name (ssh://127.0.0.1) goes by SSH",
            )
    return spec


def cache(url: str, keys: Sequence[str], unsigned: bool) -> Cache:
    """The cache that a command line names. Raises ConfigError."""
    if keys and unsigned:
        raise ConfigError("--public-key asks for signatures and --unsigned for none; choose one")
    for key in keys:
        nixkey.public_key(key)
    return Cache(check_url(url, "--from"), tuple(key.strip() for key in keys), unsigned)


def has(source: Cache, path: Path) -> bool:
    """Whether the cache has a store path. Raises CacheError when it cannot be asked."""
    argv = ["nix", *store.setup().options, *_ASK_ANEW, "path-info", "--store", source.url, str(path)]
    place = urlsplit(source.url).path
    # Nix 2.8 takes a file's URL to the letter, newer ones decode it.
    if source.url.startswith("file:") and not (Path(place).is_dir() or Path(unquote(place)).is_dir()):
        raise CacheError(f"there is no binary cache at {source.url}", hint="`nixbox build --store URL` makes one")
    done = run.run(argv, timeout_s=_ASK_S, check=False, env=store.env() | agent(source.url))
    if done.code == 0:
        return True
    if re.search(r"is not valid|does not exist in (the )?binary cache", done.stderr):
        return False
    raise _failure(source.url, done)


def take(source: Cache, path: Path) -> None:
    """Copy a store path and all that it refers to from the cache. Nix checks every hash, and signatures unless
    `source` says otherwise; what was copied before a failure is whole and belongs to nobody. Raises CacheError.
    """
    argv = ["nix", *store.setup().options, *_ASK_ANEW]
    if source.keys:
        argv += ["--option", "trusted-public-keys", " ".join(source.keys)]
    argv += ["--option", "require-sigs", "true", "copy", "--from", source.url, str(path)]
    argv += ["--no-check-sigs"] if source.unsigned else []
    done = run.stream(argv, env=store.env() | agent(source.url))
    if done.code != 0:
        raise _failure(source.url, done)


def push(url: str, path: Path, key: Path | None = None) -> None:
    """Copy a store path and all that it refers to into a cache, signed with the key in a file if one is named.

    Raises CacheError, ConfigError.
    """
    argv = ["nix", *store.setup().options, *_ASK_ANEW, "copy", "--to", _target(url, key), str(path)]
    done = run.stream(argv, env=store.env() | agent(url))
    if done.code != 0:
        raise _failure(url, done)


def _target(url: str, key: Path | None) -> str:
    """The URL with what Nix takes as a cache's parameters: how to compress, with which key to sign."""
    said = urlsplit(url).query
    more = []
    if urlsplit(url).scheme not in ("ssh", "ssh-ng") and "compression=" not in said:
        more.append("compression=zstd")  # xz, Nix's default: 137 s for an image that this does in 3
    if key is not None:
        nixkey.secret_key(key)  # Nix itself would say less
        more.append(f"secret-key={quote(str(key.absolute()), safe='/')}")
    joined = "&".join(([said] if said else []) + more)
    return f"{url.partition('?')[0]}?{joined}" if joined else url


def _failure(url: str, done: run.Completed) -> NixboxError:
    """What Nix said of a cache, in words of ours where they are known."""
    plain = harmless(re.sub(r"\x1b\[[0-9;]*m", "", done.stderr), "\n")
    errors = [line.strip() for line in plain.splitlines() if "error:" in line]
    said = errors[-1].partition("error:")[2].strip() if errors else plain.strip()[-500:]
    if re.search(r"lacks a (valid signature|signature by a trusted key)|no signature.*trusted", plain):
        if store.through_daemon():
            return HostError(
                f"the Nix daemon refuses what is not signed by a key that it trusts: {said}",
                hint="in its nix.conf: trusted-users = YOU; or trusted-public-keys = NAME:KEY and a signed image",
            )
        return CacheError(
            f"what {url} has is not signed by a trusted key: {said}",
            hint="--public-key NAME:KEY names the key that signed it; --unsigned takes it as it is",
        )
    if "No space left on device" in plain:
        return CacheError(f"no space left while copying: {said}", hint="free some space and try again")
    if "hash mismatch" in plain or "has wrong hash" in plain:
        return CacheError(f"{url} is damaged, or was changed: {said}", hint="build the image, and push it anew")
    if re.search(
        r"unable to (download|upload)|[Cc]ouldn't connect|[Cc]ould not resolve|cannot connect|Failed to connect",
        plain,
    ):
        return CacheError(f"{url} cannot be used: {said}", hint="is it there? Without it the image is built here")
    return CacheError(f"{url}: {said} (Nix exited with {done.code})")
