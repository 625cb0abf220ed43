"""Tar streams to a guest over its SSH connection: how many, compressed or not, watched, and ended whatever happens.

What was measured, and why it is so: docs/decisions/018-seeding.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TypeAlias

from nixbox import run
from nixbox.errors import ConfigError, NixboxError, TimeoutExpired
from nixbox.guest import inside
from nixbox.guest.listing import Entry, Listing
from nixbox.guest.ssh import Endpoint
from nixbox.guest.tarwrite import TarWriter, check_unchanged
from nixbox.report import Reporter, harmless
from nixbox.values import dataclass

# Below these a copy is over before it could be told how to do it best.
_LARGE_BYTES = 32 << 20
MANY_FILES = 1000
_MAX_STREAMS = 4
_SMALL_BYTES = 128 << 10  # files of this mean size or less are bound by the guest's file system, not by the link
# What a small file costs in the guest beside its bytes, as the bytes that the link carries meanwhile.
_FILE_COST_BYTES = 20_000
_SAMPLE_BYTES = 8 << 20
_SAMPLE_PIECE_BYTES = 128 << 10
_SHRINKS = 0.85  # a sample that stays larger than this is not worth a measurement
_WORTH_IT = 0.85  # zstd is taken for a sample that it sends in less than this part of the time
_ANSWER_S = 60.0
_STALL_S = 180.0  # without a byte taken by the guest
_END_S = 600.0  # for the guest to write what it was sent
_TICK_S = 0.1
_COMPRESS = ("zstd", "-q", "-1", "-T1", "--no-check", "-c")
_ERROR_LINES = 4
# The guest's clock is not the host's, and files may be older than all clocks.
TAR_OPTIONS = ("--no-same-owner", "--warning=no-timestamp")

# The guest's SSH server and its tar wait for each other less often when the pipe between them holds 1 MiB instead of
# 64 KiB: a tenth of the time of a large file. 1031 is F_SETPIPE_SZ (fcntl(2)); without perl it stays as it is.
_WIDER = "{ [ $large = 0 ] || perl -e 'fcntl(STDIN, 1031, 1 << 20)' 2>/dev/null || :; }"

Job: TypeAlias = list[tuple[Listing, Sequence[Entry]]]

# For a quick_script: says what the guest has, and takes samples until another word comes, which is
# then in $word, with $size.
PROBE = """
head=$(which head)  # busybox has another one, which reads further than it should
probe() {
  while read -r word size; do
    case $word in
      has) echo "$(nproc) $(command -v zstd >/dev/null && echo 1 || echo 0)" ;;
      plain) "$head" -c "$size" >/dev/null && echo ok ;;
      zstd) "$head" -c "$size" | zstd -dc >/dev/null && echo ok ;;
      *) return ;;
    esac
  done
  word=
}
"""


@dataclass(frozen=True, slots=True)
class How:
    """How data is sent: in so many streams at once, with zstd or as it is."""

    streams: int = 1
    zstd: bool = False


def shell_path(path: str) -> str:
    """A path of the guest (`/…`, `~/…`) as words of a shell. Raises ConfigError for another."""
    bare = path.rstrip("/")
    if "\0" in path or "\n" in path:
        raise ConfigError(f"{path!r} cannot be a path in the guest")
    if bare == "~":
        return '"$HOME"'
    if bare.startswith("~/"):
        return f'"$HOME"/{shlex.quote(bare[2:])}'
    if not path.startswith("/"):
        raise ConfigError(f"{path!r} is no path in the guest", hint="begin it with / or ~/")
    return shlex.quote(bare or "/")


def guest_script(script: str) -> str:
    """A command for the guest that runs a script in the image's own shell, whatever the user's shell is."""
    return f"exec sh -c {shlex.quote(script)}"


def quick_script(script: str) -> str:
    """The same in nixbox's own shell, where busybox's commands come before the image's.

    They take a millisecond; one that has libraries to load takes fifty under software emulation.
    """
    return f"exec /run/nixbox/busybox sh -c {shlex.quote(script)}"


class Lines:
    """What a command in the guest says, line by line, and never without a bound."""

    def __init__(self, child: run.Piped, what: str) -> None:
        self._child = child
        self._what = what
        self._left = b""

    def next(self, timeout_s: float) -> str:
        """The next line; "" at the end. Raises TimeoutExpired."""
        import select

        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._left:
            ready, _, _ = select.select([self._child.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutExpired(f"the guest did not answer within {timeout_s:g} s: {self._what}")
            piece = os.read(self._child.stdout, 4096)
            if not piece or len(self._left) > 1 << 16:
                return ""
            self._left += piece
        line, _, self._left = self._left.partition(b"\n")
        return line.decode(errors="replace")

    def drain(self, timeout_s: float) -> None:
        """Wait until it says no more, or for so long."""
        with contextlib.suppress(TimeoutExpired):
            end = time.monotonic() + timeout_s
            while self.next(end - time.monotonic()):
                pass


def failure(what: str, said: str, code: int) -> NixboxError:
    """The error for a command of the guest's that failed: what it said, without what could drive a terminal."""
    lines = [harmless(line) for line in said.splitlines() if line.strip()]
    text = "\n".join(f"  {line[:500]}" for line in lines[-_ERROR_LINES:])
    # "Wrote only": the last piece that still fits.
    if any(words in said for words in ("No space left on device", "Disk quota exceeded", ": Wrote only ")):
        return disk_full(what)
    if code in (255, -13) and not lines:
        return NixboxError(f"{what}: the connection to the machine was lost", hint="nixbox status shows how it is")
    if code == 127:
        return NixboxError(f"{what}: the guest lacks a program:\n{text}", hint="add `tar` to packages")
    return NixboxError(f"{what}: the guest says (exit code {code}):\n{text or '  nothing'}")


def ended(what: str, child: run.Piped) -> NixboxError:
    """The error for a command in the guest that is about to fail, or has."""
    code = child.finish(_ANSWER_S)
    return failure(what, child.said(), code)


def disk_full(what: str, detail: str = "") -> NixboxError:
    """The error for a guest's disk without space."""
    return NixboxError(
        f"{what}: the machine's disk is full{detail}",
        hint="free some space in the guest, or give it a larger one: [resources] disk, then nixbox down and up",
    )


# --- how ---


def choose(endpoint: Endpoint, listings: Sequence[Listing]) -> HowTo:
    """What `choose_by` says, asked in a session of its own if that is worth it."""
    if _is_little(listings):
        return HowTo(How(), "too little to measure")
    with run.piped([*endpoint.argv("-T"), quick_script(f". /run/nixbox/rc\n{PROBE}\nprobe")]) as child:
        return choose_by(child, Lines(child, "what it has"), listings)


def _is_little(listings: Sequence[Listing]) -> bool:
    return sum(listing.count for listing in listings) < MANY_FILES and _size(listings) < _LARGE_BYTES


def _size(listings: Sequence[Listing]) -> int:
    return sum(listing.bytes for listing in listings)


def choose_by(child: run.Piped, lines: Lines, listings: Sequence[Listing]) -> HowTo:
    """Ask what the guest has, and measure if it is worth it; a script with PROBE answers.

    Raises NixboxError when it does not.
    """
    if _is_little(listings):
        return HowTo(How(), "too little to measure")
    write_all(child.stdin, b"has\n")
    words = lines.next(_ANSWER_S).split()
    if len(words) != 2 or not (words[0].isdigit() and len(words[0]) < 6):
        raise ended("asking what the guest has", child)
    count, size = sum(listing.count for listing in listings), _size(listings)
    small = count >= MANY_FILES and size <= count * _SMALL_BYTES
    streams = max(1, min(int(words[0]), _MAX_STREAMS)) if small else 1
    if size < _LARGE_BYTES:
        return HowTo(How(streams), "too little to compress")
    if words[1] != "1":
        return HowTo(How(streams), "the guest has no zstd")
    if run.find_tool("zstd") is None:
        return HowTo(How(streams), "this host has no zstd")
    zstd, why = _measure(child, lines, sample(listings))
    return HowTo(How(streams, zstd), why)


@dataclass(frozen=True, slots=True)
class HowTo:
    """A choice, and why it is so."""

    how: How
    why: str


def sample(listings: Sequence[Listing]) -> bytes:
    """Pieces from all over the data, in proportion to the sizes of its files: 8 MiB at most."""
    total = sum(listing.bytes for listing in listings)
    wanted = max(1, min(_SAMPLE_BYTES, total) // _SAMPLE_PIECE_BYTES)
    step = max(total // wanted, 1)
    found, passed, next_at = bytearray(), 0, 0
    for listing in listings:
        with inside.closing(inside.open_real(listing.base)) as base:
            below = inside.Below(base)
            for entry in listing.files:
                if entry.kind != "file":
                    continue
                while passed <= next_at < passed + entry.size and len(found) < _SAMPLE_BYTES:
                    found += _piece(below, entry, next_at - passed)
                    next_at += step
                passed += entry.size
            below.close()
    return bytes(found)


def _piece(below: inside.Below, entry: Entry, offset: int) -> bytes:
    above, _, name = entry.path.rpartition(b"/")
    try:
        at = below.directory(above.split(b"/") if above else ())
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        with inside.closing(fd):
            return os.pread(fd, _SAMPLE_PIECE_BYTES, offset)
    except OSError:
        return b""  # whoever sends it will say


def _measure(child: run.Piped, lines: Lines, data: bytes) -> tuple[bool, str]:
    """Whether zstd is quicker for this sample on this link, and the figures."""
    with tempfile.TemporaryFile() as packed:
        begun = time.perf_counter()
        with run.piped(_COMPRESS, stdout=packed.fileno()) as zstd:
            write_all(zstd.stdin, data)
            if zstd.finish(_ANSWER_S) != 0:
                return False, "zstd fails on this host"
        packing_s = time.perf_counter() - begun
        packed.seek(0)
        small = packed.read()
    ratio = len(small) / max(len(data), 1)
    if ratio > _SHRINKS:
        return False, f"a sample shrinks to {ratio:.0%} only"
    seconds: dict[str, float] = {}
    for how, sent in (("plain", data), ("zstd", small), ("plain", data), ("zstd", small)):
        begun = time.perf_counter()
        write_all(child.stdin, f"{how} {len(sent)}\n".encode())
        write_all(child.stdin, sent)
        if lines.next(_STALL_S) != "ok":
            return False, "the guest failed to take a sample"
        taken = time.perf_counter() - begun
        seconds[how] = min(taken, seconds.get(how, taken))
    plain, zstd_s = seconds["plain"], max(seconds["zstd"], packing_s)
    rates = f"{len(data) / plain / 1e6:.0f} MB/s as it is, {len(data) / zstd_s / 1e6:.0f} MB/s with zstd"
    return zstd_s < _WORTH_IT * plain, f"a sample shrinks to {ratio:.0%}: {rates}"


def write_all(fd: int, data: bytes, timeout_s: float = _STALL_S) -> None:
    """Write it all to a pipe. Raises NixboxError when its reader has gone, TimeoutExpired when it takes nothing."""
    import select

    with memoryview(data) as view:
        done = 0
        while done < len(view):
            _, ready, _ = select.select([], [fd], [], timeout_s)
            if not ready:
                raise TimeoutExpired(f"the guest took nothing for {timeout_s:g} s")
            try:
                # A pipe that can be written to takes so much without waiting (pipe(7)).
                done += os.write(fd, view[done : done + select.PIPE_BUF])
            except BrokenPipeError:
                raise NixboxError(
                    "the connection to the machine was lost", hint="nixbox status shows how it is"
                ) from None


# --- sending ---


def split(listings: Sequence[Listing], parts: int) -> list[Job]:
    """The files, in their order, in so many parts that take about the same time; there may be fewer."""
    jobs: list[Job] = [[] for _ in range(parts)]
    weights = [[entry.size + _FILE_COST_BYTES for entry in listing.files] for listing in listings]
    total = sum(map(sum, weights))
    passed = 0
    for listing, own in zip(listings, weights, strict=True):
        begun = 0
        for i, weight in enumerate(own):
            part = min(passed * parts // max(total, 1), parts - 1)
            passed += weight
            if i + 1 == len(own) or min(passed * parts // total, parts - 1) != part:
                jobs[part].append((listing, listing.files[begun : i + 1]))
                begun = i + 1
    return [job for job in jobs if job]


def last(listings: Sequence[Listing]) -> Job:
    """What comes after the files: further names of them, and directories with their own times and modes."""
    return [(listing, (*listing.hard, *reversed(listing.directories))) for listing in listings]


def send(
    endpoint: Endpoint,
    listings: Sequence[Listing],
    directory: str,
    how: How,
    report: Reporter,
    what: str,
    extra: Mapping[bytes, bytes] | None = None,
    begun: run.Piped | None = None,
) -> None:
    """Unpack listings into a directory of the guest (words of a shell), and files of our own beside them.

    `begun` is an `unpacking` for that directory, if there is one already.

    Raises NixboxError: the source changed, the guest's disk is full, the connection was lost. When this returns, the
    guest has written everything to its file system, but not yet synced it.
    """
    end = last(listings)
    tally = _Tally(report, what, listings)
    files = split(listings, how.streams)
    if len(files) <= 1:
        _together(endpoint, [[*(files[0] if files else []), *end]], directory, how, tally, extra or {}, begun)
    else:
        _together(endpoint, files, directory, how, tally, {}, begun)
        _together(endpoint, [end], directory, How(), tally, extra or {})
    for listing in listings:
        with inside.closing(inside.open_real(listing.base)) as base:
            check_unchanged(base, listing.directories)


class _Tally:
    """Adds up what all streams have sent, and tells the reporter."""

    def __init__(self, report: Reporter, what: str, listings: Sequence[Listing]) -> None:
        self.report = report
        self.what = what
        self._bytes = sum(listing.bytes for listing in listings)
        self._files = sum(listing.count for listing in listings)
        self.writers: list[TarWriter] = []

    def show(self) -> int:
        """Tell how far it is; returns the bytes."""
        done = sum(writer.bytes for writer in self.writers)
        files = sum(writer.files for writer in self.writers)
        self.report.copying(self.what, done, self._bytes, files, self._files)
        return done + files


class _Stream(threading.Thread):
    """Writes one job into one tar of the guest's."""

    def __init__(self, job: Job, out: int, extra: Mapping[bytes, bytes]) -> None:
        super().__init__(daemon=True)
        self.writer = TarWriter(out)
        self.error: BaseException | None = None
        self._job = job
        self._extra = extra

    def run(self) -> None:
        try:
            for listing, entries in self._job:
                with inside.closing(inside.open_real(listing.base)) as base:
                    self.writer.enter(base)
                    for entry in entries:
                        self.writer.add(entry)
                    self.writer.close()
            for name, content in self._extra.items():
                self.writer.data(name, content)
            self.writer.finish()
        except BaseException as error:
            self.error = error
            self.writer.close()


def unpacking(endpoint: Endpoint, directory: str) -> AbstractContextManager[run.Piped]:
    """A tar in the guest that is to unpack into a directory, which need not be there before it is told how.

    So its session can begin while other things are done.
    """
    # -p: modes as they are; -P: links are made at once, not at the end in place of something.
    tar = shlex.join(["tar", "-xpPf", "-", *TAR_OPTIONS])
    script = (
        f". /run/nixbox/rc; export LC_ALL=C.UTF-8; read -r large how && {_WIDER} && cd -P -- {directory} && "
        f"exec {tar} $how"
    )
    return run.piped([*endpoint.argv("-T"), guest_script(script)], stdout=run.NOWHERE)


def _together(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    directory: str,
    how: How,
    tally: _Tally,
    extra: Mapping[bytes, bytes],
    begun: run.Piped | None = None,
) -> None:
    """Run jobs at the same time, each in a stream of its own; the first failure ends them all."""
    with ExitStack() as stack:
        children: list[list[run.Piped]] = []
        streams: list[_Stream] = []
        try:
            for i, job in enumerate(jobs):
                ssh = begun or stack.enter_context(unpacking(endpoint, directory))
                begun = None
                children.append([ssh])
                large = sum(entry.size for _, entries in job for entry in entries) >= _LARGE_BYTES
                write_all(ssh.stdin, f"{large:d}{' -I zstd' if how.zstd else ''}\n".encode())
                if how.zstd:
                    children[-1].insert(0, stack.enter_context(run.piped(_COMPRESS, stdout=ssh.stdin)))
                    ssh.no_more()
                streams.append(_Stream(job, children[-1][0].stdin, extra if i == len(jobs) - 1 else {}))
                tally.writers.append(streams[-1].writer)
            for stream in streams:
                stream.start()
            _watch(streams, tally)
            _end(children, streams, tally)
        finally:
            _stop(children, streams)


def _watch(streams: Sequence[_Stream], tally: _Tally) -> None:
    """Wait until every stream has written all, or one has failed. Raises TimeoutExpired when nothing moves."""
    moved, before = time.monotonic(), -1
    while alive := [stream for stream in streams if stream.is_alive()]:
        alive[0].join(_TICK_S)
        if any(stream.error for stream in streams):
            return
        now = tally.show()
        if now != before:
            moved, before = time.monotonic(), now
        elif time.monotonic() - moved > _STALL_S:
            raise TimeoutExpired(f"{tally.what}: the guest took nothing for {_STALL_S:g} s")


def _end(children: Sequence[Sequence[run.Piped]], streams: Sequence[_Stream], tally: _Tally) -> None:
    """Wait for the guest's tars, and raise what went wrong: our own errors first, else what the guest says."""
    for stream in streams:
        if stream.error is not None and not isinstance(stream.error, BrokenPipeError):
            raise stream.error
    broken = any(stream.error for stream in streams)
    for (*before, ssh), stream in zip(children, streams, strict=True):
        if broken and stream.error is None:
            continue
        for child in before:
            child.finish(_ANSWER_S)
        code = ssh.finish(_END_S)
        if code != 0 or stream.error is not None:
            raise failure(tally.what, ssh.said(), code)
    tally.show()


def _stop(children: Sequence[Sequence[run.Piped]], streams: Sequence[_Stream]) -> None:
    """No thread writes to a pipe any more when this returns: its reader is gone."""
    for line in children:
        for child in line:
            if child.process.poll() is None:
                child.process.kill()
    for stream in streams:
        if stream.is_alive():
            stream.join(_ANSWER_S)
