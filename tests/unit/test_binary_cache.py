"""What a command line may call a binary cache, and what is said of one that fails."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from nixbox import ed25519, run
from nixbox.errors import ConfigError, HostError
from nixbox.image import binary_cache, nixkey, store

KEY = nixkey.SecretKey("k-1", b"k" * 32).public


@pytest.mark.parametrize(
    "url",
    [
        "file:///srv/cache",
        "http://127.0.0.1:80",
        "https://cache.example/x?priority=10",
        "s3://b?region=x",
        "ssh://a@b",
    ],
)
def test_urls_of_caches_are_taken(url: str) -> None:
    assert binary_cache.cache(url, [KEY], unsigned=False).url == url


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("/srv/cache", "file:///srv/cache"),  # to Nix: a store of another root
        ("", "file://"),
        ("daemon", "file://"),
        ("ftp://x/y", "one of file"),
        ("file://srv", "file:///srv/cache"),
        ("http:///x", "http://HOST"),
        ("http://a b", "one of file"),
        ("http://a\x1b", "one of file"),
        ("http://[2J\x1b", "file:///srv"),
    ],
)
def test_other_urls_are_refused_with_a_mend(url: str, mend: str) -> None:
    with pytest.raises(ConfigError) as refused:
        binary_cache.check_url(url, "--store")
    assert "--store" in refused.value.message and "\x1b" not in refused.value.message
    assert refused.value.hint is not None and mend in refused.value.hint


def test_signatures_are_asked_for_or_not() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        binary_cache.cache("file:///x", [KEY], unsigned=True)
    with pytest.raises(ConfigError, match="no public key"):
        binary_cache.cache("file:///x", ["cache.example-1"], unsigned=False)


def test_parameters_join_those_that_are_there(tmp_path: Path) -> None:
    key = tmp_path / "a key"
    secret = nixkey.SecretKey("k-1", b"k" * 32)
    key.write_text(f"k-1:{base64.b64encode(secret.seed + ed25519.public_half(secret.seed)).decode()}\n")
    quoted = str(key).replace(" ", "%20")
    target = binary_cache._target
    assert target("file:///x", None) == "file:///x?compression=zstd"
    assert target("file:///x?compression=xz", None) == "file:///x?compression=xz"
    assert target("https://x?a=b", key) == f"https://x?a=b&compression=zstd&secret-key={quoted}"
    assert target("ssh://x", None) == "ssh://x"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("error: cannot add path '/nix/store/x' because it lacks a valid signature", "not signed by a trusted key"),
        ("error: cannot add path 'x' because it lacks a signature by a trusted key", "not signed by a trusted key"),
        ("error: hash mismatch importing path '/nix/store/x'", "is damaged, or was changed"),
        ("error: unable to download 'u': Couldn't connect to server (7)", "cannot be used"),
        ("error: writing to file: No space left on device", "no space left"),
        ("warning: x\nerror: something \x1b[31melse", "something else"),
    ],
)
def test_failures_are_said_in_words(said: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "through_daemon", lambda: False)
    failure = binary_cache._failure("file:///x", run.Completed(1, "", said))
    assert words in failure.message and "\x1b" not in failure.message


def test_a_daemon_has_its_own_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "through_daemon", lambda: True)
    failure = binary_cache._failure("file:///x", run.Completed(1, "", "error: … lacks a valid signature"))
    assert isinstance(failure, HostError) and "trusted-users" in str(failure.hint)


@pytest.mark.parametrize(
    ("remote", "through"),
    [("daemon", True), ("unix:///run/nix", True), ("/home/me/store", False), ("ssh://x", False)],
)
def test_who_does_the_work(remote: str, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIX_REMOTE", remote)
    store.private_root.cache_clear()
    try:
        assert store.through_daemon() is through
    finally:
        store.private_root.cache_clear()


def test_hashes_are_written_both_ways() -> None:
    for number in range(64):
        digest = hashlib.sha256(bytes([number])).hexdigest()
        assert store.hash_hex(store.hash_base32(digest)) == digest
        assert store.hash_hex(f"sha256:{digest}") == digest
