"""Seeds: caches of the host that a guest gets a copy of, once.

The files are unpacked beside the target, and come to their place when all of them are there and on the disk; then the
sentinel is written. So whatever is interrupted, and however, never counts as done, and leaves the target as it was.
docs/decisions/018-seeding.md says why.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from nixbox import run
from nixbox.errors import NixboxError
from nixbox.guest import listing, stream, tarwrite
from nixbox.guest.ssh import Endpoint
from nixbox.report import Reporter, harmless
from nixbox.values import dataclass, field

_FORMAT = 1
_STATE = '"$HOME"/.local/state/nixbox/seeds'
_LONGEST_COMMAND = 7000  # bytes: dropbear takes 9000
_PENDING_S = 60.0
_BEGIN_S = 900.0  # to remove what an interrupted seed left
_LOCK_S = 4 * 3600.0  # while somebody else seeds the same target
_COMMIT_S = 1800.0  # to bring it all to the disk
_HEADROOM_BYTES = 8 << 20
_INODE_RESERVE = 100

# Holds the lock, makes the place to unpack in, and puts what came there where it belongs. Its standard input ends
# when the host goes away, however that happens; it then removes what has come. A quick_script; a command of the
# image's is used ("real") where busybox has none, or another one.
_KEEPER = r"""
. /run/nixbox/rc
export LC_ALL=C.UTF-8
trap '' PIPE
state="$HOME"/.local/state/nixbox/seeds
stage=
real() {
  program=$(which "$1") || { echo "the guest has no $1" >&2; return 127; }
  shift
  "$program" "$@"
}
why() { tail -n 3 "$state/$key.why" 2>/dev/null | tr '\n' ' '; }
mine() { # as the user, or where it may not as root
  "$@" 2>"$state/$key.why" || { command -v sudo >/dev/null && sudo -n "$@" 2>>"$state/$key.why"; }
}
clean() {
  [ -n "$stage" ] || return 0
  tries=0
  # A tar of the former seed may still be at it.
  until mine rm -rf -- "$stage" || [ $tries -gt 50 ]; do
    tries=$((tries + 1))
    sleep 0.1
  done
}
fail() {
  printf 'fail %s %s\n' "$*" "$(why)"
  clean
  exit 1
}
# Take away what the last seed brought and nobody has changed since: name, size and time of change are the same.
undo() {
  (cd "$target" && real find . -mindepth 1 ! -type d -printf '%s %T@ %P\0') | real sort -z >"$stage/now"
  real sort -z "$state/$key.files" | real comm -z -12 - "$stage/now" | real cut -z -d ' ' -f 3- >"$stage/gone"
  cd "$target" || return
  mine xargs -0ra "$stage/gone" rm -f --
  # Directories go if they are empty by now.
  real sort -zr "$state/$key.directories" >"$stage/gone"
  xargs -0ra "$stage/gone" rmdir -- 2>/dev/null
  cd /
}
place() { # rename it to its place, or merge it with what is there
  mine "$(which mv)" -fT -- "$stage/new" "$target" && return
  [ -d "$stage/new" ] && [ -d "$target" ] || return
  way=-a
  [ "$(stat -c %d "$stage/new")" != "$(stat -c %d "$target")" ] || way=-al
  mode=$(stat -c %a "$target")
  mine "$(which cp)" $way --remove-destination -T -- "$stage/new" "$target" || return
  mine chmod "$mode" "$target"
}

mkdir -p "$state" || { echo "fail the state directory cannot be made"; exit 1; }
target=$(realpath "$target" 2>/dev/null || real realpath -m -- "$target")
[ -n "$target" ] || { echo "fail the target has no real path"; exit 1; }
mark=$(printf %s "$target" | sha256sum | cut -c -16)
exec 9>"$state/$mark.lock" || { echo "fail no lock can be made"; exit 1; }
flock -n 9 || {
  echo wait
  flock 9
}
line=
{ read -r line <"$sentinel"; } 2>/dev/null
if [ "$force" = 0 ] && [ "$line" = "$id" ] && [ -e "$target" ]; then
  echo done
  exit
fi
mine rm -f -- "$sentinel" || fail "the old sentinel stays:"
above=${target%/*}
[ -d "${above:=/}" ] || mkdir -p "$above" 2>/dev/null || mine mkdir -p "$above" || fail "$above cannot be made:"
stage=${above%/}/.nixbox-seed-$mark
clean
[ ! -e "$stage" ] || fail "what an interrupted seed left cannot be removed:"
mine mkdir -m 700 -- "$stage" || fail "no directory can be made beside the target:"
[ -O "$stage" ] || mine chown "$(id -u):$(id -g)" "$stage" || fail "the directory beside the target is not ours:"
ln -sfn "$stage" "$state/$key.stage" || fail "the state directory cannot be written"
set -- $(stat -f -c '%S %a %c %d' "$stage")
[ "$3" != 0 ] || set -- "$1" "$2" - -
echo "ready $(($1 * $2 / 1024)) $4"
probe
[ "$word" = commit ] || {
  clean
  exit 1
}
"$head" -c "$size" >"$state/$key.text" 2>"$state/$key.why" || fail "the sentinel cannot be written:"
sync -f "$stage" 2>"$state/$key.why" || fail "the disk cannot be synced:"
[ ! -s "$state/$key.files" ] || [ ! -d "$target" ] || undo
rm -f "$state/$key.files"
for list in directories files; do
  [ ! -e "$stage/$list" ] || mine mv -f "$stage/$list" "$state/$key.$list" || fail "the list of files cannot be kept:"
done
place || fail "the files cannot be put to their place:"
sync -f "$target" 2>"$state/$key.why" || fail "the disk cannot be synced:"
mkdir -p "${sentinel%/*}" 2>/dev/null || mine mkdir -p "${sentinel%/*}" || fail "the sentinel cannot be written:"
mine cp -fT "$state/$key.text" "$sentinel.new" || fail "the sentinel cannot be written:"
sync "$sentinel.new"
mine mv -fT "$sentinel.new" "$sentinel" || fail "the sentinel cannot be written:"
sync "${sentinel%/*}"
echo seeded
clean
rm -f "$state/$key.text" "$state/$key.why" "$state/$key.stage"
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A seed: an absolute path of the host, and where the guest is to have it (`/…` or `~/…`).

    `exclude`: see listing.excluder. `sentinel`: a file of the guest that says that it is done; by default one below
    ~/.local/state/nixbox/seeds.
    """

    source: Path
    target: str
    exclude: tuple[str, ...] = ()
    sentinel: str | None = None

    @property
    def key(self) -> str:
        """The name of what is kept about it in the guest."""
        return hashlib.sha256(self.target.rstrip("/").encode(errors="surrogateescape")).hexdigest()[:16]

    @property
    def ident(self) -> str:
        """The first line of its sentinel: another source, target or exclude is another seed."""
        words = [str(self.source), self.target.rstrip("/"), *sorted(self.exclude)]
        digest = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()
        return f"nixbox-seed {_FORMAT} {digest[:32]}"

    @property
    def sentinel_words(self) -> str:
        """The path of the sentinel, as words of a shell."""
        return f"{_STATE}/{self.key}" if self.sentinel is None else stream.shell_path(self.sentinel)


@dataclass(frozen=True, slots=True)
class Seeded:
    """What was copied: files, bytes of them, how many of each kind were left out; how long it took.

    `streams` and `zstd` say how it was sent, and `why` so.
    """

    files: int
    bytes: int
    skipped: Mapping[str, int]
    seconds: float
    how: Literal["done before", "seeded"]
    streams: int = 0
    zstd: bool = False
    why: str = ""


def pending(endpoint: Endpoint, wanted: Sequence[Wanted]) -> list[bool]:
    """Which seeds the guest still lacks: its sentinel is not there, or another seed's, or the target has gone.

    One command for all of them, of the shell's own words only. Raises NixboxError when the guest does not answer.
    """
    check = 'c() { l=; { read -r l <"$2"; } 2>/dev/null; [ "$l" = "$3" ] && [ -e "$1" ] && echo 0 || echo 1; }\n'
    found: list[bool] = []
    chunk: list[str] = []
    for i, one in enumerate(wanted):
        chunk.append(f"c {stream.shell_path(one.target)} {one.sentinel_words} {shlex.quote(one.ident)}\n")
        if i + 1 == len(wanted) or len("".join(chunk).encode()) > _LONGEST_COMMAND // 2:
            command = stream.quick_script(check + "".join(chunk))
            said = run.run([*endpoint.argv("-T"), command], timeout_s=_PENDING_S).stdout.split()
            if len(said) != len(chunk) or not set(said) <= {"0", "1"}:
                raise NixboxError("the guest did not say which seeds it has", hint="nixbox shell shows what is wrong")
            found += [word == "1" for word in said]
            chunk = []
    return found


def seed(endpoint: Endpoint, wanted: Wanted, *, force: bool = False, report: Reporter) -> Seeded:
    """Copy a directory or a file of the host into the guest, unless that was done; with `force` again.

    What the target has of its own stays; what the last seed brought, and nobody has changed since, goes if the source
    lacks it by now. Raises NixboxError: the source is missing, unreadable or changed meanwhile, the guest's disk is
    full, the connection was lost, the target cannot be made. Nothing counts as done then, and the target is as it
    was.
    """
    begun = time.monotonic()
    what = f"seeding {harmless(wanted.target)}"
    report.phase(what)
    directory = f"{_STATE}/{wanted.key}.stage"
    with stream.unpacking(endpoint, directory) as tar, _keeper(endpoint, wanted, force, report) as keeper:
        if keeper.done:
            return Seeded(0, 0, {}, time.monotonic() - begun, "done before")
        found = listing.scan(wanted.source, b"new", wanted.exclude)
        _check_space(found, keeper, what)
        chosen = stream.choose_by(keeper.child, keeper.lines, [found])
        stream.send(endpoint, [found], directory, chosen.how, report, what, _lists(found), tar)
        report.phase(f"{what}: writing it to the disk")
        keeper.commit(_sentinel(wanted, found))
    report.done()
    seconds = time.monotonic() - begun
    how = chosen.how
    return Seeded(found.count, found.bytes, found.skipped, seconds, "seeded", how.streams, how.zstd, chosen.why)


def _lists(found: listing.Listing) -> dict[bytes, bytes]:
    """What the guest keeps to know its own files from the seed's: as `find -printf '%s %T@ %P\\0'` prints them."""
    if not found.directories:
        return {b"files": b""}
    begin = len(b"new/")
    files = [
        b"%d %b0 %b\0" % (entry.size, tarwrite.seconds(entry.mtime_ns), entry.name[begin:])
        for entry in (*found.files, *found.hard)
    ]
    directories = [entry.name[begin:] + b"\0" for entry in found.directories if entry.name[begin:]]
    return {b"directories": b"".join(directories), b"files": b"".join(files)}


def _sentinel(wanted: Wanted, found: listing.Listing) -> bytes:
    """What the sentinel holds: its first line is what counts, the rest is for people."""
    lines = [wanted.ident, f"files {found.count}", f"bytes {found.bytes}", f"sha256 of the listing {found.digest}"]
    lines += [f"from {str(wanted.source)!r}", f"at {datetime.now(UTC).isoformat(timespec='seconds')}"]
    return ("\n".join(lines) + "\n").encode(errors="backslashreplace")


def _check_space(found: listing.Listing, keeper: _Keeper, what: str) -> None:
    """Say beforehand what cannot fit. Raises NixboxError."""
    # A file takes whole blocks, a sparse one only those with data: its size says nothing.
    needed = sum(-(-entry.size // 4096) * 4096 for entry in found.files if entry.kind == "file" and not entry.sparse)
    inodes = found.count + len(found.directories)
    if needed + _HEADROOM_BYTES > keeper.free_bytes or inodes + _INODE_RESERVE > keeper.free_inodes:
        raise stream.disk_full(
            what,
            f": it has {keeper.free_bytes >> 20} MiB and {keeper.free_inodes} inodes free, "
            f"{needed >> 20} MiB and {inodes} are needed",
        )


@dataclass(slots=True)
class _Keeper:
    """The guest's side of one seed."""

    child: run.Piped
    lines: stream.Lines
    what: str
    done: bool = False
    free_bytes: int = 0
    free_inodes: int = 0
    _ended: bool = field(default=False)

    def begin(self, report: Reporter) -> None:
        """Wait until it has the lock and a place for the files. Raises NixboxError."""
        line = self.lines.next(_BEGIN_S)
        if line == "wait":
            report.phase(f"{self.what}: waiting for another seed of the same target")
            line = self.lines.next(_LOCK_S)
        match line.split():
            case ["done"]:
                self.done = True
            case ["ready", kib, inodes] if kib.isdigit() and len(kib) < 18:
                self.free_bytes = int(kib) << 10
                # Some file systems do not count them.
                self.free_inodes = int(inodes) if inodes.isdigit() and len(inodes) < 18 else 1 << 62
            case _:
                raise self._failure(line)

    def commit(self, sentinel: bytes) -> None:
        """Let it put the files to their place, and say that it is done. Raises NixboxError."""
        stream.write_all(self.child.stdin, f"commit {len(sentinel)}\n".encode() + sentinel)
        line = self.lines.next(_COMMIT_S)
        if line != "seeded":
            raise self._failure(line)
        self.child.finish(_BEGIN_S)

    def _failure(self, line: str) -> NixboxError:
        code = self.child.finish(_BEGIN_S)
        return stream.failure(self.what, line.removeprefix("fail ") or self.child.said(), code)


@contextmanager
def _keeper(endpoint: Endpoint, wanted: Wanted, force: bool, report: Reporter) -> Iterator[_Keeper]:
    """The guest's side of a seed, which ends with the body; without a commit it removes what came."""
    what = f"seeding {harmless(wanted.target)}"
    variables = {
        "target": stream.shell_path(wanted.target),
        "sentinel": wanted.sentinel_words,
        "key": wanted.key,
        "id": shlex.quote(wanted.ident),
        "force": str(int(force)),
    }
    head = "".join(f"{name}={value}\n" for name, value in variables.items())
    with run.piped([*endpoint.argv("-T"), stream.quick_script(head + stream.PROBE + _KEEPER)]) as child:
        keeper = _Keeper(child, stream.Lines(child, what), what)
        try:
            keeper.begin(report)
            yield keeper
        except NixboxError:
            # Its cleaning up is worth waiting for: the next seed finds the disk free.
            child.no_more()
            keeper.lines.drain(_BEGIN_S)
            raise
