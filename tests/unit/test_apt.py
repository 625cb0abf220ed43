"""Which mirror the host's apt sources name, and what apt's own output says about packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixbox.errors import ConfigError, NixboxError
from nixbox.image import apt
from nixbox.image.apt import AptRoot, Mirrors

DEBIAN = "http://mirror.example/debian"
SECURITY = "http://security.example/debian-security"
SHA = "ab" * 32


def etc(directory: Path, files: dict[str, str]) -> Path:
    """An /etc/apt with these files; `{dir}` in a text is its own path."""
    (directory / "sources.list.d").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{dir}", str(directory)))
    return directory


BULLSEYE = f"""\
# deb cdrom:[Debian GNU/Linux 11.7.0 _Bullseye_ - Official amd64 NETINST 20230429-11:50]/ bullseye main

#deb cdrom:[Debian GNU/Linux 11.7.0 _Bullseye_ - Official amd64 NETINST 20230429-11:50]/ bullseye main

deb {DEBIAN}/ bullseye main
deb-src {DEBIAN}/ bullseye main

deb {SECURITY} bullseye-security main
deb-src {SECURITY} bullseye-security main

# bullseye-updates, to get updates before a point release is made;
deb {DEBIAN}/ bullseye-updates main
"""
BOOKWORM = f"""\
deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {DEBIAN} bookworm main non-free-firmware
deb {SECURITY} bookworm-security main non-free-firmware # security
"""
CONTAINER = f"""\
Types: deb
# http://snapshot.example/archive/debian/20240101T000000Z
URIs: {DEBIAN}
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
# http://snapshot.example/archive/debian-security/20240101T000000Z
URIs: {SECURITY}
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
TRIXIE = f"""\
Types: deb deb-src
URIs: {DEBIAN}/
Suites: trixie trixie-updates
Components: main contrib
 non-free non-free-firmware
Enabled: yes
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF:x
 -----END PGP PUBLIC KEY BLOCK-----
\t
Types: deb
URIs: {SECURITY}/
Suites: trixie-security
Components: main
"""
CLOUD = """\
Types: deb deb-src
URIs: mirror+file:{dir}/mirrors/debian.list
Suites: bookworm bookworm-updates bookworm-backports
Components: main

Types: deb deb-src
URIs: mirror+file:{dir}/mirrors/debian-security.list
Suites: bookworm-security
Components: main
"""
THIRD_PARTIES = {
    "sources.list.d/docker.list": "deb [arch=amd64] https://docker.example/linux/debian bookworm stable\n",
    "sources.list.d/google-cloud.list": "deb https://cloud.example/apt cloud-sdk main\n",
    "sources.list.d/kubernetes.list": "deb [signed-by=/k.gpg] https://k8s.example/core:/stable:/v1.29/deb/ /\n",
    "sources.list.d/nginx.list": "deb https://nginx.example/packages/debian bookworm nginx\n",
    "sources.list.d/nodesource.sources": "Types: deb\nURIs: https://node.example/node_20.x\n"
    "Suites: nodistro\nComponents: main\n",
    "sources.list.d/pgdg.list": "deb https://pg.example/pub/repos/apt bookworm-pgdg main\n",
}
UBUNTU = """\
Types: deb
URIs: http://ubuntu.example/ubuntu/
Suites: noble noble-updates noble-backports
Components: main restricted universe multiverse

Types: deb
URIs: http://security.example/ubuntu/
Suites: noble-security
Components: main restricted universe multiverse
"""


@pytest.mark.parametrize(
    "files",
    [
        {"sources.list": BULLSEYE},
        {"sources.list": BOOKWORM},
        {"sources.list.d/debian.sources": CONTAINER},
        {"sources.list": "# see sources.list.d\n", "sources.list.d/debian.sources": TRIXIE},
        {"sources.list": BULLSEYE, **THIRD_PARTIES},
        {"sources.list.d/debian.sources": TRIXIE, **THIRD_PARTIES},
        {
            "sources.list.d/debian.sources": CLOUD,
            "mirrors/debian.list": f"\n# the nearest\n{DEBIAN}/\tpriority:1\nhttp://other.example/debian\n",
            "mirrors/debian-security.list": f"{SECURITY}\n",
        },
    ],
    ids=["11", "12", "12-container", "13", "11-third-parties", "13-third-parties", "cloud"],
)
def test_the_mirrors_of_a_debian_host(tmp_path: Path, files: dict[str, str]) -> None:
    assert apt.host_mirrors(etc(tmp_path, files)) == Mirrors(DEBIAN, SECURITY)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"sources.list": ""},
        {"sources.list.d/ubuntu.sources": UBUNTU},
        {"sources.list": "deb http://ubuntu.example/ubuntu jammy main universe\n"},
        THIRD_PARTIES,
        {"sources.list": f"#deb {DEBIAN} bookworm main\n# deb {DEBIAN} sid main\ndeb-src {DEBIAN} bookworm main\n"},
        {"sources.list": f"deb {DEBIAN} bookworm contrib\n"},
        {"sources.list": "deb cdrom:[Debian GNU/Linux 12]/debian bookworm main\ndeb\ndeb x\n\x00\xff\n"},
        {"sources.list.d/debian.sources.disabled": CONTAINER, "sources.list.d/debian.list.save": BOOKWORM},
        {"sources.list.d/debian.sources": CLOUD},  # its mirror files are missing
        {"sources.list.d/debian.sources": CLOUD, "mirrors/debian.list": "# none\n\n"},
        {"sources.list.d/debian.sources": CONTAINER.replace("Types: deb\n", "Types: deb-src\n")},
        {"sources.list.d/debian.sources": CONTAINER.replace("URIs:", "#URIs:")},
        *(
            {"sources.list.d/d.sources": CONTAINER.replace("Suites:", f"Enabled: {w}\nSuites:")}
            for w in ("no", "False")
        ),
    ],
)
def test_hosts_without_a_debian_mirror(tmp_path: Path, files: dict[str, str]) -> None:
    assert apt.host_mirrors(etc(tmp_path, files)) is None


def test_no_etc_apt_at_all(tmp_path: Path) -> None:
    assert apt.host_mirrors(tmp_path / "none") is None


def test_a_disabled_stanza_hides_only_itself(tmp_path: Path) -> None:
    first = CONTAINER.replace("mirror.example", "off.example").replace("Types: deb\n", "Enabled: no\nTypes: deb\n")
    directory = etc(tmp_path, {"sources.list.d/a.sources": first, "sources.list.d/b.sources": CONTAINER})
    assert apt.host_mirrors(directory) == Mirrors(DEBIAN, SECURITY)


def test_an_empty_enabled_field_is_on(tmp_path: Path) -> None:
    text = CONTAINER.replace("Types: deb\n", "Enabled:\nTypes: deb\n")
    assert apt.host_mirrors(etc(tmp_path, {"sources.list.d/a.sources": text})) == Mirrors(DEBIAN, SECURITY)


def test_a_mirror_without_security(tmp_path: Path) -> None:
    directory = etc(tmp_path, {"sources.list": "deb file:/srv/debian sid main\n"})
    assert apt.host_mirrors(directory) == Mirrors("file:/srv/debian", None)


@pytest.mark.parametrize("line", ["deb https://a.example/apt/debian bookworm/server/7.0 main"])
def test_a_third_party_that_calls_itself_debian(tmp_path: Path, line: str) -> None:
    directory = etc(tmp_path, {"sources.list.d/a.list": f"{line}\n", "sources.list.d/debian.sources": CONTAINER})
    assert apt.host_mirrors(directory) == Mirrors(DEBIAN, SECURITY)


# --- which mirror serves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "security", "expected"),
    [
        (None, None, Mirrors("http://host.example/debian", "http://host.example/debian-security")),
        (f"{DEBIAN}/", None, Mirrors(DEBIAN, None)),  # a mirror of one's own need not have the host's security
        (DEBIAN, f"{SECURITY}/", Mirrors(DEBIAN, SECURITY)),
        (None, f"{SECURITY}/", Mirrors("http://host.example/debian", SECURITY)),
    ],
)
def test_the_config_wins_over_the_host(
    configured: str | None, security: str | None, expected: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Mirrors("http://host.example/debian", "http://host.example/debian-security")
    monkeypatch.setattr(apt, "host_mirrors", lambda: host)
    assert apt.mirrors(configured, security) == expected


def test_no_mirror_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_mirrors", lambda: None)
    with pytest.raises(ConfigError, match="no Debian mirror") as caught:
        apt.mirrors(None, None)
    assert "[debian] mirror" in (caught.value.hint or "")
    assert apt.mirrors(DEBIAN, None) == Mirrors(DEBIAN, None)


def test_repositories_for_nix() -> None:
    assert Mirrors(DEBIAN, SECURITY).as_dict() == {"debian": DEBIAN, "security": SECURITY}
    assert Mirrors(DEBIAN, None).as_dict() == {"debian": DEBIAN}


# --- the guest's own sources -----------------------------------------------------------------------------


def test_the_guests_sources_name_the_same_mirrors(tmp_path: Path) -> None:
    text = apt.guest_sources(Mirrors(DEBIAN, SECURITY), "trixie")
    assert "Suites: trixie trixie-updates\n" in text
    assert "Suites: trixie-security\n" in text
    assert apt.host_mirrors(etc(tmp_path, {"sources.list.d/nixbox.sources": text})) == Mirrors(DEBIAN, SECURITY)


def test_a_rolling_suite_has_neither_updates_nor_security() -> None:
    text = apt.guest_sources(Mirrors(DEBIAN, SECURITY), "sid")
    assert "Suites: sid\n" in text
    assert SECURITY not in text
    assert "updates" not in text


def test_a_mirror_of_the_host_alone_is_left_out() -> None:
    assert apt.guest_sources(Mirrors("file:/srv/debian", None), "trixie") == ""
    assert "file:" not in apt.guest_sources(Mirrors("file:/srv/debian", SECURITY), "trixie")


# --- what apt prints -------------------------------------------------------------------------------------


def root(tmp_path: Path, mirrors: Mirrors = Mirrors(DEBIAN, SECURITY)) -> AptRoot:  # noqa: B008 - frozen
    return AptRoot(tmp_path, "trixie", "amd64", mirrors)


def test_lines_of_print_uris(tmp_path: Path) -> None:
    lines = [
        f"'{SECURITY}/pool/updates/main/o/openssl/libssl3_3.0.15-1%7edeb12u1_amd64.deb'"
        f" libssl3_3.0.15-1~deb12u1_amd64.deb 2026000 SHA256:{SHA}",
        f"'{DEBIAN}/pool/main/g/gcc-12/libstdc%2b%2b6_12.2.0-14_amd64.deb'"
        f" libstdc++6_12.2.0-14_amd64.deb 1 SHA256:{SHA}",
        f"'{DEBIAN}/pool/main/u/util-linux/bsdutils_2.38.1-5_amd64.deb'"
        f" bsdutils_1%3a2.38.1-5_amd64.deb 91704 SHA256:{SHA}",
        f"'{DEBIAN}/pool/main/n/netbase/netbase_6.4_all.deb' netbase_6.4_all.deb 12 SHA256:{SHA}",
    ]
    found = root(tmp_path)._packages("\n".join(lines) + "\n")
    assert [(p.name, p.version, p.arch, p.repo, p.path) for p in found] == [
        ("bsdutils", "1:2.38.1-5", "amd64", "debian", "pool/main/u/util-linux/bsdutils_2.38.1-5_amd64.deb"),
        (
            *("libssl3", "3.0.15-1~deb12u1", "amd64", "security"),
            "pool/updates/main/o/openssl/libssl3_3.0.15-1~deb12u1_amd64.deb",
        ),
        ("libstdc++6", "12.2.0-14", "amd64", "debian", "pool/main/g/gcc-12/libstdc++6_12.2.0-14_amd64.deb"),
        ("netbase", "6.4", "all", "debian", "pool/main/n/netbase/netbase_6.4_all.deb"),
    ]
    assert [p.size for p in found] == [91704, 2026000, 1, 12]
    assert {p.sha256 for p in found} == {SHA}


def test_nothing_to_install(tmp_path: Path) -> None:
    assert root(tmp_path)._packages("") == []


def test_one_mirror_may_begin_like_the_other(tmp_path: Path) -> None:
    mirrors = Mirrors("http://m.example/debian", "http://m.example/debian-security")
    uri = f"{mirrors.security}/pool/updates/main/j/jq/jq_1_amd64.deb"
    found = root(tmp_path, mirrors)._packages(f"'{uri}' jq_1_amd64.deb 5 SHA256:{SHA}")
    assert [(p.repo, p.path) for p in found] == [("security", "pool/updates/main/j/jq/jq_1_amd64.deb")]


@pytest.mark.parametrize(
    "tail", ["5 ", "5", "5 MD5Sum:" + "a" * 32, "5 SHA1:" + "a" * 40, "5 SHA256:" + "a" * 63, "-5 SHA256:" + SHA]
)
def test_a_package_without_a_sha256_is_refused(tmp_path: Path, tail: str) -> None:
    with pytest.raises(NixboxError, match=r"no SHA-256 for '.*jq_1_amd64\.deb'"):
        root(tmp_path)._packages(f"'{DEBIAN}/pool/main/j/jq/jq_1_amd64.deb' jq_1_amd64.deb {tail}\n")
