"""Plugins that are named by their place on GitHub: `github:OWNER/REPO[/SUBDIR][@REF]`."""

from __future__ import annotations

import re

from nixbox.config.names import shown
from nixbox.values import dataclass

PREFIX = "github:"
_FORM = "a plugin on GitHub is named github:OWNER/REPO[/SUBDIR][@REF]"
# GitHub's rule for new accounts forbids two hyphens in a row and one at the end; older accounts have them, and
# accounts that a company manages end in an underscore and the company's short code.
_OWNER = r"[A-Za-z0-9][A-Za-z0-9_-]{0,38}"
_REPO = r"[A-Za-z0-9._-]{1,100}"
_REV = r"[0-9a-f]{40}"
# git-check-ref-format(1): no control character, space, ~ ^ : ? * [ or backslash; none of `..`, `//` and `@{`; no
# part that begins with a dot or ends with .lock; no slash or dot at the end. A hyphen in front would be an option.
_BAD_REF = r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|(^|/)\.|\.lock(/|$)|[/.]$|^[-/]|^@$"
_MOST = 200  # characters of a subdirectory or a ref


@dataclass(frozen=True, slots=True)
class Github:
    """A plugin's place: `subdir` is relative to the repository's top ("": the top itself), `ref` a branch, a tag or
    a commit's 40 hex digits (None: the default branch).
    """

    owner: str
    repo: str
    subdir: str = ""
    ref: str | None = None

    @property
    def repository(self) -> str:
        """`OWNER/REPO`."""
        return f"{self.owner}/{self.repo}"

    @property
    def rev(self) -> str | None:
        """The commit that the ref itself names; None when it is a branch or a tag, which can move."""
        return self.ref if self.ref and re.fullmatch(_REV, self.ref) else None

    @property
    def name(self) -> str:
        """What the plugin is called: the last part of its place."""
        return self.subdir.rpartition("/")[2] or self.repo

    def __str__(self) -> str:
        return PREFIX + "/".join(filter(None, (self.repository, self.subdir))) + (f"@{self.ref}" if self.ref else "")


def is_github(value: object) -> bool:
    """Whether `value` means a plugin on GitHub, well-formed or not."""
    return isinstance(value, str) and value.startswith(PREFIX)


def parse(text: str) -> Github:
    """The place that a text names. Raises ValueError that says what is wrong and what is accepted.

    The first `@` begins the ref: a tag may hold further ones (`@scope/tool@1.2.0`), a subdirectory none.
    """
    if not text.startswith(PREFIX):
        raise ValueError(f"{shown(text)} does not begin with `{PREFIX}`: {_FORM}")
    place, at, ref = text.removeprefix(PREFIX).partition("@")
    owner, _, rest = place.partition("/")
    repo, slash, subdir = rest.partition("/")
    if not re.fullmatch(_OWNER, owner):
        raise ValueError(f"{shown(owner)} is no owner on GitHub (letters, digits and hyphens, at most 39): {_FORM}")
    if not re.fullmatch(_REPO, repo) or repo in (".", ".."):
        raise ValueError(
            f"{shown(repo)} is no repository on GitHub (letters, digits, `-`, `_` and `.`, at most 100): {_FORM}"
        )
    if repo.lower().endswith(".git"):
        raise ValueError(f"{shown(repo)}: leave `.git` out: {_FORM}")
    if slash:
        _check_subdir(subdir)
    if at:
        _check_ref(ref)
    if re.fullmatch(r"[0-9A-Fa-f]{40}", ref):
        ref = ref.lower()
    return Github(owner, repo, subdir, ref or None)


def _check_subdir(subdir: str) -> None:
    if len(subdir) > _MOST:
        raise ValueError(f"{shown(subdir)} is longer than {_MOST} characters: {_FORM}")
    if any(part in ("", ".", "..") for part in subdir.split("/")):
        raise ValueError(f"{shown(subdir)} must be a path below the repository's top, without `..`: {_FORM}")
    if "\\" in subdir or not subdir.isprintable():
        raise ValueError(f"{shown(subdir)} holds a character that a plugin's directory cannot have: {_FORM}")


def _check_ref(ref: str) -> None:
    if not ref or len(ref) > _MOST or not ref.isprintable() or re.search(_BAD_REF, ref):
        raise ValueError(f"{shown(ref)} is no branch, tag or commit (all 40 digits): {_FORM}")
