"""What a command tells people while it works: on stderr, a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def harmless(text: str, keep: str = "") -> str:
    """Text of a guest or a build that cannot drive a terminal; `keep` are control characters to leave in it."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)


class Reporter:
    """Says nothing: what a library caller gets."""

    def note(self, text: str) -> None:
        """Something the user should know and that stays on the screen."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def transfer(self, done: int, total: int, files: int, all_files: int) -> None:
        """How far a download is: bytes and files."""

    def copying(self, what: str, done: int, total: int, files: int, all_files: int) -> None:
        """How far a copy to or from a guest is: bytes and files; a total of 0 is unknown."""

    def output(self, line: str) -> None:
        """A line of a guest's or a build's own output that is being followed."""

    def done(self) -> None:
        """The phases are over; take the live display away."""


class Pace:
    """How fast something goes (bytes a second over the last seconds), and how long it will still take."""

    def __init__(self) -> None:
        self.what = ""
        self._seen: deque[tuple[float, int]] = deque(maxlen=50)

    def words(self, what: str, done: int, total: int, files: int, all_files: int) -> str:
        """`12 of 300 MiB, 1041 of 20000 files, 31 MiB/s, 9 s left`."""
        if what != self.what:
            self.what = what
            self._seen.clear()
        now = time.monotonic()
        self._seen.append((now, done))
        since, before = self._seen[0]
        rate = (done - before) / (now - since) if now - since >= 0.5 else 0.0
        known = total > 0 or all_files > 0
        text = f"{done >> 20} of {total >> 20} MiB, {files} of {all_files} files" if known else f"{done >> 20} MiB"
        text += "" if known else f", {files} files"
        if rate > 0:
            text += f", {rate / (1 << 20):.1f} MiB/s"
            text += f", {max(total - done, 0) / rate:.0f} s left" if known else ""
        return text


class LineReporter(Reporter):
    """Plain lines on stderr; a transfer says something every few seconds."""

    def __init__(self) -> None:
        self._last = 0.0
        self._pace = Pace()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def phase(self, text: str) -> None:
        print(f"· {text}", file=sys.stderr, flush=True)

    def transfer(self, done: int, total: int, files: int, all_files: int) -> None:
        if time.monotonic() - self._last >= 3 or files == all_files:
            self._last = time.monotonic()
            self.phase(f"fetching packages: {files}/{all_files}, {done >> 20} of {total >> 20} MiB")

    def copying(self, what: str, done: int, total: int, files: int, all_files: int) -> None:
        if what != self._pace.what:
            self._last = time.monotonic()  # what takes less than that needs no line
        words = self._pace.words(what, done, total, files, all_files)
        if time.monotonic() - self._last >= 3:
            self._last = time.monotonic()
            self.phase(f"{what}: {words}")

    def output(self, line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)


class NoteReporter(LineReporter):
    """Only what the user should know: for a command whose own output is what counts."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def transfer(self, done: int, total: int, files: int, all_files: int) -> None:
        """Nothing."""

    def copying(self, what: str, done: int, total: int, files: int, all_files: int) -> None:
        """Nothing."""

    def output(self, line: str) -> None:
        """Nothing."""


class LiveReporter(LineReporter):
    """One live line with the phase, a bar where there is something to count, and the time it took so far."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def _start(self) -> Progress:
        if self._progress is None:
            # 80 ms of import, only where something takes long enough to be watched.
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        return self._progress

    def phase(self, text: str) -> None:
        progress = self._start()
        if self._task is not None:
            progress.remove_task(self._task)
        self._task = progress.add_task(text, total=None, detail="")

    def transfer(self, done: int, total: int, files: int, all_files: int) -> None:
        if self._task is None:
            self.phase("fetching packages")
        assert self._task is not None
        detail = f"{files}/{all_files} packages, {done >> 20}/{total >> 20} MiB"
        self._start().update(self._task, completed=done, total=total, detail=detail)

    def copying(self, what: str, done: int, total: int, files: int, all_files: int) -> None:
        if self._task is None or what != self._pace.what:
            self.phase(what)
        assert self._task is not None
        detail = self._pace.words(what, done, total, files, all_files)
        self._start().update(self._task, completed=done, total=total or None, detail=detail)

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            super().note(text)

    def output(self, line: str) -> None:
        self.note(f"  {line}")

    def done(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


def for_stderr(*, quiet: bool = False) -> Reporter:
    """The reporter that suits this stderr; `quiet` says only notes where a display could not be taken away."""
    return LiveReporter() if sys.stderr.isatty() else NoteReporter() if quiet else LineReporter()


class Phases:
    """How long each part of a start took (seconds), in their order; a part inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # seconds of the parts inside each part that goes on now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.seconds.setdefault(name, 0.0)
        self._inside.append(0.0)
        start = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - start
            self.seconds[name] = round(self.seconds[name] + took - self._inside.pop(), 4)
            if self._inside:
                self._inside[-1] += took
