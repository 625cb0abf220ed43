"""`nixbox cp`: files between host and guest, as `cp -a` would copy them."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nixbox import run
from nixbox.errors import ConfigError, NixboxError
from nixbox.guest import inside, listing, stream, tarread
from nixbox.guest.ssh import Endpoint
from nixbox.report import Reporter, harmless
from nixbox.values import dataclass, replace

_ANSWER_S = 60.0
_END_S = 60.0
_TICK_S = 0.1

# Says what a path of the guest is: `d` a directory, `n` a new name in one, `x` neither.
_LOOK = "if [ -d {path} ]; then echo d; elif [ -d {above} ]; then echo n; else echo x; fi"
# Sends a directory's contents, or a file, after one line that says which. A link that is named itself is followed.
# Where the host goes away, standard input ends; dropbear would let a tar wait for ever that nobody reads from.
_SEND = """
. /run/nixbox/rc
export LC_ALL=C.UTF-8
path={path}
if [ -d "$path" ]; then
  cd -P -- "$path" || exit 1
  echo d
  set -- .
elif [ -f "$path" ]; then
  path=$(realpath -- "$path")
  cd -P -- "${{path%/*}}/" || exit 1
  echo f
  set -- "./${{path##*/}}"
elif [ -e "$path" ]; then
  echo "it is neither a directory nor a regular file" >&2
  exit 1
else
  echo "it is not there" >&2
  exit 1
fi
exec 3<&0
tar -c --format=posix --sparse --pax-option=delete=atime,delete=ctime -f - -- "$@" 3<&- &
tar=$!
(
  read -r _ <&3
  kill $tar
) >/dev/null 2>&1 &
wait $tar
code=$?
kill $! 2>/dev/null
exit $code
"""


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: files (everything but directories), bytes of them, how many of each kind were left out."""

    files: int
    bytes: int
    skipped: Mapping[str, int]
    seconds: float


def guest_path(text: str) -> str:
    """A path of the guest as typed: one that begins with neither / nor ~ is relative to the user's home."""
    return text if text.startswith(("/", "~/")) or text == "~" else f"~/{text}"


def _last(text: str) -> str:
    """The name that a source is to have in a directory; "" if only what is in it is meant (`.`, `dir/.`, `~`)."""
    name = text.rstrip("/").rpartition("/")[2]
    return "" if name in ("", ".", "..", "~") else name


def send(endpoint: Endpoint, sources: Sequence[str], target: str, report: Reporter) -> Copied:
    """Copy files and directories of the host into the guest, as its user: into `target` if that is a directory, else
    as `target`.

    `dir/.` is what is in `dir`. Links in the sources are not followed, sockets and devices left out. Raises
    ConfigError for several sources without a directory, NixboxError as stream.send and listing.scan do.
    """
    begun = time.monotonic()
    what = f"copying to {harmless(target)}"
    report.phase(what)
    path = guest_path(target)
    above, _, name = path.rstrip("/").rpartition("/")
    look = _LOOK.format(path=stream.shell_path(path), above=stream.shell_path(above or "/"))
    kind = run.run([*endpoint.argv("-T"), stream.guest_script(look)], timeout_s=_ANSWER_S).stdout.strip()
    if kind not in ("d", "n"):
        raise NixboxError(f"{harmless(target)}: there is no such directory in the guest", hint=f"mkdir -p {above}")
    if kind == "n" and len(sources) > 1:
        raise ConfigError(f"several files need a directory, and {target} is none in the guest")
    if kind == "n":
        found = [listing.scan(Path(sources[0]), os.fsencode(f"./{name}"))]
        directory = stream.shell_path(above or "/")
    else:
        found = [_into(source) for source in sources]
        directory = stream.shell_path(path)
        _check_names(found)
    chosen = stream.choose(endpoint, found)
    stream.send(endpoint, found, directory, chosen.how, report, what)
    report.done()
    skipped = sum((Counter(one.skipped) for one in found), Counter())
    count, size = sum(one.count for one in found), sum(one.bytes for one in found)
    return Copied(count, size, dict(skipped), time.monotonic() - begun)


def _into(source: str) -> listing.Listing:
    """A source that is to be in a directory, under its own name if it has one."""
    name = _last(source)
    found = listing.scan(Path(source), os.fsencode(f"./{name}" if name else "."))
    # What is in it goes into a directory that is there, which keeps its own mode and times.
    return found if name else replace(found, directories=found.directories[1:])


def _check_names(found: Sequence[listing.Listing]) -> None:
    """No two sources of one name. Raises ConfigError."""
    names = Counter(entry.name for one in found for entry in (*one.directories[:1], *one.files[:1])[:1])
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"more than one of the sources is called {os.fsdecode(name)[2:]}")


def receive(endpoint: Endpoint, sources: Sequence[str], target: Path, report: Reporter) -> Copied:
    """Copy files and directories of the guest to the host: into `target` if that is a directory, else as `target`.

    Nothing that the guest sends is written outside of the target: see tarread. Left out and counted are devices,
    sockets, symbolic links that lead out of what is copied, and `.nixbox` directories. Raises ConfigError for several
    sources without a directory, NixboxError for what cannot be read or written, and for a guest that cheats.
    """
    begun = time.monotonic()
    place = inside.real(target)
    is_directory = place.is_dir()
    if len(sources) > 1 and not is_directory:
        raise ConfigError(f"several files need a directory, and {target} is none")
    files = size = 0
    skipped: Counter[str] = Counter()
    for source in sources:
        where = place / _last(source) if is_directory else place
        done = _fetch(endpoint, source, where, report)
        files, size = files + done.files, size + done.bytes
        skipped += done.skipped
    report.done()
    return Copied(files, size, dict(skipped), time.monotonic() - begun)


def _fetch(endpoint: Endpoint, source: str, where: Path, report: Reporter) -> tarread.Unpacked:
    """One source, to be called `where` on the host."""
    what = f"copying {harmless(source)}"
    report.phase(what)
    command = stream.guest_script(_SEND.format(path=stream.shell_path(guest_path(source))))
    try:
        above = inside.open_real(where.parent)
    except OSError as error:
        raise NixboxError(f"{where.parent}: {error.strerror}", hint="name a directory that is there") from None
    with (
        inside.closing(above),
        run.piped([*endpoint.argv("-T"), command]) as child,
    ):
        came = tarread.Source(child.stdout)
        try:
            kind = came.exactly(2)
        except tarread.Truncated:
            raise stream.ended(what, child) from None
        try:
            done = _unpack(came, kind, above, where, _Tick(report, what))
        except tarread.Truncated:
            if child.finish(_END_S) != 0:
                raise stream.ended(what, child) from None
            raise
        code = child.finish(_END_S)
        if code != 0:
            raise stream.failure(what, child.said(), code)
        if sockets := child.said().count("socket ignored"):
            done.skipped["socket"] += sockets
        return done


class _Tick:
    """Tells the reporter how far it is, not more often than anybody can see."""

    def __init__(self, report: Reporter, what: str) -> None:
        self._report = report
        self._what = what
        self._next = 0.0
        self.done: tarread.Unpacked | None = None

    def __call__(self) -> None:
        now = time.monotonic()
        if self.done is not None and now >= self._next:
            self._next = now + _TICK_S
            self._report.copying(self._what, self.done.bytes, 0, self.done.files, 0)


def _unpack(came: tarread.Source, kind: bytes, above: int, where: Path, tick: _Tick) -> tarread.Unpacked:
    """Unpack a stream as `where`, whose directory is open as `above`."""
    name = os.fsencode(where.name)
    if kind == b"f\n":
        one = tarread.Unpacker(above, only=name)
        tick.done = one.done
        one.unpack(came, tick)
        came.rest()
        return one.done
    if kind != b"d\n":
        raise tarread.hostile("it is neither a file's nor a directory's")
    fresh = True
    try:
        os.mkdir(name, 0o700, dir_fd=above)
    except FileExistsError:
        fresh = False
    except OSError as error:
        raise NixboxError(f"{where} cannot be made: {error.strerror}") from None
    try:
        root = os.open(name, inside.DIRECTORY, dir_fd=above)
    except OSError as error:
        raise NixboxError(f"{where} is there, and no directory: {error.strerror}", hint="move it away") from None
    try:
        with inside.closing(root):
            many = tarread.Unpacker(root, fresh=fresh)
            tick.done = many.done
            many.unpack(came, tick)
            came.rest()
            return many.done
    except BaseException:
        if fresh:
            with contextlib.suppress(OSError):  # it stays if something came
                os.rmdir(name, dir_fd=above)
        raise
